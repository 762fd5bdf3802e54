"""The expert-parallel kernels between GPUs that load and store each other's memory.

`PeerGroup` drives all ranks from one process: N GPUs with peer access, or N virtual GPUs of the
emulator. Arguments and results are lists with one entry a rank, with the meaning of
`dskernels.ref.ep`, and equal to it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..ep.errors import PeerSilent
from ..types import ScaledTensor
from . import launchers

Tokens = torch.Tensor | ScaledTensor
RECEIVE, RESULTS, FORWARD = 0, 1, 2  # the regions of a window


class Received(NamedTuple):
    """As dskernels.ref.ep.Received. x and source lie in the rank's window until its next call."""

    x: Tokens
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None
    tokens_per_expert: list[int]
    source: torch.Tensor
    row_of: torch.Tensor  # int32 [t, r] of this rank's own tokens: their rows at each rank, -1
    forward_of: torch.Tensor  # int32 [t, nodes]: their places among those sent to a node, -1
    forwarded: torch.Tensor  # int32 [nodes, max_tokens, ranks_per_node]: rows of what was passed on
    num_forwarded: torch.Tensor  # int32 [nodes]


class LowLatencyReceived(NamedTuple):
    """As dskernels.ref.ep.LowLatencyReceived; rows at or behind count are undefined."""

    x: Tokens
    count: torch.Tensor
    source: torch.Tensor
    layout_range: torch.Tensor
    words: torch.Tensor  # int64 [l, r * max_tokens]: source token << 32 | its slot
    call: int
    arrived: torch.Tensor | None  # int32 [l], with signal_arrival: 1 + rows of an expert, or 0


class _Rank(NamedTuple):
    device: torch.device
    window: torch.Tensor  # uint8
    signals: torch.Tensor  # int64, proto's counters
    status: torch.Tensor  # int32 [4]
    arrivals: torch.Tensor  # int32 [2]
    group: Any


