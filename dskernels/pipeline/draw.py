"""Pictures of a simulated schedule: SVG, PNG, and text for a terminal.

Time runs to the right, one row per rank. Blue: forward, green: backward (dark: both gradients,
light: input gradient only), amber: weight gradient; direction 1 has violet, pink and orange
instead. An overlapped pair shows its forward above its backward. Hatched ground is bubble. Under
each row a thin lane shows communication (transfers, all-to-alls), under the chart the memory of
every rank.
"""

from __future__ import annotations

from html import escape

import numpy as np

from .actions import RECVS, SENDS, Action, Op, Schedule
from .simulate import Result

COLOURS = {
    Op.F: "#5b8ff9",
    Op.B: "#2f9e6e",
    Op.BI: "#8fd3a8",
    Op.W: "#f6c65b",
}
SECOND_F = "#9270ca"  # forward of direction 1
SECOND_B = "#c2548a"  # backward of direction 1
SECOND_BI = "#e5a3c2"
SECOND_W = "#e8945a"
COMM = "#6b7280"
IDLE = "#eceef2"
LEGEND = {
    "F": COLOURS[Op.F],
    "B": COLOURS[Op.B],
    "Bi": COLOURS[Op.BI],
    "W": COLOURS[Op.W],
    "comm": COMM,
    "bubble": IDLE,
}
SECOND_LEGEND = {"F'": SECOND_F, "B'": SECOND_B, "Bi'": SECOND_BI, "W'": SECOND_W}
# Above this many actions single boxes are thinner than a pixel: draw columns of pixels instead.
MAX_BOXES = 20_000


def colour(atom: Action) -> str:
    if atom.direction:
        return {Op.F: SECOND_F, Op.B: SECOND_B, Op.BI: SECOND_BI, Op.W: SECOND_W}[atom.op]
    return COLOURS[atom.op]


def boxes(result: Result, rank: int) -> list[tuple[float, float, Action]]:
    """(start, end, action) of a rank's compute actions in order."""
    return [
        (s, e, a)
        for s, e, a in zip(
            result.start[rank], result.end[rank], result.schedule.actions[rank], strict=True
        )
        if a.op not in SENDS and a.op not in RECVS
    ]


def comm_spans(result: Result, rank: int) -> list[tuple[float, float, str]]:
    """(start, end, name) of a rank's communication: its sends, and all-to-alls inside actions."""
    spans = []
    for start, end, action in zip(
        result.start[rank], result.end[rank], result.schedule.actions[rank], strict=True
    ):
        if action.op in SENDS:
            if end > start:
                spans.append((start, end, str(action)))
        elif action.op not in RECVS:
            line = result.costs.timeline(action)
            if line is not None and line.duration:
                scale = (end - start) / line.duration
                spans.extend(
                    (start + s.start * scale, start + s.end * scale, s.name)
                    for s in line.segments
                    if s.lane == 1 and s.end > s.start
                )
    return spans


def sample(result: Result, rank: int, columns: int) -> list[Action | None]:
    """What a rank computes at the middle of each of `columns` equal slices of the makespan."""
    row = boxes(result, rank)
    if not row or not result.makespan:
        return [None] * columns
    starts = np.asarray([b[0] for b in row])
    middles = (np.arange(columns) + 0.5) * result.makespan / columns
    at = np.searchsorted(starts, middles, side="right") - 1
    return [row[i][2] if i >= 0 and t < row[i][1] else None for i, t in zip(at, middles)]


# --- SVG ------------------------------------------------------------------------------------------

_LEFT, _TOP, _ROW, _GAP, _LANE, _MEMORY = 52, 46, 22, 4, 5, 120


