"""Approximate functions within PTX's documented errors; the remaining float and integer forms."""

import math

import numpy as np
import pytest

golden = pytest.importorskip("golden")
from golden import (  # noqa: E402
    LANES,
    ONE,
    check,
    compare,
    decode,
    encode,
    execute,
    flush,
    fma,
    mask,
    nan_bits,
    operands,
    signed,
)


def f32(bits):
    return np.array(bits, np.uint32).view(np.float32)


def near(text, model, x, ulps=0.0, absolute=0.0, y=None, dtype=np.float32):
    """Results against a float64 model: within `ulps` units of the result, or `absolute`."""
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    sources = [v.astype(dtype).view(unsigned) for v in ([x] if y is None else [x, y])]
    got = execute(text, unsigned.itemsize * 8, sources).view(dtype).astype(np.float64)
    with np.errstate(all="ignore"):
        want = model(*[v.view(dtype).astype(np.float64) for v in sources])
        rounded = want.astype(dtype)
        spacing = np.spacing(np.abs(rounded)).astype(np.float64)
        special = ~np.isfinite(rounded) | (want == 0)
        limit = np.maximum(ulps * spacing, absolute)
        good = np.where(special, (got == rounded) | (np.isnan(got) & np.isnan(want)),
                        np.abs(got - want) <= limit)  # fmt: skip
    bad = np.flatnonzero(~good)
    assert bad.size == 0, [(x[k], got[k], want[k]) for k in bad[:4]]


