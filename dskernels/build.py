"""What this build consists of and where it runs, for bug reports: `build_info`."""

from __future__ import annotations

import importlib
import platform
import re
from pathlib import Path
from typing import Any

import torch

from . import backend, env

KERNELS = Path(__file__).parent / "_kernels"
# ptxas -v, one kernel a report. What it does not mention is none of: static shared memory only.
_PTXAS = {
    "registers": r"Used (\d+) registers",
    "stack": r"(\d+) bytes stack frame",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
}
_STATIC_SMEM = r"(\d+)(?:\+\d+)? bytes smem"


def build_info() -> dict[str, Any]:
    """What this build consists of and where it runs.

    version, python, torch   of the package and its surroundings
    compiler                 of the compiled library, or why there is none
    backends                 {name: reason}, "no: " before those that cannot run
    cpu                      what `dskernels.cpu.info()` reports of the native kernels' targets
    cuda_toolkit             release of the nvcc that compiled the cubins; "" without one
    cuda_driver_needed       oldest driver that loads them, as the CUDA release it supports: "13.0"
    cuda_driver              the one found, likewise, or why there is none
    cuda_kernels             {name: figures} of the cubins in dskernels/_kernels: registers, stack,
                             spill_stores, spill_loads (a thread's, the last three in bytes),
                             static_smem (bytes; a launch adds its dynamic ring), threads of a CTA,
                             bytes of the file; in builds that had nvdisasm also instructions, and
                             qgmma and hgmma, the tensor core's FP8 and 16-bit ones among them
    """
    core = backend._module("_C")
    info = getattr(backend._module("cpu"), "info", None)
    driver = core.driver_status(env.get("DSK_CUDA_DRIVER")) if core else {}
    return {
        "version": importlib.import_module(__package__).__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": core.compiler if core else backend.backends()["cpu"].reason,
        "backends": {k: ("" if s else "no: ") + s.reason for k, s in backend.backends().items()},
        "cpu": info() if info else {},
        "cuda_toolkit": core.nvcc if core else "",
        "cuda_driver_needed": _release(driver.get("min_driver_version", 0)),
        "cuda_driver": _release(driver.get("driver_version", 0)) or driver.get("reason", ""),
        "cuda_kernels": {p.stem: _figures(p) for p in sorted(KERNELS.glob("*.cubin"))},
    }


def _release(version: int) -> str:
    """13000 -> "13.0", the driver API's way to write a CUDA release; 0 -> ""."""
    return f"{version // 1000}.{version % 1000 // 10}" if version else ""


def _figures(cubin: Path) -> dict[str, int]:
    threads = re.search(r"\.maxntid (\d+)", cubin.with_suffix(".ptx").read_text())
    return {
        **ptxas_figures(cubin.with_suffix(".ptxas.txt").read_text()),
        "threads": int(threads[1]) if threads else 0,
        "bytes": cubin.stat().st_size,
        **_machine_code(cubin.with_suffix(".sass.txt")),
    }


def _machine_code(summary: Path) -> dict[str, int]:
    """From "OPCODE count" lines; empty where there is no such file."""
    if not summary.exists():
        return {}
    count = {opcode: int(n) for opcode, n in map(str.split, summary.read_text().splitlines())}
    return {
        "instructions": sum(count.values()),
        "qgmma": count.get("QGMMA", 0),
        "hgmma": count.get("HGMMA", 0),
    }


def ptxas_figures(report: str) -> dict[str, int]:
    """The numbers of one kernel's `ptxas -v` report. Raises ValueError where one is missing: an
    absent figure is not a zero."""
    figures = {}
    for name, pattern in _PTXAS.items():
        match = re.search(pattern, report)
        if match is None:
            raise ValueError(f"report: expected {pattern!r} in ptxas' report, got {report!r}")
        figures[name] = int(match[1])
    smem = re.search(_STATIC_SMEM, report)
    return {**figures, "static_smem": int(smem[1]) if smem else 0}
