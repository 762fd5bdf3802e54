"""Read and write schedules: torch.distributed.pipelining's CSV, and JSON.

CSV, as torch's schedule runtime loads it: one line per rank, one cell per action, `2F0` for the
forward of stage 2 on micro-batch 0, likewise B (full backward), I (input gradient), W, SEND_F,
RECV_F, SEND_B, RECV_B, and `(2F5;1B0)OVERLAP_F_B` for a pair; an empty cell is an idle step.
`compute_only` has no transfers (torch adds its own); `compute_comms` has them, and REDUCE_GRAD
where a stage has seen its last weight gradient (torch then scales and reduces its gradients).
The CSV knows one direction only, so Chimera and DualPipe travel as JSON: a header, the same cells.
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

from .actions import COMPUTE, Action, Op, Schedule, ScheduleError

_CELL = re.compile(r"(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|F|B|I|W)(\d+)")
_PAIR = re.compile(r"\(([^;()]+);([^;()]+)\)OVERLAP_F_B")
# torch's parameter-sharding hints: they carry no micro-batch and do not change the order.
_HINT = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD)")
FORMATS = ("compute_only", "compute_comms")


def parse_cell(text: str, rank: int) -> Action | None:
    """One cell as an action; None for an idle step or a sharding hint."""
    cell = text.strip()
    if not cell or _HINT.fullmatch(cell):
        return None
    if match := _PAIR.fullmatch(cell):
        parts = [parse_cell(part, rank) for part in match.groups()]
        if any(p is None or p.op not in (Op.F, Op.B, Op.BI) for p in parts):
            raise ScheduleError(f"rank {rank}: {cell!r} is not a pair of F and B")
        fwd, bwd = sorted(parts, key=lambda p: p.op is not Op.F)
        return fwd._replace(op=Op.FB, parts=(fwd, bwd))
    match = _CELL.fullmatch(cell)
    if not match:
        raise ScheduleError(
            f"rank {rank}: cannot read action {cell!r}; expected e.g. 2F0, 1I3, 0SEND_F4 or "
            "(2F5;1B0)OVERLAP_F_B"
        )
    stage, op, microbatch = match.groups()
    return Action(rank, Op(op), int(stage), int(microbatch))


def from_csv(text: str, name: str = "imported") -> Schedule:
    """A schedule from torch's CSV (either format; sharding hints and idle steps are dropped).

    Raises ScheduleError for cells that cannot be read, a stage on two ranks or on none. Whether
    the list makes sense is for `validate`.
    """
    rows = [
        [a for a in (parse_cell(cell, rank) for cell in row) if a is not None]
        for rank, row in enumerate(csv.reader(io.StringIO(text)))
    ]
    return from_rows(rows, name)


def from_rows(rows: list[list[Action]], name: str) -> Schedule:
    """A schedule of one direction from per-rank lists; stages and placement are inferred."""
    home: dict[int, int] = {}
    top = -1
    for rank, row in enumerate(rows):
        for action in row:
            for atom in action.atoms:
                if atom.op in COMPUTE and home.setdefault(atom.stage, rank) != rank:
                    raise ScheduleError(
                        f"stage {atom.stage} computes on rank {home[atom.stage]} and on rank {rank}"
                    )
                top = max(top, atom.microbatch)
    if not home:
        raise ScheduleError("the schedule holds no compute action")
    missing = sorted(set(range(max(home) + 1)) - set(home))
    if missing:
        raise ScheduleError(f"stages {missing} compute on no rank")
    place = tuple(home[s] for s in range(len(home)))
    return Schedule(name, len(rows), len(home), top + 1, (place,), tuple(map(tuple, rows)))


def to_csv(schedule: Schedule, format: str = "compute_only") -> str:
    """torch's CSV of a one-directional schedule; `compute_comms` adds transfers if there are none.

    Raises ScheduleError for a schedule of two directions: torch's engine has no second direction.
    """
    from .lower import add_comms

    if format not in FORMATS:
        raise ScheduleError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    if schedule.num_directions > 1:
        raise ScheduleError(
            f"{schedule.name} runs {schedule.num_directions} directions, which torch's CSV cannot "
            "say (a stage has one rank there); export it as JSON"
        )
    source = schedule.compute_only() if format == "compute_only" else add_comms(schedule)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for acts in source.actions:
        cells = []
        left: dict[int, int] = {}
        for action in acts:
            cells.append(str(action))
            if format == "compute_only":
                continue
            for atom in action.atoms:
                if atom.op in (Op.B, Op.W):
                    left[atom.stage] = left.get(atom.stage, schedule.num_microbatches) - 1
                    if left[atom.stage] == 0:
                        cells.append(f"{atom.stage}REDUCE_GRAD")
        writer.writerow(cells)
    return out.getvalue()


def to_json(schedule: Schedule) -> str:
    """Every schedule, losslessly: a header and the CSV's cells."""
    return json.dumps(
        {
            "format": "dskernels.pipeline/1",
            "name": schedule.name,
            "num_ranks": schedule.num_ranks,
            "num_stages": schedule.num_stages,
            "num_microbatches": schedule.num_microbatches,
            "placement": schedule.placement,
            "forward_only": schedule.forward_only,
            "actions": [[str(a) for a in acts] for acts in schedule.actions],
        }
    )


def from_json(text: str) -> Schedule:
    """The reverse of `to_json`; the directions follow from the micro-batches."""
    try:
        head = json.loads(text)
        shell = Schedule(
            head["name"],
            head["num_ranks"],
            head["num_stages"],
            head["num_microbatches"],
            tuple(tuple(p) for p in head["placement"]),
            (),
            head["forward_only"],
        )
        rows = head["actions"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ScheduleError(f"not a schedule in dskernels' JSON form: {error!r}") from error

    def directed(action: Action) -> Action:
        parts = tuple(directed(p) for p in action.parts)
        return action._replace(direction=shell.direction_of(action.microbatch), parts=parts)

    lists = []
    for rank, row in enumerate(rows):
        parsed = (parse_cell(cell, rank) for cell in row)
        lists.append([directed(a) for a in parsed if a is not None])
    return shell.with_actions(lists)


def load(path: str | Path) -> Schedule:
    """A schedule from a .csv or .json file."""
    path = Path(path)
    text = path.read_text()
    if path.suffix == ".json":
        return from_json(text)
    return from_csv(text, path.stem)
