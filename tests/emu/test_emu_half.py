"""Half, bfloat and FP8 arithmetic and conversions, bit by bit, against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest

golden = pytest.importorskip("golden")
from golden import (  # noqa: E402
    FORMATS,
    LANES,
    check,
    compare,
    decode,
    encode,
    execute,
    flush,
    fma,
    inf_bits,
    mask,
    nan_bits,
    operands,
)

FORMATS["tf32"] = (8, 10)
FORMATS["e5m2"] = (5, 2)
FMT = {"f16": 16, "bf16": "bf16"}
ONE = {"f16": 0x3C00, "bf16": 0x3F80}
NEG = 0x8000


def per_half(model):
    """A model of one half applied to the halves of packed registers."""
    return lambda *v: sum(mask(model(*[x >> s & 0xFFFF for x in v]), 16) << s for s in (0, 16))


def both(text, n, model, t):
    """Checks a form on t and on t x2 ("$t" in the text)."""
    check(text.replace("$t", t), 16, [16] * n, model)
    check(text.replace("$t", t + "x2"), 32, [32] * n, per_half(model))


def saturate(x, t):
    v = decode(x, FMT[t])
    if v == "nan" or v[1]:
        return 0
    return ONE[t] if v[0] == "inf" or v[0] > 1 else x


def relu(x, t):
    v = decode(x, FMT[t])
    return x if v == "nan" or not v[1] else 0


def product(a, b, t):
    x, y = decode(a, FMT[t]), decode(b, FMT[t])
    zero = NEG if "nan" not in (x, y) and x[1] ^ y[1] else 0
    return fma(a, b, zero, FMT[t])


@pytest.mark.parametrize("t", ["f16", "bf16"])
def test_arithmetic(t):
    f = FMT[t]
    one = ONE[t]
    both("add.rn.$t $d, $a, $b;", 2, lambda a, b: fma(a, one, b, f), t)
    both("sub.$t $d, $a, $b;", 2, lambda a, b: fma(a, one, b ^ NEG, f), t)
    both("mul.$t $d, $a, $b;", 2, lambda a, b: product(a, b, t), t)
    both("fma.rn.$t $d, $a, $b, $c;", 3, lambda a, b, c: fma(a, b, c, f), t)
    both("fma.rn.relu.$t $d, $a, $b, $c;", 3, lambda a, b, c: relu(fma(a, b, c, f), t), t)
    both("neg.$t $d, $a;", 1, lambda a: a ^ NEG, t)
    both("abs.$t $d, $a;", 1, lambda a: a & 0x7FFF, t)


def test_half_modifiers():
    def ftz(f):
        return lambda *v: flush(f(*[flush(x, 16) for x in v]), 16)

    def add(a, b):
        return fma(a, 0x3C00, b, 16)

    both("add.ftz.$t $d, $a, $b;", 2, ftz(add), "f16")
    both("add.sat.$t $d, $a, $b;", 2, lambda a, b: saturate(add(a, b), "f16"), "f16")
    both("sub.sat.$t $d, $a, $b;", 2, lambda a, b: saturate(add(a, b ^ NEG), "f16"), "f16")
    both("mul.ftz.$t $d, $a, $b;", 2, ftz(lambda a, b: product(a, b, "f16")), "f16")
    both("fma.rn.sat.$t $d, $a, $b, $c;", 3,
         lambda a, b, c: saturate(fma(a, b, c, 16), "f16"), "f16")  # fmt: skip
    both("fma.rn.ftz.$t $d, $a, $b, $c;", 3, ftz(lambda a, b, c: fma(a, b, c, 16)), "f16")


def extreme(a, b, t, want_max, propagate=False):
    x, y = decode(a, FMT[t]), decode(b, FMT[t])
    if (x == "nan" and y == "nan") or (propagate and "nan" in (x, y)):
        return nan_bits(FMT[t])
    if "nan" in (x, y):
        return b if x == "nan" else a
    less = compare("lt", a, b, FMT[t]) or (compare("eq", a, b, FMT[t]) and x[1] > y[1])
    return b if less == want_max else a


@pytest.mark.parametrize("t", ["f16", "bf16"])
@pytest.mark.parametrize("op", ["min", "max"])
def test_extremes(t, op):
    big = op == "max"
    both(f"{op}.$t $d, $a, $b;", 2, lambda a, b: extreme(a, b, t, big), t)
    both(f"{op}.NaN.$t $d, $a, $b;", 2, lambda a, b: extreme(a, b, t, big, True), t)


@pytest.mark.parametrize("t", ["f16", "bf16"])
def test_comparisons(t):
    for c in ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "geu", "num", "nan"):
        check(f"setp.{c}.{t} $d, $a, $b;", 0, [16, 16], lambda a, b, c=c: compare(c, a, b, FMT[t]))
    rng = np.random.default_rng(1)
    a, b = operands(rng, 32), operands(rng, 32)
    text = "{ .reg .pred v; and.b32 %u, %t, 1; setp.eq.u32 %q, %u, 1;"
    text += f"setp.lt.and.{t}x2 %p|v, $a, $b, %q; selp.b32 $d, 1, 0, %p; @v or.b32 $d, $d, 2; }}"
    out = execute(text, 32, [a, b])
    want = [
        sum(
            compare("lt", int(x) >> s & 0xFFFF, int(y) >> s & 0xFFFF, FMT[t]) << (s > 0)
            for s in (0, 16)
        )
        * (k & 1)
        for k, (x, y) in enumerate(zip(a, b, strict=True))
    ]
    assert out.tolist() == want


@pytest.mark.parametrize("t, relative, absolute", [("f16", 2**-9.9, 2**-10.9), ("bf16", 2**-7, 2**-8)])
def test_approximations(t, relative, absolute):
    x = np.random.default_rng(2).uniform(-6, 6, LANES).astype(np.float32)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    bits = x.astype(np.float16).view(np.uint16) if t == "f16" else bits

    def value(b):
        return np.array([float(decode(int(v), FMT[t])[0]) for v in b])

    ftz = ".ftz" if t == "bf16" else ""
    for packed in (False, True):
        source = [bits.astype(np.uint32) * 0x10001 if packed else bits]
        name, width = t + "x2" * packed, 32 if packed else 16
        for shift in (0, 16) if packed else (0,):
            got = execute(f"ex2.approx{ftz}.{name} $d, $a;", width, source) >> shift & 0xFFFF
            want = np.exp2(value(bits))
            assert np.all(np.abs(value(got) - want) <= relative * want)
            got = execute(f"tanh.approx.{name} $d, $a;", width, source) >> shift & 0xFFFF
            assert np.all(np.abs(value(got) - np.tanh(value(bits))) <= absolute)


# --- conversions


def narrow(a, source, to, mode="rn"):
    v = decode(a, source)
    if v == "nan":
        return nan_bits(to)
    return inf_bits(to, v[1]) if v[0] == "inf" else encode(v[0], to, mode, v[1])


def finite(bits, t):
    """satfinite: infinity becomes the largest number."""
    v = decode(bits, FMT[t])
    return bits - 1 if v != "nan" and v[0] == "inf" else bits


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("t", ["f16", "bf16"])
def test_packed_and_clamped_halves(t, mode):
    def one(a, flags):
        r = narrow(a, 32, FMT[t], mode)
        r = finite(r, t) if "satfinite" in flags else r
        return relu(r, t) if "relu" in flags else r

    for flags in ("", ".relu", ".satfinite", ".relu.satfinite"):
        if flags:
            order = ".satfinite.relu" if flags == ".relu.satfinite" else flags
            for form in {flags, order}:
                check(f"cvt.{mode}{form}.{t}.f32 $d, $a;", 16, [32],
                      lambda a, g=flags: one(a, g), floats=True)  # fmt: skip
        check(f"cvt.{mode}{flags}.{t}x2.f32 $d, $a, $b;", 32, [32, 32],
              lambda a, b, g=flags: one(a, g) << 16 | one(b, g), floats=True)  # fmt: skip


def fp8_value(code, t):
    """Value of a non-negative finite code."""
    bits, bias = (3, 7) if t == "e4m3" else (2, 15)
    e, m = code >> bits, code & ((1 << bits) - 1)
    scale = Fraction(2) ** ((e or 1) - bias - bits)
    return (m | (1 << bits if e else 0)) * scale


LARGEST = {"e4m3": 0x7E, "e5m2": 0x7B}
CODES = {t: [fp8_value(c, t) for c in range(LARGEST[t] + 1)] for t in LARGEST}


def to_fp8(v, t):
    """Nearest code, ties to the even code, clamped; 0x7f for NaN."""
    if v == "nan":
        return 0x7F
    sign = v[1] << 7
    if v[0] == "inf" or abs(v[0]) >= CODES[t][-1]:
        return sign | LARGEST[t]
    x = abs(v[0])
    low, high = 0, LARGEST[t]
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if CODES[t][middle] <= x else (low, middle)
    down, up = x - CODES[t][low], CODES[t][high] - x
    code = low if down < up or (down == up and low % 2 == 0) else high
    return sign | code


@pytest.mark.parametrize("t", ["e4m3", "e5m2"])
def test_fp8(t):
    def clip(code):
        return 0 if code & 0x80 and code & 0x7F != 0x7F else code

    for flag, f in (("", lambda c: c), (".relu", clip)):
        check(f"cvt.rn.satfinite{flag}.{t}x2.f32 $d, $a, $b;", 16, [32, 32],
              lambda a, b, f=f: f(to_fp8(decode(a, 32), t)) << 8 | f(to_fp8(decode(b, 32), t)),
              floats=True)  # fmt: skip
        check(f"cvt.rn.satfinite{flag}.{t}x2.f16x2 $d, $a;", 16, [32],
              lambda a, f=f: f(to_fp8(decode(a >> 16, 16), t)) << 8
              | f(to_fp8(decode(a & 0xFFFF, 16), t)))  # fmt: skip

    def widen(code, flag):
        if t == "e5m2":
            bits = 0x7FFF if code & 0x7F > 0x7C else code << 8
        elif code & 0x7F == 0x7F:
            bits = 0x7FFF
        else:
            value = CODES[t][code & 0x7F]
            bits = encode(-value if code >> 7 else value, 16, "rn", code >> 7)
        return relu(bits, "f16") if flag else bits

    for flag in ("", ".relu"):
        check(f"cvt.rn{flag}.f16x2.{t}x2 $d, $a;", 32, [16],
              lambda a, g=flag: widen(a >> 8, g) << 16 | widen(a & 255, g))  # fmt: skip


def test_fp8_every_pair_of_neighbours():
    """Ties between all adjacent codes, where a wrong rounding shows."""
    for t in ("e4m3", "e5m2"):
        ties = [(a + b) / 2 for a, b in zip(CODES[t], CODES[t][1:], strict=False)]
        x = np.array([float(v) for v in ties], np.float32)
        x = np.resize(np.concatenate([x, -x]), LANES).view(np.uint32)
        out = execute(f"cvt.rn.satfinite.{t}x2.f32 $d, $a, $b;", 16, [x, x[::-1].copy()])
        want = [to_fp8(decode(int(a), 32), t) << 8 | to_fp8(decode(int(b), 32), t)
                for a, b in zip(x, x[::-1], strict=True)]  # fmt: skip
        assert out.tolist() == want


def test_tf32():
    def away(a):
        v = decode(a, 32)
        if v == "nan":
            return 0x7FFFFFFF
        if v[0] == "inf":
            return a
        return mask((a & 0x7FFFFFFF) + 0x1000 & ~0x1FFF, 32) | a & 1 << 31

    def by(mode):
        return lambda a: 0x7FFFFFFF if decode(a, 32) == "nan" else narrow(a, 32, "tf32", mode) << 13

    check("cvt.rna.tf32.f32 $d, $a;", 32, [32], away, floats=True)
    check("cvt.rn.tf32.f32 $d, $a;", 32, [32], by("rn"), floats=True)
    check("cvt.rz.tf32.f32 $d, $a;", 32, [32], by("rz"), floats=True)
