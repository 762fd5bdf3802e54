"""Every arithmetic row of the instruction table against exact scalar models, on fuzzed operands."""

import numpy as np
import pytest

golden = pytest.importorskip("golden")
from golden import (  # noqa: E402
    ONE,
    check,
    clamp,
    compare,
    decode,
    divide,
    encode,
    execute,
    flush,
    fma,
    inf_bits,
    mask,
    nan_bits,
    operands,
    signed,
)

INT_TYPES = ["u16", "s16", "u32", "s32", "u64", "s64"]


def by_type(op, t):
    bits = int(t[1:])
    return (lambda x: signed(x, bits)) if t[0] == "s" else (lambda x: x)


def truncated_div(a, b):
    q = abs(a) // abs(b)
    return -q if (a < 0) != (b < 0) else q


def int_models(t):
    bits = int(t[1:])
    s = by_type("", t)

    def div(a, b):
        return mask(-1 if s(b) == 0 else truncated_div(s(a), s(b)), bits)

    def rem(a, b):
        return a if s(b) == 0 else mask(s(a) - s(b) * truncated_div(s(a), s(b)), bits)

    models = {
        "add": lambda a, b: mask(a + b, bits),
        "sub": lambda a, b: mask(a - b, bits),
        "mul.lo": lambda a, b: mask(a * b, bits),
        "mul.hi": lambda a, b: mask(s(a) * s(b) >> bits, bits),
        "div": div,
        "rem": rem,
        "min": lambda a, b: mask(min(s(a), s(b)), bits),
        "max": lambda a, b: mask(max(s(a), s(b)), bits),
    }
    return bits, s, models


@pytest.mark.parametrize("t", INT_TYPES)
def test_integer_binary(t):
    bits, s, models = int_models(t)
    for op, model in models.items():
        check(f"{op}.{t} $d, $a, $b;", bits, [bits, bits], model)


@pytest.mark.parametrize("t", INT_TYPES)
def test_integer_ternary_and_wide(t):
    bits, s, _ = int_models(t)
    check(f"mad.lo.{t} $d, $a, $b, $c;", bits, [bits] * 3, lambda a, b, c: mask(a * b + c, bits))
    check(
        f"mad.hi.{t} $d, $a, $b, $c;",
        bits,
        [bits] * 3,
        lambda a, b, c: mask((s(a) * s(b) >> bits) + c, bits),
    )
    check(
        f"sad.{t} $d, $a, $b, $c;",
        bits,
        [bits] * 3,
        lambda a, b, c: mask(c + abs(s(a) - s(b)), bits),
    )
    if bits < 64:
        wide = 2 * bits
        check(f"mul.wide.{t} $d, $a, $b;", wide, [bits] * 2, lambda a, b: mask(s(a) * s(b), wide))
        check(
            f"mad.wide.{t} $d, $a, $b, $c;",
            wide,
            [bits, bits, wide],
            lambda a, b, c: mask(s(a) * s(b) + c, wide),
        )
    if t[0] == "s":
        check(f"neg.{t} $d, $a;", bits, [bits], lambda a: mask(-a, bits))
        check(f"abs.{t} $d, $a;", bits, [bits], lambda a: mask(abs(s(a)), bits))


def test_saturating_and_packed_integers():
    s = by_type("", "s32")
    check("add.sat.s32 $d, $a, $b;", 32, [32, 32], lambda a, b: mask(clamp(s(a) + s(b), 32), 32))
    check("sub.sat.s32 $d, $a, $b;", 32, [32, 32], lambda a, b: mask(clamp(s(a) - s(b), 32), 32))
    check("min.relu.s32 $d, $a, $b;", 32, [32, 32], lambda a, b: max(min(s(a), s(b)), 0))
    check("max.relu.s32 $d, $a, $b;", 32, [32, 32], lambda a, b: max(s(a), s(b), 0))
    check(
        "mad.hi.sat.s32 $d, $a, $b, $c;",
        32,
        [32] * 3,
        lambda a, b, c: mask(clamp((s(a) * s(b) >> 32) + s(c), 32), 32),
    )

    def halves(f, sign):
        def one(a, b, k):
            x, y = a >> 16 * k & 0xFFFF, b >> 16 * k & 0xFFFF
            return mask(f(signed(x, 16), signed(y, 16)) if sign else f(x, y), 16)

        return lambda a, b: one(a, b, 0) | one(a, b, 1) << 16

    for t in ("u16x2", "s16x2"):
        check(f"add.{t} $d, $a, $b;", 32, [32, 32], halves(lambda x, y: x + y, t[0] == "s"))
        check(f"min.{t} $d, $a, $b;", 32, [32, 32], halves(min, t[0] == "s"))
        check(f"max.{t} $d, $a, $b;", 32, [32, 32], halves(max, t[0] == "s"))
    relu = halves(lambda x, y: max(min(x, y), 0), True)
    check("min.relu.s16x2 $d, $a, $b;", 32, [32, 32], relu)
    check("max.relu.s16x2 $d, $a, $b;", 32, [32, 32], halves(lambda x, y: max(x, y, 0), True))