class PeerGroup:
    """num_ranks GPUs of this process.

    machine    "emu": virtual GPUs, tensors on the CPU; "cuda": rank r is GPU r. Peer access must be
               enabled between all of them.
    num_sms    SMs a kernel may take; 0: all
    max_polls  how often a wait looks before it gives up and the call raises PeerSilent
    ranks_per_node  0: one node. Otherwise dispatch sends a token once to each other node, where
               it is passed on, and combine brings one sum back from each (the order of its sums is
               that of dskernels.ref.ep with ranks_per_node); the low-latency mode reaches every
               rank directly
    The other options are those of dskernels.ep.Group. hidden rows must be multiples of 16 bytes.
    """

    def __init__(
        self,
        machine: str,
        num_ranks: int,
        *,
        num_experts: int | Sequence[int],
        max_tokens: int,
        hidden: int,
        topk: int,
        dtype: torch.dtype = torch.bfloat16,
        num_sms: int = 0,
        max_polls: int = 2**31,
        ranks_per_node: int = 0,
    ) -> None:
        from ..ep.group import _experts_of_rank

        if ranks_per_node and num_ranks % ranks_per_node:
            raise ValueError(
                f"ranks_per_node: expected a divisor of {num_ranks} ranks, got {ranks_per_node}"
            )
        self.ranks_per_node = ranks_per_node

        self.machine, self.num_ranks, self.num_sms = machine, num_ranks, num_sms
        self.max_tokens, self.hidden = max_tokens, hidden
        self.experts_of_rank = _experts_of_rank(num_experts, num_ranks)
        self.epoch = self.calls = 0
        self.alive = [True] * num_ranks
        self._kept: dict[int, torch.Tensor] = {}  # by address, until what is queued has run
        self._second: dict[int, Any] = {}  # streams of work beside the exchange
        begin = [sum(self.experts_of_rank[:r]) for r in range(num_ranks + 1)]
        # Forwarded records carry row numbers behind the expert numbers, see ep_forward.cuh.
        widest = topk + (ranks_per_node + 1) // 2
        buffers = 3 if ranks_per_node else 2
        shape = (max_tokens, hidden * dtype.itemsize, -(-hidden // 128) * 4, widest, buffers)
        self._native = launchers()
        if machine == "emu":
            self._native_emu().set_device_count(num_ranks)

        def group(rank: int, windows: list[int], signals: list[int], status: int, arrivals: int):
            return self._native.EpGroup(
                rank, shape, begin, windows, signals, status, arrivals, max_polls
            )

        size = group(0, [0] * num_ranks, [0] * num_ranks, 0, 0).window_bytes
        slots = self._native.kEpCounterSlots
        memory = []
        for r in range(num_ranks):
            at = dict(device=self._device(r))
            memory.append(
                (
                    torch.zeros(size, dtype=torch.uint8, **at),
                    torch.zeros(slots, dtype=torch.int64, **at),
                    torch.zeros(4, dtype=torch.int32, **at),
                    torch.zeros(2, dtype=torch.int32, **at),
                )
            )
        windows = [m[0].data_ptr() for m in memory]
        signals = [m[1].data_ptr() for m in memory]
        self.ranks = [
            _Rank(self._device(r), *m,
                  group(r, windows, signals, m[2].data_ptr(), m[3].data_ptr()))
            for r, m in enumerate(memory)
        ]  # fmt: skip

    # ---- normal mode ----

    def dispatch(
        self,
        xs: Sequence[Tokens],
        topk_idxs: Sequence[torch.Tensor],
        topk_weights: Sequence[torch.Tensor] | None = None,
        *,
        expert_alignment: int = 1,
    ) -> list[Received]:
        """As dskernels.ref.ep.dispatch; a dead rank's entry is empty."""
        self.epoch += 1
        row_ofs, counts, scratch, rails = [], [], [], []
        nodes = self.num_ranks // self.ranks_per_node if self.ranks_per_node else 0
        first = next(r for r in range(self.num_ranks) if self.alive[r])
        row = self._row(xs[first], topk_idxs[first].shape[1], topk_weights is not None)
        for r, rank in enumerate(self.ranks):
            at = dict(dtype=torch.int32, device=rank.device)
            row_ofs.append(torch.full((len(topk_idxs[r]), self.num_ranks), -1, **at))
            counts.append(torch.zeros(1 + self.experts_of_rank[r], **at))
            scratch.append(torch.zeros(self.num_ranks + sum(self.experts_of_rank), **at))
            rails.append((
                torch.full((len(topk_idxs[r]), nodes), -1, **at),
                torch.full((nodes, self.max_tokens, self.ranks_per_node), -1, **at),
                torch.zeros(nodes, **at),
            ))  # fmt: skip

        def launch(r: int, on: tuple, group: Any) -> list[torch.Tensor]:
            data, scale = _parts(xs[r])
            idx = topk_idxs[r].contiguous()
            weights = None if topk_weights is None else topk_weights[r].contiguous()
            self._native.ep_dispatch(
                on, group, row, tokens=len(data), x=data.data_ptr(),
                ld_x=data.stride(0) * data.dtype.itemsize, scale=_address(scale),
                scale_row=0 if scale is None else scale.stride(0),
                scale_column=0 if scale is None else scale.stride(1), topk_idx=idx.data_ptr(),
                topk_weights=_address(weights), region=self._region(r, RECEIVE),
                ranks_per_node=self.ranks_per_node, forward=self._region(r, FORWARD),
                forward_of=rails[r][0].data_ptr(), forwarded=rails[r][1].data_ptr(),
                num_forwarded=rails[r][2].data_ptr(), row_of=row_ofs[r].data_ptr(),
                rows_to=scratch[r].data_ptr(), received=counts[r].data_ptr(),
                mentions=scratch[r].data_ptr() + 4 * self.num_ranks,
            )  # fmt: skip
            return [data, scale, idx, weights]

        self._run(launch, [*row_ofs, *counts, *scratch, *(x for rail in rails for x in rail)])
        return [
            self._received(r, xs[r], row, counts[r].tolist(), (row_ofs[r], *rails[r]),
                           expert_alignment)
            for r in range(self.num_ranks)
        ]  # fmt: skip

    def _received(self, r, x, row, counts, places, alignment) -> Received:
        data_at, records_at, record, scale_at, idx_at, weights_at, source_at = (
            self._native.ep_region_fields(row, self.num_ranks * self.max_tokens)
        )
        base, rows = self._region(r, RECEIVE), counts[0]
        data, scale = _parts(x)
        window = self.ranks[r].window

        def part(at: int, width: int) -> torch.Tensor:
            return window[base + at : base + at + rows * width].view(rows, width)

        got = part(data_at, row[0]).view(data.dtype).view(rows, data.shape[1])
        records = part(records_at, record)

        def field(at: int, width: int, dtype: torch.dtype) -> torch.Tensor:
            return records[:, at : at + width * dtype.itemsize].view(dtype)

        tokens: Tokens = got
        if isinstance(x, ScaledTensor):
            scales = field(scale_at, scale.shape[1], torch.float32)
            tokens = ScaledTensor(got, scales, x.block, x.dtype)
        weights = field(weights_at, row[2], torch.float32).contiguous() if row[3] else None
        per_expert = [-(-n // alignment) * alignment for n in counts[1:]]
        idx = field(idx_at, row[2], torch.int64).contiguous()
        source = field(source_at, 2, torch.int64)
        return Received(tokens, idx, weights, per_expert, source, *places)

    def combine(
        self,
        ys: Sequence[torch.Tensor],
        received: Sequence[Received],
        *,
        topk_weights: Sequence[torch.Tensor] | None = None,
        bias: Sequence[torch.Tensor] | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """As dskernels.ref.ep.combine, for bf16."""
        self.epoch += 1
        h, topk = ys[0].shape[1], received[0].topk_idx.shape[1]
        outs, out_weights = [], []
        for r, rank in enumerate(self.ranks):
            tokens = len(received[r].row_of)
            outs.append(torch.zeros(tokens, h, dtype=torch.bfloat16, device=rank.device))
            out_weights.append(torch.zeros(tokens, topk, device=rank.device))

        def launch(r: int, on: tuple, group: Any) -> list[torch.Tensor]:
            base, size = self._region(r, RESULTS), ys[r].numel() * 2
            behind = base + -(-size // 64) * 64
            window = self.ranks[r].window
            window[base : base + size].view(torch.bfloat16).view(ys[r].shape).copy_(ys[r])
            if topk_weights is not None:
                w = topk_weights[r]
                window[behind : behind + 4 * w.numel()].view(torch.float32).view(w.shape).copy_(w)
            extra = None if bias is None else bias[r].contiguous()
            got = received[r]
            self._native.ep_combine(
                on, group, tokens=len(outs[r]), topk=topk, elements=h, results=base,
                weights=behind, with_weights=topk_weights is not None,
                row_of=got.row_of.data_ptr(), ranks_per_node=self.ranks_per_node,
                partial=self._region(r, FORWARD), forward_of=got.forward_of.data_ptr(),
                forwarded=got.forwarded.data_ptr(), num_forwarded=got.num_forwarded.data_ptr(),
                bias=_address(extra), out=outs[r].data_ptr(), out_weights=out_weights[r].data_ptr(),
            )  # fmt: skip
            return [extra, got.row_of, got.forward_of, got.forwarded, got.num_forwarded]

        self._run(launch, [*outs, *out_weights])
        return outs, None if topk_weights is None else out_weights

    # ---- low latency ----

    def low_latency_dispatch(
        self,
        xs: Sequence[torch.Tensor],
        topk_idxs: Sequence[torch.Tensor],
        *,
        use_fp8: bool = True,
        round_scale: bool = False,
        signal_arrival: bool = False,
    ) -> tuple[list[LowLatencyReceived], Callable[..., None]]:
        """As dskernels.ref.ep.low_latency_dispatch, for bf16; results are there after hook().
        With hook(wait=False) the receive half is only queued, until a later call waits.

        signal_arrival: `arrived` of a result says expert by expert when its rows are there, to
        `GemmKernels.grouped_gemm_on_arrival` on the second stream (`beside`)."""
        self.calls += 1
        call, slots = self.calls, self.num_ranks * self.max_tokens
        h, topk = xs[0].shape[1], topk_idxs[0].shape[1]
        groups = -(-h // 128) if use_fp8 else 0
        row = (h if use_fp8 else 2 * h, 4 * groups, topk, False)
        received, scales = [], []
        for r, rank in enumerate(self.ranks):
            local, at = self.experts_of_rank[r], dict(device=rank.device)
            padded = -(-slots // 4) * 4
            dtype = torch.float8_e4m3fn if use_fp8 else torch.bfloat16
            data = torch.zeros(local, slots, h, dtype=torch.uint8 if use_fp8 else dtype, **at)
            storage = torch.zeros(local, groups, padded, **at)
            scales.append(storage)
            x: Tokens = data
            if use_fp8:
                scale = storage.transpose(1, 2)[:, :slots]
                x = ScaledTensor(data.view(dtype), scale, (1, 128))
            received.append(
                LowLatencyReceived(
                    x,
                    torch.zeros(local, dtype=torch.int32, **at),
                    torch.full((local, slots), -1, dtype=torch.int64, **at),
                    torch.zeros(local, self.num_ranks, dtype=torch.int64, **at),
                    torch.zeros(local, slots, dtype=torch.int64, **at),
                    call,
                    torch.zeros(local, dtype=torch.int32, **at) if signal_arrival else None,
                )
            )

        def send(r: int, on: tuple, group: Any) -> list[torch.Tensor]:
            x, idx = xs[r].contiguous(), topk_idxs[r].contiguous()
            self._native.ep_low_send(
                on, group, row, tokens=len(x), elements=h, ue8m0=round_scale, x=x.data_ptr(),
                topk_idx=idx.data_ptr(),
            )  # fmt: skip
            return [x, idx]

        def receive(r: int, on: tuple, group: Any) -> list[torch.Tensor]:
            got = received[r]
            self._native.ep_low_receive(
                on, group, row, x=_parts(got.x)[0].data_ptr(), scale=scales[r].data_ptr(),
                ld_scale=scales[r].shape[2], count=got.count.data_ptr(),
                source=got.source.data_ptr(), layout_range=got.layout_range.data_ptr(),
                words=got.words.data_ptr(), arrived=_address(got.arrived),
            )  # fmt: skip
            return [_parts(got.x)[0], scales[r], got.count, got.source, got.layout_range, got.words,
                    got.arrived]  # fmt: skip

        self._queue(send, [], epoch=call)
        return received, lambda wait=True: self._run(receive, [], epoch=call, wait=wait)

    def low_latency_combine(
        self,
        ys: Sequence[torch.Tensor],
        topk_idxs: Sequence[torch.Tensor],
        topk_weights: Sequence[torch.Tensor],
        received: Sequence[LowLatencyReceived],
    ) -> tuple[list[torch.Tensor], Callable[..., None]]:
        """As dskernels.ref.ep.low_latency_combine, for bf16; the results are there after hook(),
        or, after hook(wait=False), when a later call has waited."""
        h, call = ys[0].shape[2], received[0].call
        outs = [
            torch.zeros(len(idx), h, dtype=torch.bfloat16, device=rank.device)
            for idx, rank in zip(topk_idxs, self.ranks)
        ]

        def give_back(r: int, on: tuple, group: Any) -> list[torch.Tensor]:
            y = ys[r].contiguous()
            self._native.ep_low_return(
                on, group, row_bytes=2 * h, y=y.data_ptr(),
                layout_range=received[r].layout_range.data_ptr(),
                words=received[r].words.data_ptr(),
            )  # fmt: skip
            return [y, received[r].layout_range, received[r].words]

        def reduce(r: int, on: tuple, group: Any) -> list[torch.Tensor]:
            idx, weights = topk_idxs[r].contiguous(), topk_weights[r].contiguous()
            self._native.ep_low_reduce(
                on, group, tokens=len(idx), topk=idx.shape[1], elements=h, topk_idx=idx.data_ptr(),
                topk_weights=weights.data_ptr(), out=outs[r].data_ptr(),
            )  # fmt: skip
            return [idx, weights]

        self._queue(give_back, [], epoch=call)
        return outs, lambda wait=True: self._run(reduce, outs, epoch=call, wait=wait)

    # ---- running all ranks ----

    def _queue(self, launch: Callable, tensors: list, epoch: int | None = None) -> None:
        """Queue launch(rank, on, group) on every living rank; it returns what it reads."""
        mask = sum(1 << r for r, up in enumerate(self.alive) if up)
        for rank in self.ranks:
            self._lend([rank.window, rank.signals, rank.status, rank.arrivals])
        self._lend(tensors)
        for r in self._order():
            rank = self.ranks[r]
            rank.group.alive = mask
            rank.group.epoch = self.epoch if epoch is None else epoch
            stream = 0
            if rank.device.type == "cuda":
                stream = torch.cuda.current_stream(rank.device).cuda_stream
            # Emulated kernels run, and read their tensors, when somebody waits.
            self._lend(launch(r, (self.machine, r, stream, self.num_sms), rank.group))

    def beside(self, launch: Callable[[int, int], list[torch.Tensor | None]]) -> None:
        """Queue launch(rank, stream) on every living rank's second stream, where it may run while
        the first one's kernels do. It returns the tensors that its kernels touch."""
        for r in self._order():
            self._lend(launch(r, self._second_stream(r)))

    def order(self, *, second_waits: bool) -> None:
        """What is queued from here on the second streams waits for what is queued on the first ones
        now; or, with second_waits=False, the other way round."""
        for r in self._order():
            if self.machine == "emu":
                emu, first, second = self._native_emu(), r, self._second_stream(r)
                event = emu.create_event()
                emu.record(first if second_waits else second, event)
                emu.wait(second if second_waits else first, event)
                continue
            device = self.ranks[r].device
            first = torch.cuda.current_stream(device)
            second = torch.cuda.ExternalStream(self._second_stream(r), device=device)
            before, after = (first, second) if second_waits else (second, first)
            after.wait_stream(before)

    def _second_stream(self, r: int) -> int:
        if r not in self._second:
            if self.machine == "emu":
                self._second[r] = self._native_emu().create_stream(r)
            else:
                self._second[r] = torch.cuda.Stream(self.ranks[r].device)
        stream = self._second[r]
        return stream if isinstance(stream, int) else stream.cuda_stream

    def _run(
        self, launch: Callable, tensors: list, epoch: int | None = None, wait: bool = True
    ) -> None:
        """Queue on every living rank, behind what is queued already, and wait for all of it."""
        try:
            self._queue(launch, tensors, epoch)
        except BaseException:
            self._take_back()
            raise
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until all that is queued has run. Raises PeerSilent if a kernel of it gave up."""
        try:
            self._synchronize()
        finally:
            self._take_back()
        self._check()

    def _order(self) -> list[int]:
        return [r for r in range(self.num_ranks) if self.alive[r]]

    def _check(self) -> None:
        failed = [r for r, rank in enumerate(self.ranks) if int(rank.status[0])]
        if not failed:
            return
        # Over nodes a rank may miss rows of one that is itself held up: first who waits for a rank
        # that has not given up.
        first = min(failed, key=lambda r: (int(self.ranks[r].status[2]) in failed, r))
        rank = self.ranks[first]
        _, counter, source, call = rank.status.tolist()
        rows = rank.signals.view(-1, self._native.kEpMaxRanks)[:, : self.num_ranks].tolist()
        counters = {
            self._native.ep_counter_name(kind): row
            for kind, row in enumerate(rows)
            if self._native.ep_counter_name(kind) != "unknown"
        }
        phase = self._native.ep_counter_name(counter)
        silent = dict(rank=source, state="unknown", have=rows[counter][source], want=call)
        for other in self.ranks:  # whoever gave up left its counters as they were
            other.status.zero_()
            other.arrivals.zero_()
        raise PeerSilent(
            dict(rank=first, reason="timeout", phase=phase, epoch=call, waited_seconds=0.0,
                 silent=[silent], counters=counters)
        )  # fmt: skip

    def _synchronize(self) -> None:
        if self.machine == "emu":
            self._native_emu().synchronize()
            return
        for rank in self.ranks:
            torch.cuda.synchronize(rank.device)

    def _lend(self, tensors: list[torch.Tensor | None]) -> None:
        """On the emulator, kernels may touch these tensors until `_take_back`; on a GPU they are
        only kept alive."""
        for x in tensors:
            if x is None or not x.numel() or x.data_ptr() in self._kept:
                continue
            self._kept[x.data_ptr()] = x
            if self.machine == "emu":
                self._native_emu().lend(x.data_ptr(), _span(x), False, "tensor")

    def _take_back(self) -> None:
        kept, self._kept = self._kept, {}
        if self.machine == "emu":
            for x in kept.values():
                self._native_emu().take_back(x.data_ptr(), _span(x))

    def _device(self, rank: int) -> torch.device:
        return torch.device("cpu") if self.machine == "emu" else torch.device("cuda", rank)

    def _region(self, rank: int, index: int) -> int:
        group = self.ranks[rank].group
        return group.region_offset + index * group.region_bytes

    def _row(self, x: Tokens, topk: int, weights: bool) -> tuple[int, int, int, bool]:
        data, scale = _parts(x)
        scale_bytes = 0 if scale is None else 4 * scale.shape[1]
        return data.shape[1] * data.dtype.itemsize, scale_bytes, topk, weights

    @staticmethod
    def _native_emu():
        from .. import _C

        return _C.emu


def _span(x: torch.Tensor) -> int:
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
    return (last + 1) * x.dtype.itemsize


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _parts(x: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (x.data, x.scale) if isinstance(x, ScaledTensor) else (x, None)
