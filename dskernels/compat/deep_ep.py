"""`deep_ep`: the expert-parallel Buffer that DeepSeek's users call, over `dskernels.ep` on CPU
tensors between processes of one host.

Names, arguments and results are the peer's (`Buffer` of V1, dispatch and combine of V2's
`ElasticBuffer`). What differs: sizes of buffers are not the
caller's business (num_nvl_bytes and the like are accepted and ignored; windows grow when a call
needs it, on all ranks together); events are complete when they are returned; results are copies
that the caller owns; a rank that does not answer raises dskernels.ep.PeerSilent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .. import ep
from ..ref.ep import dispatch_layout
from ..types import ScaledTensor

__all__ = ["Buffer", "Config", "ElasticBuffer", "EPHandle", "EventOverlap"]

Tokens = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class EventOverlap:
    """An event that has happened: CPU calls return when their results are there."""

    def __init__(self, event: Any = None, extra_tensors: tuple | None = None) -> None:
        self.event, self.extra_tensors = event, extra_tensors

    def current_stream_wait(self) -> None:
        """Nothing to wait for."""

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *exception: object) -> None:
        self.current_stream_wait()


class Config:
    """Tuning of the peer's kernels; kept for callers that pass it on."""

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        self.num_sms = num_sms
        self.nvl_send, self.nvl_recv = (
            num_max_nvl_chunked_send_tokens,
            num_max_nvl_chunked_recv_tokens,
        )
        self.rdma_send, self.rdma_recv = (
            num_max_rdma_chunked_send_tokens,
            num_max_rdma_chunked_recv_tokens,
        )

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: the windows size themselves."""
        return 0

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: there is no RDMA buffer."""
        return 0


class _Handle(NamedTuple):
    received: Any  # of dskernels.ep.dispatch, without the window's tensors
    topk_idx: torch.Tensor
    num_experts: int
    rows: int
    group: ep.Group


class _Shape(NamedTuple):
    tokens: int
    row_bytes: int
    topk: int
    experts: int


