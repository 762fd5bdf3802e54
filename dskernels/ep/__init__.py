"""Expert-parallel exchange between processes: every rank's tokens to the ranks of their experts,
and back. `docs/expert_parallel.md` describes the protocol; `dskernels.ref.ep` is the
specification, which results equal bit for bit.

    group = dsk.ep.Group.from_process_group(num_experts=256, max_tokens=4096, hidden=7168, topk=8)
    received = dsk.ep.dispatch(group, x, topk_idx, topk_weights)
    y = my_experts(received.x, received.topk_idx, received.topk_weights)
    out, _ = dsk.ep.combine(group, y, received)

A rank that dies or falls silent makes the call raise PeerSilent on every other rank within the
timeout; `group.recover()` then continues without it.
"""

from .doctor import doctor
from .errors import PeerSilent
from .exchange import (
    LowLatencyReceived,
    Received,
    combine,
    dispatch,
    low_latency_combine,
    low_latency_dispatch,
)
from .group import Group

__all__ = [
    "Group",
    "LowLatencyReceived",
    "PeerSilent",
    "Received",
    "combine",
    "dispatch",
    "doctor",
    "low_latency_combine",
    "low_latency_dispatch",
]
