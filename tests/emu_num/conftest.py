"""Shared pieces of the emulator-numerics tests."""

import dskernels._C as _C
import numpy as np
import pytest
import torch

NUM = _C._emu_num

TORCH_TYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


@pytest.fixture
def num():
    """The bound units; restores the run-time choice of instruction set afterwards."""
    torch.set_num_threads(1)
    yield NUM
    NUM.force_isa("")


def available_isas() -> list[str]:
    """Instruction sets that this machine can force, best last."""
    found = []
    for name in ("scalar", "avx2", "avx512", "avx512bf16"):
        try:
            NUM.force_isa(name)
        except ValueError:
            continue
        found.append(name)
    NUM.force_isa("")
    return found


def to_bytes(t: torch.Tensor) -> np.ndarray:
    """A 2-D tensor's storage as uint8 rows."""
    return t.contiguous().view(torch.uint8).numpy()