def test_carry_chain():
    for chain, model in [
        ("add.cc.u32 $d, $a, $b; addc.u32 $d, $a, $b;", lambda a, b: a + b + (a + b >> 32)),
        ("sub.cc.u32 $d, $a, $b; subc.u32 $d, $a, $b;", lambda a, b: a - b - (a < b)),
        (
            "mad.lo.cc.u32 $d, $a, $b, $b; madc.hi.u32 $d, $a, $b, $a;",
            lambda a, b: (a * b >> 32) + a + (mask(a * b, 32) + b >> 32),
        ),
    ]:
        rng = np.random.default_rng(5)
        values = [operands(rng, 32) for _ in range(2)]
        out = execute(chain, 32, values)
        want = [mask(model(int(a), int(b)), 32) for a, b in zip(*values, strict=True)]
        assert out.tolist() == want


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic_and_shifts(bits):
    check(f"and.b{bits} $d, $a, $b;", bits, [bits] * 2, lambda a, b: a & b)
    check(f"or.b{bits} $d, $a, $b;", bits, [bits] * 2, lambda a, b: a | b)
    check(f"xor.b{bits} $d, $a, $b;", bits, [bits] * 2, lambda a, b: a ^ b)
    check(f"not.b{bits} $d, $a;", bits, [bits], lambda a: mask(~a, bits))
    check(f"cnot.b{bits} $d, $a;", bits, [bits], lambda a: int(a == 0))
    check(f"shl.b{bits} $d, $a, $b;", bits, [bits, 32], lambda a, n: mask(a << min(n, 64), bits))
    check(f"shr.u{bits} $d, $a, $b;", bits, [bits, 32], lambda a, n: a >> min(n, 64))
    check(
        f"shr.s{bits} $d, $a, $b;",
        bits,
        [bits, 32],
        lambda a, n: mask(signed(a, bits) >> min(n, 64), bits),
    )


