"""GPUs of one process that load and store each other's memory: what they share, their streams, and
what runs on them. `PeerGroup` (ep.py) puts the exchange on top.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..ep.errors import PeerSilent
from . import launchers


class Rank(NamedTuple):
    device: torch.device
    window: torch.Tensor  # uint8
    signals: torch.Tensor  # int64, proto's counters
    status: torch.Tensor  # int32 [4]: EpStatus
    control: torch.Tensor  # int64: EpControl (alive, calls by kind, arrivals)
    group: Any


class Machine:
    """Virtual GPUs ("emu") or real ones ("cuda"), rank r on the r-th, and the tensors that queued
    kernels may still touch. Outlives the group: what is queued must end before memory is freed."""

    def __init__(self, name: str, num_ranks: int) -> None:
        self.name, self.num_ranks = name, num_ranks
        self.kept: dict[int, torch.Tensor] = {}  # by address, until what is queued has run
        self.second: dict[int, Any] = {}  # streams of work beside the exchange
        if name == "emu":
            self.emu().set_device_count(num_ranks)

    @staticmethod
    def emu():
        from .. import _C

        return _C.emu

    def device(self, rank: int) -> torch.device:
        return torch.device("cpu") if self.name == "emu" else torch.device("cuda", rank)

    def first_stream(self, rank: int) -> int:
        return 0 if self.name == "emu" else torch.cuda.current_stream(self.device(rank)).cuda_stream

    def second_stream(self, rank: int) -> int:
        if rank not in self.second:
            if self.name == "emu":
                self.second[rank] = self.emu().create_stream(rank)
            else:
                self.second[rank] = torch.cuda.Stream(self.device(rank))
        stream = self.second[rank]
        return stream if isinstance(stream, int) else stream.cuda_stream

    def free_streams(self) -> None:
        second, self.second = self.second, {}
        if self.name == "emu":
            for stream in second.values():
                self.emu().destroy_stream(stream)

    def order(self, rank: int, *, second_waits: bool) -> None:
        if self.name == "emu":
            emu, first, second = self.emu(), rank, self.second_stream(rank)
            event = emu.create_event()
            emu.record(first if second_waits else second, event)
            emu.wait(second if second_waits else first, event)
            return
        device = self.device(rank)
        first = torch.cuda.current_stream(device)
        second = torch.cuda.ExternalStream(self.second_stream(rank), device=device)
        before, after = (first, second) if second_waits else (second, first)
        after.wait_stream(before)

    def lend(self, tensors: Sequence[torch.Tensor | None]) -> None:
        """On the emulator, kernels may touch these tensors until `take_back`; on a GPU they are
        only kept alive."""
        for x in tensors:
            if x is None or not x.numel() or x.data_ptr() in self.kept:
                continue
            self.kept[x.data_ptr()] = x
            if self.name == "emu":
                self.emu().lend(x.data_ptr(), _span(x), False, "tensor")

    def take_back(self) -> None:
        kept, self.kept = self.kept, {}
        if self.name == "emu":
            for x in kept.values():
                self.emu().take_back(x.data_ptr(), _span(x))

    def wait(self) -> None:
        """Until all that is queued has run; what was lent is taken back, whatever happens."""
        try:
            if self.name == "emu":
                self.emu().synchronize()
            else:
                for rank in range(self.num_ranks):
                    torch.cuda.synchronize(self.device(rank))
        finally:
            self.take_back()


class Peers:
    """The ranks' memory and launches. shape, begin: as _C.launch.EpGroup takes them."""

    def __init__(
        self, machine: str, num_ranks: int, shape: tuple, begin: list[int], *, num_sms: int,
        max_polls: int,
    ) -> None:  # fmt: skip
        self.num_ranks, self.num_sms = num_ranks, num_sms
        self._native = launchers()
        self._machine = Machine(machine, num_ranks)

        def group(rank: int, windows: list[int], signals: list[int], status: int, control: int):
            return self._native.EpGroup(
                rank, shape, begin, windows, signals, status, control, max_polls
            )

        size = group(0, [0] * num_ranks, [0] * num_ranks, 0, 0).window_bytes
        memory = []
        for r in range(num_ranks):
            at = dict(device=self._machine.device(r))
            memory.append(
                (
                    torch.zeros(size, dtype=torch.uint8, **at),
                    torch.zeros(self._native.kEpCounterSlots, dtype=torch.int64, **at),
                    torch.zeros(4, dtype=torch.int32, **at),
                    torch.zeros(self._native.kEpControlWords, dtype=torch.int64, **at),
                )
            )
        windows = [m[0].data_ptr() for m in memory]
        signals = [m[1].data_ptr() for m in memory]
        self.ranks = [
            Rank(self._machine.device(r), *m,
                 group(r, windows, signals, m[2].data_ptr(), m[3].data_ptr()))
            for r, m in enumerate(memory)
        ]  # fmt: skip
        self._alive = (True,) * num_ranks
        self._agree()
        self._end = weakref.finalize(self, _end_of, self._machine, self.ranks)

    @property
    def machine(self) -> str:
        return self._machine.name

    # ---- who takes part ----

    @property
    def alive(self) -> tuple[bool, ...]:
        """Which ranks take part; set it to mask the dead, or to take one in again. It lies in the
        ranks' memory, so launches that were recorded before see it, too. Setting it waits for what
        is queued."""
        return self._alive

    @alive.setter
    def alive(self, up: Sequence[bool]) -> None:
        up = tuple(bool(x) for x in up)
        if len(up) != self.num_ranks or not any(up):
            raise ValueError(
                f"alive: expected {self.num_ranks} entries, one of them True, got {list(up)}"
            )
        if self._machine.kept:
            self.wait()
        self._alive = up
        self._agree()

    def _agree(self, *, abandon: bool = False) -> None:
        """Write into every rank's memory who is alive, and the same numbers of calls: whoever was
        away catches up. abandon: whatever was sent and not received never will be."""
        kinds = self._native.kEpKinds
        calls = [max(n) for n in zip(*(r.control[1 : 1 + kinds].tolist() for r in self.ranks))]
        if abandon:  # normal | send, receive | return, reduce
            calls = [calls[0], *[max(calls[1:3])] * 2, *[max(calls[3:5])] * 2]
        mask = sum(1 << r for r, up in enumerate(self._alive) if up)
        mask -= (mask >> 63) << 64  # as int64
        for rank in self.ranks:
            rank.control.zero_()
            rank.control[: 1 + kinds] = torch.tensor([mask, *calls])

    def _order(self) -> list[int]:
        return [r for r in range(self.num_ranks) if self._alive[r]]

    # ---- queueing ----

    def _queue(self, launch: Callable, tensors: list) -> None:
        """Queue launch(rank, on, group) on every living rank; it returns what it reads."""
        if not self._end.alive:
            raise RuntimeError("PeerGroup: expected one that is in use, got one that was closed")
        for rank in self.ranks:
            self._machine.lend([rank.window, rank.signals, rank.status, rank.control])
        self._machine.lend(tensors)
        for r in self._order():
            on = (self.machine, r, self._machine.first_stream(r), self.num_sms)
            # Emulated kernels run, and read their tensors, when somebody waits.
            self._machine.lend(launch(r, on, self.ranks[r].group))

    def beside(self, launch: Callable[[int, int], list[torch.Tensor | None]]) -> None:
        """Queue launch(rank, stream) on every living rank's second stream, where it may run while
        the first one's kernels do. It returns the tensors that its kernels touch."""
        for r in self._order():
            self._machine.lend(launch(r, self._machine.second_stream(r)))

    def order(self, *, second_waits: bool) -> None:
        """What is queued from here on the second streams waits for what is queued on the first ones
        now; or, with second_waits=False, the other way round."""
        for r in self._order():
            self._machine.order(r, second_waits=second_waits)

    def _run(self, launch: Callable, tensors: list, wait: bool = True) -> None:
        """Queue on every living rank, behind what is queued already, and wait for all of it."""
        try:
            self._queue(launch, tensors)
        except BaseException:
            self._machine.take_back()
            raise
        if wait:
            self.wait()

    # ---- waiting ----

    def wait(self) -> None:
        """Until all that is queued has run. Raises PeerSilent if a kernel of it gave up."""
        try:
            self._machine.wait()
        except BaseException:
            self._give_up()
            raise
        self._check()

    def close(self) -> None:
        """Wait for what is queued, and use the group no more. A group that is dropped with work
        under way does the same, and warns (ResourceWarning): nobody was left to see how it ended.
        A hook that was not called keeps its group."""
        try:
            if self._end.alive and self._machine.kept:
                self.wait()
        finally:
            if self._end.detach():
                self._machine.free_streams()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _give_up(self) -> None:
        self._agree(abandon=True)

    def _check(self) -> None:
        report = _report(self._native, self.ranks)
        if report is None:
            return
        for rank in self.ranks:
            rank.status.zero_()
        self._give_up()
        raise PeerSilent(report)


