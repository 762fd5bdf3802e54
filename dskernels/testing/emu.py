"""A pytest fixture that runs a CUDA kernel in the Hopper emulator over many schedules.

In a conftest.py: `pytest_plugins = ["dskernels.testing.emu"]`. In a test:

    def test_saxpy(emu_kernel):
        x, y = np.ones(1000, np.float32), np.zeros(1000, np.float32)
        emu_kernel("saxpy.cu", "saxpy")[4, 256](2.0, x, y, 1000)
        assert np.all(y == 2)

The launch runs under the fixed schedule and eight random ones, each from the same arrays, with
every check on. A hazard or a deadlock fails the test with its report, and so does a result that
differs in a bit between schedules. The arrays end as the fixed schedule left them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

__all__ = ["CheckedKernel", "emu_kernel"]


class CheckedKernel:
    """A kernel of the emulator whose launches run over `seeds` random schedules as well.

    allow: kinds of formal findings that are fine ("formal-proxy-order" by default: the memory model
    asks for a proxy fence that hardware is not known to need).
    """

    def __init__(self, kernel: Any, seeds: int, allow: Sequence[str]):
        self._kernel, self._seeds, self._allow = kernel, seeds, frozenset(allow)

    def __getitem__(self, shape: tuple) -> Callable[..., Any]:
        """`kernel[grid, block]`: a function of the kernel's arguments and of the options `cluster`,
        `shared`, `numerics` and `device`; see dskernels.emu. Returns the fixed schedule's
        LaunchStats. Raises HazardError, DeadlockError, AssertionError."""
        launcher = self._kernel[shape]

        def launch(*args: Any, **options: Any) -> Any:
            arrays = [a for a in map(_behind, args) if _is_writable(a)]
            before = _copies(arrays)
            stats = self._run(launcher, args, None, options)
            first = _copies(arrays)
            for seed in range(self._seeds):
                _restore(arrays, before)
                self._run(launcher, args, seed, options)
                self._compare(arrays, first, seed)
            _restore(arrays, first)
            return stats

        return launch

    def _run(self, launcher: Any, args: tuple, seed: int | None, options: dict) -> Any:
        stats = launcher(*args, seed=seed, check=True, **options)
        findings = [h for h in stats.hazards if h.kind not in self._allow]
        assert not findings, "\n".join(map(repr, findings))
        return stats

    def _compare(self, arrays: list, first: list, seed: int) -> None:
        for k, (now, then) in enumerate(zip(arrays, first, strict=True)):
            differ = _bytes(now) != _bytes(then)
            assert not differ.any(), (
                f"array {k} of '{self._kernel.name}' depends on the schedule: "
                f"{int(differ.sum())} bytes differ under seed {seed}, the first at byte "
                f"{int(differ.argmax())}"
            )


def _behind(value: Any) -> Any:
    """The array that a tensor map describes; anything else is itself."""
    described = getattr(value, "array", value)
    return getattr(described, "owner", value)


def _copies(arrays: list) -> list:
    return [a.copy() if isinstance(a, np.ndarray) else a.clone() for a in arrays]


def _is_writable(value: Any) -> bool:
    if hasattr(value, "data_ptr"):
        return True
    return isinstance(value, np.ndarray) and value.ndim > 0 and value.flags.writeable


def _bytes(array: Any) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    import torch

    return array.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _restore(arrays: list, values: list) -> None:
    for array, value in zip(arrays, values, strict=True):
        if isinstance(array, np.ndarray):
            array[...] = value
        else:
            array.detach().copy_(value)


@pytest.fixture
def emu_kernel() -> Callable[..., CheckedKernel]:
    """`emu_kernel(source, name, seeds=8, allow=("formal-proxy-order",), options=())`.

    source: a path of a .cu or .ptx file, CUDA C++ or PTX text, or a dskernels.emu.Module. CUDA
    sources need nvcc (the test is skipped without it); `options` are further options of nvcc.
    """
    from dskernels import emu

    def make(
        source: Any,
        name: str,
        seeds: int = 8,
        allow: Sequence[str] = ("formal-proxy-order",),
        options: Sequence[str] = (),
    ) -> CheckedKernel:
        if isinstance(source, emu.Module):
            return CheckedKernel(source.kernel(name), seeds, allow)
        text, label = str(source), None
        if isinstance(source, Path) or "\n" not in text:
            label, text = Path(text).name, Path(text).read_text()
        if ".version" not in text:
            import shutil

            if shutil.which("nvcc") is None:
                pytest.skip("nvcc is not on PATH")
            text = emu.compile(text, options=options)
        return CheckedKernel(emu.Module(text, label).kernel(name), seeds, allow)

    return make