def test_bit_fields():
    for w in (32, 64):
        check(f"brev.b{w} $d, $a;", w, [w], lambda a, w=w: int(f"{a:0{w}b}"[::-1], 2))
        check(f"popc.b{w} $d, $a;", 32, [w], lambda a: bin(a).count("1"))
        check(f"clz.b{w} $d, $a;", 32, [w], lambda a, w=w: w - a.bit_length())

        def bfi(a, b, p, n, w=w):
            p, n = p & 255, n & 255
            field = mask((1 << n) - 1, w)
            return b if n == 0 or p >= w else mask(b & ~(field << p) | (a & field) << p, w)

        check(f"bfi.b{w} $d, $a, $b, $c, $d4;".replace("$d4", "7"), w, [w, w, 32],
              lambda a, b, p, w=w: bfi(a, b, p, 7, w))  # fmt: skip

        def bfe(a, p, n, w, sign):
            p, n = p & 255, n & 255
            top = min(p + n - 1, w - 1)
            fill = sign and n > 0 and a >> top & 1
            bits = [
                (a >> (p + k) & 1) if k < n and p + k < w else int(bool(fill)) for k in range(w)
            ]
            return 0 if n == 0 else sum(b << k for k, b in enumerate(bits))

        for t in "us":
            check(f"bfe.{t}{w} $d, $a, $b, $c;", w, [w, 32, 32],
                  lambda a, p, n, w=w, t=t: bfe(a, p, n, w, t == "s"))  # fmt: skip

            def bfind(a, w=w, t=t):
                inverted = t == "s" and a >> (w - 1)
                return mask((a ^ mask(-1, w) if inverted else a).bit_length() - 1, 32)

            check(f"bfind.{t}{w} $d, $a;", 32, [w], bfind)
    table = 0xCA

    def lop3(a, b, c):
        r = 0
        for k in range(32):
            r |= (table >> ((a >> k & 1) * 4 + (b >> k & 1) * 2 + (c >> k & 1)) & 1) << k
        return r

    check(f"lop3.b32 $d, $a, $b, $c, {table};", 32, [32] * 3, lop3)

    def prmt(a, b, s):
        v, r = b << 32 | a, 0
        for k in range(4):
            n = s >> 4 * k & 15
            byte = v >> 8 * (n & 7) & 255
            r |= (byte if n < 8 else 255 * (byte >> 7)) << 8 * k
        return r

    check("prmt.b32 $d, $a, $b, $c;", 32, [32] * 3, prmt)
    check("shf.l.wrap.b32 $d, $a, $b, $c;", 32, [32] * 3,
          lambda a, b, n: (b << 32 | a) << (n & 31) >> 32 & 0xFFFFFFFF)  # fmt: skip
    check("shf.r.clamp.b32 $d, $a, $b, $c;", 32, [32] * 3,
          lambda a, b, n: (b << 32 | a) >> min(n, 32) & 0xFFFFFFFF)  # fmt: skip


CMPS = ["eq", "ne", "lt", "le", "gt", "ge"]


@pytest.mark.parametrize("t", [*INT_TYPES, "f32", "f64"])
def test_comparisons(t):
    bits = int(t[1:])
    is_float = t[0] == "f"
    s = by_type("", t)
    names = CMPS + ([c + "u" for c in CMPS] + ["num", "nan"] if is_float else [])
    for c in names:
        if is_float:
            model = lambda a, b, c=c: compare(c, a, b, bits)  # noqa: E731
        else:
            model = lambda a, b, c=c: {  # noqa: E731
                "eq": s(a) == s(b), "ne": s(a) != s(b), "lt": s(a) < s(b), "le": s(a) <= s(b),
                "gt": s(a) > s(b), "ge": s(a) >= s(b)}[c]  # fmt: skip
        check(f"setp.{c}.{t} $d, $a, $b;", 0, [bits, bits], model, floats=is_float)


@pytest.mark.parametrize("fmt", [32, 64])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_float_arithmetic(fmt, mode):
    t = f"f{fmt}"
    neg = 1 << (fmt - 1)

    def add(a, b):
        return fma(a, ONE[fmt], b, fmt, mode)

    def mul(a, b):
        x, y = decode(a, fmt), decode(b, fmt)
        zero = neg if "nan" not in (x, y) and x[1] ^ y[1] else 0
        return fma(a, b, zero, fmt, mode)

    check(f"add.{mode}.{t} $d, $a, $b;", fmt, [fmt] * 2, add, floats=True)
    check(f"sub.{mode}.{t} $d, $a, $b;", fmt, [fmt] * 2, lambda a, b: add(a, b ^ neg), floats=True)
    check(f"mul.{mode}.{t} $d, $a, $b;", fmt, [fmt] * 2, mul, floats=True)
    check(f"fma.{mode}.{t} $d, $a, $b, $c;", fmt, [fmt] * 3,
          lambda a, b, c: fma(a, b, c, fmt, mode), floats=True)  # fmt: skip
    check(f"div.{mode}.{t} $d, $a, $b;", fmt, [fmt] * 2,
          lambda a, b: divide(a, b, fmt, mode), floats=True)  # fmt: skip
    check(f"rcp.{mode}.{t} $d, $a;", fmt, [fmt],
          lambda a: divide(ONE[fmt], a, fmt, mode), floats=True)  # fmt: skip