def _report(native: Any, ranks: list[Rank]) -> dict | None:
    """What kernels that gave up have left in their status; None if none did."""
    failed = [r for r, rank in enumerate(ranks) if int(rank.status[0])]
    if not failed:
        return None
    # Over nodes a rank may miss rows of one that is itself held up: first who waits for a rank
    # that has not given up.
    first = min(failed, key=lambda r: (int(ranks[r].status[2]) in failed, r))
    rank = ranks[first]
    _, counter, source, call = rank.status.tolist()
    rows = rank.signals.view(-1, native.kEpMaxRanks)[:, : len(ranks)].tolist()
    names = [native.ep_counter_name(kind) for kind in range(len(rows))]
    silent = dict(rank=source, state="unknown", have=rows[counter][source], want=call)
    return dict(
        rank=first, reason="timeout", phase=names[counter], epoch=call, waited_seconds=0.0,
        silent=[silent], counters=dict(zip(names, rows)),
    )  # fmt: skip


def _end_of(machine: Machine, ranks: list[Rank]) -> None:
    """The group is gone: its memory must not be, as long as kernels are queued that use it."""
    if not machine.kept:
        machine.free_streams()
        return
    outcome = "its kernels ended"
    try:
        machine.wait()
        report = _report(launchers(), ranks)
        if report is not None:
            outcome = str(PeerSilent(report))
    except Exception as error:
        outcome = f"its kernels failed: {error}"
    machine.free_streams()
    warnings.warn(
        "PeerGroup: expected wait() or close() before the last reference to it is dropped, got one "
        f"with work under way; {outcome}",
        ResourceWarning,
        stacklevel=1,
    )


def _span(x: torch.Tensor) -> int:
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
    return (last + 1) * x.dtype.itemsize
