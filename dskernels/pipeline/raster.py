"""The chart as a PNG, with nothing but NumPy and zlib: the twin of `draw.svg`."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from .draw import COMM, IDLE, boxes, colour, comm_spans, legend, rank_colour, ticks
from .simulate import Result

# 3 x 5 pixels a glyph, rows from the top, three bits each.
_GLYPHS = {
    "0": 0o75557, "1": 0o26227, "2": 0o71747, "3": 0o71717, "4": 0o55711,
    "5": 0o74717, "6": 0o74757, "7": 0o71122, "8": 0o75757, "9": 0o75717,
    "A": 0o25755, "B": 0o65656, "C": 0o34443, "D": 0o65556, "E": 0o74647,
    "F": 0o74644, "G": 0o34553, "H": 0o55755, "I": 0o72227, "J": 0o11152,
    "K": 0o55655, "L": 0o44447, "M": 0o57755, "N": 0o57775, "O": 0o25552,
    "P": 0o65644, "Q": 0o25563, "R": 0o65655, "S": 0o34216, "T": 0o72222,
    "U": 0o55557, "V": 0o55552, "W": 0o55775, "X": 0o55255, "Y": 0o55222,
    "Z": 0o71247, "-": 0o00700, ".": 0o00002, "%": 0o51245, "+": 0o02720,
    "'": 0o22000, ":": 0o02020, ",": 0o00024, "(": 0o12221, ")": 0o42224,
    "&": 0o25253, "/": 0o11244,
}  # fmt: skip


def _rgb(value: str) -> tuple[int, int, int]:
    return tuple(int(value[i : i + 2], 16) for i in (1, 3, 5))


class _Canvas:
    def __init__(self, width: int, height: int):
        self.pixels = np.full((height, width, 3), 255, np.uint8)

    def rect(self, x0: float, y0: float, x1: float, y1: float, fill: str) -> None:
        """At least one pixel wide, so that nothing that happened is invisible."""
        left, top = round(x0), round(y0)
        self.pixels[top : max(top + 1, round(y1)), left : max(left + 1, round(x1))] = _rgb(fill)

    def text(self, x: float, y: float, text: str, fill: str = "#222222", zoom: int = 2) -> None:
        """Upper-case text with its top left corner at (x, y); glyphs are 4*zoom apart."""
        for i, char in enumerate(text.upper()):
            bits = _GLYPHS.get(char, 0)
            for k in range(15):
                if bits >> (14 - k) & 1:
                    px, py = x + (4 * i + k % 3) * zoom, y + k // 3 * zoom
                    self.rect(px, py, px + zoom, py + zoom, fill)

    def png(self) -> bytes:
        height, width, _ = self.pixels.shape
        rows = np.zeros((height, 1 + 3 * width), np.uint8)  # filter type 0 before each row
        rows[:, 1:] = self.pixels.reshape(height, -1)

        def chunk(kind: bytes, data: bytes) -> bytes:
            body = kind + data
            return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6))
            + chunk(b"IEND", b"")
        )


def text_width(text: str, zoom: int) -> int:
    return 4 * zoom * len(text)


def png(result: Result, *, width: int = 1600) -> bytes:
    """The chart as PNG bytes: rows of ranks, communication lanes, memory curves.

    Args:
        result: of `simulate`.
        width: pixels, at least 300; the height follows from the number of ranks.
    """
    if width < 300:
        raise ValueError(f"width must be at least 300 pixels; got {width}")
    s = result.schedule
    left, top, row, lane, gap, memory = 90, 56, 30, 6, 4, 160
    pitch = row + lane + gap
    bottom = top + s.num_ranks * pitch
    canvas = _Canvas(width, bottom + 40 + memory + 20)
    scale = (width - left - 20) / (result.makespan or 1.0)
    canvas.text(
        left,
        8,
        f"{s.name} {s.num_ranks} ranks {s.num_microbatches} micro-batches "
        f"makespan {result.makespan:.6g} bubble {max(result.bubble):.4g}",
    )
    for i, (name, fill) in enumerate(legend(result).items()):
        x = left + 120 * i
        canvas.rect(x, 32, x + 14, 46, fill)
        canvas.text(x + 20, 34, name)
    for rank in range(s.num_ranks):
        y = top + rank * pitch
        canvas.text(6, y + 8, f"rank {rank}")
        canvas.rect(left, y, left + result.makespan * scale, y + row, IDLE)
        for start, end, action in boxes(result, rank):
            _box(canvas, action, left + start * scale, left + end * scale, y, row)
        for start, end, _ in comm_spans(result, rank):
            x0, x1 = left + start * scale, left + end * scale
            canvas.rect(x0, y + row + 1, x1, y + row + lane, COMM)
    for value in ticks(result.makespan):
        x = left + value * scale
        canvas.rect(x, bottom, x + 1, bottom + 6, "#888888")
        label = f"{value:g}"
        canvas.text(x - text_width(label, 2) / 2, bottom + 10, label, "#555555")
    _memory(canvas, result, left, bottom + 40, memory, scale)
    return canvas.png()


def _box(canvas: _Canvas, action, x0: float, x1: float, y: float, row: float) -> None:
    height = row / len(action.atoms)
    edge = 1 if x1 - x0 > 4 else 0  # a white seam between neighbours, where there is room
    for k, atom in enumerate(action.atoms):
        above = y + k * height
        canvas.rect(x0, above, x1 - edge, above + height, colour(atom))
        label, zoom = str(atom.microbatch), 2 if len(action.atoms) == 1 else 1
        if x1 - x0 > text_width(label, zoom) + 2:
            canvas.text(
                (x0 + x1 - text_width(label, zoom)) / 2 + 1,
                above + height / 2 - 2.5 * zoom,
                label,
                zoom=zoom,
            )


def _memory(canvas: _Canvas, result: Result, left, y, height, scale) -> None:
    canvas.text(6, y, "memory")
    peak = max(result.peak_memory, default=0.0) or 1.0
    base = y + height
    canvas.rect(left, base, left + result.makespan * scale, base + 1, "#888888")
    for value in ticks(peak, 4):
        label = f"{value:g}"
        level = base - value / peak * (height - 10)
        canvas.text(left - text_width(label, 2) - 6, level - 5, label, "#555555")
    ranks = result.schedule.num_ranks
    for rank, (times, curve) in enumerate(result.memory):
        fill = rank_colour(rank, ranks)
        xs = left + np.append(times, result.makespan) * scale
        levels = base - curve / peak * (height - 10)
        for i, level in enumerate(levels):
            canvas.rect(xs[i], level, xs[i + 1], level + 1, fill)
            if i:
                low, high = sorted((levels[i - 1], level))
                canvas.rect(xs[i], low, xs[i] + 1, high + 1, fill)
