"""Modules, kernels and launches."""

import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dskernels._C import emu as _emu
from dskernels.emu.arrays import Lent, describe, is_array
from dskernels.emu.stat import LaunchProfile, profiling
from dskernels.emu.tensor_map import TensorMap

_FORMATS = {
    "f32": "f", "f64": "d", "u8": "B", "s8": "b", "u16": "H", "s16": "h", "u32": "I", "s32": "i",
    "u64": "Q", "s64": "q", "b8": "B", "b16": "H", "b32": "I", "b64": "Q",
}  # fmt: skip


@dataclass
class LaunchStats:
    """What one launch did: instruction counts (per warp and per thread), asynchronous operations,
    warp-level wgmma executions, host seconds, the formal findings, and the profile if one was
    asked for."""

    kernel: str
    warp_instructions: int
    thread_instructions: int
    async_operations: int
    wgmma: int
    seconds: float
    hazards: list = field(default_factory=list)
    profile: LaunchProfile | None = None  # of a launch with profile=True


def _triple(value: int | Sequence[int], what: str) -> tuple[int, int, int]:
    parts = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    if not 1 <= len(parts) <= 3 or any(p < 1 for p in parts):
        raise ValueError(f"{what}: expected one to three positive integers, got {value!r}")
    return parts + (1,) * (3 - len(parts))


NUMERICS = ("exact", "fast", "worst")  # in the order of the compiled library


class _Loans:
    """Lends ranges for the duration of a launch; equal ranges once."""

    def __init__(self, stack: ExitStack):
        self._stack = stack

    def lend(self, lent: Lent, name: str) -> None:
        if lent.bytes:
            _emu.lend(lent.base, lent.bytes, lent.read_only, name)
            self._stack.callback(_emu.take_back, lent.base, lent.bytes)


@contextmanager
def lend(*arrays: Any) -> Iterator[list[int]]:
    """Lends arrays (NumPy, torch CPU) whose addresses kernels find in memory or inside structs.

    Yields the addresses. Kernels may use the arrays until the block ends.
    """
    with ExitStack() as stack:
        loans = _Loans(stack)
        described = [describe(array) for array in arrays]
        for k, lent in enumerate(described):
            loans.lend(lent, f"lent array {k}")
        yield [lent.address for lent in described]


def _integer_bytes(value: Any, size: int, name: str) -> bytes:
    number = int(value)
    if not -(1 << (8 * size - 1)) <= number < 1 << (8 * size):
        raise ValueError(f"argument '{name}': {number} does not fit {size} bytes")
    return (number & ((1 << (8 * size)) - 1)).to_bytes(size, "little")


def _pack(value: Any, param: dict, loans: _Loans) -> bytes:
    """One argument as the kernel's parameter block holds it."""
    size, name = param["size"], param["name"]
    if isinstance(value, TensorMap):
        loans.lend(value.array, name)
        value = value.data
    if isinstance(value, bytes | bytearray):
        if len(value) != size:
            raise ValueError(f"argument '{name}': expected {size} bytes, got {len(value)}")
        return bytes(value)
    if is_array(value) and getattr(value, "shape", ()) != () or hasattr(value, "data_ptr"):
        if size != 8:
            raise ValueError(f"argument '{name}': an array needs 8 bytes, the kernel has {size}")
        lent = describe(value)
        loans.lend(lent, name)
        return lent.address.to_bytes(8, "little")
    if value is None and size == 8:
        return bytes(8)
    if isinstance(value, float) or getattr(getattr(value, "dtype", None), "kind", "") == "f":
        declared = param["type"]
        kind = declared if declared in ("f32", "f64") else {4: "f32", 8: "f64"}.get(size, "f32")
        if size not in (4, 8):
            raise ValueError(f"argument '{name}': a float needs 4 or 8 bytes, not {size}")
        return struct.pack("<" + _FORMATS[kind], float(value))
    return _integer_bytes(value, size, name)


