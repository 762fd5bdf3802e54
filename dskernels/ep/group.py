"""The ranks of an exchange, and their memory."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

Gather = Callable[[Any], list]


class Group:
    """Ranks that exchange tokens, each with a window of shared memory that the others write into.

    rank, num_ranks  this process's number, and how many there are (at most 64)
    gather           all-gather of small Python objects at set-up: gather(mine) -> [of every rank];
                     `from_process_group` and `from_store` bring theirs
    num_experts      in all (a multiple of num_ranks), or the number on every rank, which may differ
    max_tokens       the most tokens a rank sends in one call
    hidden, topk     the widest token and the most experts of one (at most 16)
    dtype            the widest type of tokens and results: decides the size of the buffers
    buffers          receive buffers of `dispatch`: as many results can be alive at a time, plus one
                     for `combine`
    ranks_per_node   0: one node. Otherwise `combine` adds in the order of GPUs over nodes, a node's
                     rows first, for the same bits as theirs; memory is shared all the same
    timeout          seconds after which a call raises PeerSilent

    Memory is reserved for the worst case, all tokens of all ranks to one, and taken page by page as
    it is used. Calls on a group are collective: the same ones in the same order on every rank, with
    the same shapes of a token; one thread at a time.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        gather: Gather,
        *,
        num_experts: int | Sequence[int],
        max_tokens: int,
        hidden: int,
        topk: int,
        dtype: torch.dtype = torch.bfloat16,
        buffers: int = 3,
        ranks_per_node: int = 0,
        timeout: float = 30.0,
    ) -> None:
        if ranks_per_node < 0 or (ranks_per_node and num_ranks % ranks_per_node):
            raise ValueError(
                f"ranks_per_node: expected 0 or a divisor of {num_ranks} ranks, got "
                f"{ranks_per_node}"
            )
        self.ranks_per_node = ranks_per_node
        self.max_tokens, self.hidden, self.topk = max_tokens, hidden, topk
        self.dtype, self.buffers, self.timeout = dtype, buffers, timeout
        self._join(rank, num_ranks, gather, num_experts)

    @classmethod
    def from_process_group(cls, process_group: dist.ProcessGroup | None = None, **options) -> Group:
        """All ranks of a torch.distributed process group (default: all), on one host."""

        def gather(mine: Any) -> list:
            everyone: list = [None] * dist.get_world_size(process_group)
            dist.all_gather_object(everyone, mine, group=process_group)
            return everyone

        ranks = dist.get_world_size(process_group)
        return cls(dist.get_rank(process_group), ranks, gather, **options)

    @classmethod
    def from_store(cls, store: dist.Store, rank: int, num_ranks: int, **options) -> Group:
        """Set up over a torch.distributed store alone; `store` may be a PrefixStore. A key is used
        once: give every group and every `reform` a prefix of its own."""
        return cls(rank, num_ranks, store_gather(store, rank, num_ranks, options.get("timeout")),
                   **options)  # fmt: skip

    def _join(
        self, rank: int, num_ranks: int, gather: Gather, num_experts: int | Sequence[int]
    ) -> None:
        comm = native()
        self.rank, self.num_ranks = rank, num_ranks
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank: expected 0 .. {num_ranks - 1}, got {rank}")
        self.experts_of_rank = _experts_of_rank(num_experts, num_ranks)
        begin = [0]
        for count in self.experts_of_rank:
            begin.append(begin[-1] + count)
        shape = (
            self.max_tokens,
            self.hidden * self.dtype.itemsize,
            -(-self.hidden // 128) * 4,
            self.topk,
            begin,
            self.buffers,
        )
        self.window_bytes = comm.window_bytes(*shape)
        transport = comm.Transport.shm(rank, num_ranks, self.window_bytes)
        options = (*shape, self.ranks_per_node)
        mine = (transport.handle(), options)
        everyone = gather(mine)
        for other, (_, theirs) in enumerate(everyone):
            if theirs != options:
                raise ValueError(
                    f"group: expected the same options on every rank, {options} as on rank {rank}, "
                    f"got {theirs} on rank {other}"
                )
        transport.connect([handle for handle, _ in everyone], (1 << num_ranks) - 1)
        gather(None)  # nobody leaves before all have opened all windows
        self._transport = transport
        self._exchange = comm.Exchange(transport, *shape, True)

    @property
    def num_experts(self) -> int:
        return sum(self.experts_of_rank)

    @property
    def num_local_experts(self) -> int:
        return self.experts_of_rank[self.rank]

    @property
    def alive(self) -> list[bool]:
        """Which ranks take part; experts of the others count as -1."""
        mask = self._exchange.alive
        return [bool(mask >> r & 1) for r in range(self.num_ranks)]

    def recover(self, exclude: Sequence[int] = (), timeout: float | None = None) -> list[bool]:
        """Agree with the other survivors who is left, and continue without the rest.

        exclude: ranks to leave out although they may answer; dead and stopped ones are left out
        anyway. Every survivor must call this, after a PeerSilent or between calls; whoever does not
        within `timeout` counts as dead. Ranks, left out or not, that are still in a call which
        this one has completed complete it; one that waits for this rank in a later call gets
        PeerSilent. The memory is new afterwards, so a stopped rank that wakes up cannot write into
        it; results received earlier stay valid, but cannot be combined any more. Returns `alive`.
        Raises ValueError on a rank that the others have given up on.
        """
        mask = self._exchange.alive
        for rank in range(self.num_ranks):
            gone = rank != self.rank and self.peer_state(rank) in ("dead", "stopped")
            if gone or rank in exclude:
                mask &= ~(1 << rank)
        self._transport.leave()  # whoever waits for this rank comes along
        alive = self._transport.recover(mask, self._seconds(timeout))
        self._exchange.restart(alive)
        return self.alive

    def reform(
        self,
        rank: int,
        num_ranks: int,
        gather: Gather,
        num_experts: int | Sequence[int] | None = None,
    ) -> None:
        """Change the members between steps: this process becomes `rank` of num_ranks. Members that
        join make a Group with the same gather and options; those that leave do nothing."""
        self._join(
            rank, num_ranks, gather, self.num_experts if num_experts is None else num_experts
        )

    def result_buffer(self, rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised [rows, hidden] tensor in this rank's window: `combine` reads results
        written there in place, without a copy. Takes one of `buffers`."""
        size = rows * hidden * dtype.itemsize
        if size > self.num_ranks * self.max_tokens * self.hidden * self.dtype.itemsize:
            raise ValueError(
                f"rows, hidden, dtype: expected at most {self.num_ranks * self.max_tokens} rows of "
                f"{self.hidden} {self.dtype}, got {rows} of {hidden} {dtype}"
            )
        return view(self._exchange.take_region(), 0, (rows, hidden), dtype)

    def peer_state(self, rank: int) -> str:
        """ "alive", "stopped", "dead" or "unknown", as the operating system sees it."""
        return self._transport.peer_state(rank)

    def _seconds(self, timeout: float | None) -> float:
        seconds = self.timeout if timeout is None else timeout
        if not seconds > 0:
            raise ValueError(f"timeout: expected a positive number of seconds, got {seconds}")
        return float(seconds)


def view(region: Any, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor over a region of the window, which it keeps alive."""
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(region, dtype=torch.uint8, count=size, offset=offset)
    return flat.view(dtype).view(shape)


def store_gather(
    store: dist.Store, rank: int, num_ranks: int, timeout: float | None = None
) -> Gather:
    """gather() over a store: each call uses keys of its own."""
    calls = 0
    wait = timedelta(seconds=30.0 if timeout is None else timeout)

    def gather(mine: Any) -> list:
        nonlocal calls
        calls += 1
        store.set(f"{calls}/{rank}", pickle.dumps(mine))
        keys = [f"{calls}/{r}" for r in range(num_ranks)]
        store.wait(keys, wait)
        return [pickle.loads(store.get(key)) for key in keys]

    return gather


def native():
    """The compiled exchange."""
    try:
        from .. import _C
    except ImportError as error:
        raise RuntimeError(
            f"dskernels.ep: expected the compiled module dskernels._C, got: {error}"
        ) from error
    return _C.comm


def _experts_of_rank(num_experts: int | Sequence[int], num_ranks: int) -> list[int]:
    if isinstance(num_experts, int):
        if num_experts < 1 or num_experts % num_ranks:
            raise ValueError(
                f"num_experts: expected a positive multiple of {num_ranks} ranks, or a number per "
                f"rank, got {num_experts}"
            )
        return [num_experts // num_ranks] * num_ranks
    counts = [int(n) for n in num_experts]
    if len(counts) != num_ranks or min(counts) < 0 or not sum(counts):
        raise ValueError(
            f"num_experts: expected {num_ranks} numbers >= 0, one a rank, not all 0, got {counts}"
        )
    return counts
