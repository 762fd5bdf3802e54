"""Row-wise CUDA kernels: 1x128 quantisation. Dimension letters: m rows, k columns."""

from __future__ import annotations

import torch

from ..types import ScaledTensor, Support, Unsupported
from . import launchers
from ._tensor import device_of, stream_of


def on(machine: str):
    """quantize() and supports() for "cuda" or "emu"."""

    def quantize(
        x: torch.Tensor,
        block: tuple[int, int] = (1, 128),
        scale_format: str = "fp32",
        dtype: str = "e4m3",
        transpose: bool = False,
    ) -> ScaledTensor:
        """As dskernels.ref.rowwise.quantize, for x [m, k] bf16 or fp32 in blocks (1, 128)."""
        if not isinstance(x, torch.Tensor) or x.dtype not in (torch.bfloat16, torch.float32):
            raise Unsupported(f"x: expected bf16 or fp32, got {getattr(x, 'dtype', type(x))}")
        if x.dim() != 2 or tuple(block) != (1, 128) or dtype != "e4m3" or transpose:
            raise Unsupported(
                "the kernel quantises [m, k] to e4m3 in blocks of (1, 128), not transposed; got "
                f"shape {tuple(x.shape)}, block {tuple(block)}, {dtype}, transpose={transpose}"
            )
        if x.stride(-1) != 1:
            x = x.contiguous()
        m, k = x.shape
        groups = -(-k // 128)
        data = torch.empty(m, k, dtype=torch.float8_e4m3fn, device=x.device)
        scale = torch.zeros(groups, -(-m // 4) * 4, dtype=torch.float32, device=x.device)
        launchers().rowwise_quantize(
            machine=machine,
            ordinal=device_of(x),
            stream=stream_of(x),
            x=x.data_ptr(),
            is_bf16=x.dtype == torch.bfloat16,
            data=data.data_ptr(),
            scale=scale.data_ptr(),
            rows=m,
            cols=k,
            ld_x=x.stride(0),
            ld_data=k,
            ld_scale=scale.stride(0),
            ue8m0=scale_format != "fp32",
            num_sms=0,
        )
        return ScaledTensor(data, scale.t()[:m], (1, 128), "e4m3")

    def supports(op: str, **shapes) -> Support:
        return Support(True, f"{machine}: rowwise_quantize (block (1, 128), e4m3)")

    return quantize, supports


quantize, supports = on("cuda")