class Kernel:
    """One kernel of a module. `kernel[grid, block](*args, ...)` launches and waits."""

    def __init__(self, module: "Module", name: str):
        self._module = module
        self.name = name
        self.info = module._handle.kernel_info(name)

    def __getitem__(self, shape: tuple) -> "Launcher":
        if not isinstance(shape, tuple) or len(shape) != 2:
            raise ValueError("expected kernel[grid, block]")
        return Launcher(self, _triple(shape[0], "grid"), _triple(shape[1], "block"))

    def pack(self, args: Sequence[Any], stack: ExitStack) -> bytes:
        """The parameter block of `args`; arrays stay lent until `stack` closes."""
        params = self.info["params"]
        if len(args) != len(params):
            names = ", ".join(p["name"] for p in params)
            raise ValueError(
                f"kernel '{self.name}' takes {len(params)} arguments ({names}), got {len(args)}"
            )
        block = bytearray(self.info["param_bytes"])
        loans = _Loans(stack)
        for value, param in zip(args, params, strict=True):
            data = _pack(value, param, loans)
            block[param["offset"] : param["offset"] + param["size"]] = data
        return bytes(block)


class Launcher:
    """A kernel with its grid and block."""

    def __init__(self, kernel: Kernel, grid: tuple, block: tuple):
        self._kernel, self._grid, self._block = kernel, grid, block

    def __call__(
        self,
        *args: Any,
        cluster: int | Sequence[int] = (1, 1, 1),
        shared: int = 0,
        seed: int | None = None,
        check: bool | str = True,
        numerics: str = "exact",
        device: int = 0,
        profile: bool = False,
        max_instructions: int = 0,
    ) -> LaunchStats:
        """Runs the kernel to its end.

        args: arrays (NumPy, torch CPU), Python or NumPy scalars, bytes, tensor maps, None for a
        null pointer. cluster: CTAs per cluster. shared: dynamic shared memory, bytes. seed: None
        for the fixed schedule on all host threads, a number for a random schedule that this seed
        reproduces. check: look for hazards; "strict" also raises formal findings, but for
        "formal-proxy-order". numerics: "exact" (tensor cores as on
        Hopper, the approximate functions correctly rounded), "fast" (tensor cores in fp32) or
        "worst" (as exact, but approximate functions are off by the largest documented error, up or
        down by seed and input). profile: record the launch in full, for LaunchStats.profile (use
        `emu.profiling` for a sample, another part or launches made elsewhere). max_instructions:
        warp-instructions of one cluster after which it counts as endless (DeadlockError); 0: no
        limit. Raises HazardError, DeadlockError, EmuError; ValueError for bad arguments.
        """
        if numerics not in NUMERICS:
            raise ValueError(f"numerics: expected one of {NUMERICS}, got {numerics!r}")
        if check not in (True, False, "strict"):
            raise ValueError(f"check must be True, False or 'strict', got {check!r}")
        if seed is not None and not 0 <= seed < 1 << 63:
            raise ValueError(f"seed must be in 0..2**63-1, got {seed}")
        with ExitStack() as stack:
            params = self._kernel.pack(args, stack)
            recorded = None
            if profile:
                options = {"sample_ctas": None, "check": bool(check), "numerics": numerics}
                recorded = stack.enter_context(profiling(**options))
            number = _emu.launch(
                device,
                self._kernel._module._handle,
                self._kernel.name,
                self._grid,
                self._block,
                _triple(cluster, "cluster"),
                shared,
                params,
                0 if seed is None else seed + 1,
                bool(check),
                NUMERICS.index(numerics),
                False,
                max_instructions,
                check == "strict",
            )
            _emu.synchronize(device)
        stats = LaunchStats(**_emu.stats(number))
        if recorded is not None:
            (stats.profile,) = recorded.launches
        return stats


class Module:
    """A PTX file, parsed and decoded.

    source: PTX text, or the path of a .ptx file. Raises PtxError, with the line, for text that
    cannot be parsed and for instructions that are not supported.
    """

    def __init__(self, source: str | Path, name: str | None = None):
        if isinstance(source, Path) or (len(source) < 4096 and "\n" not in source):
            path = Path(source)
            name = name or path.name
            source = path.read_text()
        self.text = source
        self._handle = _emu.load(source, name or "module")

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels, sorted."""
        return self._handle.kernels()

    def kernel(self, name: str) -> Kernel:
        """The kernel called `name`; a unique part of a (mangled) name will do."""
        names = self.kernels
        if name not in names:
            hits = [n for n in names if name in n]
            if len(hits) == 1:
                name = hits[0]
        return Kernel(self, name)