class Buffer:
    """See the module. All ranks of `group` make it, and call its methods in the same order."""

    num_sms = 20

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        **ignored: Any,
    ) -> None:
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.group_size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.low_latency_mode, self.explicitly_destroy = low_latency_mode, explicitly_destroy
        self._shape = _Shape(0, 0, 0, 0)
        self._normal: ep.Group | None = None
        self._low: ep.Group | None = None
        self._low_shape: _Shape | None = None
        self._masked: set[int] = set()

    def destroy(self) -> None:
        """Give the windows back."""
        self._normal = self._low = None

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        if new_num_sms % 2:
            raise ValueError(f"new_num_sms: expected an even number, got {new_num_sms}")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap()

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config(Buffer.num_sms)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """0: the windows size themselves."""
        return 0

    def get_comm_stream(self) -> None:
        """None: calls run where they are made."""

    # ---- normal mode ----

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """(tokens per rank [R], per node [R / 8] or None within one, per expert [E],
        is_token_in_rank [T, R], event)."""
        layout = dispatch_layout(topk_idx, num_experts, self.group_size)
        nodes = layout.tokens_per_node if self.group_size > 8 else None
        return (
            layout.tokens_per_rank,
            nodes,
            layout.tokens_per_expert,
            layout.is_token_in_rank,
            EventOverlap(),
        )

    def dispatch(
        self,
        x: Tokens,
        handle: _Handle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple:
        """(recv_x, recv_topk_idx, recv_topk_weights, tokens per local expert, handle, event); with
        a `handle` of an earlier dispatch the same routing, and None for what it already gave."""
        tokens = _scaled(x)
        if handle is not None:
            idx, num_experts = handle.topk_idx, handle.num_experts
        elif topk_idx is None or num_tokens_per_expert is None:
            raise ValueError(
                "topk_idx, num_tokens_per_expert: expected both, or a handle, got None"
            )
        else:
            idx, num_experts = topk_idx, num_tokens_per_expert.numel()
        group = self._group_for(tokens, idx, num_experts)
        got = ep.dispatch(group, tokens, idx, topk_weights, expert_alignment=expert_alignment)
        rows = len(got.source)
        recv_x = _own(got.x)
        if handle is not None:
            return recv_x, None, None, None, None, EventOverlap()
        kept = _Handle(got._replace(x=None, source=None), idx, num_experts, rows, group)
        counts, recv_idx, recv_weights = got.tokens_per_expert, got.topk_idx, got.topk_weights
        if num_worst_tokens:
            if rows > num_worst_tokens:
                raise ValueError(
                    f"num_worst_tokens: expected at least {rows}, got {num_worst_tokens}"
                )
            recv_x = _map(recv_x, lambda t: _pad(t, num_worst_tokens, 0))
            recv_idx = _pad(recv_idx, num_worst_tokens, -1)
            recv_weights = None if recv_weights is None else _pad(recv_weights, num_worst_tokens, 0)
            counts = []
        return recv_x, recv_idx, recv_weights, counts, kept, EventOverlap()

    def combine(
        self,
        x: torch.Tensor,
        handle: _Handle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """(x [T, H] summed without weights, topk_weights [T, K] summed or None, event)."""
        weights = None if topk_weights is None else topk_weights[: handle.rows]
        out, back = ep.combine(
            handle.group, x[: handle.rows], handle.received, topk_weights=weights, bias=bias
        )
        return out, back, EventOverlap()

    def _group_for(self, tokens: Any, topk_idx: torch.Tensor, num_experts: int) -> ep.Group:
        """A group large enough for all ranks' calls; made anew, by all, when it is not."""
        data = tokens.data if isinstance(tokens, ScaledTensor) else tokens
        # Results come back in bf16 or wider.
        row = data.shape[1] * max(2, data.dtype.itemsize)
        lost = self._normal is None  # on any rank: all make a new one
        want = torch.tensor([len(data), row, topk_idx.shape[1], num_experts, int(lost)])
        dist.all_reduce(want, op=dist.ReduceOp.MAX, group=self.group)
        tokens_, row_, topk, experts, lost = want.tolist()
        have = self._shape
        fits = (tokens_ <= have.tokens and row_ <= have.row_bytes and topk <= have.topk
                and experts == have.experts)  # fmt: skip
        if lost or not fits:
            self._shape = _Shape(
                max(have.tokens, tokens_, 1),
                max(have.row_bytes, row_),
                max(have.topk, topk),
                experts,
            )
            self._normal = ep.Group.from_process_group(
                self.group, num_experts=experts, max_tokens=self._shape.tokens,
                hidden=self._shape.row_bytes // 2, topk=self._shape.topk,
            )  # fmt: skip
        return self._normal

    # ---- low latency ----

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, torch.Tensor, Any, EventOverlap, Callable[[], None]]:
        """(recv_x [L, R * max, H] or (e4m3, scales), count [L], handle, event, hook).

        scales: fp32 [L, R * max, H / 128]; with use_ue8m0, which needs round_scale, the exponents
        alone, four to an int32: [L, R * max, ceil(H / 512)]. Both with rows next to each other.
        """
        if use_ue8m0 and not (use_fp8 and round_scale):
            raise ValueError(
                "use_ue8m0: expected use_fp8 and round_scale with it (exponents stand for powers "
                f"of two only), got use_fp8={use_fp8}, round_scale={round_scale}"
            )
        group = self._low_group(num_max_dispatch_tokens_per_rank, x.shape[1], topk_idx, num_experts)
        got, hook = ep.low_latency_dispatch(
            group, x, topk_idx, use_fp8=use_fp8, round_scale=round_scale, return_recv_hook=True
        )

        scales = got.x.scale if use_fp8 else None
        if use_ue8m0:
            experts, rows, groups = scales.shape
            packed = torch.zeros(experts, -(-groups // 4), rows, dtype=torch.int32)
            scales = packed.transpose(1, 2)

        def receive() -> None:
            hook()
            if use_ue8m0:
                _pack_exponents(got.x.scale, scales)
            if cumulative_local_expert_recv_stats is not None:
                cumulative_local_expert_recv_stats.add_(got.count)

        if not return_recv_hook:
            receive()
        recv = (got.x.data, scales) if use_fp8 else got.x
        return recv, got.count, got, EventOverlap(), receive if return_recv_hook else _nothing

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Any,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Callable[[], None]]:
        """(x [T, H], weighted sums, event, hook). use_logfmt would only lose digits: ignored."""
        result, hook = ep.low_latency_combine(
            self._low, x, topk_weights, handle, out=out, return_recv_hook=True
        )
        if not return_recv_hook:
            hook()
        return result, EventOverlap(), hook if return_recv_hook else _nothing

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = True) -> None:
        """Leave a rank out from the next dispatch on (mask), or take it back in.

        The mask itself is local. The next low_latency_dispatch makes it true among all that are not
        masked: each of them masks the same ranks before it, and calls it within the timeout (30 s);
        a rank still in an earlier call completes that first. Taking back in: all ranks of the group
        clear the mask, those that were left out call destroy(), and all meet in the next dispatch.
        """
        (self._masked.add if mask else self._masked.discard)(rank_to_mask)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Writes 1 for every masked rank into mask_status [R]."""
        status = [int(r in self._masked) for r in range(self.group_size)]
        mask_status.copy_(torch.tensor(status, dtype=mask_status.dtype))

    def low_latency_clean_mask_buffer(self) -> None:
        """Take all ranks back in."""
        self._masked.clear()

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Nothing to clean: the protocol never needs zeroed buffers."""

    def _low_group(self, tokens: int, hidden: int, topk_idx, num_experts: int) -> ep.Group:
        shape = _Shape(tokens, hidden, topk_idx.shape[1], num_experts)
        masked_now = set() if self._low is None else {
            r for r, up in enumerate(self._low.alive) if not up}  # fmt: skip
        if self._low is None or shape != self._low_shape or masked_now - self._masked:
            self._low_shape = shape
            self._low = ep.Group.from_process_group(
                self.group, num_experts=num_experts, max_tokens=tokens, hidden=hidden,
                topk=shape.topk, buffers=1,
            )  # fmt: skip
            masked_now = set()
        if self._masked - masked_now:
            self._low.recover(exclude=sorted(self._masked))
        return self._low


def _scaled(x: Tokens) -> Any:
    if not isinstance(x, tuple):
        return x
    data, scale = x
    return ScaledTensor(data, scale, (1, -(-data.shape[1] // scale.shape[1])))


def _own(x: Any) -> Tokens:
    return (x.data.clone(), x.scale.clone()) if isinstance(x, ScaledTensor) else x.clone()


def _map(x: Tokens, change: Callable) -> Tokens:
    return tuple(change(t) for t in x) if isinstance(x, tuple) else change(x)


def _pad(x: torch.Tensor, rows: int, value: float) -> torch.Tensor:
    padded = torch.full((rows, *x.shape[1:]), value, dtype=torch.float32).to(x.dtype)
    padded[: len(x)] = x
    return padded


def _pack_exponents(scales: torch.Tensor, packed: torch.Tensor) -> None:
    """The biased exponents of scales [l, n, c], powers of two, into int32 [l, n, ceil(c / 4)]: the
    first in the lowest byte. Rows that hold no scales yet hold no meaning."""
    exponents = torch.zeros(*packed.shape, 4, dtype=torch.uint8)
    exponents.flatten(2)[..., : scales.shape[2]] = (scales.view(torch.int32) >> 23) & 255
    packed.copy_(exponents.view(torch.int32).squeeze(-1))


def _nothing() -> None:
    """The hook of a call that is complete."""


from ._elastic_buffer import ElasticBuffer, EPHandle  # noqa: E402  (it is made of the above)
