"""One or more small calls of every public op, shared by the tests of the op layer.

A case is data: the name of the public function, its arguments, and which of them (by position or
keyword) may require grad. Calls are made through `Case.call`, which copies what an op writes to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import dskernels as dsk
from dskernels.backend import OPS


@dataclass
class Case:
    id: str
    op: str
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    diff: tuple = ()
    writes: tuple = ()

    @property
    def stem(self) -> str:
        return OPS[self.op]

    def call(self, function: Callable, **more: Any) -> Any:
        """The call's result, followed by the fresh copies of what it wrote."""
        args = [a.clone() if i in self.writes else a for i, a in enumerate(self.args)]
        kwargs = {k: v.clone() if k in self.writes else v for k, v in self.kwargs.items()}
        result = function(*args, **kwargs, **more)
        written = [args[w] if isinstance(w, int) else kwargs[w] for w in self.writes]
        return result, *written

    def requiring_grad(self) -> Case:
        """The same case with its differentiable tensors as leaves that require grad."""

        def leaf(key: int | str, value: Any) -> Any:
            return value.detach().clone().requires_grad_() if key in self.diff else value

        args = tuple(leaf(i, a) for i, a in enumerate(self.args))
        kwargs = {k: leaf(k, v) for k, v in self.kwargs.items()}
        return Case(self.id, self.op, args, kwargs, self.diff, self.writes)

    def leaves(self) -> list[torch.Tensor]:
        """The tensors that may require grad, in the order of `diff`."""
        return [self.args[d] if isinstance(d, int) else self.kwargs[d] for d in self.diff]


def public(case: Case) -> Callable:
    return getattr(dsk, case.op)


def reference(case: Case) -> Callable:
    return getattr(getattr(dsk.ref, case.stem), case.op)


