"""What will work on this machine, and why not, before a job is started."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import env
from ..types import Support
from . import rail
from .group import _experts_of_rank, native

_SYSCALL_PIDFD_OPEN = 434


@dataclass(frozen=True)
class Report:
    """transports: whether each can run here, with the reason; checks: what was looked at;
    window_bytes: address space of one rank's window, needed_bytes: memory that a full window and
    the tokens' own tensors touch on this host, when load is even."""

    transports: dict[str, Support]
    checks: dict[str, Support]
    window_bytes: int
    needed_bytes: int
    facts: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = ["transports"]
        lines += [_line(name, support) for name, support in self.transports.items()]
        lines += ["checks"] + [_line(name, support) for name, support in self.checks.items()]
        lines += ["facts"] + [f"  {name:16} {text}" for name, text in self.facts.items()]
        return "\n".join(lines)


def _line(name: str, support: Support) -> str:
    return f"  {'ok' if support else 'no':3} {name:16} {support.reason}"


def doctor(
    *,
    num_ranks: int = 8,
    num_experts: int = 256,
    max_tokens: int = 4096,
    hidden: int = 7168,
    topk: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    buffers: int = 3,
) -> Report:
    """Examine this machine for a Group with these options, all ranks on this host. Starts nothing
    and changes nothing."""
    comm = native()
    counts = _experts_of_rank(num_experts, num_ranks)
    begin = [sum(counts[:r]) for r in range(num_ranks + 1)]
    size = dtype.itemsize
    scale_bytes = -(-hidden // 128) * 4
    window = 0
    if num_ranks <= comm.max_ranks:
        window = comm.window_bytes(max_tokens, hidden * size, scale_bytes, topk, begin, buffers)
    # A token reaches a rank with 1 - (1 - 1/r)^k when its experts are spread evenly.
    reached = num_ranks * (1 - (1 - 1 / num_ranks) ** topk)
    rows = num_ranks * max_tokens * reached
    needed = int(rows * hidden * size * 2 + num_ranks * max_tokens * hidden * size * 2)
    checks = {
        "memfd": _memfd(),
        "proc_fd": _proc_fd(),
        "pidfd": _pidfd(),
        "memory": _memory(needed),
        "ranks": _ranks(num_ranks),
    }
    missing = [f"{name}: {s.reason}" for name, s in checks.items() if not s and name != "pidfd"]
    shm = Support(not missing, "; ".join(missing) or f"copies with {comm.copy_isa()} stores")
    transports = {"shm": shm, "nvlink": _nvlink(), "rdma": _rdma(), "emu": _emulator()}
    facts = {
        "processors": f"{os.cpu_count()} for {num_ranks} ranks",
        "window": f"{window / 2**30:.2f} GiB of address space a rank, taken page by page",
        "memory": f"{needed / 2**30:.2f} GiB touched on this host under even load",
    }
    return Report(transports, checks, window, needed, facts)


def _memfd() -> Support:
    try:
        os.close(os.memfd_create("dskernels-doctor"))
    except (OSError, AttributeError) as error:
        return Support(False, f"memfd_create: {error}")
    return Support(True, "anonymous shared memory")


def _proc_fd() -> Support:
    fd = os.memfd_create("dskernels-doctor") if hasattr(os, "memfd_create") else -1
    try:
        os.close(os.open(f"/proc/{os.getpid()}/fd/{fd}", os.O_RDWR))
    except OSError as error:
        return Support(False, f"cannot open another rank's memory: {error}")
    finally:
        if fd >= 0:
            os.close(fd)
    return Support(True, "ranks of one user and PID namespace can open each other's memory")


def _pidfd() -> Support:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_SYSCALL_PIDFD_OPEN, os.getpid(), 0)
    if fd < 0:
        why = os.strerror(ctypes.get_errno())
        return Support(False, f"pidfd_open: {why}; deaths are then found by polling")
    os.close(fd)
    return Support(True, "the death of a rank is noticed within about 10 ms")


def _memory(needed: int) -> Support:
    available = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError as error:
        return Support(True, f"unknown: {error}")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists():
        text = limit.read_text().strip()
        if text != "max":
            available = min(available or int(text), int(text))
    if available is None:
        return Support(True, "unknown: /proc/meminfo has no MemAvailable")
    have = f"{needed / 2**30:.2f} GiB needed, {available / 2**30:.2f} GiB available"
    return Support(needed <= available, have)


def _ranks(num_ranks: int) -> Support:
    most = native().max_ranks
    return Support(num_ranks <= most, f"{num_ranks} of at most {most}")


def _nvlink() -> Support:
    from ..backend import backends

    cuda = backends()["cuda"]
    if not cuda:
        return Support(False, cuda.reason)
    devices = torch.cuda.device_count()
    if devices < 2:
        return Support(False, f"expected 2 or more GPUs, got {devices}")
    apart = [
        (a, b)
        for a in range(devices)
        for b in range(devices)
        if a != b and not torch.cuda.can_device_access_peer(a, b)
    ]
    if apart:
        return Support(False, f"GPUs {apart[0]} have no peer access")
    return Support(True, f"{devices} GPUs with peer access; the kernels never ran on a GPU")


def _rdma() -> Support:
    folder = Path("/sys/class/infiniband")
    nics = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    found = f"NICs: {', '.join(nics)}" if nics else "no RDMA NIC (/sys/class/infiniband is empty)"
    return Support(
        False, f"{found}; exchange between hosts is not written yet; the rail's kernel: {_rail()}"
    )


def _rail() -> str:
    """How far the optional kernel on NCCL's device API is: never executed, wherever it is."""
    library = env.get("DSK_EP_RAIL")
    if not library:
        ready = rail.can_build()
        return f"{'not compiled, ' if ready else ''}{ready.reason}"
    try:
        rail.load(Path(library))
    except (OSError, RuntimeError, AttributeError) as error:
        return f"DSK_EP_RAIL does not load: {error}"
    return f"{library} loads; compiled, never executed"


def _emulator() -> Support:
    if platform.machine() not in ("x86_64", "AMD64"):
        return Support(False, f"expected x86-64, got {platform.machine()}")
    from ..backend import backends

    return backends()["emu"]
