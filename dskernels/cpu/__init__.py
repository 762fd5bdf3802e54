"""The native CPU kernels: which target runs, weight packing, and one module per stem.

A target is an instruction set the same C++ sources were compiled for: "amx", "avx512_fp16",
"avx512", "avx2" or "portable". The best one that the processor runs is taken; DSK_CPU_TARGET
forces one. Kernels use torch.get_num_threads() threads of a pool of their own.
"""

from __future__ import annotations

from .. import _C
from .packing import PackedWeight, pack

__all__ = ["PackedWeight", "info", "pack"]


def info() -> dict[str, object]:
    """Which target runs and why, what else this processor could run, and the pool's size.

    Raises ValueError when DSK_CPU_TARGET names an unknown or unavailable target.
    """
    return {
        "target": _C.cpu.target(),
        "reason": _C.cpu.target_reason(),
        "available": _C.cpu.available_targets(),
        "pool_threads": _C.cpu.pool_size(),
    }
