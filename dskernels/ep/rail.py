"""The rail between nodes, from the host: find NCCL, compile csrc/rail against it, load, launch it.

Compiled, linked and loaded on a machine without a GPU; NEVER EXECUTED: there was no network card.
Nothing in `dskernels.ep` calls it yet: `Group` exchanges within a host, and the kernels of
`dskernels.cuda.ep` reach other nodes' memory by stores. What is missing between them and this is a
dispatch that leaves its messages in an outbox, and forwards from an inbox.

NCCL's device code is not binary compatible between versions, so the library is made once for the
NCCL that it runs with, and `Rail` refuses another one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

from .. import env
from ..types import Support

LEAST_NCCL = (2, 30, 7)
SOURCES = Path(__file__).resolve().parents[2] / "csrc"


class RailParams(ctypes.Structure):
    """EpRailParams of csrc/rail/ep_rail.cu, field by field; pointers are addresses on the GPU."""

    _fields_ = (
        ("epoch", ctypes.c_uint64),
        ("wait_cycles", ctypes.c_int64),
        ("outbox", ctypes.c_uint64),
        ("inbox", ctypes.c_uint64),
        ("totals", ctypes.c_uint64),
        ("message_bytes", ctypes.c_int64),
        ("max_messages", ctypes.c_int64),
        ("ranks_per_node", ctypes.c_int32),
        ("chunk", ctypes.c_int32),
        ("counts", ctypes.c_void_p),
        ("sent", ctypes.c_void_p),
        ("failed", ctypes.c_void_p),
    )


def window_bytes(nodes: int, max_messages: int, message_bytes: int) -> dict[str, int]:
    """Offsets of outbox, inbox and totals in a rail's window, and "bytes", its size."""
    for name, value in (("nodes", nodes), ("max_messages", max_messages)):
        if value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    if message_bytes < 16 or message_bytes % 16:
        raise ValueError(f"message_bytes: expected a multiple of 16, got {message_bytes}")
    box = nodes * max_messages * message_bytes
    totals = 3 * box  # the outbox, and two copies of the inbox
    return {"outbox": 0, "inbox": box, "totals": totals, "bytes": totals + 2 * nodes * 8}


class Rail:
    """One rank's end of the rail. All ranks of the communicator open it together.

    library  of `build`; default: the variable DSK_EP_RAIL
    comm     ncclComm_t, as an address
    memory   this rank's window of `size` bytes, from ncclMemAlloc; laid out by `window_bytes`
    Raises RuntimeError, naming the call and NCCL's code, for whatever NCCL refuses.
    """

    def __init__(
        self, comm: int, memory: int, size: int, nodes: int, *, library: Path | None = None
    ) -> None:
        self._library = load(library)
        self._rail = ctypes.create_string_buffer(_size_of(self._library, 1))
        self._call(
            "ep_rail_open", ctypes.c_void_p(comm), ctypes.c_void_p(memory), ctypes.c_size_t(size),
            ctypes.c_int(nodes), self._rail,
        )  # fmt: skip

    def exchange(self, params: RailParams, *, ctas: int, stream: int) -> None:
        """Queue one exchange of messages with the other nodes on a CUDA stream."""
        if ctas < 1:
            raise ValueError(f"ctas: expected a positive number, got {ctas}")
        self._call(
            "ep_rail_exchange", self._rail, ctypes.byref(params), ctypes.c_int(ctas),
            ctypes.c_void_p(stream),
        )  # fmt: skip

    def close(self) -> None:
        self._call("ep_rail_close", self._rail)

    def _call(self, name: str, *args: object) -> None:
        code = getattr(self._library, name)(*args)
        if code:
            raise RuntimeError(f"{name}: expected success, got code {code}")


