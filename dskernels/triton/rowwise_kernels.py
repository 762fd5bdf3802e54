"""The Triton kernels of rowwise.py.

Dimension letters: m rows, k columns. Scales of 1 x 128 groups are MN-major: [planes, groups, rows].
"""

import triton
import triton.language as tl

from .cast import cast_to, decode_e4m3, encode_e4m3, encode_e5m6, scale_of


@triton.jit
def finite_magnitude(x):
    """|x|, 0 for NaN: a NaN stays out of its block's amax (it becomes a NaN element)."""
    return tl.where(x != x, 0.0, tl.abs(x))


@triton.jit
def quantize_kernel(
    x_ptr, data_ptr, scale_ptr, m, k, ld_x, ld_scale, plane_rows, plane_scale,
    SWIGLU: tl.constexpr, POWER_OF_TWO: tl.constexpr, E5M6: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """x [m, k] (SWIGLU: [m, 2k] = [gate; up]) -> data [m, k], scale [planes, groups, plane_rows].

    data is uint8 (e4m3), or int16 bits of float16 (E5M6).
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    at = rows[:, None].to(tl.int64) * ld_x + columns[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SWIGLU:
        up = tl.load(x_ptr + at + k, mask=inside, other=0.0).to(tl.float32)
        x = x / (1.0 + tl.exp(-x)) * up
    scale = scale_of(
        tl.max(finite_magnitude(x), axis=1), POWER_OF_TWO, 65024.0 if E5M6 else 448.0
    )  # fmt: skip
    quotient = tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    out = rows[:, None].to(tl.int64) * k + columns[None, :]
    tl.store(data_ptr + out, encode_e5m6(quotient) if E5M6 else encode_e4m3(quotient), mask=inside)
    plane = (rows // plane_rows).to(tl.int64)
    to = plane * plane_scale + tl.program_id(1).to(tl.int64) * ld_scale + rows % plane_rows
    tl.store(scale_ptr + to, scale, mask=rows < m)


@triton.jit
def quantize_block_kernel(
    x_ptr, data_ptr, scale_ptr, m, k, POWER_OF_TWO: tl.constexpr, GROUP: tl.constexpr
):
    """x [planes, m, k] -> e4m3 data, one scale per 128 x 128 block; a program takes a block."""
    rows = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    columns = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    plane = tl.program_id(2).to(tl.int64)
    at = (plane * m + rows[:, None]) * k + columns[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(finite_magnitude(x), axis=1), axis=0), POWER_OF_TWO)
    code = encode_e4m3(tl.math.div_rn(x, tl.zeros(x.shape, tl.float32) + scale))
    tl.store(data_ptr + at, code, mask=inside)
    block = (plane * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1)
    tl.store(scale_ptr + block + tl.program_id(1), scale)


@triton.jit
def quantize_transpose_kernel(
    x_ptr, x_scale_ptr, data_ptr, scale_ptr, m, k, ld_scale,
    block_rows, block_columns, x_scale_row, x_scale_column,
    SCALED: tl.constexpr, POWER_OF_TWO: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x [m, k] -> e4m3 x^T [k, m], scale [ceil(m / 128), k]: groups of 128 rows of a column.

    SCALED: x is e4m3 (uint8) with one scale per block_rows x block_columns.
    """
    rows = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    at = rows[:, None].to(tl.int64) * k + columns[None, :]
    if SCALED:
        x = decode_e4m3(tl.load(x_ptr + at, mask=inside, other=0)).to(tl.float32)
        from_ = rows[:, None] // block_rows * x_scale_row
        from_ += columns[None, :] // block_columns * x_scale_column
        x = x * tl.load(x_scale_ptr + from_, mask=inside, other=0.0)
    else:
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(finite_magnitude(x), axis=0), POWER_OF_TWO)
    code = encode_e4m3(tl.math.div_rn(x, tl.broadcast_to(scale[None, :], x.shape)))
    out = columns[None, :].to(tl.int64) * m + rows[:, None]
    tl.store(data_ptr + out, code, mask=inside)
    to = tl.program_id(0).to(tl.int64) * ld_scale + columns
    tl.store(scale_ptr + to, scale, mask=columns < k)


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, scale_ptr, d, eps,
    plane_rows, ld_scale, plane_scale,
    HAS_RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = x / rms(x) * weight, one program a row; with a residual, x + residual takes x's place.

    QUANTIZE: y is e4m3 (uint8), its scales [planes, groups, plane_rows].
    """
    index = tl.program_id(0)
    row = index.to(tl.int64) * d
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    x = tl.load(x_ptr + row + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row + columns, mask=inside, other=0.0)
        x = cast_to(x.to(tl.float32) + residual.to(tl.float32), x.dtype)
        tl.store(sum_ptr + row + columns, x, mask=inside)
    wide = x.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / d + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = wide * inverse * weight
    if QUANTIZE:
        groups = tl.reshape(y, (BLOCK // GROUP, GROUP))
        scale = scale_of(tl.max(finite_magnitude(groups), axis=1), POWER_OF_TWO)
        code = encode_e4m3(tl.math.div_rn(groups, tl.broadcast_to(scale[:, None], groups.shape)))
        tl.store(y_ptr + row + columns, tl.reshape(code, (BLOCK,)), mask=inside)
        group = tl.arange(0, BLOCK // GROUP)
        plane = (index // plane_rows).to(tl.int64)
        to = plane * plane_scale + group * ld_scale + index % plane_rows
        tl.store(scale_ptr + to, scale, mask=group * GROUP < d)
    else:
        tl.store(y_ptr + row + columns, cast_to(y, x.dtype), mask=inside)


@triton.jit
def swiglu_kernel(x_ptr, y_ptr, k, BLOCK: tl.constexpr):
    """x [m, 2k] = [gate; up] -> silu(gate) * up, a program takes BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < k
    gate = tl.load(x_ptr + row * 2 * k + columns, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * 2 * k + k + columns, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    y = wide / (1.0 + tl.exp(-wide)) * up
    tl.store(y_ptr + row * k + columns, cast_to(y, gate.dtype), mask=inside)


@triton.jit
def swiglu_backward_kernel(grad_ptr, x_ptr, dx_ptr, k, BLOCK: tl.constexpr):
    """With s = sigmoid(gate): d gate = grad up s (1 + gate (1 - s)), d up = grad gate s."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < k
    at = row * 2 * k + columns
    raw = tl.load(x_ptr + at, mask=inside, other=0.0)
    gate = raw.to(tl.float32)
    up = tl.load(x_ptr + at + k, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * k + columns, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    tl.store(dx_ptr + at, cast_to(grad * up * (s * (1 + gate * (1 - s))), raw.dtype), mask=inside)
    tl.store(dx_ptr + at + k, cast_to(grad * gate * s, raw.dtype), mask=inside)


@triton.jit
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, heads, half,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate the pairs of one head of one token by the token's angles."""
    row = tl.program_id(0).to(tl.int64)  # token * heads + head
    pair = tl.arange(0, BLOCK)
    inside = pair < half
    first = pair * 2 if INTERLEAVED else pair
    second = first + (1 if INTERLEAVED else half)
    token = row // heads
    cos = tl.load(cos_ptr + token * half + pair, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + token * half + pair, mask=inside, other=0.0)
    if INVERSE:
        sin = -sin
    x = x_ptr + row * 2 * half
    y = y_ptr + row * 2 * half
    a = tl.load(x + first, mask=inside, other=0.0)
    b = tl.load(x + second, mask=inside, other=0.0).to(tl.float32)
    wide = a.to(tl.float32)
    tl.store(y + first, cast_to(wide * cos - b * sin, a.dtype), mask=inside)
    tl.store(y + second, cast_to(wide * sin + b * cos, a.dtype), mask=inside)


@triton.jit
def dequantize_kernel(
    data_ptr, scale_ptr, y_ptr, m, k, block_rows, block_columns, scale_rows, scale_columns,
    E4M3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """data [planes * m, k] (uint8 e4m3, or E5M6 in fp16) * scale [planes, scale rows, columns]."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < k
    at = row.to(tl.int64) * k + columns
    data = tl.load(data_ptr + at, mask=inside, other=0)
    value = decode_e4m3(data).to(tl.float32) if E4M3 else data.to(tl.float32)
    scale_row = row // m * scale_rows + row % m // block_rows
    from_ = scale_row.to(tl.int64) * scale_columns + columns // block_columns
    value = value * tl.load(scale_ptr + from_, mask=inside, other=0.0)
    tl.store(y_ptr + at, cast_to(value, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def pack_e5m6_kernel(wide_ptr, packed_ptr, num_words, k, words_per_row, BLOCK: tl.constexpr):
    """float16 bits (int16) [rows, k] -> words of 3 bytes, 2 elements each [rows, words_per_row]."""
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = word < num_words
    column = word % words_per_row * 2
    at = word // words_per_row * k + column
    low = (tl.load(wide_ptr + at, mask=inside, other=0).to(tl.int32) >> 4) & 0xFFF
    high = tl.load(wide_ptr + at + 1, mask=inside & (column + 1 < k), other=0)
    bits = low | (((high.to(tl.int32) >> 4) & 0xFFF) << 12)
    for byte in tl.static_range(3):
        tl.store(packed_ptr + word * 3 + byte, ((bits >> (8 * byte)) & 0xFF).to(tl.uint8), inside)


@triton.jit
def unpack_e5m6_kernel(packed_ptr, wide_ptr, num_words, k, words_per_row, BLOCK: tl.constexpr):
    """The inverse of pack_e5m6_kernel."""
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = word < num_words
    bits = tl.zeros((BLOCK,), tl.int32)
    for byte in tl.static_range(3):
        part = tl.load(packed_ptr + word * 3 + byte, mask=inside, other=0).to(tl.int32)
        bits |= part << (8 * byte)
    column = word % words_per_row * 2
    at = word // words_per_row * k + column
    tl.store(wide_ptr + at, ((bits & 0xFFF) << 4).to(tl.int16), mask=inside)
    tl.store(
        wide_ptr + at + 1, ((bits >> 12) << 4).to(tl.int16), mask=inside & (column + 1 < k)
    )  # fmt: skip
