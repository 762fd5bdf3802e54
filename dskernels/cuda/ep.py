"""The expert-parallel kernels between GPUs that load and store each other's memory.

`PeerGroup` drives all ranks from one process: N GPUs with peer access, or N virtual GPUs of the
emulator. Arguments and results are lists with one entry a rank, with the meaning of
`dskernels.ref.ep`, and equal to it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..types import ScaledTensor
from .ep_peers import Peers

Tokens = torch.Tensor | ScaledTensor
RECEIVE, RESULTS, FORWARD = 0, 1, 2  # the regions of a window


class Received(NamedTuple):
    """As dskernels.ref.ep.Received. x and source lie in the rank's window until its next call."""

    x: Tokens
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None
    tokens_per_expert: list[int]  # empty if sizes are not read on the host
    source: torch.Tensor
    counts: torch.Tensor  # int32 [1 + l]: rows, then mentions of each local expert
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
    arrived: torch.Tensor | None  # int32 [l], with signal_arrival: 1 + rows of an expert, or 0


class PeerGroup(Peers):
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

        if ranks_per_node < 0 or (ranks_per_node and num_ranks % ranks_per_node):
            raise ValueError(
                f"ranks_per_node: expected a divisor of {num_ranks} ranks, got {ranks_per_node}"
            )
        self.ranks_per_node = ranks_per_node
        self.max_tokens, self.hidden = max_tokens, hidden
        self.experts_of_rank = _experts_of_rank(num_experts, num_ranks)
        self._owed = dict.fromkeys(("dispatch", "combine"), False)  # hooks not called yet
        self._abandoned = 0  # how often a failure ended what was under way
        begin = [sum(self.experts_of_rank[:r]) for r in range(num_ranks + 1)]
        # Forwarded records carry row numbers behind the expert numbers, see ep_forward.cuh.
        widest = topk + (ranks_per_node + 1) // 2
        buffers = 3 if ranks_per_node else 2
        shape = (max_tokens, hidden * dtype.itemsize, -(-hidden // 128) * 4, widest, buffers)
        super().__init__(machine, num_ranks, shape, begin, num_sms=num_sms, max_polls=max_polls)

    # ---- normal mode ----

    def dispatch(
        self,
        xs: Sequence[Tokens],
        topk_idxs: Sequence[torch.Tensor],
        topk_weights: Sequence[torch.Tensor] | None = None,
        *,
        expert_alignment: int = 1,
        sizes_on_host: bool = True,
    ) -> list[Received]:
        """As dskernels.ref.ep.dispatch; a dead rank's entry is empty.

        sizes_on_host=False only queues, and takes the whole region: x [r * max_tokens, h] and what
        goes along, as they are when a later call has waited; rows at or behind counts[0] name no
        expert and hold nothing of use otherwise. So the call reads no value on the host, and can be
        recorded in a CUDA graph."""
        row_ofs, counts, places, scratch, rails = [], [], [], [], []
        nodes = self.num_ranks // self.ranks_per_node if self.ranks_per_node else 0
        first = next(r for r in range(self.num_ranks) if self.alive[r])
        row = self._row(xs[first], topk_idxs[first].shape[1], topk_weights is not None)
        for r, rank in enumerate(self.ranks):
            at = dict(dtype=torch.int32, device=rank.device)
            row_ofs.append(torch.full((len(topk_idxs[r]), self.num_ranks), -1, **at))
            counts.append(torch.zeros(1 + self.experts_of_rank[r], **at))
            places.append(torch.empty_like(row_ofs[r]))
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
                whole_region=not sizes_on_host, ranks_per_node=self.ranks_per_node,
                forward=self._region(r, FORWARD),
                forward_of=rails[r][0].data_ptr(), forwarded=rails[r][1].data_ptr(),
                num_forwarded=rails[r][2].data_ptr(), row_of=row_ofs[r].data_ptr(),
                place_of=places[r].data_ptr(), rows_to=scratch[r].data_ptr(),
                received=counts[r].data_ptr(),
                mentions=scratch[r].data_ptr() + 4 * self.num_ranks,
            )  # fmt: skip
            return [data, scale, idx, weights]

        tensors = [*row_ofs, *counts, *places, *scratch, *(x for rail in rails for x in rail)]
        self._run(launch, tensors, wait=sizes_on_host)
        results = []
        for r in range(self.num_ranks):
            sizes = counts[r].tolist() if sizes_on_host else [self.num_ranks * self.max_tokens]
            kept = (counts[r], row_ofs[r], *rails[r])
            results.append(self._received(r, xs[r], row, sizes, kept, expert_alignment))
        return results

    def _received(self, r, x, row, sizes, kept, alignment) -> Received:
        """Views of the region; of all of it, and copying nothing, if sizes are of rows alone."""
        data_at, records_at, record, scale_at, idx_at, weights_at, source_at = (
            self._native.ep_region_fields(row, self.num_ranks * self.max_tokens)
        )
        base, rows, per_expert = self._region(r, RECEIVE), sizes[0], sizes[1:]
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
        weights = field(weights_at, row[2], torch.float32) if row[3] else None
        idx, source = field(idx_at, row[2], torch.int64), field(source_at, 2, torch.int64)
        if per_expert:
            idx, weights = idx.contiguous(), None if weights is None else weights.contiguous()
        aligned = [-(-n // alignment) * alignment for n in per_expert]
        return Received(tokens, idx, weights, aligned, source, *kept)

    def result_buffer(self, rank: int, rows: int, hidden: int) -> torch.Tensor:
        """bf16 [rows, hidden] in the rank's window: `combine` reads results written there in
        place. One at a time: every call returns the same memory."""
        base, size = self._region(rank, RESULTS), rows * hidden * 2
        return self.ranks[rank].window[base : base + size].view(torch.bfloat16).view(rows, hidden)

    def combine(
        self,
        ys: Sequence[torch.Tensor],
        received: Sequence[Received],
        *,
        topk_weights: Sequence[torch.Tensor] | None = None,
        bias: Sequence[torch.Tensor] | None = None,
        wait: bool = True,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """As dskernels.ref.ep.combine, for bf16. wait=False only queues; ys that are not in a
        `result_buffer` are copied there when it is called, so earlier work must have ended."""
        h, topk = ys[0].shape[1], received[0].topk_idx.shape[1]
        outs, out_weights = [], []
        for r, rank in enumerate(self.ranks):
            tokens = len(received[r].row_of)
            outs.append(torch.zeros(tokens, h, dtype=torch.bfloat16, device=rank.device))
            out_weights.append(torch.zeros(tokens, topk, device=rank.device))

        def launch(r: int, on: tuple, group: Any) -> list[torch.Tensor]:
            base, behind = self._region(r, RESULTS), -(-ys[r].numel() * 2 // 64) * 64
            behind += base
            window = self.ranks[r].window
            place = self.result_buffer(r, *ys[r].shape)
            if ys[r].data_ptr() != place.data_ptr():
                place.copy_(ys[r])
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

        self._run(launch, [*outs, *out_weights], wait=wait)
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
        With hook(wait=False) the receive half is only queued, until a later call waits. Hooks come
        in order: before the next dispatch, the hook of the one before.

        signal_arrival: `arrived` of a result says expert by expert when its rows are there, to
        `GemmKernels.grouped_gemm_on_arrival` on the second stream (`beside`)."""
        self._expect_hook("dispatch")
        slots = self.num_ranks * self.max_tokens
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

        self._queue(send, [])
        return received, self._hook("dispatch", receive, [])

    def low_latency_combine(
        self,
        ys: Sequence[torch.Tensor],
        topk_idxs: Sequence[torch.Tensor],
        topk_weights: Sequence[torch.Tensor],
        received: Sequence[LowLatencyReceived],
    ) -> tuple[list[torch.Tensor], Callable[..., None]]:
        """As dskernels.ref.ep.low_latency_combine, for bf16; the results are there after hook(),
        or, after hook(wait=False), when a later call has waited."""
        self._expect_hook("combine")
        h = ys[0].shape[2]
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

        self._queue(give_back, [])
        return outs, self._hook("combine", reduce, outs)

    # ---- hooks ----

    def _expect_hook(self, what: str) -> None:
        if self._owed[what]:
            raise RuntimeError(
                f"low_latency_{what}: expected the hook of the call before to be called first, got "
                "another call: its slots would be overwritten"
            )

    def _hook(self, what: str, launch: Callable, tensors: list) -> Callable[..., None]:
        self._owed[what] = True
        made_in = self._abandoned

        def hook(wait: bool = True) -> None:
            if not self._owed[what] or made_in != self._abandoned:
                raise RuntimeError(
                    f"low_latency_{what}: expected hook() to be called once, and not after a "
                    "failure, which abandons what is under way"
                )
            self._owed[what] = False
            self._run(launch, tensors, wait=wait)

        return hook

    def _give_up(self) -> None:
        super()._give_up()
        self._abandoned += 1
        self._owed = dict.fromkeys(self._owed, False)

    def _region(self, rank: int, index: int) -> int:
        group = self.ranks[rank].group
        return group.region_offset + index * group.region_bytes

    def _row(self, x: Tokens, topk: int, weights: bool) -> tuple[int, int, int, bool]:
        data, scale = _parts(x)
        scale_bytes = 0 if scale is None else 4 * scale.shape[1]
        return data.shape[1] * data.dtype.itemsize, scale_bytes, topk, weights


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _parts(x: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (x.data, x.scale) if isinstance(x, ScaledTensor) else (x, None)
