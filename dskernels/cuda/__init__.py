"""The hand-written sm_90a kernels, on a Hopper GPU through the CUDA driver found at run time.

`machine` is "cuda" here and "emu" in dskernels.emu: the same launchers and the same kernels, whose
cubins run on the GPU and whose PTX runs in the emulator.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

from .. import env
from ..types import Support

KERNEL_DIRECTORY = Path(__file__).resolve().parent.parent / "_kernels"


@functools.cache
def launchers() -> ModuleType:
    """The compiled launchers, told where this package's kernels lie."""
    from .. import _C

    _C.launch.set_kernel_directory(str(KERNEL_DIRECTORY))
    return _C.launch


def kernels_built() -> Support:
    """Whether this build has CUDA kernels at all."""
    if not any(KERNEL_DIRECTORY.glob("*.ptx")):
        return Support(False, "built without nvcc: the CUDA kernels were left out")
    return Support(True, f"{len(list(KERNEL_DIRECTORY.glob('*.ptx')))} kernels")


def machine_code() -> dict[str, dict[str, int]]:
    """Kernel -> how often each opcode stands in its cubin (QGMMA, HGMMA, LDL, ...); empty for a
    build without nvdisasm."""
    found = {}
    for file in sorted(KERNEL_DIRECTORY.glob("*.sass.txt")):
        lines = (line.split() for line in file.read_text().splitlines())
        found[file.name.removesuffix(".sass.txt")] = {opcode: int(n) for opcode, n in lines}
    return found


def available() -> Support:
    """Whether a Hopper GPU, its driver and the kernels are here."""
    from .. import _C

    built = kernels_built()
    if not built:
        return built
    status = _C.driver_status(env.get("DSK_CUDA_DRIVER"))
    return Support(status["available"], status["reason"])