def tensors(result: Any) -> list[torch.Tensor]:
    """Every tensor among values, ScaledTensors taken apart."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, dsk.ScaledTensor):
        return [result.data, result.scale]
    if isinstance(result, (tuple, list)):
        return [t for part in result for t in tensors(part)]
    return []


def same(actual: Any, expected: Any) -> None:
    """Bitwise equality of two results, dtypes and shapes included (NaN equals NaN)."""
    left, right = tensors(actual), tensors(expected)
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(bits(a), bits(b))


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().flatten().view(torch.uint8)


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator).to(dtype)


def _rowwise() -> list[Case]:
    x, w = _randn(3, 4, 10), _randn(10)
    wide = _randn(5, 260)
    cos, sin = _randn(6, 4), _randn(6, 4)
    q = dsk.ref.rowwise.quantize(wide)
    return [
        Case("quantize", "quantize", (wide,)),
        Case("quantize-weight", "quantize", (_randn(2, 150, 130), (128, 128), "ue8m0")),
        Case("quantize-transpose", "quantize", (wide,), {"transpose": True, "dtype": "e5m6"}),
        Case("quantize-again", "quantize", (q,), {"transpose": True, "scale_format": "pow2"}),
        Case("dequantize", "dequantize", (q,)),
        Case("dequantize-weight", "dequantize",
             (dsk.ref.rowwise.quantize(_randn(2, 150, 130), (128, 128)), torch.float32)),
        Case("dequantize-e5m6", "dequantize",
             (dsk.ref.rowwise.quantize(wide, dtype="e5m6"), torch.float64)),
        Case("pack_e5m6", "pack_e5m6", (_randn(3, 7, dtype=torch.float16),)),
        Case("unpack_e5m6", "unpack_e5m6", (torch.arange(36, dtype=torch.uint8).view(3, 12), 7)),
        Case("rms_norm", "rms_norm", (x, w), diff=(0, 1)),
        Case("rms_norm-bf16", "rms_norm", (x.bfloat16(), w, 1e-3), diff=(0, 1)),
        Case("rms_norm-strided", "rms_norm", (_randn(10, 6).t(), _randn(10)), diff=(0, 1)),
        Case("rms_norm-residual", "rms_norm", (x, w, 1e-6, _randn(3, 4, 10)), diff=(0, 1, 3)),
        Case("rms_norm_quantize", "rms_norm_quantize", (wide, _randn(260))),
        Case("rms_norm_quantize-residual", "rms_norm_quantize",
             (wide.bfloat16(), _randn(260), 1e-6, _randn(5, 260).bfloat16()),
             {"scale_format": "ue8m0"}),
        Case("rope", "rope", (_randn(6, 2, 8), cos, sin), diff=(0,)),
        Case("rope-batch", "rope", (_randn(3, 6, 2, 8, dtype=torch.bfloat16), cos, sin),
             {"interleaved": False, "inverse": True}, diff=(0,)),
        Case("swiglu", "swiglu", (_randn(3, 4, 10),), diff=(0,)),
        Case("swiglu-strided", "swiglu", (_randn(10, 4).t().unsqueeze(1),), diff=(0,)),
        Case("swiglu_quantize", "swiglu_quantize", (_randn(4, 520),)),
    ]  # fmt: skip


def _gemm() -> list[Case]:
    a, b, c, bias = _randn(5, 12), _randn(8, 12), _randn(5, 8), _randn(8)
    quantize = dsk.ref.rowwise.quantize
    qa, qb = quantize(_randn(5, 200)), quantize(_randn(130, 200), (128, 128))
    qb1 = quantize(_randn(6, 200))
    plain = (a, b)
    every = {"c": c, "bias": bias}
    return [
        Case("gemm", "gemm", plain, diff=(0, 1)),
        Case("gemm-bf16", "gemm", (a.bfloat16(), b.bfloat16()), {"out_dtype": torch.float32},
             diff=(0, 1)),
        Case("gemm-c-bias", "gemm", plain, every, diff=(0, 1, "c", "bias")),
        Case("gemm-swiglu", "gemm", plain, {"epilogue": "swiglu", **every},
             diff=(0, 1, "c", "bias")),
        Case("gemm-quant", "gemm", plain, {"epilogue": "swiglu_quant", "deterministic": True}),
        Case("gemm-out", "gemm", plain, {"out": _randn(5, 8), "num_sms": 4}, writes=("out",)),
        Case("gemm-1d2d", "gemm", (qa, qb)),
        Case("gemm-1d1d", "gemm", (qa, qb1), {"c": _randn(5, 6)}),
        Case("gemm-1d2d-quant", "gemm", (qa, qb), {"epilogue": "swiglu_quant"}),
        Case("gemm-1d2d-out", "gemm", (qa, qb), {"out": _randn(5, 130)}, writes=("out",)),
    ]  # fmt: skip


def _grouped() -> list[Case]:
    a, b, sizes = _randn(7, 12), _randn(3, 8, 12), torch.tensor([2, 0, 4])
    quantize = dsk.ref.rowwise.quantize
    qa, qb = quantize(_randn(7, 200)), quantize(_randn(3, 130, 200), (128, 128))
    ka, kb = _randn(4, 9), _randn(5, 9)
    qka, qkb = quantize(_randn(4, 384)), quantize(_randn(5, 384))
    ends = torch.tensor([2, 3, 1], dtype=torch.int32)
    name, name_k = "grouped_gemm", "grouped_gemm_k"
    return [
        Case("grouped", name, (a, b), {"group_sizes": sizes}, diff=(0, 1)),
        Case("grouped-c", name, (a, b), {"group_sizes": [2, 0, 4], "c": _randn(7, 8)},
             diff=(0, 1, "c")),
        Case("grouped-swiglu", name, (a, b),
             {"group_sizes": sizes, "epilogue": "swiglu", "bias": _randn(3, 8)}, diff=(0, 1)),
        Case("grouped-indices", name, (a, b),
             {"m_indices": torch.tensor([2, 2, -1, 0, 1, 1, 0], dtype=torch.int32)}),
        Case("grouped-masked", name, (_randn(3, 4, 12), b), {"masked_m": ends, "expected_m": 2}),
        Case("grouped-out", name, (a, b), {"group_sizes": sizes, "out": _randn(7, 8)},
             writes=("out",)),
        Case("grouped-1d2d", name, (qa, qb), {"group_sizes": sizes}),
        Case("grouped-quant", name, (qa, qb), {"group_sizes": sizes, "epilogue": "swiglu_quant"}),
        Case("grouped_k", name_k, (ka, kb, torch.tensor([4, 0, 3])), diff=(0, 1)),
        Case("grouped_k-c", name_k, (ka, kb, [4, 5]), {"c": _randn(2, 4, 5)}, diff=(0, 1, "c")),
        Case("grouped_k-out", name_k, (ka, kb, [4, 5]), {"out": _randn(2, 4, 5)}, writes=("out",)),
        Case("grouped_k-1d1d", name_k, (qka, qkb, torch.tensor([128, 256]))),
    ]  # fmt: skip


def _mla() -> list[Case]:
    page, pages = 4, 6
    poison = 2147480000
    table = torch.tensor([[3, 0, poison], [5, poison, poison], [1, 2, 4]], dtype=torch.int32)
    lens = torch.tensor([7, 0, 12], dtype=torch.int32)
    width, rope = 16, 4
    q = _randn(3, 2, 3, width + rope)
    cache = _randn(pages, page, width + rope)
    decode = {"head_dim_v": width}
    latent, k_rope, slots = _randn(5, width), _randn(5, rope), torch.tensor([3, -1, 0, 23, 3])
    fp8 = torch.zeros(pages, page, width + 4 + 2 * rope, dtype=torch.uint8)
    dsk.ref.mla.mla_cache_append(fp8, _randn(24, width), _randn(24, rope), torch.arange(24))
    cu_q = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    cu_k = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    angles = torch.linspace(0, 3, 10).view(5, 2)
    turn = (angles.cos(), angles.sin())
    down = (_randn(5, 6), _randn(5, width + rope), _randn(6), _randn(width), *turn)
    alone = (None, down[1].bfloat16(), None, *down[3:])
    prefill = (_randn(6, 2, 4), _randn(8, 2, 4), _randn(8, 2, 3), cu_q, cu_k)
    return [
        Case("decode", "mla_decode", (q, cache, table, lens), decode),
        Case("decode-all", "mla_decode", (q, cache.bfloat16(), table.long(), lens.long()),
             {"causal": False, "softmax_scale": 0.3, **decode}),
        Case("decode-fp8", "mla_decode", (q.bfloat16(), fp8, table, lens), decode),
        Case("append", "mla_cache_append", (cache, latent, k_rope, slots), writes=(0,)),
        Case("append-fp8", "mla_cache_append", (fp8, latent, k_rope, slots), writes=(0,)),
        Case("latents", "mla_latents", (*down, cache, slots), writes=(6,)),
        Case("latents-fp8", "mla_latents", (*alone, fp8, slots), {"eps": 1e-3}, writes=(6,)),
        Case("absorb-queries", "mla_absorb_queries", (_randn(5, 3, 7), _randn(3, 3, 8), *turn)),
        Case("absorb-queries-halves", "mla_absorb_queries",
             (_randn(5, 3, 7).bfloat16(), _randn(3, 3, 8).bfloat16(), *turn),
             {"interleaved": False}),
        Case("absorb-output", "mla_absorb_output", (_randn(5, 3, 8), _randn(3, 4, 8))),
        Case("prefill", "mla_prefill", prefill, diff=(0, 1, 2)),
        Case("prefill-all", "mla_prefill", prefill, {"causal": False, "softmax_scale": 0.7},
             diff=(0, 1, 2)),
    ]  # fmt: skip


def _moe() -> list[Case]:
    x, weight, bias = _randn(5, 6), _randn(8, 6), _randn(8)
    idx = torch.tensor([[0, 2], [1, -1], [2, 2], [0, 1], [-1, -1]])
    y, row_map = _randn(8, 6), torch.tensor([[0, 3], [2, -1], [4, 5], [1, 6], [-1, -1]])
    weights = _randn(5, 2)
    w13, w2 = _randn(4, 10, 6), _randn(4, 6, 5)
    quantize = dsk.ref.rowwise.quantize
    scaled = (
        quantize(_randn(4, 20, 6), (128, 128)),
        quantize(_randn(4, 6, 10), (128, 128)),
    )
    counts = torch.tensor([3, 1, 2, 2, 0, 9, 2, 2])
    replicas = torch.tensor([[0, 5], [-1, 8], [2, 1]])
    return [
        Case("gate", "moe_gate", (x, weight, bias), {"topk": 3}, diff=(0, 1)),
        Case("gate-statistics", "moe_gate", (x, weight, bias), {"topk": 3, "sequences": 1},
             diff=(0, 1)),
        Case("gate-groups", "moe_gate", (x, weight, bias),
             {"topk": 3, "n_group": 4, "topk_group": 2, "scale": 2.5}, diff=(0, 1)),
        Case("gate-softmax", "moe_gate", (x.bfloat16(), weight.bfloat16(), None),
             {"topk": 2, "score": "softmax"}, diff=(0, 1)),
        Case("gate-softmax-max", "moe_gate", (x, weight, None),
             {"topk": 2, "score": "softmax", "renormalize": True, "n_group": 2}, diff=(0, 1)),
        Case("permute", "moe_permute", (x, idx, 4), diff=(0,)),
        Case("permute-aligned", "moe_permute", (x, idx, 4), {"alignment": 4}, diff=(0,)),
        Case("permute-mapped", "moe_permute", (x, idx, 9), {"expert_map": replicas}, diff=(0,)),
        Case("unpermute", "moe_unpermute", (y, row_map, weights), diff=(0, 2)),
        Case("unpermute-plain", "moe_unpermute", (y.bfloat16(), row_map, None), diff=(0,)),
        Case("experts", "moe_experts", (x, w13, w2, idx, weights), diff=(0, 1, 2, 4)),
        Case("experts-w8a8", "moe_experts", (x.bfloat16(), *scaled, idx, weights)),
        Case("experts-shared", "moe_experts", (x, w13, w2, idx, weights),
             {"num_shared": 1, "expert_map": replicas.clamp(max=2)}, diff=(0, 1, 2, 4)),
        Case("bias_update", "moe_bias_update", (bias, counts, 0.001)),
    ]  # fmt: skip


_generator = torch.Generator().manual_seed(0)
CASES = [*_rowwise(), *_gemm(), *_grouped(), *_mla(), *_moe()]
