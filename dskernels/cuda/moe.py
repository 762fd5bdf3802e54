"""Mixture of experts on the sm_90a kernels: gate, permute, unpermute, experts.

Names, arguments and meaning are those of dskernels.ref.moe; what a kernel does not cover raises
Unsupported. Dimension letters: t tokens, d model width, e experts, k chosen experts per token,
m permuted rows, i expert width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import ScaledTensor, Support, Unsupported
from . import gemm, launchers, rowwise
from ._gemm_bf16 import K_BLOCK
from ._operands import address
from ._tensor import device_of, stream_of

GROUP = 128
FLOATS = (torch.bfloat16, torch.float32)


def _float(name: str, x: torch.Tensor) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        raise Unsupported(f"{name}: expected bf16 or fp32, got {getattr(x, 'dtype', type(x))}")
    return x


def _experts(count: int, most: int) -> int:
    if count > most:
        raise Unsupported(f"experts: expected at most {most}, got {count}")
    return count


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _need_bf16(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> None:
    """Plain operands of products: bf16, rows of 16 bytes."""
    for name, value in (("x", x), ("w13", w13), ("w2", w2)):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.bfloat16:
            given = getattr(value, "dtype", type(value).__name__)
            raise Unsupported(f"{name}: expected bf16 with weights of bf16, got {given}")
    for name, size in (("d", w2.shape[1]), ("i", w2.shape[2])):
        if size % 8:
            raise Unsupported(f"{name}: expected a multiple of 8 (rows of 16 bytes), got {size}")


def _need_scaled(x: torch.Tensor, w13: ScaledTensor, w2: torch.Tensor | ScaledTensor) -> None:
    """Operands of the FP8 backward: the hidden layer is cut into whole blocks of 128."""
    _float("x", x)
    for name, w in (("w13", w13), ("w2", w2)):
        given = getattr(w, "block", "a plain tensor")
        if given != (GROUP, GROUP):
            raise Unsupported(f"{name}: expected e4m3 in blocks of (128, 128), got {given}")
    for name, size, multiple in (("d", w2.shape[1], 16), ("i", w2.shape[2], GROUP)):
        if size % multiple:
            raise Unsupported(f"{name}: expected a multiple of {multiple}, got {size}")


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-2, -1).contiguous()


def _transposed_blocks(w: ScaledTensor) -> ScaledTensor:
    """w [e, n, k] -> [e, k, n]: the transpose of 128 x 128 blocks is such blocks again."""
    data = _transposed(w.data.view(torch.uint8)).view(w.data.dtype)
    return ScaledTensor(data, _transposed(w.scale), w.block, w.dtype)


def _aligned_rows(slots: int, experts: int, alignment: int) -> int:
    """The most rows that groups of `slots` rows in all take, each rounded up to `alignment`."""
    rows = slots + min(experts, slots) * (alignment - 1)
    return -(-rows // alignment) * alignment


def _empty_scaled(rows: int, columns: int, device: torch.device) -> ScaledTensor:
    """e4m3 in 1 x 128, sizes multiples of 128; the scales MN-major."""
    data = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(columns // GROUP, rows, dtype=torch.float32, device=device)
    return ScaledTensor(data, scale.t(), (1, GROUP), "e4m3")


def _mean_affinity(sums: torch.Tensor, length: int) -> torch.Tensor:
    """The gate kernel's sums [b, e + 1] in units of 2^-40, NaNs counted last -> means [b, e]."""
    mean = (sums[:, :-1].double() * (2.0**-40 / length)).float()
    return mean.masked_fill(sums[:, -1:] > 0, torch.nan)


class _Layout(NamedTuple):
    """Where sorted slots go; see csrc/cuda/kernels/moe_layout.cuh."""

    chosen: torch.Tensor  # int64 [t, k + s], contiguous: experts that are sorted by, s shared ones
    first_row: torch.Tensor  # int32 [chunks, e]
    group_sizes: torch.Tensor  # int64 [e]
    group_sizes_i32: torch.Tensor  # the same as int32
    shape: tuple[int, ...]  # (rows,), or masked (e, capacity)