def samples(seed, low=-1e3, high=1e3):
    rng = np.random.default_rng(seed)
    wide = np.exp(rng.uniform(-60, 60, LANES // 2)) * rng.choice([-1, 1], LANES // 2)
    return np.concatenate([rng.uniform(low, high, LANES - LANES // 2 - 4), wide,
                           [0.0, np.inf, -np.inf, np.nan]])  # fmt: skip


@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_approximate_functions(ftz):
    x = samples(1)
    near(f"rcp.approx{ftz}.f32 $d, $a;", lambda a: 1 / a, x, ulps=1)
    near(f"sqrt.approx{ftz}.f32 $d, $a;", np.sqrt, x, ulps=4)
    near(f"rsqrt.approx{ftz}.f32 $d, $a;", lambda a: 1 / np.sqrt(a), x, ulps=4)
    near(f"ex2.approx{ftz}.f32 $d, $a;", np.exp2, samples(2, -100, 100), ulps=4)
    near(f"lg2.approx{ftz}.f32 $d, $a;", np.log2, np.abs(x), ulps=4, absolute=2**-22)
    angles = np.random.default_rng(3).uniform(-math.pi, math.pi, LANES)
    near(f"sin.approx{ftz}.f32 $d, $a;", np.sin, angles, absolute=2**-20)
    near(f"cos.approx{ftz}.f32 $d, $a;", np.cos, angles, absolute=2**-20)
    y = np.random.default_rng(4).uniform(0.1, 50, LANES)
    near(f"div.approx{ftz}.f32 $d, $a, $b;", lambda a, b: a / b, x, ulps=2, y=y)
    near(f"div.full{ftz}.f32 $d, $a, $b;", lambda a, b: a / b, x, ulps=2, y=y)


def test_tanh_and_double_approximations():
    near("tanh.approx.f32 $d, $a;", np.tanh, samples(5, -4, 4), ulps=2**13)
    x = np.random.default_rng(6).uniform(1e-3, 1e3, LANES)
    near("rsqrt.approx.f64 $d, $a;", lambda a: 1 / np.sqrt(a), x, ulps=2**32, dtype=np.float64)
    for op, model in (("rcp", lambda a: 1 / a), ("rsqrt", lambda a: 1 / np.sqrt(a))):
        text = f"{op}.approx.ftz.f64 $d, $a;"
        near(text, model, x, ulps=2**33, dtype=np.float64)
        out = execute(text, 64, [x.view(np.uint64)])
        assert not (out & 0xFFFFFFFF).any()


def exact_root(x, fmt, mode):
    """Correctly rounded square root from integer square roots."""
    v = decode(x, fmt)
    if v == "nan" or (v[1] and v[0] != 0):
        return nan_bits(fmt)
    if v[0] in ("inf", 0):
        return x
    q = v[0]
    scale = 200  # bits below the result: enough, the fraction is sticky beyond
    square = q * 4**600
    root = math.isqrt(square.numerator // square.denominator * 4**scale)
    exact = root * root == square * 4**scale
    from fractions import Fraction

    value = Fraction(2 * root + (not exact), 2 ** (600 + scale + 1))
    return encode(value, fmt, mode)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_square_root(mode):
    check(f"sqrt.{mode}.f32 $d, $a;", 32, [32], lambda a: exact_root(a, 32, mode), floats=True)
    check(f"sqrt.{mode}.f64 $d, $a;", 64, [64], lambda a: exact_root(a, 64, mode), floats=True)
    for fmt in (32, 64):
        check(f"mad.{mode}.f{fmt} $d, $a, $b, $c;", fmt, [fmt] * 3,
              lambda a, b, c, f=fmt: fma(a, b, c, f, mode), floats=True)  # fmt: skip


def test_double_forms():
    neg = 1 << 63
    check("neg.f64 $d, $a;", 64, [64], lambda a: a ^ neg, floats=True)
    check("abs.f64 $d, $a;", 64, [64], lambda a: a & (neg - 1), floats=True)
    check("copysign.f64 $d, $a, $b;", 64, [64] * 2, lambda a, b: b & (neg - 1) | a & neg)
    check("min.f64 $d, $a, $b;", 64, [64] * 2, lambda a, b: extreme(a, b, 64, False), floats=True)
    check("max.f64 $d, $a, $b;", 64, [64] * 2, lambda a, b: extreme(a, b, 64, True), floats=True)


def extreme(a, b, fmt, want_max, propagate=False):
    x, y = decode(a, fmt), decode(b, fmt)
    if propagate and "nan" in (x, y):
        return nan_bits(fmt)
    if x == "nan":
        return nan_bits(fmt) if y == "nan" else b
    if y == "nan":
        return a
    less = compare("lt", a, b, fmt) or (compare("eq", a, b, fmt) and x[1] > y[1])
    return b if less == want_max else a


def test_min_and_max_forms():
    for op in ("min", "max"):
        big = op == "max"
        check(f"{op}.NaN.f32 $d, $a, $b;", 32, [32] * 2,
              lambda a, b: extreme(a, b, 32, big, True), floats=True)  # fmt: skip
        check(f"{op}.ftz.f32 $d, $a, $b;", 32, [32] * 2,
              lambda a, b: extreme(flush(a, 32), flush(b, 32), 32, big), floats=True)  # fmt: skip

        def by_magnitude(a, b):
            low = (1 << 31) - 1
            r = extreme(a & low, b & low, 32, big)
            return r if decode(r, 32) == "nan" else r | (a ^ b) & 1 << 31

        rng = np.random.default_rng(8)
        values = [operands(rng, 32, LANES, True) for _ in range(2)]
        keep = [v for v in values]
        for v in keep:  # the sign with a NaN operand is not specified
            v[np.isnan(v.view(np.float32))] = 0x40000000
        out = execute(f"{op}.xorsign.abs.f32 $d, $a, $b;", 32, keep)
        assert out.tolist() == [by_magnitude(int(a), int(b)) for a, b in zip(*keep, strict=True)]


@pytest.mark.parametrize("fmt", [32, 64])
def test_testp(fmt):
    top, low = (8, 23) if fmt == 32 else (11, 52)

    def parts(a):
        return a >> low & ((1 << top) - 1), a & ((1 << low) - 1)

    ones = (1 << top) - 1
    models = {
        "finite": lambda e, m: e != ones,
        "infinite": lambda e, m: e == ones and m == 0,
        "number": lambda e, m: e != ones or m == 0,
        "notanumber": lambda e, m: e == ones and m != 0,
        "normal": lambda e, m: 0 < e < ones,
        "subnormal": lambda e, m: e == 0 and m != 0,
    }
    for name, model in models.items():
        check(f"testp.{name}.f{fmt} $d, $a;", 0, [fmt],
              lambda a, f=model: f(*parts(a)), floats=True)  # fmt: skip


# --- integers


def bytes_of(v, is_signed, size=8):
    out = [v >> size * k & ((1 << size) - 1) for k in range(32 // size)]
    return [signed(x, size) for x in out] if is_signed else out


@pytest.mark.parametrize("ta", ["u32", "s32"])
@pytest.mark.parametrize("tb", ["u32", "s32"])
def test_dot_products(ta, tb):
    sa, sb = ta[0] == "s", tb[0] == "s"
    check(f"dp4a.{ta}.{tb} $d, $a, $b, $c;", 32, [32] * 3, lambda a, b, c: mask(
        c + sum(x * y for x, y in zip(bytes_of(a, sa), bytes_of(b, sb), strict=True)), 32))
    for half in ("lo", "hi"):
        first = 0 if half == "lo" else 2
        check(f"dp2a.{half}.{ta}.{tb} $d, $a, $b, $c;", 32, [32] * 3, lambda a, b, c: mask(
            c + sum(x * y for x, y in zip(bytes_of(a, sa, 16), bytes_of(b, sb)[first:][:2],
                                          strict=True)), 32))  # fmt: skip


@pytest.mark.parametrize("t", ["u32", "s32"])
def test_mul24(t):
    def low24(v):
        return signed(mask(v, 24), 24) if t[0] == "s" else mask(v, 24)

    for half, shift in (("lo", 0), ("hi", 16)):
        check(f"mul24.{half}.{t} $d, $a, $b;", 32, [32] * 2,
              lambda a, b, s=shift: mask(low24(a) * low24(b) >> s, 32))  # fmt: skip
        check(f"mad24.{half}.{t} $d, $a, $b, $c;", 32, [32] * 3,
              lambda a, b, c, s=shift: mask((low24(a) * low24(b) >> s) + c, 32))  # fmt: skip


def test_selection():
    check("slct.u32.s32 $d, $a, $b, $c;", 32, [32] * 3, lambda a, b, c: b if c >> 31 else a)
    check("slct.b64.f32 $d, $a, $b, $c;", 64, [64, 64, 32],
          lambda a, b, c: a if compare("ge", c, 0, 32) else b, floats=True)  # fmt: skip


def test_bit_manipulation():
    def prmt(mode, a, b, s):
        v = (b << 32 | a).to_bytes(8, "little")
        s &= 3
        pick = {
            "f4e": [s, s + 1, s + 2, s + 3],
            "b4e": [s, (s - 1) % 8, (s - 2) % 8, (s - 3) % 8],
            "rc8": [s] * 4,
            "ecl": [max(k, s) for k in range(4)],
            "ecr": [min(k, s) for k in range(4)],
            "rc16": [2 * (s & 1), 2 * (s & 1) + 1] * 2,
        }[mode]
        return int.from_bytes(bytes(v[k] for k in pick), "little")

    for mode in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
        check(f"prmt.b32.{mode} $d, $a, $b, $c;", 32, [32] * 3,
              lambda a, b, s, m=mode: prmt(m, a, b, s))  # fmt: skip
    for w in (32, 64):
        for t in "us":
            def shift_amount(a, w=w, t=t):
                x = a ^ mask(-1, w) if t == "s" and a >> (w - 1) else a
                return w - x.bit_length() if x else 0xFFFFFFFF

            check(f"bfind.shiftamt.{t}{w} $d, $a;", 32, [w], shift_amount)
    for form, wraps in (("clamp", False), ("wrap", True)):
        def bmsk(a, b, wraps=wraps):
            at, n = (a & 31, b & 31) if wraps else (min(a, 32), min(b, 32))
            return mask(((1 << n) - 1) << at, 32)

        check(f"bmsk.{form}.b32 $d, $a, $b;", 32, [32] * 2, bmsk)
        for t in "us":
            def szext(a, b, wraps=wraps, t=t):
                n = b & 31 if wraps else min(b, 32)
                if n == 0:
                    return 0
                return mask(signed(mask(a, n), n), 32) if t == "s" else mask(a, n)

            check(f"szext.{form}.{t}32 $d, $a, $b;", 32, [32] * 2, szext)


def test_fns():
    def fns(m, base, offset):
        if offset == 0:
            return base if m >> base & 1 else 0xFFFFFFFF
        step, left, at = (1 if offset > 0 else -1), abs(offset), base
        while 0 <= at < 32:
            if m >> at & 1:
                left -= 1
                if left == 0:
                    return at
            at += step
        return 0xFFFFFFFF

    for offset in (0, 1, 2, 5, -1, -3):
        rng = np.random.default_rng(offset + 9)
        m, b = operands(rng, 32), (operands(rng, 32) & 31).astype(np.uint32)
        out = execute(f"fns.b32 $d, $a, $b, {offset};", 32, [m, b])
        assert out.tolist() == [fns(int(x), int(y), offset) for x, y in zip(m, b, strict=True)]


def test_lop3_with_a_predicate():
    x = [operands(np.random.default_rng(k), 32) for k in range(2)]
    for op, model in (("or", lambda r: r != 0), ("and", lambda r: False)):
        text = f"setp.ne.b32 %q, 0, 0; lop3.{op}.b32 $d|%p, $a, $b, 0, 0xC0, %q; selp.b32 $d, 1, 0, %p;"
        out = execute(text, 32, x)
        want = [int(model(int(a) & int(b))) for a, b in zip(*x, strict=True)]
        assert out.tolist() == want


@pytest.mark.parametrize("t", ["s32", "u64", "f32", "f64"])
def test_compare_and_combine(t):
    bits = int(t[1:])
    floats = t[0] == "f"
    rng = np.random.default_rng(bits)
    a, b = (operands(rng, bits, LANES, floats) for _ in range(2))

    def lt(x, y):
        if floats:
            return compare("lt", int(x), int(y), bits)
        return signed(int(x), bits) < signed(int(y), bits) if t[0] == "s" else x < y

    odd = [k & 1 for k in range(LANES)]
    less = [lt(x, y) for x, y in zip(a, b, strict=True)]
    combine = {"and": lambda p, q: p and q, "or": lambda p, q: p or q, "xor": lambda p, q: p != q}
    for op, f in combine.items():
        head = "and.b32 %u, %t, 1; setp.eq.u32 %q, %u, 1;"
        text = f"{head} setp.lt.{op}.{t} %p, $a, $b, %q; selp.b32 $d, 1, 0, %p;"
        out = execute(text, 32, [a, b])
        want = [bool(f(p, bool(q))) for p, q in zip(less, odd, strict=True)]
        assert out.tolist() == [int(w) for w in want]
        out = execute(f"{head} set.lt.{op}.u32.{t} $d, $a, $b, %q;", 32, [a, b])
        assert out.tolist() == [0xFFFFFFFF * w for w in want]
    for to, yes in (("u32", 0xFFFFFFFF), ("s32", 0xFFFFFFFF), ("f32", ONE[32])):
        out = execute(f"set.lt.{to}.{t} $d, $a, $b;", 32, [a, b])
        assert out.tolist() == [yes * bool(p) for p in less]


def test_packing_integers():
    def pair(bits, a, b, c=0):
        keep = 32 - 2 * bits
        return (mask(c, keep) << 2 * bits) | a << bits | b

    for t in ("u16", "s16", "u8", "s8"):
        bits = int(t[1:])
        low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if t[0] == "s" else (0, (1 << bits) - 1)

        def sat(v, lo=low, hi=high, bits=bits):
            return mask(max(lo, min(hi, signed(v, 32))), bits)

        if bits == 16:
            check(f"cvt.pack.sat.{t}.s32 $d, $a, $b;", 32, [32] * 2,
                  lambda a, b, s=sat: pair(16, s(a), s(b)))  # fmt: skip
        else:
            check(f"cvt.pack.sat.{t}.s32.b32 $d, $a, $b, $c;", 32, [32] * 3,
                  lambda a, b, c, s=sat: pair(8, s(a), s(b), c))  # fmt: skip
