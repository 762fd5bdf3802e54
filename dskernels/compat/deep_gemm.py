"""DeepGEMM's interface for Hopper on this package's ops: `import dskernels.compat.deep_gemm as
deep_gemm`.

Names, arguments and layouts are DeepGEMM's (v2, and the v1 aliases at the end); tensors may also be
on the CPU, where DSK_BACKEND chooses what runs. Functions write `d` and return None.

FP8 operands are pairs (data, scale): data e4m3, scales fp32 with any strides, [mn, ceil(k / 128)]
of a 1x128 operand or [ceil(n / 128), ceil(k / 128)] of a 128x128 one. Dimension letters: m rows, n
columns, k depth, g groups; "nt" is a [m, k], b [n, k]; in nn, tn and tt the transposed operand
comes as [k, ...], scales likewise, and is brought into k-major order first, the only one that
Hopper's FP8 tensor cores read.

Differences, all towards more: C with any recipe and fp32 or bf16 results; no alignment is asked of
groups; fp32 scales are never rounded to powers of two, whatever disable_ue8m0_cast says (DeepGEMM
does that on other architectures only). compiled_dims is accepted and means nothing: nothing is
compiled at run time. Packed UE8M0 scales (int32) are Blackwell's and refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..types import ScaledTensor

Pair = tuple[Tensor, Tensor]
Recipe = tuple[int, int, int]

_GROUP = 128
_H100_SMS = 132
_num_sms: int | None = None
_alignment = 128


# ---- settings, layouts -------------------------------------------------------------------------


def set_num_sms(num_sms: int) -> None:
    """Launches from now on occupy at most so many SMs."""
    global _num_sms
    if num_sms < 1:
        raise ValueError(f"num_sms: expected a positive integer, got {num_sms}")
    _num_sms = num_sms


def get_num_sms() -> int:
    """What `set_num_sms` set, else the device's SMs (an H100's where there is no GPU)."""
    if _num_sms is not None:
        return _num_sms
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties().multi_processor_count
    return _H100_SMS


def set_mk_alignment_for_contiguous_layout(alignment: int) -> None:
    """Where the next group of a psum layout starts: the end of the last, rounded up to this."""
    global _alignment
    if alignment < 1:
        raise ValueError(f"alignment: expected a positive integer, got {alignment}")
    _alignment = alignment


def get_mk_alignment_for_contiguous_layout() -> int:
    return _alignment


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def align(x: int, y: int) -> int:
    return ceil_div(x, y) * y


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """x rounded up to what fills 16 bytes."""
    return align(x, 16 // element_size)


def get_mn_major_tma_aligned_tensor(sf: Tensor) -> Tensor:
    """fp32 scales [(g,) mn, c] with strides (1, align(mn, 4)): what TMA reads."""
    if sf.dtype != torch.float32 or sf.dim() not in (2, 3):
        raise TypeError(f"sf: expected fp32 [(g,) mn, c], got {sf.dtype} {list(sf.shape)}")
    mn, columns = sf.shape[-2:]
    stride = get_tma_aligned_size(mn, 4)
    if sf.stride()[-2:] == (1, stride) and (sf.dim() == 2 or sf.stride(0) == columns * stride):
        return sf
    storage = sf.new_zeros(*sf.shape[:-2], columns, stride)
    storage[..., :mn] = sf.transpose(-2, -1)
    return storage.transpose(-2, -1)[..., :mn, :]


def transform_sf_into_required_layout(
    sf: Tensor,
    mn: int,
    k: int,
    recipe: Recipe,
    num_groups: int | None = None,
    is_sfa: bool = False,
    disable_ue8m0_cast: bool = False,
) -> Tensor:
    """Scales as Hopper's kernels read them: MN-major for 1x128, contiguous for 128x128.

    recipe (granularity of a's rows, of b's rows, of k). Raises ValueError for a shape that does not
    fit mn, k and num_groups.
    """
    rows = recipe[0] if is_sfa else recipe[1]
    lead = () if num_groups is None else (num_groups,)
    expected = (*lead, ceil_div(mn, rows), ceil_div(k, recipe[2]))
    if tuple(sf.shape) != expected:
        raise ValueError(f"sf: expected shape {expected}, got {tuple(sf.shape)}")
    if sf.dtype != torch.float32:
        raise TypeError(f"sf: expected float32 (packed UE8M0 is not Hopper's), got {sf.dtype}")
    return get_mn_major_tma_aligned_tensor(sf) if rows == 1 else sf.contiguous()


# ---- operands ----------------------------------------------------------------------------------


def _recipe(recipe, recipe_a, recipe_b, compiled_dims: str) -> Recipe:
    """(rows of a's blocks, of b's, columns): Hopper has (1, 128, 128) and (1, 1, 128)."""
    if not set(compiled_dims) <= set("mnk"):
        raise ValueError(f"compiled_dims: expected letters of 'mnk', got {compiled_dims!r}")
    if recipe_a is not None or recipe_b is not None:
        left, right = tuple(recipe_a or (1, _GROUP)), tuple(recipe_b or (_GROUP, _GROUP))
        if left[1] != right[1]:
            raise ValueError(f"recipe_b: expected {left[1]} columns as recipe_a, got {right}")
        recipe = (left[0], right[0], left[1])
    recipe = (1, _GROUP, _GROUP) if recipe is None else tuple(recipe)
    if recipe not in ((1, _GROUP, _GROUP), (1, 1, _GROUP)):
        raise ValueError(f"recipe: expected (1, 128, 128) or (1, 1, 128), got {recipe}")
    return recipe


def _scaled(name: str, pair: Pair, rows: int) -> ScaledTensor:
    data, scale = pair
    if scale.dtype != torch.float32:
        raise TypeError(f"{name}: expected fp32 scales, got {scale.dtype}")
    try:
        return ScaledTensor(data, scale, (rows, _GROUP))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _turned(pair: Pair) -> Pair:
    """[(g,) k, mn] -> [(g,) mn, k], k-major; the scales are read where they lie."""
    data, scale = pair
    bytes_ = data.view(torch.uint8).transpose(-2, -1).contiguous()
    return bytes_.view(data.dtype), scale.transpose(-2, -1)


def _check_d(d: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(d.shape) != shape:
        raise ValueError(f"d: expected shape {shape}, got {tuple(d.shape)}")


def _psum_to_indices(ends: Tensor, rows: int) -> Tensor:
    """Real ends of the groups -> the group of each row, -1 in the gaps. Nothing leaves the device.

    A group starts at the end of the one before it, rounded up to the layout's alignment.
    """
    ends = ends.to(torch.int64)
    starts = torch.zeros_like(ends)
    starts[1:] = (ends[:-1] + _alignment - 1).div(_alignment, rounding_mode="floor") * _alignment
    row = torch.arange(rows, device=ends.device)
    # The last group that starts at or before the row, among those that are not behind it.
    group = torch.searchsorted(ends, row, right=True)
    inside = group < len(ends)
    group = group.clamp(max=len(ends) - 1)
    return torch.where(inside & (row >= starts[group]), group, -1).to(torch.int32)


# ---- FP8 ---------------------------------------------------------------------------------------


def fp8_gemm_nt(
    a: Pair,
    b: Pair,
    d: Tensor,
    c: Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d [m, n] = a [m, k] b [n, k]^T (+ c); c may be d. recipe (1, 1, 128) scales b by 1x128."""
    rows_a, rows_b, _ = _recipe(recipe, recipe_a, recipe_b, compiled_dims)
    left, right = _scaled("a", a, rows_a), _scaled("b", b, rows_b)
    _check_d(d, (left.shape[0], right.shape[0]))
    ops.gemm(left, right, out=d, c=c, num_sms=_num_sms)


