"""The published closed forms for bubble and peak activations, beside which we print the simulation.

A bubble here is makespan minus busy time, the same on every rank. Costs are those of one action
on one stage, as in `Costs`: with V stages a rank, an action covers 1/V of the rank's layers, so a
published (P-1)(F+B)/V with F and B of the whole rank reads (P-1)(f+b).

The forms assume uniform costs and free communication. DualPipe's is not general even then: it
counts the waits of the middle ranks as if every rank had them, and it does not hold where the
order of costs changes the critical path. The simulator is the authority.
"""

from __future__ import annotations

from .schedules import check_sizes

_TEXT = {
    "gpipe": "(P-1)(F+B)",
    "1f1b": "(P-1)(F+B)",
    "interleaved": "(P-1)(F+B), F and B of one of V chunks",
    "zb1p": "(P-1)(F+B-2W)",
    "zbv": "(P-1)F, if F=Bi=W",
    "chimera": "(P-2)max(F,B), if microbatches=P",
    "dualpipe": "(P/2-1)(F&B+B-3W)",
    "dualpipev": "(P-1)(F&B+B-3W)",
}


def bubble_text(name: str) -> str:
    """The formula as text; P = ranks."""
    return _TEXT[name]


def bubble(
    name: str, ranks: int, microbatches: int, *, f: float, b: float, w: float, fb: float
) -> float | None:
    """The published bubble, or None where none is published for these sizes and costs.

    f, b, w, fb: forward, full backward, weight gradient and overlapped pair of one stage.
    """
    check_sizes(name, ranks, microbatches)
    p = ranks
    if name in ("gpipe", "1f1b", "interleaved"):
        return (p - 1) * (f + b)
    if name == "zb1p":
        return (p - 1) * (f + b - 2 * w)
    if name == "zbv":
        return (p - 1) * f if abs(f - w) + abs(b - 2 * f) < 1e-12 * f else None
    if name == "chimera":
        return (p - 2) * max(f, b) if microbatches == p else None
    depth = p if name == "dualpipev" else p // 2
    return (depth - 1) * (fb + b - 3 * w)


def peak_activations(
    name: str, ranks: int, microbatches: int, virtual_stages: int = 1
) -> list[int] | None:
    """Published peak number of stage inputs held per rank (released by W), or None.

    Counted in chunks: one chunk is one micro-batch's activations of one stage.
    """
    p, m = ranks, microbatches
    if name == "gpipe":
        return [m] * p
    if name == "1f1b":
        return [min(p - r, m) for r in range(p)]
    if name == "interleaved":
        return [
            min((virtual_stages - 1) * p + 2 * (p - 1 - r) + 1, m * virtual_stages)
            for r in range(p)
        ]
    if name == "zb1p":
        return [p] * p if m >= p else None
    if name == "zbv":
        return [2 * p] * p if m >= 2 * p else None
    if name == "dualpipe":
        return [p + 1] * p
    if name == "dualpipev":
        return [2 * p + 1] * p
    return None  # Chimera: between P/2+1 and P, by rank


def parameter_copies(name: str) -> int:
    """Copies of the model's parameters held over all ranks of one pipeline."""
    return 2 if name in ("chimera", "dualpipe") else 1