class _Hidden(NamedTuple):
    """See csrc/cuda/kernels/moe_hidden_quantize.cuh; rows are sorted slots."""

    dh: ScaledTensor  # [rows, 2i] in 1 x 128
    dh_t: ScaledTensor  # [2i, rows]
    act_t: ScaledTensor  # [i, rows], times the routing weight
    dweights: torch.Tensor  # fp32 [t, k + s]


class Moe:
    """The functions of this module on one machine, "cuda" or "emu"."""

    def __init__(self, machine: str) -> None:
        self.machine = machine
        self.rowwise = rowwise.Rowwise(machine)
        products = gemm.GemmKernels(machine)
        self.grouped_gemm, self.grouped_gemm_k = products.grouped_gemm, products.grouped_gemm_k

    def _on(self, x: torch.Tensor) -> tuple[str, int, int, int]:
        return self.machine, device_of(x), stream_of(x), 0

    def moe_gate(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        n_group: int = 1,
        topk_group: int = 1,
        topk: int,
        scale: float = 1.0,
        score: str = "sigmoid",
        group_score: str | None = None,
        renormalize: bool | None = None,
        sequences: int | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """As dskernels.ref.moe.moe_gate, at most 512 experts. Every token's result is the same
        whatever the batch around it."""
        x, weight = _rows(_float("x", x)), _float("weight", weight).contiguous()
        (tokens, depth), experts = x.shape, weight.shape[0]
        _experts(experts, launchers().kMoeMaxExperts)

        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(*shape, dtype=dtype, device=x.device)

        topk_idx = torch.empty(tokens, topk, dtype=torch.int64, device=x.device)
        weights = torch.empty(tokens, topk, dtype=torch.float32, device=x.device)
        scores = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
        groups = launchers().moe_gate_groups(tokens), launchers().kGateCluster
        finished = zeros(*groups, dtype=torch.int32)
        counts = affinity = None
        if sequences is not None:
            counts, affinity = zeros(sequences, experts), zeros(sequences, experts + 1)
        bias = None if bias is None else bias.float().contiguous()
        sigmoid = score == "sigmoid"
        length = tokens // sequences if sequences else 0
        launchers().moe_gate(
            self._on(x), x=x.data_ptr(), x_is_bf16=x.dtype == torch.bfloat16,
            weight=weight.data_ptr(), weight_is_bf16=weight.dtype == torch.bfloat16,
            bias=0 if bias is None else bias.data_ptr(), topk_idx=topk_idx.data_ptr(),
            topk_weights=weights.data_ptr(), scores=scores.data_ptr(),
            finished=finished.data_ptr(), counts=0 if counts is None else counts.data_ptr(),
            affinity=0 if affinity is None else affinity.data_ptr(),
            ld_x=x.stride(0), tokens=tokens, depth=depth, experts=experts,
            num_groups=n_group, topk_group=topk_group, topk=topk, softmax=not sigmoid,
            top2=(group_score or ("top2" if sigmoid else "max")) == "top2",
            renormalize=sigmoid if renormalize is None else renormalize,
            sequence=length, scale=scale,
        )  # fmt: skip
        if sequences is None:
            return topk_idx, weights, scores
        return topk_idx, weights, scores, counts, _mean_affinity(affinity, length)

    def _product(self, a, b, out, transpose: bool) -> None:
        """out [m, n] = a [m, k] b [k, n], a fp32, or a^T for a [k, m]."""
        (k, m) = a.shape if transpose else a.shape[::-1]
        launchers().moe_gate_product(
            self._on(a), a=a.data_ptr(), a_transposed=transpose, b=b.data_ptr(),
            b_is_bf16=b.dtype == torch.bfloat16, out=out.data_ptr(),
            out_is_bf16=out.dtype == torch.bfloat16, ld_b=b.stride(0), m=m, n=out.shape[1], k=k,
        )  # fmt: skip

    def moe_gate_backward(
        self,
        grad_weights: torch.Tensor,
        grad_scores: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        topk_idx: torch.Tensor,
        scores: torch.Tensor,
        scale: float,
        score: str,
        renormalize: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As dskernels.ref.moe_backward.moe_gate_backward: gradient of the logits, then its
        products with weight and x in fp32."""
        x, weight = _rows(_float("x", x)), _rows(_float("weight", weight))
        (tokens, topk), experts = topk_idx.shape, weight.shape[0]
        _experts(experts, launchers().kMoeMaxExperts)
        grads = [g.float().contiguous() for g in (grad_weights, grad_scores)]
        topk_idx, scores = topk_idx.to(torch.int64).contiguous(), scores.contiguous()
        dlogits = torch.empty_like(scores)
        launchers().moe_gate_backward(
            self._on(x), grad_weights=grads[0].data_ptr(), grad_scores=grads[1].data_ptr(),
            scores=scores.data_ptr(), topk_idx=topk_idx.data_ptr(), dlogits=dlogits.data_ptr(),
            tokens=tokens, experts=experts, topk=topk, softmax=score == "softmax",
            renormalize=renormalize, scale=scale,
        )  # fmt: skip
        dx, dweight = (torch.empty(v.shape, dtype=v.dtype, device=x.device) for v in (x, weight))
        self._product(dlogits, weight, dx, transpose=False)
        self._product(dlogits, x, dweight, transpose=True)
        return dx, dweight

    def _layout(
        self,
        topk_idx: torch.Tensor,
        experts: int,
        alignment: int = 1,
        *,
        expert_map: torch.Tensor | None = None,
        shared: int = 0,
        capacity: int = 0,
    ) -> _Layout:
        """Count and place the slots, on the device; with a capacity in planes of so many rows."""
        _experts(experts, launchers().kMoeMaxGroups)
        topk_idx = topk_idx.to(torch.int64).contiguous()
        (tokens, topk), chosen = topk_idx.shape, topk_idx
        if expert_map is not None or shared:
            chosen = topk_idx.new_empty(tokens, topk + shared)
        if expert_map is not None:
            expert_map = expert_map.to(torch.int64).contiguous()
        slots = chosen.numel()

        def zeros(*shape, dtype=torch.int32):
            return torch.zeros(*shape, dtype=dtype, device=topk_idx.device)

        first_row = zeros(launchers().moe_chunks(slots), experts)
        sizes, sizes_i32 = zeros(experts, dtype=torch.int64), zeros(experts)
        finished = zeros(1)
        mapped, replicas = (0, 0) if expert_map is None else expert_map.shape
        launchers().moe_layout(
            self._on(topk_idx), topk_idx=topk_idx.data_ptr(), expert_map=address(expert_map),
            chosen=0 if chosen is topk_idx else chosen.data_ptr(), first_row=first_row.data_ptr(),
            group_sizes=sizes.data_ptr(), group_sizes_i32=sizes_i32.data_ptr(),
            finished=finished.data_ptr(), slots=slots, topk=topk, shared=shared,
            replicas=replicas, experts=experts, alignment=alignment, capacity=capacity,
            mapped=mapped,
        )  # fmt: skip
        shape = (experts, capacity) if capacity else (_aligned_rows(slots, experts, alignment),)
        return _Layout(chosen, first_row, sizes, sizes_i32, shape)

    def _place(self, layout: _Layout, slot_of_row: torch.Tensor | None) -> tuple[tuple, Tensor]:
        """The launchers' `place`, and the row_map [t, k + s] that it will fill."""
        chosen = layout.chosen
        row_map = torch.full_like(chosen, -1)
        tensors = chosen, layout.first_row, row_map, slot_of_row
        sizes = chosen.numel(), chosen.shape[1], layout.group_sizes.numel()
        return (*(address(v) for v in tensors), *sizes), row_map

    def _copy(self, layout: _Layout, data: Tensor, x_perm: Tensor) -> Tensor:
        """Rows of data [t, d] to their places in x_perm; returns row_map [t, k + s]."""
        place, row_map = self._place(layout, None)
        element = data.element_size()
        launchers().moe_permute(
            self._on(data), place=place, x=data.data_ptr(), x_perm=x_perm.data_ptr(),
            ld_x=data.stride(0) * element, row_bytes=data.shape[1] * element,
            rows=x_perm.shape[:-1].numel(),
        )  # fmt: skip
        return row_map

    def _copy_quantized(
        self,
        layout: _Layout,
        x: Tensor,
        *,
        pow2: bool = False,
        slot_of_row: torch.Tensor | None = None,
    ) -> tuple[ScaledTensor, Tensor]:
        """x [t, d] quantised in 1 x 128 on the way to its rows, and row_map. Other rows are 0 with
        slot_of_row, which takes each row's slot, and hold nothing without."""
        x, depth = _rows(_float("x", x)), x.shape[1]
        (*planes, rows), groups = layout.shape, -(-depth // GROUP)
        new = torch.empty if slot_of_row is None else torch.zeros
        data = new(*planes, rows, depth, dtype=torch.uint8, device=x.device)
        scale = new(*planes, groups, -(-rows // 4) * 4, dtype=torch.float32, device=x.device)
        place, row_map = self._place(layout, slot_of_row)
        launchers().moe_permute_quantize(
            self._on(x), place=place, x=x.data_ptr(), is_bf16=x.dtype == torch.bfloat16,
            data=data.data_ptr(), scale=scale.data_ptr(), ld_x=x.stride(0),
            ld_scale=scale.shape[-1], depth=depth, plane_rows=rows, ue8m0=pow2,
            rows=data.shape[:-1].numel(),
        )  # fmt: skip
        scale = scale.transpose(-2, -1)[..., :rows, :]
        return ScaledTensor(data.view(torch.float8_e4m3fn), scale, (1, GROUP), "e4m3"), row_map

    def moe_permute(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_experts: int,
        *,
        alignment: int = 1,
        expert_map: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As dskernels.ref.moe.moe_permute, any element type, at most 1024 experts.

        The number of rows is a result, so the call waits for the device.
        """
        layout = self._layout(topk_idx, num_experts, alignment, expert_map=expert_map)
        rows = int(layout.group_sizes.sum())
        x_perm = x.new_zeros(rows, x.shape[1]) if alignment > 1 else x.new_empty(rows, x.shape[1])
        row_map = self._copy(layout, _rows(x), x_perm)
        return x_perm, layout.group_sizes, row_map

    def moe_unpermute(
        self, y: torch.Tensor, row_map: torch.Tensor, topk_weights: torch.Tensor | None
    ) -> torch.Tensor:
        """As dskernels.ref.moe.moe_unpermute for bf16 and fp32, the same bits. The columns of
        row_map [t, k + s] behind those of topk_weights [t, k] are shared experts' with weight 1."""
        y, row_map = _float("y", y).contiguous(), row_map.to(torch.int64).contiguous()
        (tokens, topk), depth = row_map.shape, y.shape[1]
        if topk_weights is not None:
            topk_weights = topk_weights.float().contiguous()
        out = torch.empty(tokens, depth, dtype=y.dtype, device=y.device)
        launchers().moe_unpermute(
            self._on(y), y=y.data_ptr(), is_bf16=y.dtype == torch.bfloat16,
            row_map=row_map.data_ptr(),
            weights=0 if topk_weights is None else topk_weights.data_ptr(), out=out.data_ptr(),
            tokens=tokens, topk=topk, depth=depth, rows=y.shape[0],
            shared=0 if topk_weights is None else topk - topk_weights.shape[1],
        )  # fmt: skip
        return out

    def moe_unpermute_backward(
        self,
        grad: torch.Tensor,
        y: torch.Tensor,
        row_map: torch.Tensor,
        topk_weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As dskernels.ref.moe_backward.moe_unpermute_backward, for a row_map that names no row
        twice, as moe_permute's; dy has the reference's bits."""
        y, grad = _float("y", y).contiguous(), grad.to(y.dtype).contiguous()
        row_map = row_map.to(torch.int64).contiguous()
        (tokens, topk), depth = row_map.shape, y.shape[1]
        weights = None if topk_weights is None else topk_weights.float().contiguous()
        dy, dweights = torch.zeros_like(y), torch.zeros_like(row_map, dtype=torch.float32)
        launchers().moe_unpermute_backward(
            self._on(y), grad=grad.data_ptr(), y=y.data_ptr(), is_bf16=y.dtype == torch.bfloat16,
            row_map=row_map.data_ptr(), weights=0 if weights is None else weights.data_ptr(),
            dy=dy.data_ptr(), dweights=dweights.data_ptr(), tokens=tokens, topk=topk,
            depth=depth, rows=y.shape[0],
        )  # fmt: skip
        return dy, dweights.to(y.dtype if topk_weights is None else topk_weights.dtype)

    def moe_experts(
        self,
        x: torch.Tensor,
        w13: torch.Tensor | ScaledTensor,
        w2: torch.Tensor | ScaledTensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        expert_map: torch.Tensor | None = None,
        num_shared: int = 0,
        layout: str | None = None,
    ) -> torch.Tensor:
        """As dskernels.ref.moe.moe_experts with e4m3 weights in blocks of 128 x 128, or bf16.

        Five launches, none of which waits for another one's result on the host: layout, permute
        with quantisation, gate-up product with SwiGLU and quantisation, down product, weighted sum.
        A token is quantised once, however many experts it goes to. With bf16 weights SwiGLU is a
        launch of its own. The masked layout is for e4m3 weights; with bf16 it is not used.
        """
        experts, slots = w13.shape[0], x.shape[0] * (topk_idx.shape[1] + num_shared)
        if isinstance(w13, ScaledTensor) and not isinstance(w2, ScaledTensor):
            raise Unsupported("w2: expected a ScaledTensor, as w13, got a plain tensor")
        if not isinstance(w13, ScaledTensor):
            _need_bf16(x, w13, w2)
        if slots == 0:
            return torch.zeros_like(x)
        choice = dict(expert_map=expert_map, shared=num_shared)
        if not isinstance(w13, ScaledTensor):
            y, row_map = self._plain_products(x, w13, w2, self._layout(topk_idx, experts, **choice))
        elif layout == "masked":
            # A token has one row at most in each group.
            choice["capacity"] = -(-x.shape[0] // 4) * 4
            y, row_map = self._masked_products(
                x, w13, w2, self._layout(topk_idx, experts, **choice), -(-slots // experts)
            )
        else:
            places = self._layout(topk_idx, experts, **choice)
            sizes = places.group_sizes_i32
            tokens, row_map = self._copy_quantized(places, x)
            hidden = self.grouped_gemm(tokens, w13, group_sizes=sizes, epilogue="swiglu_quant")
            y = self.grouped_gemm(hidden, w2, group_sizes=sizes, out_dtype=x.dtype)
        return self.moe_unpermute(y, row_map, topk_weights)

    def _masked_products(self, x, w13, w2, layout: _Layout, expected: int) -> tuple[Tensor, Tensor]:
        """y [e * capacity, d] and row_map; rows that no slot has hold nothing."""
        groups = dict(masked_m=layout.group_sizes_i32, expected_m=expected)
        tokens, row_map = self._copy_quantized(layout, x)
        hidden = self.grouped_gemm(tokens, w13, epilogue="swiglu_quant", **groups)
        y = self.grouped_gemm(hidden, w2, out_dtype=x.dtype, **groups)
        return y.view(-1, y.shape[-1]), row_map

    def _permute_plain(self, layout: _Layout, *tensors) -> tuple:
        """Each x [t, d] with a row for each copy, [rows, d], and row_map; other rows are 0."""
        out = [x.new_zeros(*layout.shape, x.shape[1]) for x in tensors]
        for x, x_perm in zip(tensors, out):
            row_map = self._copy(layout, x, x_perm)
        return (*out, row_map)

    def _plain_products(self, x, w13, w2, layout: _Layout) -> tuple[Tensor, Tensor]:
        sizes = layout.group_sizes_i32
        x_perm, row_map = self._permute_plain(layout, _rows(x))
        hidden = self.rowwise.swiglu(self.grouped_gemm(x_perm, w13, group_sizes=sizes))
        return self.grouped_gemm(hidden, w2, group_sizes=sizes), row_map

    def moe_experts_backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        w13: torch.Tensor | ScaledTensor,
        w2: torch.Tensor | ScaledTensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        expert_map: torch.Tensor | None = None,
        num_shared: int = 0,
        weight_grads: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """As dskernels.ref.moe_backward.moe_experts_backward for bf16, or e4m3 weights in blocks
        of 128 x 128, without waiting for the device; no d13 and d2 without weight_grads.

        Groups start at multiples of 64 rows (e4m3: 128), which is what the products along them ask
        for. bf16: gradients between products are rounded to bf16.
        """
        scaled, (tokens, topk) = isinstance(w13, ScaledTensor), topk_weights.shape
        (_need_scaled if scaled else _need_bf16)(x, w13, w2)
        if tokens * (topk + num_shared) == 0:
            wide = torch.float32 if scaled else x.dtype
            d13, d2 = (torch.zeros(w.shape, dtype=wide, device=x.device) for w in (w13, w2))
            return torch.zeros_like(x), d13, d2, torch.zeros_like(topk_weights)
        layout = self._layout(
            topk_idx, w13.shape[0], GROUP if scaled else K_BLOCK, expert_map=expert_map,
            shared=num_shared,
        )  # fmt: skip
        weights = topk_weights.float().contiguous()
        if num_shared:
            weights = torch.cat([weights, weights.new_ones(tokens, num_shared)], dim=1)
        run = self._scaled_backward if scaled else self._plain_backward
        dx, d13, d2, dweights = run(grad.to(x.dtype), x, w13, w2, layout, weights, weight_grads)
        return dx, d13, d2, dweights[:, :topk].to(topk_weights.dtype)

    def _plain_backward(self, grad, x, w13, w2, layout: _Layout, weights, weight_grads: bool):
        sizes = layout.group_sizes_i32
        x_perm, grad_perm, row_map = self._permute_plain(layout, _rows(x), _rows(grad))
        h = self.grouped_gemm(x_perm, w13, group_sizes=sizes)
        back = self.grouped_gemm(grad_perm, _transposed(w2), group_sizes=sizes)
        dh, act = torch.zeros_like(h), torch.zeros_like(back)
        dweights = torch.zeros_like(weights)
        launchers().moe_hidden_backward(
            self._on(x), h=h.data_ptr(), back=back.data_ptr(), row_map=row_map.data_ptr(),
            weights=weights.data_ptr(), dh=dh.data_ptr(), act=act.data_ptr(),
            dweights=dweights.data_ptr(), slots=weights.numel(), width=w2.shape[2],
            rows=x_perm.shape[0],
        )  # fmt: skip
        d13 = d2 = None
        if weight_grads:
            d13, d2 = (
                self.grouped_gemm_k(_transposed(a), _transposed(b), sizes, out_dtype=torch.bfloat16)
                for a, b in ((dh, x_perm), (grad_perm, act))
            )
        dx_perm = self.grouped_gemm(dh, _transposed(w13), group_sizes=sizes)
        return self.moe_unpermute(dx_perm, row_map, None), d13, d2, dweights

    def _scaled_backward(self, grad, x, w13, w2, layout: _Layout, weights, weight_grads: bool):
        """Twelve launches: layout, quantise and copy x and grad, two products, the hidden layer,
        its product; transpose x and grad, two products along the rows; weighted sum."""
        sizes = layout.group_sizes_i32
        slot_of_row = torch.full(layout.shape, -1, dtype=torch.int32, device=x.device)
        x8, row_map = self._copy_quantized(layout, x, slot_of_row=slot_of_row)
        g8, _ = self._copy_quantized(layout, grad, pow2=True, slot_of_row=slot_of_row)
        h = self.grouped_gemm(x8, w13, group_sizes=sizes, out_dtype=torch.bfloat16)
        back = self.grouped_gemm(
            g8, _transposed_blocks(w2), group_sizes=sizes, out_dtype=torch.bfloat16
        )
        hidden = self._hidden_quantized(h, back, slot_of_row, weights, weight_grads)
        dx_perm = self.grouped_gemm(
            hidden.dh, _transposed_blocks(w13), group_sizes=sizes, out_dtype=x.dtype
        )
        dx = self.moe_unpermute(dx_perm, row_map, None)
        d13 = d2 = None
        if weight_grads:
            xt = self.rowwise.quantize(x8, transpose=True)
            gt = self.rowwise.quantize(g8, scale_format="pow2", transpose=True)
            d13 = self.grouped_gemm_k(hidden.dh_t, xt, sizes)
            d2 = self.grouped_gemm_k(gt, hidden.act_t, sizes)
        return dx, d13, d2, hidden.dweights

    def _hidden_quantized(self, h, back, slot_of_row, weights, weight_grads) -> _Hidden:
        """The hidden layer's gradients, quantised for the products that take them."""
        rows, width = back.shape
        dh = _empty_scaled(rows, 2 * width, h.device)
        dh_t = _empty_scaled(2 * width, rows, h.device)
        act_t = _empty_scaled(width, rows, h.device)

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(*shape, dtype=dtype, device=h.device)

        dweights = zeros(weights.shape)
        dot, finished = zeros(width // GROUP, rows), zeros(rows // GROUP, dtype=torch.int32)
        launchers().moe_hidden_quantize(
            self._on(h), h=h.data_ptr(), back=back.data_ptr(), slot_of_row=slot_of_row.data_ptr(),
            weights=weights.data_ptr(), dh=dh.data.data_ptr(), dh_scale=dh.scale.data_ptr(),
            dh_t=dh_t.data.data_ptr(), dh_t_scale=dh_t.scale.data_ptr(),
            act_t=act_t.data.data_ptr(), act_t_scale=act_t.scale.data_ptr(), dot=dot.data_ptr(),
            dweights=dweights.data_ptr(), finished=finished.data_ptr(),
            slots=weights.numel(), rows=rows, width=width, transposed=weight_grads,
        )  # fmt: skip
        return _Hidden(dh, dh_t, act_t, dweights)

    def supports(self, op: str, **shapes) -> Support:
        limits = launchers()
        most = limits.kMoeMaxExperts if op == "moe_gate" else limits.kMoeMaxGroups
        if shapes.get("e", 1) > most:
            return Support(False, f"expected at most {most} experts, got e={shapes['e']}")
        if shapes.get("dtype", torch.bfloat16) not in FLOATS:
            return Support(False, f"expected bf16 or fp32, got dtype={shapes['dtype']}")
        return Support(True, f"{self.machine}: native kernels")


_cuda = Moe("cuda")
moe_gate, moe_permute, moe_unpermute = _cuda.moe_gate, _cuda.moe_permute, _cuda.moe_unpermute
moe_gate_backward = _cuda.moe_gate_backward
moe_unpermute_backward = _cuda.moe_unpermute_backward
moe_experts, moe_experts_backward = _cuda.moe_experts, _cuda.moe_experts_backward
supports = _cuda.supports