def fp8_gemm_nn(a, b, d, c=None, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk",
                disable_ue8m0_cast=False) -> None:  # fmt: skip
    """As fp8_gemm_nt with b [k, n], its scales [ceil(k / 128), ceil(n / 128)]."""
    fp8_gemm_nt(
        a, _turned(b), d, c, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast
    )  # fmt: skip


def fp8_gemm_tn(a, b, d, c=None, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="mn",
                disable_ue8m0_cast=False) -> None:  # fmt: skip
    """As fp8_gemm_nt with a [k, m] and b [k, n]."""
    fp8_gemm_nt(
        _turned(a), _turned(b), d, c, recipe, recipe_a, recipe_b, compiled_dims,
        disable_ue8m0_cast,
    )  # fmt: skip


def fp8_gemm_tt(a, b, d, c=None, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="mn",
                disable_ue8m0_cast=False) -> None:  # fmt: skip
    """As fp8_gemm_nt with a [k, m]."""
    fp8_gemm_nt(
        _turned(a), b, d, c, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast
    )  # fmt: skip


def m_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    d: Tensor,
    grouped_layout: Tensor,
    recipe: Recipe | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
) -> None:
    """d [m, n] = each row of a [m, k] times the matrix of its group in b [g, n, k].

    grouped_layout  int32 [m]: the group of each row, -1 for padding; or, with use_psum_layout,
                    int32 [g]: the real end of each group, the next one starting at the next
                    multiple of get_mk_alignment_for_contiguous_layout()
    Padding rows of d become 0, whatever ensure_zero_padding says.
    """
    rows_a, rows_b, _ = _recipe(recipe, recipe_a, recipe_b, compiled_dims)
    left, right = _scaled("a", a, rows_a), _scaled("b", b, rows_b)
    _contiguous(left, right, d, grouped_layout, use_psum_layout)