def test_float_modifiers():
    def saturate(x):
        v = decode(x, 32)
        if v == "nan" or v[1]:
            return 0
        return ONE[32] if v[0] == "inf" or v[0] > 1 else x

    def ftz(a, b, c):
        return flush(fma(flush(a, 32), flush(b, 32), flush(c, 32), 32), 32)

    check("fma.rn.ftz.f32 $d, $a, $b, $c;", 32, [32] * 3, ftz, floats=True)
    check("fma.rn.sat.f32 $d, $a, $b, $c;", 32, [32] * 3,
          lambda a, b, c: saturate(fma(a, b, c, 32)), floats=True)  # fmt: skip
    check("add.ftz.f32 $d, $a, $b;", 32, [32] * 2, lambda a, b: ftz(a, ONE[32], b), floats=True)
    check("neg.f32 $d, $a;", 32, [32], lambda a: a ^ 1 << 31, floats=True)
    check("abs.f32 $d, $a;", 32, [32], lambda a: a & 0x7FFFFFFF, floats=True)
    check("copysign.f32 $d, $a, $b;", 32, [32] * 2,
          lambda a, b: b & 0x7FFFFFFF | a & 1 << 31, floats=True)  # fmt: skip

    def extreme(a, b, want_max):
        x, y = decode(a, 32), decode(b, 32)
        if x == "nan":
            return nan_bits(32) if y == "nan" else b
        if y == "nan":
            return a
        less = compare("lt", a, b, 32) or (compare("eq", a, b, 32) and x[1] > y[1])
        return b if less == want_max else a

    check("min.f32 $d, $a, $b;", 32, [32] * 2, lambda a, b: extreme(a, b, False), floats=True)
    check("max.f32 $d, $a, $b;", 32, [32] * 2, lambda a, b: extreme(a, b, True), floats=True)


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_float_to_integer(mode):
    for t in ("s32", "u32", "s64", "u64"):
        bits = int(t[1:])
        low, high = (
            (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if t[0] == "s" else (0, (1 << bits) - 1)
        )

        def model(a, low=low, high=high, bits=bits):
            v = decode(a, 32)
            if v == "nan":
                return 1 << 63 if bits == 64 else 0
            if v[0] == "inf":
                return mask(low if v[1] else high, bits)
            r = golden._to_integer(abs(v[0]), mode[:2], v[1])
            return mask(max(low, min(high, -r if v[1] else r)), bits)

        check(f"cvt.{mode}.{t}.f32 $d, $a;", bits, [32], model, floats=True)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_integer_to_float_and_between_floats(mode):
    from fractions import Fraction

    for t in ("s32", "u32", "s64", "u64"):
        bits = int(t[1:])
        s = by_type("", t)
        check(f"cvt.{mode}.f32.{t} $d, $a;", 32, [bits],
              lambda a, s=s: encode(Fraction(s(a)), 32, mode))  # fmt: skip

    def narrow(a, source, to):
        v = decode(a, source)
        if v == "nan":
            return nan_bits(to)
        return inf_bits(to, v[1]) if v[0] == "inf" else encode(v[0], to, mode, v[1])

    check(f"cvt.{mode}.f32.f64 $d, $a;", 32, [64], lambda a: narrow(a, 64, 32), floats=True)
    check(f"cvt.{mode}.f16.f32 $d, $a;", 16, [32], lambda a: narrow(a, 32, 16), floats=True)
    if mode in ("rn", "rz"):
        check(
            f"cvt.{mode}.bf16.f32 $d, $a;", 16, [32], lambda a: narrow(a, 32, "bf16"), floats=True
        )


def test_integer_conversions():
    for source in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
        for to in ("u16", "s16", "u32", "s32", "u64", "s64"):
            sb, tb = int(source[1:]), int(to[1:])
            register = max(sb, 16)
            value = (
                (lambda a, sb=sb: signed(mask(a, sb), sb))
                if source[0] == "s"
                else (lambda a, sb=sb: mask(a, sb))
            )
            check(f"cvt.{to}.{source} $d, $a;", tb, [register],
                  lambda a, v=value, tb=tb: mask(v(a), tb))  # fmt: skip
            low, high = (
                (-(1 << (tb - 1)), (1 << (tb - 1)) - 1) if to[0] == "s" else (0, (1 << tb) - 1)
            )
            check(f"cvt.sat.{to}.{source} $d, $a;", tb, [register],
                  lambda a, v=value, lo=low, hi=high, tb=tb:
                  mask(max(lo, min(hi, v(a))), tb))  # fmt: skip
