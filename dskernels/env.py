"""Every environment variable of the project, in one registry.

This is the only Python file that reads the process environment (setup.py, which runs before the
package exists, is the one exception; its variables are listed here so that `describe()` is
complete). A variable is read when it is asked for, so tests and notebooks may change it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["EnvError", "Variable", "VARIABLES", "describe", "get"]


class EnvError(ValueError):
    """An environment variable holds a value that its reader cannot use."""


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    name     as the user sets it
    default  the value `get` returns when it is unset or empty (already parsed)
    expected what a valid value looks like, for error messages and `describe()`
    doc      what it changes
    parse    text -> value; raises ValueError on anything it does not understand
    when     "run" (read through this module), "build" (read by setup.py) or "native" (read by the
             compiled library, once, when it is loaded)
    """

    name: str
    default: Any
    expected: str
    doc: str
    parse: Callable[[str], Any] = str
    when: str = "run"


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        value = text.strip().lower()
        if value not in choices:
            raise ValueError(value)
        return value

    return parse


BACKEND_CHOICES = ("auto", "cuda", "triton", "cpu", "emu", "ref")

VARIABLES: dict[str, Variable] = {
    v.name: v
    for v in (
        Variable(
            "DSK_BACKEND",
            "auto",
            " | ".join(BACKEND_CHOICES),
            "Backend of every call that names none; read once, at import.",
            _one_of(*BACKEND_CHOICES),
        ),
        Variable(
            "DSK_CPU_TARGET",
            "",
            "a target of this processor, see dskernels.cpu.info()",
            "Instruction set of the native CPU kernels; default: the best one.",
            when="native",
        ),
        Variable(
            "DSK_EMU_ISA",
            "",
            "an instruction set of this processor",
            "Instruction set the Hopper emulator runs on; default: the best one.",
            when="native",
        ),
        Variable(
            "DSK_CUDA_DRIVER",
            "",
            "path of a libcuda.so.1",
            "CUDA driver of the cuda backend; default: libcuda.so.1 by the loader's search.",
            when="native",
        ),
        Variable(
            "DSK_NCCL_HOME",
            "",
            "a folder with include/nccl_device.h and lib",
            "NCCL that dskernels.ep.rail.build compiles against; default: nvidia-nccl's wheel.",
        ),
        Variable(
            "DSK_EP_RAIL",
            "",
            "path of the library that dskernels.ep.rail.build made",
            "The rail between nodes (compiled, never executed).",
        ),
        Variable(
            "DSK_EMU_CHECK",
            "",
            "0 | 1 | order | strict",
            "Checks of kernels that ops launch on the emulator: 0 turns them off, order raises "
            "formal findings about order too, strict also uninitialized reads.",
            when="native",
        ),
        Variable(
            "DSK_EMU_NUMERICS",
            "",
            "exact | fast | worst",
            "Arithmetic of kernels that ops launch on the emulator; see docs/emulator_numerics.md.",
            when="native",
        ),
        Variable(
            "DSK_EMU_SEED",
            "",
            "an integer; 0 is the fixed schedule",
            "Seed of the emulator's schedule for kernels that ops launch on it.",
            when="native",
        ),
        Variable(
            "DSK_EMU_SEEDS",
            "",
            "a positive integer",
            "Every launch on the emulator also runs under that many random schedules from the same "
            "memory; results that differ in a bit raise HazardError (order-dependent-result).",
            when="native",
        ),
        Variable(
            "DSK_EMU_THREADS",
            "",
            "a positive integer",
            "Host threads of the Hopper emulator; default: the number of processors.",
            when="native",
        ),
        Variable(
            "DSK_BUILD_TYPE",
            "Release",
            "a CMake build type",
            "CMAKE_BUILD_TYPE of the compiled library.",
            when="build",
        ),
        Variable(
            "DSK_BUILD_DIR",
            "build/cmake-<python tag>",
            "a directory",
            "Where CMake keeps its build tree.",
            when="build",
        ),
        Variable(
            "DSK_CMAKE_ARGS",
            "",
            "arguments separated by spaces",
            "Further arguments of the CMake configure step.",
            when="build",
        ),
        Variable(
            "MAX_JOBS",
            "number of processors",
            "a positive integer",
            "Parallel compile jobs of the build.",
            when="build",
        ),
    )
}


def get(name: str) -> Any:
    """Return the parsed value of `name`, or its default when it is unset or empty.

    Raises KeyError for a variable that is not in the registry (a bug in the caller) and EnvError,
    naming variable, expected and actual, for a value that does not parse.
    """
    variable = VARIABLES[name]
    text = os.environ.get(name, "")
    if not text.strip():
        return variable.default
    try:
        return variable.parse(text)
    except ValueError as error:
        raise EnvError(f"{name}: expected {variable.expected}, got {text!r}") from error


def describe() -> str:
    """Return a table of every variable: name, when it is read, what it takes, what it does."""
    rows = [("name", "read", "expected", "default", "what it does")]
    rows += [(v.name, v.when, v.expected, str(v.default), v.doc) for v in VARIABLES.values()]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for row in rows:
        head = "  ".join(cell.ljust(width) for cell, width in zip(row, widths))
        lines.append(f"{head}  {row[4]}".rstrip())
    return "\n".join(lines)