def _contiguous(a, b, d: Tensor, grouped_layout: Tensor, use_psum_layout: bool) -> None:
    m, groups = a.shape[0], b.shape[0]
    _check_d(d, (m, b.shape[1]))
    expected = (groups,) if use_psum_layout else (m,)
    if tuple(grouped_layout.shape) != expected or grouped_layout.dtype != torch.int32:
        raise ValueError(
            f"grouped_layout: expected int32 {expected}, "
            f"got {grouped_layout.dtype} {tuple(grouped_layout.shape)}"
        )
    indices = _psum_to_indices(grouped_layout, m) if use_psum_layout else grouped_layout
    ops.grouped_gemm(a, b, m_indices=indices, out=d, num_sms=_num_sms)


def m_grouped_fp8_gemm_nn_contiguous(
    a, b, d, grouped_layout, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk",
    disable_ue8m0_cast=False, use_psum_layout=False, ensure_zero_padding=True,
) -> None:  # fmt: skip
    """As m_grouped_fp8_gemm_nt_contiguous with b [g, k, n]."""
    m_grouped_fp8_gemm_nt_contiguous(
        a, _turned(b), d, grouped_layout, recipe, recipe_a, recipe_b, compiled_dims,
        disable_ue8m0_cast, use_psum_layout, ensure_zero_padding,
    )  # fmt: skip


