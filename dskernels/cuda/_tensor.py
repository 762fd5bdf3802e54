"""What launchers need to know of a tensor: its device's ordinal and its current stream."""

from __future__ import annotations

import torch


def device_of(x: torch.Tensor) -> int:
    """Ordinal of the GPU that holds x; CPU tensors run on the emulator's device 0."""
    return x.device.index or 0 if x.is_cuda else 0


def stream_of(x: torch.Tensor) -> int:
    """Handle of torch's current stream on x's device; 0, the default stream, on the CPU."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