def svg(result: Result, *, width: int = 1200, title: str | None = None) -> str:
    """The chart as one self-contained SVG document (usable inline in HTML).

    Args:
        result: of `simulate`.
        width: pixels, at least 200; the height follows from the number of ranks.
        title: heading; schedule, sizes, makespan and bubble if not given.
    """
    if width < 200:
        raise ValueError(f"width must be at least 200 pixels; got {width}")
    ranks = result.schedule.num_ranks
    scale = (width - _LEFT - 12) / (result.makespan or 1.0)
    lanes = [comm_spans(result, r) for r in range(ranks)]
    lane = _LANE if any(lanes) else 0
    pitch = _ROW + lane + _GAP
    chart_bottom = _TOP + ranks * pitch
    height = chart_bottom + 30 + _MEMORY + 24
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui,sans-serif" font-size="11">',
        '<defs><pattern id="dsk-idle" width="6" height="6" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)"><rect width="6" height="6" fill="{IDLE}"/>'
        '<rect width="1.5" height="6" fill="#cfd4dd"/></pattern></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="16" font-size="14" font-weight="600" fill="#111">'
        f"{escape(title or headline(result))}</text>",
    ]
    out += _legend(result)
    crowded = result.schedule.num_actions > MAX_BOXES
    for rank in range(ranks):
        y = _TOP + rank * pitch
        out.append(f'<text x="6" y="{y + 15}" fill="#333">rank {rank}</text>')
        span = result.makespan * scale
        out.append(
            f'<rect x="{_LEFT}" y="{y}" width="{span:.2f}" height="{_ROW}" fill="url(#dsk-idle)"/>'
        )
        row = _pixel_row(result, rank, scale, y) if crowded else _box_row(result, rank, scale, y)
        out += row
        out += [
            f'<rect x="{_LEFT + s * scale:.2f}" y="{y + _ROW + 1}" width="{(e - s) * scale:.2f}" '
            f'height="{lane - 1}" fill="{COMM}"><title>{escape(name)}</title></rect>'
            for s, e, name in lanes[rank]
        ]
    out += _axis(result, scale, chart_bottom)
    out += _memory_svg(result, scale, chart_bottom + 30)
    out.append("</svg>")
    return "\n".join(out)


def headline(result: Result) -> str:
    s = result.schedule
    return (
        f"{s.name}: {s.num_ranks} ranks, {s.num_microbatches} micro-batches, makespan "
        f"{result.makespan:.6g}, bubble {max(result.bubble):.4g} "
        f"({100 * max(result.bubble) / (result.makespan or 1):.1f}%)"
    )


def legend(result: Result) -> dict[str, str]:
    """{label: colour}; primed labels are of direction 1."""
    return LEGEND | (SECOND_LEGEND if result.schedule.num_directions > 1 else {})


def _legend(result: Result) -> list[str]:
    out = []
    for i, (name, fill) in enumerate(legend(result).items()):
        x = _LEFT + 66 * i
        ground = "url(#dsk-idle)" if name == "bubble" else fill
        out.append(f'<rect x="{x}" y="24" width="12" height="12" fill="{ground}"/>')
        out.append(f'<text x="{x + 16}" y="34" fill="#333">{escape(name)}</text>')
    return out


def _box_row(result: Result, rank: int, scale: float, y: float) -> list[str]:
    out = []
    for start, end, action in boxes(result, rank):
        x, w = _LEFT + start * scale, (end - start) * scale
        part_height = _ROW / len(action.atoms)
        for k, atom in enumerate(action.atoms):
            top = y + k * part_height
            tip = f"{action}  {start:.6g} .. {end:.6g}"
            out.append(
                f'<rect x="{x:.2f}" y="{top:.1f}" width="{w:.2f}" height="{part_height:.1f}" '
                f'fill="{colour(atom)}" stroke="#fff" stroke-width="0.6">'
                f"<title>{escape(tip)}</title></rect>"
            )
            label = str(atom.microbatch)
            if w > 6 * len(label) + 2:
                size = 10 if len(action.atoms) == 1 else 8
                out.append(
                    f'<text x="{x + w / 2:.2f}" y="{top + part_height / 2 + size * 0.36:.1f}" '
                    f'font-size="{size}" text-anchor="middle" fill="#1b1f27">{label}</text>'
                )
    return out


def _pixel_row(result: Result, rank: int, scale: float, y: float) -> list[str]:
    columns = max(1, int(result.makespan * scale))
    actions = sample(result, rank, columns)
    out = []
    for half in (0, 1):
        fills = [
            None if a is None else colour(a.atoms[min(half, len(a.atoms) - 1)]) for a in actions
        ]
        begin = 0
        for i in range(1, columns + 1):
            if i == columns or fills[i] != fills[begin]:
                if fills[begin]:
                    out.append(
                        f'<rect x="{_LEFT + begin}" y="{y + half * _ROW / 2}" '
                        f'width="{i - begin}" height="{_ROW / 2}" fill="{fills[begin]}"/>'
                    )
                begin = i
    return out