def m_grouped_fp8_gemm_nt_masked(
    a: Pair,
    b: Pair,
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    recipe: Recipe | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d [g, max_m, n] = a [g, max_m, k] times b [g, n, k], the first masked_m[i] rows of group i.

    masked_m int32 [g] stays on the device; expected_m is a hint. Other rows of d are unspecified.
    """
    rows_a, rows_b, _ = _recipe(recipe, recipe_a, recipe_b, compiled_dims)
    left, right = _scaled("a", a, rows_a), _scaled("b", b, rows_b)
    _check_d(d, (*left.shape[:2], right.shape[1]))
    ops.grouped_gemm(
        left, right, masked_m=masked_m, expected_m=expected_m, out=d, num_sms=_num_sms
    )  # fmt: skip


def k_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    d: Tensor,
    ks_cpu: Sequence[int],
    grouped_layout: Tensor | None,
    c: Tensor | None = None,
    recipe: Recipe = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """d [g, m, n] (+)= a_g [m, k_g] b_g [n, k_g]^T for each group: the experts' weight gradients.

    a, b            (flat concatenation of the groups' [m, k_g], scales [m, sum k / 128]); [n, ...]
    ks_cpu          k_g on the host, multiples of 128; 0 is allowed
    grouped_layout  the same on the device, int32 [g] (with use_psum_layout their running sum)
    c               fp32 [g, m, n] added to the product; may be d
    """
    if _recipe(recipe, None, None, compiled_dims) != (1, 1, _GROUP):
        raise ValueError(f"recipe: expected (1, 1, 128) for k groups, got {tuple(recipe)}")
    ks = [int(k) for k in ks_cpu]
    if any(k % _GROUP or k < 0 for k in ks):
        raise ValueError(f"ks_cpu: expected multiples of {_GROUP}, got {ks}")
    if d.dim() != 3 or d.shape[0] != len(ks):
        raise ValueError(f"d: expected [g = {len(ks)}, m, n], got {list(d.shape)}")
    left = _beside("a", a, d.shape[1], ks)
    right = _beside("b", b, d.shape[2], ks)
    sizes = torch.tensor(ks, dtype=torch.int32, device=d.device)
    if grouped_layout is not None:
        given = grouped_layout.to(torch.int32)
        sizes = given.diff(prepend=given.new_zeros(1)) if use_psum_layout else given
    ops.grouped_gemm_k(left, right, sizes, c=c, out=d, num_sms=_num_sms)


def _beside(name: str, pair: Pair, mn: int, ks: list[int]) -> ScaledTensor:
    """The groups' [mn, k_g], one after the other in memory, side by side as [mn, sum k]."""
    data, scale = pair
    total = sum(ks)
    if data.numel() != mn * total:
        raise ValueError(f"{name}: expected {mn} * {total} elements, got {data.numel()}")
    flat = data.view(torch.uint8).reshape(-1)
    pieces = flat.split([mn * k for k in ks])
    beside = torch.cat([piece.view(mn, k) for piece, k in zip(pieces, ks)], dim=1)
    if tuple(scale.shape) != (mn, total // _GROUP) and scale.shape == (total // _GROUP, mn):
        scale = scale.transpose(0, 1)
    return _scaled(name, (beside.view(data.dtype), scale), 1)


# ---- BF16 --------------------------------------------------------------------------------------


def bf16_gemm_nt(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None,
                 compiled_dims: str = "nk") -> None:  # fmt: skip
    """d [m, n] = a [m, k] b [n, k]^T (+ c), bf16 operands of any strides, fp32 sums."""
    _recipe(None, None, None, compiled_dims)
    for name, operand in (("a", a), ("b", b)):
        if operand.dtype != torch.bfloat16:
            raise TypeError(f"{name}: expected bfloat16, got {operand.dtype}")
    _check_d(d, (a.shape[0], b.shape[0]))
    ops.gemm(a, b, out=d, c=c, num_sms=_num_sms)


def bf16_gemm_nn(a, b, d, c=None, compiled_dims="nk") -> None:
    """As bf16_gemm_nt with b [k, n]."""
    bf16_gemm_nt(a, b.transpose(0, 1), d, c, compiled_dims)


def bf16_gemm_tn(a, b, d, c=None, compiled_dims="mn") -> None:
    """As bf16_gemm_nt with a [k, m] and b [k, n]."""
    bf16_gemm_nt(a.transpose(0, 1), b.transpose(0, 1), d, c, compiled_dims)


def bf16_gemm_tt(a, b, d, c=None, compiled_dims="mn") -> None:
    """As bf16_gemm_nt with a [k, m]."""
    bf16_gemm_nt(a.transpose(0, 1), b, d, c, compiled_dims)


def m_grouped_bf16_gemm_nt_contiguous(
    a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor, compiled_dims: str = "nk",
    use_psum_layout: bool = False, ensure_zero_padding: bool = True,
) -> None:  # fmt: skip
    """As m_grouped_fp8_gemm_nt_contiguous on bf16 operands."""
    _recipe(None, None, None, compiled_dims)
    _contiguous(a, b, d, grouped_layout, use_psum_layout)


def m_grouped_bf16_gemm_nn_contiguous(
    a, b, d, grouped_layout, compiled_dims="nk", use_psum_layout=False, ensure_zero_padding=True
) -> None:
    """The same with b [g, k, n]."""
    m_grouped_bf16_gemm_nt_contiguous(
        a, b.transpose(1, 2), d, grouped_layout, compiled_dims, use_psum_layout
    )


def m_grouped_bf16_gemm_nt_masked(
    a: Tensor, b: Tensor, d: Tensor, masked_m: Tensor, expected_m: int, compiled_dims: str = "nk"
) -> None:
    """As m_grouped_fp8_gemm_nt_masked on bf16 operands."""
    _recipe(None, None, None, compiled_dims)
    _check_d(d, (*a.shape[:2], b.shape[1]))
    ops.grouped_gemm(a, b, masked_m=masked_m, expected_m=expected_m, out=d, num_sms=_num_sms)


def k_grouped_bf16_gemm_tn_contiguous(
    a: Tensor, b: Tensor, d: Tensor, ks: Sequence[int], ks_tensor: Tensor | None,
    c: Tensor | None = None, compiled_dims: str = "mn",
) -> None:  # fmt: skip
    """d [g, m, n] (+)= a_g^T b_g of a [sum k, m] and b [sum k, n], groups along k."""
    _recipe(None, None, None, compiled_dims)
    _check_d(d, (len(ks), a.shape[1], b.shape[1]))
    sizes = torch.tensor(list(ks), dtype=torch.int32, device=a.device)
    ops.grouped_gemm_k(a.transpose(0, 1), b.transpose(0, 1), sizes, c=c, out=d, num_sms=_num_sms)


# ---- casts of deep_gemm.utils ------------------------------------------------------------------


def per_token_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128) -> Pair:
    """x [m, k] -> e4m3 with a scale per 1 x gran_k: (data, [m, ceil(k / gran_k)])."""
    q = ops.quantize(x, (1, gran_k), "ue8m0" if use_ue8m0 else "fp32")
    return q.data, q.scale


def per_channel_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128) -> Pair:
    """x [k, m] -> e4m3 with a scale per gran_k x 1: (data [k, m], [ceil(k / gran_k), m])."""
    q = ops.quantize(x, (gran_k, 1), "ue8m0" if use_ue8m0 else "fp32")
    return q.data, q.scale


def per_block_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128) -> Pair:
    """x [(g,) n, k] -> e4m3 with a scale per 128 x gran_k."""
    q = ops.quantize(x, (128, gran_k), "ue8m0" if use_ue8m0 else "fp32")
    return q.data, q.scale


