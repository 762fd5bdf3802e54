"""Runs one PTX instruction over many operands, and exact scalar models to compare with.

Models work on bit patterns (Python integers) and on exact fractions; they share nothing with the
emulator. A case runs twice: with full warps, and under a predicate that only some lanes hold.
"""

from fractions import Fraction

import numpy as np

from dskernels import emu

LANES = 256
SPECIAL = {
    16: [0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x3C00, 0xBC00, 0x7C00, 0xFC00, 0x7E00, 0x0400, 0x03FF],
    32: [0, 1, 2, 31, 32, 33, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x3F800000, 0xBF800000,
         0x7F800000, 0xFF800000, 0x7FC00000, 0x00800000, 0x007FFFFF, 0x7F7FFFFF, 0x4F000000],
    64: [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0x3FF0000000000000, 0x7FF0000000000000,
         0xFFF0000000000000, 0x7FF8000000000000, 0x0010000000000000, 63, 64],
}  # fmt: skip


def operands(rng, bits, n=LANES, floats=False):
    """Fuzzed operands: specials in all pairings, small numbers, uniform bits (or tame floats)."""
    values = rng.integers(0, 2**bits, n, dtype=np.uint64, endpoint=False if bits < 64 else False)
    small = rng.integers(0, 40, n, dtype=np.uint64)
    out = np.where(rng.random(n) < 0.3, small, values)
    if floats and bits in (32, 64):
        kind = np.float32 if bits == 32 else np.float64
        tame = (rng.standard_normal(n) * 10.0 ** rng.integers(-3, 4, n)).astype(kind)
        out = np.where(rng.random(n) < 0.6, tame.view(f"u{bits // 8}").astype(np.uint64), out)
    pick = rng.random(n) < 0.35
    out[pick] = rng.choice(np.array(SPECIAL[bits], np.uint64), int(pick.sum()))
    return out.astype(f"u{bits // 8}")


def _register(bits):
    return {16: "rs", 32: "r", 64: "rd"}[bits]


def snippet(text, dst, srcs, predicate=False, target="sm_90a"):
    """A kernel around `text` ("add.s32 $d, $a, $b;"). dst 0: a predicate named $d."""
    names = "abcd"
    body = []
    for k, bits in enumerate(srcs):
        reg = f"%{_register(bits)}{k + 1}"
        body.append(f"ld.param.u64 %x{k}, [p{k}];")
        body.append(f"mul.wide.u32 %o, %t, {bits // 8}; add.s64 %x{k}, %x{k}, %o;")
        body.append(f"ld.global.b{bits} {reg}, [%x{k}];")
        text = text.replace(f"${names[k]}", reg)
    width = dst or 32
    result = f"%{_register(width)}9"
    guard = "@%q " if predicate else ""
    if dst == 0:
        instruction = f"setp.ne.b32 %p, 0, 0; {guard}{text.replace('$d', '%p')}"
        instruction += f" selp.b32 {result}, 1, 0, %p;"
    else:
        instruction = f"mov.b{width} {result}, 0; {guard}{text.replace('$d', result)}"
    params = ", ".join(f".param .u64 p{k}" for k in range(len(srcs) + 1))
    return f"""
.version 8.6
.target {target}
.address_size 64
.visible .entry k({params}) {{
.reg .b16 %rs<12>; .reg .b32 %r<12>; .reg .b64 %rd<12>; .reg .b64 %x<8>; .reg .b64 %o;
.reg .b32 %t; .reg .b32 %u; .reg .pred %p, %q;
mov.u32 %t, %tid.x;
and.b32 %u, %t, 5;
setp.eq.u32 %q, %u, 1;
{chr(10).join(body)}
{instruction}
ld.param.u64 %x7, [p{len(srcs)}];
mul.wide.u32 %o, %t, {width // 8};
add.s64 %x7, %x7, %o;
st.global.b{width} [%x7], {result};
ret;
}}
"""


def execute(text, dst, values, predicate=False):
    """Results (bit patterns) of all lanes."""
    width = dst or 32
    bits = [v.dtype.itemsize * 8 for v in values]
    module = emu.Module(snippet(text, dst, bits, predicate))
    kernel = module.kernel("k")
    out = np.zeros(LANES, f"u{width // 8}")
    kernel[1, LANES](*values, out)
    return out


def check(text, dst, srcs, model, floats=False, seed=0):
    """Compares an instruction with `model` bit by bit, unguarded and under a predicate."""
    rng = np.random.default_rng([seed, *text.encode()])
    values = [operands(rng, bits, LANES, floats) for bits in srcs]
    expected = [int(model(*(int(v[k]) for v in values))) for k in range(LANES)]
    for predicate in (False, True):
        out = execute(text, dst, values, predicate)
        for k in range(LANES):
            want = expected[k] if not predicate or k & 5 == 1 else 0
            assert int(out[k]) == want, (
                f"{text} lane {k}: operands {[hex(int(v[k])) for v in values]}, "
                f"got {int(out[k]):#x}, expected {want:#x}"
            )


