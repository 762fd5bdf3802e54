"""FlashMLA's names and signatures on our ops: `from dskernels.compat.flash_mla import ...`.

Works on CPU tensors too: the backend is the current one (`use_backend`, DSK_BACKEND). Both forms of
`get_mla_metadata` are understood. The kernels make their schedule from the lengths at every decode,
in one small kernel on the device, so metadata that were made earlier are accepted and not needed:
a stale one cannot do harm. Sparse attention (indices) is not here and is refused by name.

Sources: the README and interface of FlashMLA, both generations.
"""

from __future__ import annotations

import torch

from .. import backend as _backend
from .. import ops as _ops

__all__ = [
    "FlashMLASchedMeta",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]

METADATA_FIELDS = 8


class FlashMLASchedMeta:
    """The newer form of the metadata: an object that the first decode would fill."""


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[torch.Tensor | FlashMLASchedMeta, torch.Tensor | None]:
    """What flash_mla_with_kvcache takes as metadata.

    Without arguments: (FlashMLASchedMeta(), None), the newer form. Otherwise
    cache_seqlens            int32 [b]
    num_q_tokens_per_head_k  s_q * h_q / h_k
    num_heads_k              KV heads
    gives (int32 [parts, 8], int32 [b + 1]): rows of begin request, begin block of 64 tokens, end
    request, end block, begin split; and how many splits there are before each request. On backends
    without CUDA kernels that is one part and no splits. topk (sparse attention) must be None.
    """
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    _refuse_sparse("topk", topk)
    if num_q_tokens_per_head_k is None or num_heads_k is None:
        raise TypeError("num_q_tokens_per_head_k, num_heads_k: expected integers, got None")
    if cache_seqlens.dim() != 1 or cache_seqlens.dtype != torch.int32:
        raise ValueError(
            "cache_seqlens: expected int32 [b], "
            f"got {cache_seqlens.dtype} {list(cache_seqlens.shape)}"
        )
    schedule = _scheduler(cache_seqlens)
    if schedule is not None:
        made = schedule(cache_seqlens, num_q_tokens_per_head_k)
        return made.parts, made.num_splits
    b = cache_seqlens.shape[0]
    parts = cache_seqlens.new_zeros(1, METADATA_FIELDS)
    parts[0, 2] = b
    return parts, torch.arange(b + 1, dtype=torch.int32, device=cache_seqlens.device)


def _scheduler(seq_lens: torch.Tensor):
    """mla_schedule of the backend that decode would run on, or None where it has none."""
    name = _backend.chosen(None)
    if name == "auto":
        name = "cuda" if seq_lens.is_cuda else "cpu"
    if name == "cuda" and _backend.supports("mla_decode", backend=name):
        from ..cuda import mla
    elif name == "emu" and _backend.supports("mla_decode", backend=name):
        from ..emu import mla
    else:
        return None
    return mla.mla_schedule


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: torch.Tensor | FlashMLASchedMeta,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode of q [b, s_q, h_q, 576] over a paged cache -> out [b, s_q, h_q, head_dim_v], lse.

    k_cache        [blocks, block, h_k, 576] bf16; with is_fp8_kvcache [blocks, block, h_k, 656] of
                   one-byte values: 512 e4m3, 4 fp32 scales, 64 bf16
    block_table    int32 [b, max_blocks];  cache_seqlens  int32 [b]
    softmax_scale  default 576^-0.5
    lse is fp32 [b, h_q, s_q], natural logarithm. Several KV heads are decoded one after another.
    Raises ValueError naming the argument, NotImplementedError for indices.
    """
    _refuse_sparse("indices", indices)
    if q.dim() != 4 or k_cache.dim() != 4:
        raise ValueError(
            "q, k_cache: expected [b, s_q, h_q, d] and [blocks, block, h_k, row], "
            f"got {list(q.shape)} and {list(k_cache.shape)}"
        )
    heads, kv_heads = q.shape[2], k_cache.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q: expected a multiple of {kv_heads} heads (k_cache's), got {heads}")
    if is_fp8_kvcache != (k_cache.element_size() == 1):
        raise ValueError(
            f"k_cache: expected {'one-byte' if is_fp8_kvcache else 'two-byte'} values for "
            f"is_fp8_kvcache={is_fp8_kvcache}, got {k_cache.dtype}"
        )
    if is_fp8_kvcache:
        k_cache = k_cache.view(torch.uint8)
    group = heads // kv_heads
    results = [
        _ops.mla_decode(
            q[:, :, j * group : (j + 1) * group],
            k_cache[:, :, j],
            block_table,
            cache_seqlens,
            head_dim_v=head_dim_v,
            softmax_scale=softmax_scale,
            causal=causal,
        )
        for j in range(kv_heads)
    ]
    if kv_heads == 1:
        return results[0]
    outs, lses = zip(*results)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=1)


def flash_mla_sparse_fwd(*args, **kwargs):
    """Sparse prefill: refused by name, since DeepSeek-V3's attention is dense."""
    raise NotImplementedError("flash_mla_sparse_fwd: sparse attention is not implemented")


def _refuse_sparse(name: str, value: object) -> None:
    if value is not None:
        raise NotImplementedError(f"{name}: expected None, sparse attention is not implemented")