def ticks(limit: float, about: int = 10) -> list[float]:
    """Round numbers from 0 to `limit`."""
    if not limit > 0:
        return [0.0]
    step = 10 ** np.floor(np.log10(limit / about))
    step *= min((m for m in (1, 2, 5, 10) if limit / (step * m) <= about), default=10)
    return [float(v) for v in np.arange(0, limit * (1 + 1e-9), step)]


def _axis(result: Result, scale: float, y: float) -> list[str]:
    out = []
    for value in ticks(result.makespan):
        x = _LEFT + value * scale
        out.append(f'<path d="M{x:.1f} {y}v4" stroke="#888"/>')
        out.append(
            f'<text x="{x:.1f}" y="{y + 15}" text-anchor="middle" fill="#555">{value:g}</text>'
        )
    return out


def rank_colour(rank: int, ranks: int) -> str:
    """From blue (rank 0) to orange (last rank)."""
    t = rank / max(1, ranks - 1)
    rgb = [round(a + (b - a) * t) for a, b in zip((43, 108, 196), (222, 116, 42))]
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _memory_svg(result: Result, scale: float, y: float) -> list[str]:
    ranks = result.schedule.num_ranks
    top = max(result.peak_memory, default=0.0) or 1.0
    base = y + _MEMORY
    out = [
        f'<text x="6" y="{y + 10}" fill="#333">memory</text>',
        f'<path d="M{_LEFT} {y}V{base}H{_LEFT + result.makespan * scale:.1f}" fill="none" '
        'stroke="#888"/>',
    ]
    for value in ticks(top, 4):
        level = base - value / top * (_MEMORY - 8)
        out.append(
            f'<text x="{_LEFT - 4}" y="{level + 4:.1f}" text-anchor="end" fill="#555">'
            f"{value:g}</text>"
        )
    for rank, (times, curve) in enumerate(result.memory):
        keep = _thin(times * scale)
        path, last = [], base
        for i in keep:
            x = _LEFT + times[i] * scale
            level = base - curve[i] / top * (_MEMORY - 8)
            path.append(f"{'L' if path else 'M'}{x:.1f} {last:.1f}L{x:.1f} {level:.1f}")
            last = level
        peak = f"rank {rank}: peak {result.peak_memory[rank]:.6g}"
        out.append(
            f'<path d="{"".join(path)}" fill="none" stroke="{rank_colour(rank, ranks)}" '
            f'stroke-width="1.2" opacity="0.8"><title>{peak}</title></path>'
        )
    return out


def _thin(pixels: np.ndarray) -> list[int]:
    """Indices to draw: all of a small curve; of a large one the last of each half pixel."""
    if len(pixels) < 4000:
        return list(range(len(pixels)))
    cell = np.floor(pixels * 2)
    return [int(i) for i in np.flatnonzero(np.diff(cell, append=cell[-1] + 1))]


# --- text -----------------------------------------------------------------------------------------

_LETTER = {Op.F: "F", Op.B: "B", Op.BI: "I", Op.W: "W", Op.FB: "X"}
_ANSI = {"F": 44, "B": 42, "I": 102, "W": 43, "X": 46, ".": 100}


def ascii(result: Result, *, width: int = 100, colour: bool = False) -> str:
    """One line per rank, one character per slice of time. F forward, B backward, I input gradient,
    W weight gradient, X overlapped pair, `.` bubble; lower case: direction 1."""
    if width < 10:
        raise ValueError(f"width must be at least 10 characters; got {width}")
    lines = [headline(result)]
    for rank in range(result.schedule.num_ranks):
        row = []
        for action in sample(result, rank, width):
            letter = "." if action is None else _LETTER[action.op]
            shown = letter.lower() if action is not None and action.direction else letter
            row.append(f"\x1b[30;{_ANSI[letter]}m{shown}\x1b[0m" if colour else shown)
        lines.append(f"rank {rank:>2} |{''.join(row)}|")
    lines.append("F forward  B backward  I input gradient  W weight gradient  X F&B pair  . bubble")
    if result.schedule.num_directions > 1:
        lines[-1] += "  lower case: direction 1"
    return "\n".join(lines)


def listing(schedule: Schedule) -> str:
    """The action lists themselves, one line per rank."""
    return "\n".join(
        f"rank {rank}: {' '.join(map(str, acts))}" for rank, acts in enumerate(schedule.actions)
    )
