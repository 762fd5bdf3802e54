"""A simulated schedule as a Chrome trace: open it in ui.perfetto.dev or chrome://tracing.

Each rank is a process with a computation and a communication thread and a memory counter; arrows
lead from each send to the compute action that uses the message.
"""

from __future__ import annotations

import json

from .actions import SENDS, Op
from .draw import boxes
from .lower import needs
from .simulate import Result

_COMPUTE, _COMM = 0, 1


def events(result: Result, *, microseconds: float = 1.0) -> list[dict]:
    """Trace events; one unit of the costs becomes `microseconds` (1e6 if they are in seconds)."""
    out: list[dict] = []
    for rank in range(result.schedule.num_ranks):
        for thread, name in ((_COMPUTE, "compute"), (_COMM, "communication")):
            out.append(_meta("thread_name", rank, thread, name))
        out.append(_meta("process_name", rank, _COMPUTE, f"rank {rank}"))
        out += _compute_events(result, rank, microseconds)
        out += _send_events(result, rank, microseconds)
        times, curve = result.memory[rank]
        out += [
            {
                "name": "memory",
                "ph": "C",
                "pid": rank,
                "ts": float(t) * microseconds,
                "args": {"in use": float(value)},
            }
            for t, value in zip(times, curve, strict=True)
        ]
    return out


def _meta(kind: str, rank: int, thread: int, name: str) -> dict:
    return {"name": kind, "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}


def _flow_id(backward: bool, stage: int, microbatch: int) -> str:
    return f"{'B' if backward else 'F'}{stage}.{microbatch}"


def _compute_events(result: Result, rank: int, unit: float) -> list[dict]:
    out = []
    schedule = result.schedule
    for start, end, action in boxes(result, rank):
        common = {"pid": rank, "tid": _COMPUTE, "ts": start * unit}
        out.append(
            {
                **common,
                "name": str(action),
                "cat": action.op.value,
                "ph": "X",
                "dur": (end - start) * unit,
                "args": {
                    "stage": action.stage,
                    "microbatch": action.microbatch,
                    "direction": action.direction,
                },
            }
        )
        line = result.costs.timeline(action)
        if line is not None and line.duration:
            scale = (end - start) / line.duration * unit
            out += [
                {
                    "name": s.name,
                    "cat": "inside",
                    "ph": "X",
                    "pid": rank,
                    "tid": _COMM if s.lane else _COMPUTE,
                    "ts": start * unit + s.start * scale,
                    "dur": (s.end - s.start) * scale,
                }
                for s in line.segments
                if s.end > s.start
            ]
        for atom in action.atoms:
            need = needs(atom, schedule.num_stages)
            if need and schedule.placement[atom.direction][need[1]] != rank:
                flow = _flow_id(need[0], need[1], atom.microbatch)
                out.append({**common, "name": "p2p", "cat": "p2p", "ph": "f", "bp": "e",
                            "id": flow})  # fmt: skip
    return out


def _send_events(result: Result, rank: int, unit: float) -> list[dict]:
    out = []
    for start, end, action in zip(
        result.start[rank], result.end[rank], result.schedule.actions[rank], strict=True
    ):
        if action.op not in SENDS:
            continue
        common = {"pid": rank, "tid": _COMM, "ts": start * unit}
        flow = _flow_id(action.op is Op.SEND_B, action.stage, action.microbatch)
        out.append({**common, "name": str(action), "cat": "p2p", "ph": "X",
                    "dur": (end - start) * unit})  # fmt: skip
        out.append({**common, "name": "p2p", "cat": "p2p", "ph": "s", "id": flow})
    return out


def dumps(result: Result, *, microseconds: float = 1.0) -> str:
    """The trace as JSON text."""
    return json.dumps(
        {
            "displayTimeUnit": "ms",
            "otherData": {"schedule": result.schedule.name, "makespan": result.makespan},
            "traceEvents": events(result, microseconds=microseconds),
        }
    )
