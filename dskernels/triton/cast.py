"""Number formats inside Triton kernels: E4M3 by integer arithmetic, and casts that round right.

Converting through the compiler's own casts is not an option everywhere: sm_80 has no FP8 type, and
Triton's interpreter loses the carry when it rounds (124.3 becomes 64). These functions give the
same bits on every target. Data pointers are uint8.
"""

import triton
import triton.language as tl


@triton.jit
def encode_e4m3(x):
    """fp32 -> e4m3 bits (uint8): round to nearest even, saturate at 448, NaN to 0x7f with sign."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    absolute = magnitude.to(tl.float32, bitcast=True)
    # Normal numbers: round the 20 dropped mantissa bits to even, then move the exponent's bias from
    # 127 to 7. A carry out of the mantissa goes into the exponent, as it should.
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)
    normal = (rounded >> 20) - (120 << 3)
    # Subnormal: multiples of 2^-9. Adding 1.5 * 2^23 rounds to an integer in the low mantissa bits.
    subnormal = (absolute * 512.0 + 12582912.0).to(tl.uint32, bitcast=True) & 0xFF
    code = tl.where(absolute < 0.015625, subnormal, normal)
    code = tl.where(absolute >= 464.0, 0x7E, tl.minimum(code, 0x7E))
    code = tl.where(absolute != absolute, 0x7F, code)
    return (code | sign).to(tl.uint8)


@triton.jit
def encode_e5m6(x):
    """fp32 -> E5M6 as float16 bits (int16): to nearest even, saturate at 65024, NaN to 0x7e00."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 31) << 15
    magnitude = tl.where(x != x, 0.0, tl.minimum(tl.abs(x), 65024.0))
    wide = magnitude.to(tl.uint32, bitcast=True)
    # As in encode_e4m3: 17 mantissa bits are dropped, the bias moves from 127 to 15; subnormal
    # numbers are multiples of 2^-20.
    normal = ((wide + 0xFFFF + ((wide >> 17) & 1)) >> 17) - (112 << 6)
    subnormal = (magnitude * 1048576.0 + 12582912.0).to(tl.uint32, bitcast=True) & 0x7F
    code = tl.where(magnitude < 6.103515625e-05, subnormal, normal) << 4
    return tl.where(x != x, 0x7E00, code | sign).to(tl.int16)


@triton.jit
def decode_e4m3(code):
    """e4m3 bits (uint8) -> fp16, exact.

    The 7 bits below the sign, moved to the top of fp16's 15, are the value times 2^-8 (the biases
    are 7 and 15), subnormals included; NaN is put back afterwards.
    """
    wide = code.to(tl.uint16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    value = bits.to(tl.float16, bitcast=True) * 256.0
    nan = tl.full(value.shape, float("nan"), tl.float16)
    return tl.where((wide & 0x7F) == 0x7F, nan, value.to(tl.float16))


@triton.jit
def ceil_power_of_two(scale):
    """The smallest power of two >= scale, for positive normal fp32: the UE8M0 scale."""
    bits = scale.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0xFF800000).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(amax, POWER_OF_TWO: tl.constexpr, FORMAT_MAX: tl.constexpr = 448.0):
    """Scale of a block from its largest magnitude: max(amax, 1e-4) / 448, IEEE division."""
    scale = tl.math.div_rn(tl.maximum(amax, 1e-4), FORMAT_MAX)
    if POWER_OF_TWO:
        scale = ceil_power_of_two(scale)
    return scale


@triton.jit
def cast_to(x, like: tl.constexpr):
    """fp32 -> the type `like`, round to nearest even. bf16 is rounded here, because Triton's
    interpreter truncates; the cast that follows is then exact on every target."""
    if like == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        exact = tl.where(x != x, bits | 0x400000, rounded).to(tl.float32, bitcast=True)
        return exact.to(tl.bfloat16)
    return x.to(like)