# --- integers


def signed(x, bits):
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def mask(x, bits):
    return x & ((1 << bits) - 1)


def clamp(x, bits):
    return max(-(1 << (bits - 1)), min((1 << (bits - 1)) - 1, x))


# --- floats: exact values, one rounding

ONE = {32: 0x3F800000, 64: 0x3FF0000000000000}
FORMATS = {16: (5, 10), 32: (8, 23), 64: (11, 52), "bf16": (8, 7)}


def decode(x, fmt):
    """Bits -> 'nan', ('inf', sign), or (Fraction, sign)."""
    e_bits, m_bits = FORMATS[fmt]
    sign = x >> (e_bits + m_bits) & 1
    e, m = x >> m_bits & ((1 << e_bits) - 1), x & ((1 << m_bits) - 1)
    bias = (1 << (e_bits - 1)) - 1
    if e == (1 << e_bits) - 1:
        return "nan" if m else ("inf", sign)
    scale = Fraction(2) ** ((e or 1) - bias - m_bits)
    value = (m | (1 << m_bits if e else 0)) * scale
    return (-value if sign else value), sign


def nan_bits(fmt):
    e_bits, m_bits = FORMATS[fmt]
    return (1 << (e_bits + m_bits)) - 1


def inf_bits(fmt, sign):
    e_bits, m_bits = FORMATS[fmt]
    return sign << (e_bits + m_bits) | ((1 << e_bits) - 1) << m_bits


def _to_integer(q, mode, sign):
    """Non-negative fraction to integer by rounding mode (of the signed number)."""
    low = q.numerator // q.denominator
    rest = q - low
    if rest == 0:
        return low
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low & 1),
        "rz": False,
        "rm": bool(sign),
        "rp": not sign,
    }[mode]
    return low + bool(up)


def encode(value, fmt, mode="rn", zero_sign=0):
    """Fraction -> bits, rounded once; overflow by mode."""
    e_bits, m_bits = FORMATS[fmt]
    bias = (1 << (e_bits - 1)) - 1
    top = e_bits + m_bits
    if value == 0:
        return zero_sign << top
    sign = int(value < 0)
    v = abs(value)
    e = v.numerator.bit_length() - v.denominator.bit_length()
    if Fraction(2) ** e > v:
        e -= 1
    e = max(e, 1 - bias)
    m = _to_integer(v / Fraction(2) ** (e - m_bits), mode, sign)
    if m >= 2 << m_bits:
        m, e = m >> 1, e + 1
    if e > bias:
        infinite = mode == "rn" or (mode == "rp" and not sign) or (mode == "rm" and sign)
        return inf_bits(fmt, sign) - (0 if infinite else 1)
    biased = e + bias if m >> m_bits else 0
    return sign << top | biased << m_bits | (m & ((1 << m_bits) - 1))


def flush(x, fmt):
    e_bits, m_bits = FORMATS[fmt]
    return x & (1 << (e_bits + m_bits)) if x >> m_bits & ((1 << e_bits) - 1) == 0 else x


def fma(a, b, c, fmt, mode="rn"):
    """a * b + c on bit patterns."""
    x, y, z = decode(a, fmt), decode(b, fmt), decode(c, fmt)
    if "nan" in (x, y, z):
        return nan_bits(fmt)
    sign = x[1] ^ y[1]
    if "inf" in (x[0], y[0]):
        if x[0] == 0 or y[0] == 0 or (z[0] == "inf" and z[1] != sign):
            return nan_bits(fmt)
        return inf_bits(fmt, sign)
    if z[0] == "inf":
        return inf_bits(fmt, z[1])
    total = x[0] * y[0] + z[0]
    same = sign == z[1]
    zero = sign if same and (x[0] * y[0] == 0) else int(mode == "rm")
    if x[0] * y[0] == 0 and z[0] == 0 and same:
        zero = sign
    return encode(total, fmt, mode, zero)


def divide(a, b, fmt, mode="rn"):
    x, y = decode(a, fmt), decode(b, fmt)
    if "nan" in (x, y):
        return nan_bits(fmt)
    sign = x[1] ^ y[1]
    if x[0] == "inf":
        return nan_bits(fmt) if y[0] == "inf" else inf_bits(fmt, sign)
    if y[0] == "inf":
        return encode(Fraction(0), fmt, mode, sign)
    if y[0] == 0:
        return nan_bits(fmt) if x[0] == 0 else inf_bits(fmt, sign)
    return encode(x[0] / y[0], fmt, mode, sign)


def compare(op, a, b, fmt):
    """Float comparison by PTX's names."""
    x, y = decode(a, fmt), decode(b, fmt)
    if op in ("num", "nan"):
        return ("nan" in (x, y)) == (op == "nan")
    if "nan" in (x, y):
        return op.endswith("u")

    def key(v):
        return (-(10**400) if v[1] else 10**400) if v[0] == "inf" else v[0]

    x, y = key(x), key(y)
    base = op[:-1] if op.endswith("u") else op
    return {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}[base]
