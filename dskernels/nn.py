"""Layers on the ops. Linear layers trained in FP8 as the DeepSeek-V3 report does it (3.3):

    forward          y  = x  w^T    x  in 1x128 groups of k, w in 128x128 blocks
    input gradient   dx = dy w      dy in 1x128 groups of n, w as in the forward pass
    weight gradient  dw = dy^T x    both in 1x128 groups of t (128x1 of the forward's), fp32 sums

All three are FP8 products; master weights, gradients and optimizer stay in the precision they have.
`fp8_experts` is the same for the routed experts of a mixture, two products forward and four back.
Dimension letters: t tokens (all leading dimensions), n outputs, k inputs; for experts see
`moe_experts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .ops.experts import moe_experts_backward
from .types import ScaledTensor

__all__ = ["Fp8Linear", "fp8_experts", "fp8_linear"]

_TOKENS = 16  # the weight gradient contracts over tokens; FP8 rows are whole 16-byte words


def fp8_linear(
    x: Tensor, weight: Tensor | ScaledTensor, *, scale_format: str = "fp32"
) -> Tensor:  # fmt: skip
    """x [..., k] times weight [n, k] transposed -> [..., n], in x's dtype; all products in FP8.

    weight        float, quantised in 128x128 blocks here; or a ScaledTensor in such blocks, taken
                  as it is, without a gradient
    scale_format  of activations and gradients: "fp32", or "pow2", with which an activation loses
                  next to nothing when its 1x128 groups become 128x1 in the backward pass

    The CUDA kernels want n and k to be multiples of 16. Differentiable in x and a float weight.
    What is kept for the backward pass is FP8: one byte for each element of x. Raises as `quantize`
    and `gemm`.
    """
    lead, k = x.shape[:-1], x.shape[-1]
    rows = x.reshape(-1, k)
    if isinstance(weight, ScaledTensor):
        y = _Fp8Linear.apply(rows, None, weight.data, weight.scale, scale_format)
    else:
        y = _Fp8Linear.apply(rows, weight, None, None, scale_format)
    return y.view(*lead, y.shape[-1])


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight, data, scale, scale_format: str) -> Tensor:
        q = ops.quantize(x, (1, 128), scale_format)
        if weight is not None:
            w = ops.quantize(weight, (128, 128))
            data, scale = w.data, w.scale
            ctx.weight_dtype = weight.dtype
        ctx.scale_format = scale_format
        ctx.save_for_backward(q.data, q.scale, data, scale)
        return ops.gemm(q, ScaledTensor(data, scale, (128, 128)), out_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        q_data, q_scale, w_data, w_scale = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            # The transpose of 128x128 blocks is 128x128 blocks: nothing is quantised anew.
            w = ScaledTensor(_transposed_bytes(w_data), w_scale.t(), (128, 128))
            g = ops.quantize(grad, (1, 128), ctx.scale_format)
            dx = ops.gemm(g, w, out_dtype=grad.dtype)
        if ctx.needs_input_grad[1]:
            g, q = _pad_tokens(grad, q_data, q_scale)
            left = ops.quantize(g, (1, 128), ctx.scale_format, transpose=True)
            right = ops.quantize(q, (1, 128), ctx.scale_format, transpose=True)
            dw = ops.gemm(left, right, out_dtype=torch.float32).to(ctx.weight_dtype)
        return dx, dw, None, None, None


def _transposed_bytes(data: Tensor) -> Tensor:
    return data.view(torch.uint8).t().contiguous().view(data.dtype)


def _pad_tokens(grad: Tensor, data: Tensor, scale: Tensor) -> tuple[Tensor, ScaledTensor]:
    """Both with zero rows up to a multiple of 16 tokens: they add nothing to the sums."""
    more = -grad.shape[0] % _TOKENS
    if more:
        pad = torch.nn.functional.pad
        grad = pad(grad, (0, 0, 0, more))
        data = pad(data.view(torch.uint8), (0, 0, 0, more)).view(data.dtype)
        scale = pad(scale, (0, 0, 0, more), value=1.0)
    return grad, ScaledTensor(data, scale, (1, 128))


def fp8_experts(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    num_shared: int = 0,
) -> Tensor:
    """`moe_experts` whose products all run in FP8, forward and backward, from float weights.

    w13 [e, 2i, d] and w2 [e, d, i] are quantised in 128x128 blocks here, as an optimizer step
    changes them. Differentiable in x, w13, w2 and topk_weights; kept for the backward pass are x,
    the FP8 weights and the routing, and SwiGLU is computed again (V3 report, 3.3.3). num_shared as
    in `moe_experts`: the last so many experts have every token. The CUDA kernels want i to be a
    multiple of 128 and d one of 16. Raises as `moe_experts`.
    """
    return _Fp8Experts.apply(x, w13, w2, topk_idx, topk_weights, num_shared)


class _Fp8Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, w13, w2, topk_idx, topk_weights, num_shared: int) -> Tensor:
        q13, q2 = (ops.quantize(w.detach(), (128, 128)) for w in (w13, w2))
        ctx.dtypes, ctx.num_shared = (w13.dtype, w2.dtype), num_shared
        ctx.save_for_backward(x, q13.data, q13.scale, q2.data, q2.scale, topk_idx, topk_weights)
        return ops.moe_experts(x, q13, q2, topk_idx, topk_weights, num_shared=num_shared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        x, d13, s13, d2, s2, topk_idx, topk_weights = ctx.saved_tensors
        weights = (ScaledTensor(d, s, (128, 128)) for d, s in ((d13, s13), (d2, s2)))
        wanted = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dx, dw13, dw2, dweights = moe_experts_backward(
            grad, x, *weights, topk_idx, topk_weights, num_shared=ctx.num_shared,
            weight_grads=wanted,
        )  # fmt: skip
        if not wanted:
            return dx, None, None, None, dweights, None
        return dx, dw13.to(ctx.dtypes[0]), dw2.to(ctx.dtypes[1]), None, dweights, None


class Fp8Linear(nn.Module):
    """A linear layer without bias whose three products run in FP8; see `fp8_linear`.

    weight [n, k] is an ordinary parameter in `dtype`, the master copy that an optimizer updates.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale_format: str = "fp32",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=in_features**-0.5)
        self.scale_format = scale_format

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, scale_format=self.scale_format)

    def extra_repr(self) -> str:
        n, k = self.weight.shape
        return f"in_features={k}, out_features={n}, scale_format={self.scale_format!r}"