# ---- version 1 ---------------------------------------------------------------------------------

get_col_major_tma_aligned_tensor = get_mn_major_tma_aligned_tensor
get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout


def gemm_fp8_fp8_bf16_nt(lhs: Pair, rhs: Pair, out: Tensor) -> None:
    """out [m, n] bf16 = lhs rhs^T."""
    fp8_gemm_nt(lhs, rhs, out)


def m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(
    lhs: Pair, rhs: Pair, out: Tensor, m_indices: Tensor
) -> None:
    m_grouped_fp8_gemm_nt_contiguous(lhs, rhs, out, m_indices)


def m_grouped_gemm_fp8_fp8_bf16_nt_masked(
    lhs: Pair, rhs: Pair, out: Tensor, masked_m: Tensor, expected_m: int
) -> None:
    m_grouped_fp8_gemm_nt_masked(lhs, rhs, out, masked_m, expected_m)


def wgrad_gemm_fp8_fp8_fp32_nt(lhs: Pair, rhs: Pair, out: Tensor) -> None:
    """out [m, n] fp32 += lhs rhs^T, both scaled by 1x128."""
    fp8_gemm_nt(lhs, rhs, out, c=out, recipe=(1, 1, 128))


def k_grouped_wgrad_gemm_fp8_fp8_fp32_nt(
    lhs: Pair, rhs: Pair, out: Tensor, batch_sizes: Sequence[int]
) -> None:
    """out [g, m, n] fp32 += lhs_g rhs_g^T; lhs and rhs as in k_grouped_fp8_gemm_nt_contiguous."""
    k_grouped_fp8_gemm_nt_contiguous(lhs, rhs, out, batch_sizes, None, c=out)
