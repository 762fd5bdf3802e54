"""Portable kernels in Triton: the same functions as dskernels.ref on any GPU that Triton targets.

With Triton's interpreter switched on (TRITON_INTERPRET=1 before the first import) the kernels also
run on CPU tensors, slowly: that is how they are tested on a machine without a GPU.
"""

from __future__ import annotations

import importlib.util

import torch

from ..types import Support


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels instead of a GPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def available() -> Support:
    """Whether Triton is installed and has something to run on."""
    if importlib.util.find_spec("triton") is None:
        return Support(False, "Triton is not installed (pip install 'dskernels[triton]')")
    if interpreting():
        return Support(True, "Triton's interpreter (TRITON_INTERPRET=1), for tests")
    if not torch.cuda.is_available():
        return Support(False, "no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1)")
    return Support(True, f"Triton on {torch.cuda.get_device_name()}")
