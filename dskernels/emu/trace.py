"""One CTA's modelled timeline as data, and as a Chrome trace for Perfetto (ui.perfetto.dev).

timeline = launch.timeline()  # of emu.profiling's launches
timeline.save("t.json")
timeline.draw("t.png")  # dskernels.emu.timeline
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROCESSES = {"warps": 1, "tensor cores": 2, "copies": 3, "slots": 4}


@dataclass(frozen=True)
class Slot:
    """One stage of shared memory as TMA fills it: the copies that complete one mbarrier.

    loading, full: intervals in cycles; between them the slot is empty, or not yet filled again.
    """

    barrier: int  # shared offset of the mbarrier
    bytes: int
    loading: list[tuple[float, float]]
    full: list[tuple[float, float]]


class Timeline:
    """Spans of the warps of one CTA of the first cluster that ran, in cycles.

    spans: (warp, state, detail, pc, begin, end); tensor, copies: dicts with begin and end; slots.
    """

    def __init__(self, trace: dict[str, Any], kernel: str, clock_ghz: float, cta: int = 0):
        self.kernel, self.clock_ghz = kernel, clock_ghz
        numbers = {k for k, w in enumerate(trace["warps"]) if w["cta"] == cta}
        if not numbers:
            raise ValueError(f"cta: the cluster has no CTA {cta}")
        first = min(numbers)
        self.num_warps = len(numbers)
        self.cycles: float = trace["cycles"]
        self.cut: bool = trace["cut"]
        self.where: dict[int, dict] = trace["where"]
        self.spans = [(warp - first, *rest) for warp, *rest in trace["spans"] if warp in numbers]
        mine = [{**op, "warp": op["warp"] - first} for op in trace["tensor"] + trace["copies"]
                if op["warp"] in numbers]  # fmt: skip
        tensor = len([op for op in trace["tensor"] if op["warp"] in numbers])
        self.tensor, self.copies = mine[:tensor], mine[tensor:]
        # What lands here may have been asked for by another CTA of the cluster.
        landing = [op for op in trace["copies"] if not op["store"] and op["ranks"] >> cta & 1]
        self.slots = _slots(landing, self.cycles)
        self.filled_by_copies = {slot.barrier for slot in self.slots}

    def label(self, state: str, detail: int) -> str:
        """What a warp does, in a few words."""
        if state == "mbarrier":
            kind = "data" if detail in self.filled_by_copies else "a free slot or a signal"
            return f"waits for {kind}, mbarrier at {detail}"
        if state == "barrier":
            return f"waits at barrier {detail}"
        return {
            "issue": "issues", "wgmma": "waits for wgmma", "copies": "waits for copy groups",
            "cluster barrier": "waits at the cluster barrier", "memory": "waits for a load",
            "result": "waits for arithmetic", "busy": "held back by other warps",
            "fence": "waits for a fence",
        }[state]  # fmt: skip

    def chrome(self) -> dict:
        """The trace in Chrome's JSON format; times in microseconds."""
        scale = 1e-3 / self.clock_ghz
        events: list[dict] = []

        def name(process: str, thread: int, text: str) -> None:
            ids = {"pid": PROCESSES[process], "tid": thread}
            events.append({"ph": "M", "name": "thread_name", **ids, "args": {"name": text}})

        def span(process: str, thread: int, text: str, begin: float, end: float, **args) -> None:
            ids = {"pid": PROCESSES[process], "tid": thread, "cat": process}
            times = {"ts": begin * scale, "dur": max(end - begin, 0) * scale}
            events.append({"ph": "X", "name": text, **ids, **times, "args": args})

        for process, number in PROCESSES.items():
            named = {"name": f"{process} (modelled)"}
            events.append({"ph": "M", "name": "process_name", "pid": number, "args": named})
        for warp in range(self.num_warps):
            name("warps", warp, f"warp {warp:2} (warpgroup {warp // 4})")
        for warp, state, detail, pc, begin, end in self.spans:
            span("warps", warp, self.label(state, detail), begin, end, **self._place(pc))
        for op in self.tensor:
            name("tensor cores", op["warp"] // 4, f"warpgroup {op['warp'] // 4}")
            span("tensor cores", op["warp"] // 4, "wgmma", op["begin"], op["end"],
                 **self._place(op["pc"]))  # fmt: skip
        for lane, op in _lanes(self.copies):
            what = "store" if op["store"] else "load"
            span("copies", lane, f"{what} {op['bytes']} B", op["begin"], op["end"],
                 warp=op["warp"], shared_offset=op["offset"], **self._place(op["pc"]))  # fmt: skip
        for k, slot in enumerate(self.slots):
            name("slots", k, f"slot of mbarrier {slot.barrier} ({slot.bytes} B)")
            for begin, end in slot.loading:
                span("slots", k, "loading", begin, end)
            for begin, end in slot.full:
                span("slots", k, "full", begin, end)
        about = {"kernel": self.kernel, "clock_ghz": self.clock_ghz, "cut": self.cut}
        return {"traceEvents": _once(events), "displayTimeUnit": "ns", "otherData": about}

    def save(self, path: str | Path) -> None:
        """Writes the Chrome trace."""
        Path(path).write_text(json.dumps(self.chrome()))

    def draw(self, path: str | Path, **options: Any) -> None:
        """Writes a picture; see dskernels.emu.timeline.draw."""
        from dskernels.emu.timeline import draw

        draw(self, path, **options)

    def _place(self, pc: int) -> dict:
        at = self.where.get(pc)
        if at is None:
            return {}
        return {
            "instruction": at["text"],
            "ptx_line": at["ptx_line"],
            "source": f"{at['source_file']}:{at['source_line']}",
        }


def _once(events: list[dict]) -> list[dict]:
    """Without repeated names of threads."""
    seen, out = set(), []
    for e in events:
        key = (e["name"], e["pid"], e.get("tid")) if e["ph"] == "M" else None
        if key is None or key not in seen:
            out.append(e)
        seen.add(key)
    return out


def _lanes(copies: list[dict]) -> list[tuple[int, dict]]:
    """Copies overlap; each gets the first lane that is free."""
    ends: list[float] = []
    out = []
    for op in sorted(copies, key=lambda op: op["begin"]):
        lane = next((k for k, end in enumerate(ends) if end <= op["begin"]), len(ends))
        if lane == len(ends):
            ends.append(0)
        ends[lane] = op["end"]
        out.append((lane, op))
    return out


def _slots(loads: list[dict], end: float) -> list[Slot]:
    """Stages: loads by the mbarrier that they complete, and in turn by the slot's next filling."""
    by_barrier: dict[int, list[dict]] = defaultdict(list)
    for op in loads:
        by_barrier[op["barrier"]].append(op)
    slots = []
    for barrier, ops in sorted(by_barrier.items()):
        if barrier < 0:
            continue
        ops.sort(key=lambda op: op["begin"])
        fillings: list[list[dict]] = []
        for op in ops:
            # The same place again is the next filling.
            if not fillings or any(other["offset"] == op["offset"] for other in fillings[-1]):
                fillings.append([])
            fillings[-1].append(op)
        loading = [(f[0]["begin"], max(op["end"] for op in f)) for f in fillings]
        freed = [f[0]["freed"] for f in fillings[1:]] + [end]
        full = [(done, max(done, free)) for (_, done), free in zip(loading, freed, strict=True)]
        slots.append(Slot(barrier, sum(op["bytes"] for op in fillings[0]), loading, full))
    return slots
