"""Tensor-core arithmetic, bit for bit against PyPI `mmasim` (validated on hardware by its authors).

`reference=True` runs the scalar integer model, otherwise the vector kernels of the chosen ISA.
"""

import numpy as np
import pytest
import torch

from .conftest import NUM, TORCH_TYPES, available_isas, to_bytes

sim = pytest.importorskip("mmasim.nv_ptx", reason="PyPI mmasim==2.1.1 is the golden model")

INT_OF = {"f16": (torch.int16, np.uint16), "f32": (torch.int32, np.uint32)}
BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1}

WGMMA = [("f32", a, b, 32) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")]
WGMMA += [("f16", a, b, 32) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")]
WGMMA += [("f32", "f16", "f16", 16), ("f16", "f16", "f16", 16), ("f32", "bf16", "bf16", 16)]
WGMMA += [("f32", "tf32", "tf32", 8)]
MMA_SYNC = [(d, "f16", "f16", k) for d in ("f32", "f16") for k in (8, 16)]
MMA_SYNC += [("f32", "bf16", "bf16", k) for k in (8, 16)]
MMA_SYNC += [("f32", "tf32", "tf32", k) for k in (4, 8)]


class Draw:
    """Operands of one kind: ordinary, wide-ranged, cancelling, or raw bit patterns."""

    def __init__(self, seed):
        self.g = torch.Generator().manual_seed(seed)

    def bits(self, name, rows, k):
        width = k * BYTES[name]
        raw = torch.randint(0, 256, (rows, width), generator=self.g, dtype=torch.uint8)
        return raw.view(TORCH_TYPES[name])

    def operand(self, name, rows, k, how):
        if how == "bits":
            return self.bits(name, rows, k)
        if how == "tiny":
            scale = {"f16": -14, "bf16": -70, "tf32": -70, "e4m3": -7, "e5m2": -14}[name]
            exps = torch.randint(scale - 4, scale + 2, (rows, k), generator=self.g)
        else:
            exps = torch.randint(-7, 6, (rows, k), generator=self.g)
        x = torch.randn(rows, k, generator=self.g) * 2.0**exps
        x[torch.rand(rows, k, generator=self.g) < 0.1] = 0.0
        return x.to(TORCH_TYPES[name])

    def c(self, d, m, n, how):
        dtype = TORCH_TYPES["f16"] if d == "f16" else torch.float32
        if how == "zero":
            return torch.zeros(m, n, dtype=dtype)
        if how == "bits":
            return self.bits("f16" if d == "f16" else "tf32", m, n)
        exps = torch.randint(-24, 14, (m, n), generator=self.g)
        return (torch.randn(m, n, generator=self.g) * 2.0**exps).to(dtype)


def as_ints(t, d):
    torch_int, np_int = INT_OF[d]
    return t.contiguous().view(torch_int).numpy().view(np_int).copy()


def run(num, unit, d, a_type, b_type, k, a, b, c, **options):
    out = as_ints(c, d)
    num.mma(unit, d, a_type, b_type, k, to_bytes(a), to_bytes(b), out, **options)
    return out


def golden(unit, d, a_type, b_type, k, a, b, c):
    if unit == "wgmma":
        model = sim.WGMMA("Hopper", f"m64n{b.shape[0]}k{k}.{d}.{a_type}.{b_type}")
    else:
        model = sim.MMA("Hopper", f"m16n8k{k}.{d}.{a_type}.{b_type}.{d}")
    return as_ints(model(a, b.T, c), d)


CASES = [("ordinary", "wide"), ("ordinary", "zero"), ("tiny", "zero"), ("tiny", "wide")]
CASES += [("bits", "wide"), ("ordinary", "bits"), ("bits", "bits")]


@pytest.mark.parametrize("d,a_type,b_type,k", WGMMA, ids=lambda x: str(x))
def test_wgmma_bitwise(num, d, a_type, b_type, k):
    for seed, (how, c_how) in enumerate(CASES):
        draw = Draw(seed)
        n = (8, 72, 136, 24, 64, 40, 200)[seed]
        a, b = draw.operand(a_type, 64, k, how), draw.operand(b_type, n, k, how)
        c = draw.c(d, 64, n, c_how)
        want = golden("wgmma", d, a_type, b_type, k, a, b, c)
        for isa in available_isas():
            num.force_isa(isa)
            got = run(num, "wgmma", d, a_type, b_type, k, a, b, c)
            np.testing.assert_array_equal(got, want, err_msg=f"{isa} {how} {c_how}")
        got = run(num, "wgmma", d, a_type, b_type, k, a, b, c, reference=True)
        np.testing.assert_array_equal(got, want, err_msg=f"reference {how} {c_how}")


@pytest.mark.parametrize("d,a_type,b_type,k", MMA_SYNC, ids=lambda x: str(x))
def test_mma_sync_bitwise(num, d, a_type, b_type, k):
    for seed, (how, c_how) in enumerate(CASES * 3):
        draw = Draw(100 + seed)
        a, b = draw.operand(a_type, 16, k, how), draw.operand(b_type, 8, k, how)
        c = draw.c(d, 16, 8, c_how)
        want = golden("mma", d, a_type, b_type, k, a, b, c)
        for isa in available_isas():
            num.force_isa(isa)
            got = run(num, "mma", d, a_type, b_type, k, a, b, c)
            np.testing.assert_array_equal(got, want, err_msg=f"{isa} {how} {c_how}")


def widened(d, k, a, b, c):
    """FP8 mma.sync as sm_90's SASS does it: lower halves of each packed register through one f16
    HMMA from zero, upper halves on top, then C by FADD/HADD2."""
    a16, b16 = a.half(), b.half()
    low = [i for i in range(k) if i % 4 < 2]
    high = [i for i in range(k) if i % 4 >= 2]
    model = sim.MMA("Hopper", f"m16n8k{k // 2}.{d}.f16.f16.{d}")
    total = model(a16[:, low], b16[:, low].T, torch.zeros_like(c))
    total = model(a16[:, high], b16[:, high].T, total)
    out = (c.float() + total.float()).to(c.dtype)
    bits = as_ints(out, d)
    bits[out.isnan().numpy()] = 0x7FFF if d == "f16" else 0x7FFFFFFF
    return bits


@pytest.mark.parametrize("k", [16, 32])
@pytest.mark.parametrize("d", ["f32", "f16"])
@pytest.mark.parametrize("a_type,b_type", [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e5m2", "e5m2")])
def test_fp8_mma_sync_is_two_widened_hmmas(num, d, k, a_type, b_type):
    for seed, (how, c_how) in enumerate(CASES * 2):
        draw = Draw(200 + seed)
        a, b = draw.operand(a_type, 16, k, how), draw.operand(b_type, 8, k, how)
        c = draw.c(d, 16, 8, c_how)
        want = widened(d, k, a, b, c)
        for isa in available_isas():
            num.force_isa(isa)
            got = run(num, "mma", d, a_type, b_type, k, a, b, c)
            np.testing.assert_array_equal(got, want, err_msg=f"{isa} {how} {c_how}")


@pytest.mark.parametrize("a_type,k", [("e4m3", 32), ("bf16", 16), ("f16", 16)])
def test_scale_d_zero_and_negated_operands(num, a_type, k):
    draw = Draw(7)
    a, b = draw.operand(a_type, 64, k, "ordinary"), draw.operand(a_type, 40, k, "ordinary")
    c = draw.c("f32", 64, 40, "bits")
    zero = torch.zeros_like(c)
    args = ("wgmma", "f32", a_type, a_type, k)
    got = run(num, *args, a, b, c, accumulate=False)
    np.testing.assert_array_equal(got, golden(*args, a, b, zero))
    minus = (-a.float()).to(a.dtype)
    c = draw.c("f32", 64, 40, "wide")
    want = golden(*args, minus, b, c)
    for options in ({"negate_a": True}, {"negate_b": True}):
        for reference in (False, True):
            got = run(num, *args, a, b, c, reference=reference, **options)
            np.testing.assert_array_equal(got, want)
    got = run(num, *args, a, b, c, negate_a=True, negate_b=True)
    np.testing.assert_array_equal(got, golden(*args, a, b, c))


@pytest.mark.parametrize("d,a_type,b_type,k", WGMMA, ids=lambda x: str(x))
def test_fast_mode_is_fp32(num, d, a_type, b_type, k):
    draw = Draw(3)
    a, b = draw.operand(a_type, 64, k, "ordinary"), draw.operand(b_type, 72, k, "ordinary")
    c = (draw.c(d, 64, 72, "wide").float() * 2.0**-6).to(TORCH_TYPES["f16"] if d == "f16" else None)
    narrow = a.float(), b.float()
    if a_type == "tf32":
        narrow = tuple((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in narrow)
    exact = narrow[0].double() @ narrow[1].double().T + c.double()
    size = narrow[0].double().abs() @ narrow[1].double().abs().T + c.double().abs()
    for isa in available_isas():
        num.force_isa(isa)
        out = run(num, "wgmma", d, a_type, b_type, k, a, b, c, mode="fast")
        if d == "f16":
            got = torch.from_numpy(out.view(np.int16)).view(torch.float16).double()
            assert ((got - exact).abs() <= size * 2.0**-10 + 2.0**-24).all()
        else:
            got = torch.from_numpy(out.view(np.float32)).double()
            assert ((got - exact).abs() <= size * (k + 1) * 2.0**-24).all()


@pytest.mark.parametrize("a_type,k", [("e4m3", 32), ("e5m2", 32), ("bf16", 16), ("f16", 16)])
def test_fast_mode_keeps_nan(num, a_type, k):
    draw = Draw(4)
    a, b = draw.operand(a_type, 64, k, "ordinary"), draw.operand(a_type, 72, k, "ordinary")
    a[3, 5] = b[7, 9] = float("nan")
    c = draw.c("f32", 64, 72, "wide")
    for isa in available_isas():
        num.force_isa(isa)
        out = run(num, "wgmma", "f32", a_type, a_type, k, a, b, c, mode="fast")
        nan = np.isnan(out.view(np.float32))
        assert nan[3].all() and nan[:, 7].all()
        assert nan.sum() == 72 + 64 - 1


def int_rows(rng, name, rows, k):
    """Packed bytes and their values."""
    if name in ("s8", "u8"):
        dtype = np.int8 if name == "s8" else np.uint8
        info = np.iinfo(dtype)
        values = rng.integers(info.min, info.max + 1, (rows, k)).astype(dtype)
        return values.view(np.uint8), values.astype(np.int64)
    if name == "b1":
        bits = rng.integers(0, 2, (rows, k)).astype(np.uint8)
        return np.packbits(bits, axis=1, bitorder="little"), bits.astype(np.int64)
    low = -8 if name == "s4" else 0
    values = rng.integers(low, low + 16, (rows, k))
    nibbles = (values & 15).astype(np.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), values


@pytest.mark.parametrize(
    "unit,a_type,b_type,k",
    [
        ("wgmma", "s8", "s8", 32),
        ("wgmma", "u8", "s8", 32),
        ("wgmma", "b1", "b1", 256),
        ("mma", "s8", "u8", 16),
        ("mma", "u8", "u8", 32),
        ("mma", "s4", "u4", 64),
        ("mma", "u4", "s4", 32),
        ("mma", "b1", "b1", 128),
    ],
)
@pytest.mark.parametrize("saturate", [False, True])
def test_integers(num, unit, a_type, b_type, k, saturate):
    rng = np.random.default_rng(5)
    a, av = int_rows(rng, a_type, 16, k)
    b, bv = int_rows(rng, b_type, 24, k)
    c = rng.choice([2**31 - 5, -(2**31) + 5, 0, 17], (16, 24)).astype(np.int32)
    for bit_xor in (False, True) if a_type == "b1" else (False,):
        if bit_xor:
            total = (av[:, None] ^ bv[None]).sum(-1) + c
        else:
            total = av @ bv.T + c
        want = np.clip(total, -(2**31), 2**31 - 1) if saturate else total
        got = c.copy()
        num.mma(unit, "s32", a_type, b_type, k, a, b, got, saturate=saturate, bit_xor=bit_xor)
        np.testing.assert_array_equal(got, want.astype(np.uint64).astype(np.uint32).view(np.int32))


def test_f64_is_a_chain_of_fmas(num):
    from fractions import Fraction

    rng = np.random.default_rng(6)
    a, b, c = rng.standard_normal((16, 8)), rng.standard_normal((8, 8)), np.zeros((16, 8))
    got = c.copy()
    num.mma("mma", "f64", "f64", "f64", 8, a.view(np.uint8), b.view(np.uint8), got)
    for i in range(16):
        for j in range(8):
            total = 0.0
            for x, y in zip(a[i], b[j]):
                total = float(Fraction(x) * Fraction(y) + Fraction(total))
            assert got[i, j] == total


@pytest.mark.parametrize("n", [8, 96, 256])
@pytest.mark.parametrize("half", [False, True])
def test_accumulator_moves(num, n, half):
    rng = np.random.default_rng(8)
    dense = rng.integers(0, 1 << 32, (16, n // 2 if half else n), dtype=np.uint64)
    dense = dense.astype(np.uint32)
    regs = num.store_accumulator(dense, n, half)
    elements = dense.view(np.uint16) if half else dense
    per_reg = 2 if half else 1
    flat = regs.view(np.uint16).reshape(-1, 32, per_reg) if half else regs[:, :, None]
    for lane in range(32):
        for e in range(n // 2):
            row, col = NUM.accumulator(lane, e)
            assert flat[e // per_reg, lane, e % per_reg] == elements[row, col]
    np.testing.assert_array_equal(num.load_accumulator(regs, n, half), dense)


@pytest.mark.parametrize(
    "args,words",
    [
        (("wgmma", "f32", "e4m3", "f16", 32), "do not combine"),
        (("wgmma", "f16", "bf16", "bf16", 16), "no such accumulator"),
        (("wgmma", "f32", "e4m3", "e4m3", 16), "no such k"),
        (("mma", "f32", "f16", "f16", 32), "no such k"),
        (("wgmma", "f64", "f64", "f64", 4), "no such k"),
        (("wgmma", "s32", "s4", "s4", 64), "no such k"),
    ],
)
def test_impossible_kinds_are_refused(num, args, words):
    blank = np.zeros((8, 32), np.uint8)
    with pytest.raises(ValueError, match=words):
        num.mma(*args, blank, blank, np.zeros((8, 8), np.uint32))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("d,a_type,b_type,k", WGMMA, ids=lambda x: str(x))
def test_wgmma_bitwise_many_seeds(num, d, a_type, b_type, k, seed):
    draw = Draw(1000 + seed)
    for how, c_how in CASES:
        a, b = draw.operand(a_type, 64, k, how), draw.operand(b_type, 256, k, how)
        c = draw.c(d, 64, 256, c_how)
        want = golden("wgmma", d, a_type, b_type, k, a, b, c)
        got = run(num, "wgmma", d, a_type, b_type, k, a, b, c)
        np.testing.assert_array_equal(got, want, err_msg=f"{how} {c_how}")
