"""The Hopper emulator: run, check and look into sm_90a kernels on any machine.

    import numpy as np
    from dskernels import emu

    module = emu.Module(emu.compile(cuda_source))
    module.kernel("saxpy")[(n + 255) // 256, 256](np.float32(2), x, y, n)

Arrays (NumPy, or torch on the CPU) are lent to the kernel for the launch, without copies; every
access is checked against their bounds. See docs/emulator.md.
"""

from dskernels.emu.compile import compile
from dskernels.emu.errors import (
    DeadlockError,
    EmuError,
    Hazard,
    HazardError,
    PtxError,
    StuckWarp,
)
from dskernels.emu.module import Kernel, LaunchStats, Module, lend
from dskernels.emu.stat import PARTS, LaunchProfile, Profile, Timing, model_of, profiling
from dskernels.emu.table import instruction_table, instruction_table_markdown
from dskernels.emu.tensor_map import TensorMap, tensor_map
from dskernels.types import Support


def available() -> Support:
    """Whether the emulator can serve as a backend: it needs the kernels' PTX."""
    from dskernels.cuda import kernels_built

    built = kernels_built()
    return Support(True, f"the Hopper emulator runs the PTX of {built.reason}") if built else built


__all__ = [
    "DeadlockError",
    "EmuError",
    "Hazard",
    "HazardError",
    "Kernel",
    "LaunchProfile",
    "LaunchStats",
    "Module",
    "PARTS",
    "Profile",
    "PtxError",
    "StuckWarp",
    "TensorMap",
    "Timing",
    "available",
    "compile",
    "instruction_table",
    "instruction_table_markdown",
    "lend",
    "model_of",
    "profiling",
    "tensor_map",
]