def load(library: Path | None = None) -> ctypes.CDLL:
    """The compiled rail, checked against this file and against the NCCL in the process."""
    path = library or env.get("DSK_EP_RAIL")
    if not path or not Path(path).is_file():
        raise RuntimeError(
            "rail: expected the library that dskernels.ep.rail.build makes, as an argument or in "
            f"DSK_EP_RAIL, got {str(path)!r}"
        )
    loaded = ctypes.CDLL(str(path))
    ours, theirs = ctypes.sizeof(RailParams), _size_of(loaded, 0)
    if ours != theirs:
        raise RuntimeError(
            f"rail: expected parameters of {ours} bytes, got {theirs}: build it anew"
        )
    built, running = _size_of(loaded, 2), ctypes.c_int()
    if loaded.ncclGetVersion(ctypes.byref(running)) or running.value != built:
        raise RuntimeError(f"rail: expected NCCL {built}, as built with, got {running.value}")
    return loaded


def _size_of(library: ctypes.CDLL, index: int) -> int:
    library.ep_rail_fact.restype = ctypes.c_int64
    return int(library.ep_rail_fact(index))


def find_nccl() -> Path | None:
    """DSK_NCCL_HOME, or an installed nvidia-nccl wheel, with include/nccl_device.h and lib."""
    home = env.get("DSK_NCCL_HOME")
    folders = [Path(home)] if home else []
    spec = importlib.util.find_spec("nvidia")
    folders += [Path(p) / "nccl" for p in (spec.submodule_search_locations or [])] if spec else []
    return next((f for f in folders if (f / "include" / "nccl_device.h").exists()), None)


def build(out: Path, *, sources: Path = SOURCES) -> Path:
    """Compile csrc/rail (of a checkout) with nvcc against the NCCL found, into `out`; a minute.
    Raises RuntimeError with what is missing, or with nvcc's words."""
    ready = can_build(sources)
    if not ready:
        raise RuntimeError(f"rail: {ready.reason}")
    nccl = find_nccl()
    command = [
        "nvcc", "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler",
        "-fPIC,-Wall", "-Xptxas", "-v", f"-I{sources}", f"-I{nccl / 'include'}",
        str(sources / "rail" / "ep_rail.cu"), "-o", str(out), f"-L{nccl / 'lib'}",
        "-l:libnccl.so.2", "-Xlinker", "--no-undefined", "-Xlinker", f"-rpath={nccl / 'lib'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"rail: nvcc failed: {done.stderr[-2000:]}")
    if "0 bytes spill stores, 0 bytes spill loads" not in done.stderr:
        raise RuntimeError(f"rail: expected no spills, got {done.stderr[-2000:]}")
    return out


def can_build(sources: Path = SOURCES) -> Support:
    """Whether `build` has what it needs."""
    if not (sources / "rail" / "ep_rail.cu").is_file():
        return Support(False, "no sources of the rail: it is compiled from a checkout (csrc/rail)")
    nccl = find_nccl()
    if nccl is None:
        return Support(False, "no NCCL with nccl_device.h: install nvidia-nccl-cu13, or set "
                              "DSK_NCCL_HOME")  # fmt: skip
    version = nccl_version(nccl)
    if version < LEAST_NCCL:
        return Support(False, f"NCCL {_dotted(version)} found, {_dotted(LEAST_NCCL)} needed")
    if shutil.which("nvcc") is None:
        return Support(False, f"NCCL {_dotted(version)} found, but no nvcc on PATH")
    return Support(True, f"can be compiled against NCCL {_dotted(version)} in {nccl}")


def nccl_version(nccl: Path) -> tuple[int, ...]:
    """Of the header: (major, minor, patch)."""
    words: dict[str, str] = {}
    for line in (nccl / "include" / "nccl.h").read_text().splitlines():
        parts = line.split()
        if len(parts) >= 3 and parts[0] == "#define" and parts[1].startswith("NCCL_"):
            words[parts[1]] = parts[2]
    return tuple(int(words[f"NCCL_{part}"]) for part in ("MAJOR", "MINOR", "PATCH"))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
