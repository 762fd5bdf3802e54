"""`deep_ep.ElasticBuffer` (V2): its dispatch and combine over `dskernels.ep`, on CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .. import ep
from .deep_ep import EventOverlap, Tokens, _own, _pad, _scaled

_ELSEWHERE = {  # beginnings of names
    "all_gather": "all-gather and reduce-scatter",
    "agrs_": "all-gather and reduce-scatter",
    "pp_": "pipeline sends",
    "engram_": "Engram",
}


class EPHandle:
    """Of one dispatch, for combine and for further dispatches with the same routing.

    psum_num_recv_tokens_per_scaleup_rank int32 [R] and psum_num_recv_tokens_per_expert int32 [L]
    are inclusive prefix sums, the latter of counts rounded up to expert_alignment.
    """

    def __init__(self, options: dict, got: Any, group: ep.Group, topk_idx: torch.Tensor) -> None:
        self.do_expand, self.num_sms = False, options["num_sms"]
        self.num_experts = options["num_experts"]
        self.num_max_tokens_per_rank = options["num_max_tokens_per_rank"]
        self.expert_alignment = options["expert_alignment"]
        self.topk_idx = topk_idx
        self.num_recv_tokens = self.num_expanded_tokens = len(got.source)
        self.num_recv_tokens_per_expert_list = got.tokens_per_expert
        per_rank = torch.bincount(got.source[:, 0], minlength=group.num_ranks)
        self.psum_num_recv_tokens_per_scaleup_rank = per_rank.cumsum(0).int()
        per_expert = torch.tensor(got.tokens_per_expert, dtype=torch.int32)
        self.psum_num_recv_tokens_per_expert = per_expert.cumsum(0).int()
        self._received, self._group = got._replace(x=None, source=None), group


class ElasticBuffer:
    """All ranks of `group` make it, and call its methods in the same order. Sizes of buffers,
    queue pairs and SMs are accepted and mean nothing here; results are deterministic always.
    num_cpu_timeout_secs is the time after which a silent rank raises dskernels.ep.PeerSilent.

    Refused by name (NotImplementedError): do_expand (moe_permute gives that layout from what
    dispatch returns), num_cpu_bytes, and what is no exchange of experts' tokens (all_gather and
    reduce-scatter sessions, pipeline sends, Engram).
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        if num_cpu_bytes:
            raise NotImplementedError(
                f"num_cpu_bytes: expected 0 (there is no Engram here), got {num_cpu_bytes}"
            )
        self.group, self.rank_idx, self.num_ranks = group, dist.get_rank(group), group.size()
        self.num_max_tokens_per_rank, self.hidden = num_max_tokens_per_rank, hidden
        self.num_topk, self.timeout = num_topk, float(num_cpu_timeout_secs)
        self.num_scaleout_ranks, self.num_scaleup_ranks = 1, self.num_ranks
        self._groups: dict[tuple, ep.Group] = {}

    def __getattr__(self, name: str) -> Any:
        for beginning, what in _ELSEWHERE.items():
            if name.startswith(beginning):
                raise NotImplementedError(f"ElasticBuffer.{name}: {what}: not part of this one")
        raise AttributeError(f"ElasticBuffer has no attribute {name!r}")

    def destroy(self) -> None:
        """Give the windows back."""
        self._groups.clear()

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int, *_: Any, **__: Any) -> int:
        """0: nothing runs on SMs."""
        return 0

    def dispatch(
        self,
        x: Tokens,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Tokens, torch.Tensor, torch.Tensor | None, EPHandle, EventOverlap]:
        """(recv_x, recv_topk_idx, recv_topk_weights, handle, event).

        do_cpu_sync=False gives num_ranks * num_max_tokens_per_rank rows, as the peer must: those
        that nobody sent name no expert (-1). use_tma_aligned_col_major_sf: scales [n, c] with rows
        next to each other, columns a multiple of 4 apart.
        """
        if do_expand or do_zero_padding:
            raise NotImplementedError(
                "do_expand, do_zero_padding: expected False; moe_permute(recv_x, recv_topk_idx, "
                "num_local_experts, alignment=expert_alignment) gives the expanded rows"
            )
        if (handle is None) == (topk_idx is None):
            raise ValueError("topk_idx, handle: expected one of them, got both or none")
        kept = {} if handle is None else handle.__dict__
        idx = topk_idx if handle is None else handle.topk_idx
        tokens = num_max_tokens_per_rank or kept.get("num_max_tokens_per_rank")
        options = dict(
            num_experts=num_experts or kept.get("num_experts"),
            num_max_tokens_per_rank=tokens or self.num_max_tokens_per_rank,
            expert_alignment=expert_alignment or kept.get("expert_alignment") or 1,
            num_sms=num_sms,
        )
        if not options["num_experts"] or not options["num_max_tokens_per_rank"]:
            raise ValueError(
                "num_experts, num_max_tokens_per_rank: expected both, here, at the buffer or in a "
                f"handle, got {options['num_experts']}, {options['num_max_tokens_per_rank']}"
            )
        data = _scaled(x)
        group = self._group_of(options, idx.shape[1], x[0] if isinstance(x, tuple) else x)
        got = ep.dispatch(
            group, data, idx, topk_weights, expert_alignment=options["expert_alignment"]
        )
        recv, recv_idx, weights = _own(got.x), got.topk_idx, got.topk_weights
        if handle is None:
            own = idx.clone() if do_handle_copy else idx
            handle = EPHandle(options, got, group, own)
        if cumulative_local_expert_recv_stats is not None:
            named = recv_idx[recv_idx >= 0]
            counts = torch.bincount(named, minlength=group.num_local_experts)
            cumulative_local_expert_recv_stats.add_(counts)
        if do_cpu_sync is False:
            rows = self.num_ranks * options["num_max_tokens_per_rank"]
            recv = tuple(_pad(t, rows, 0) for t in recv) if isinstance(recv, tuple) else _pad(
                recv, rows, 0)  # fmt: skip
            recv_idx = _pad(recv_idx, rows, -1)
            weights = None if weights is None else _pad(weights, rows, 0)
        if use_tma_aligned_col_major_sf and isinstance(recv, tuple):
            recv = (recv[0], _column_major(recv[1]))
        return recv, recv_idx, weights, handle, EventOverlap()

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """(x [T, H] summed without weights, topk_weights [T, K] summed or None, event)."""
        rows = handle.num_recv_tokens
        weights = None if topk_weights is None else topk_weights[:rows]
        out, back = ep.combine(
            handle._group, x[:rows], handle._received, topk_weights=weights, bias=bias
        )
        return out, back, EventOverlap()

    def _group_of(self, options: dict, topk: int, data: torch.Tensor) -> ep.Group:
        """One group for each shape of a call; all ranks make it together."""
        size = max(2, data.dtype.itemsize)  # results come back in bf16 or wider
        key = (options["num_experts"], options["num_max_tokens_per_rank"], topk,
               max(self.hidden * 2, data.shape[1] * size))  # fmt: skip
        if key not in self._groups:
            experts, tokens, topk, row = key
            self._groups[key] = ep.Group.from_process_group(
                self.group, num_experts=experts, max_tokens=tokens, hidden=row // 2, topk=topk,
                timeout=self.timeout,
            )  # fmt: skip
        return self._groups[key]


def _column_major(scale: torch.Tensor) -> torch.Tensor:
    rows, columns = scale.shape
    storage = torch.zeros(columns, -(-rows // 4) * 4, dtype=scale.dtype)
    storage[:, :rows] = scale.t()
    return storage.t()[:rows]
