"""out/report.html: one self-contained page about a run, pictures inlined as SVG.

Nothing is loaded from elsewhere, so the page can be mailed or kept as a build artefact. Sections
whose data a run does not have are left out, never filled with placeholders.
"""

import html
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model.trainer import History

_MAX_COLUMNS = 160  # of the heat map: more steps are averaged, a page is not a data base
_SMOOTHING = 0.9


@dataclass(frozen=True)
class BackendRow:
    """One op of the model: what ran it, and what every backend says about it."""

    op: str
    used: str
    reasons: dict[str, tuple[bool, str]]


@dataclass(frozen=True)
class Sample:
    """A prompt, the model's continuation, and how it was generated."""

    label: str
    prompt: str
    continuation: str


@dataclass
class ReportData:
    """What a run has to say. Figures are (label, value) pairs, already formatted."""

    title: str
    figures: list[tuple[str, str]]
    history: History
    baselines: dict[str, float] = field(default_factory=dict)
    """Held-out bits per byte of the reference models, drawn as lines in the loss plot."""
    final_bits: float | None = None
    load_labels: Sequence[str] = ()
    """One name per gate, in the order of `history.loads`."""
    settings: list[tuple[str, str]] = field(default_factory=list)
    backends: list[BackendRow] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    charts: list[tuple[str, str]] = field(default_factory=list)
    """(heading, SVG or HTML) of further pictures, embedded as they are."""


def write_report(path: Path, data: ReportData) -> None:
    """Render `data` to `path`; a reader never sees half a page."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render(data), encoding="utf-8")
    os.replace(temporary, path)


def render(data: ReportData) -> str:
    """The page as text."""
    sections = [_figures(data.figures)]
    if data.history.records:
        sections.append(_section("Loss", loss_svg(data), _LOSS_NOTE))
    if data.history.loads:
        sections.append(_section("Expert load", load_svg(data), _LOAD_NOTE))
    for sample in data.samples:
        sections.append(_section(sample.label, _sample(sample)))
    if data.backends:
        sections.append(_section("Backends", _backend_table(data.backends), _BACKEND_NOTE))
    for heading, picture in data.charts:
        sections.append(_section(heading, f'<div class="picture">{picture}</div>'))
    if data.settings:
        sections.append(_section("Settings", _settings_table(data.settings)))
    title = html.escape(data.title)
    return _PAGE.format(title=title, style=_STYLE, body="\n".join(sections))


_LOSS_NOTE = (
    "Training loss in bits per byte (each step thin, smoothed thick), the multi-token-prediction "
    "loss, held-out measurements, and the classical models scored on the same held-out bytes."
)
_LOAD_NOTE = (
    "Tokens routed to each expert over the mean of its layer, per step: 1 is perfect balance. The "
    "bias update moves every expert towards it without a loss term."
)
_BACKEND_NOTE = (
    "Which implementation answers each op of the model on this machine, and why the others do or "
    "do not."
)


# ---- plots --------------------------------------------------------------------------------------


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    return figure


def _svg(figure) -> str:
    """The figure as an inline element: the XML prologue has no place inside a page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return f'<div class="picture">{text[text.index("<svg") :]}</div>'


def loss_svg(data: ReportData) -> str:
    """Loss against tokens; needs at least one record."""
    records = data.history.records
    tokens = [r["tokens"] / 1e6 for r in records]
    figure = _figure(9, 3.8)
    axes = figure.add_subplot()
    bits, mtp = ([r[key] for r in records] for key in ("bits", "mtp_bits"))
    axes.plot(tokens, bits, color="#9db7dd", linewidth=0.6)
    axes.plot(tokens, _smooth(bits), color="#1f5fb4", linewidth=1.8, label="train")
    if any(mtp):
        axes.plot(tokens, _smooth(mtp), color="#c98a1b", linewidth=1.2, label="train, MTP")
    if data.history.evals:
        axes.plot(
            [e["tokens"] / 1e6 for e in data.history.evals],
            [e["bits_per_byte"] for e in data.history.evals],
            "o",
            color="#b3213b",
            markersize=4,
            label="held out",
        )
    for index, (name, value) in enumerate(data.baselines.items()):
        style = ("--", ":", "-.")[index % 3]
        axes.axhline(value, color="#555", linewidth=1, linestyle=style, label=f"{name} {value:.3f}")
    if data.final_bits is not None:
        axes.plot(tokens[-1], data.final_bits, "D", color="#b3213b", markersize=6)
        axes.annotate(
            f"{data.final_bits:.3f}",
            (tokens[-1], data.final_bits),
            textcoords="offset points",
            xytext=(-6, 9),
            ha="right",
            color="#b3213b",
        )
    lowest = min([*bits, *data.baselines.values(), data.final_bits or bits[-1]])
    highest = max([*data.baselines.values(), min(bits[0], 6.0)])
    axes.set_ylim(lowest - 0.25, highest + 0.2)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _svg(figure)


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean, corrected for its start so that the first value does not linger."""
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        smoothed.append(mean / weight)
    return smoothed


def load_svg(data: ReportData) -> str:
    """Heat map, steps along x, the experts of every gate along y."""
    loads = torch.stack(data.history.loads).double()
    share = loads / loads.mean(dim=2, keepdim=True).clamp_min(1e-9)
    columns = torch.stack([part.mean(dim=0) for part in share.tensor_split(_columns(len(share)))])
    last_step = data.history.records[-1]["step"]
    gates, experts = columns.shape[1:]
    figure = _figure(9, 1.0 + 0.16 * gates * experts)
    all_axes = figure.subplots(gates, 1, sharex=True, squeeze=False)[:, 0]
    for gate, axes in enumerate(all_axes):
        image = axes.imshow(
            columns[:, gate].T.numpy(),
            aspect="auto",
            interpolation="nearest",
            origin="lower",
            cmap="RdBu_r",
            vmin=0.0,
            vmax=2.0,
            extent=(0, last_step, -0.5, experts - 0.5),
        )
        label = data.load_labels[gate] if gate < len(data.load_labels) else f"gate {gate}"
        axes.set_ylabel(label, fontsize=8)
        axes.set_yticks([0, experts - 1])
        axes.tick_params(labelsize=7)
    all_axes[-1].set_xlabel("step")
    bar = figure.colorbar(image, ax=list(all_axes), shrink=0.7, extend="max")
    bar.set_label("load / mean", fontsize=8)
    return _svg(figure)


def _columns(num_records: int) -> int:
    return max(1, min(_MAX_COLUMNS, num_records))


# ---- text ---------------------------------------------------------------------------------------


def _section(heading: str, content: str, note: str = "") -> str:
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<section><h2>{html.escape(heading)}</h2>{note}{content}</section>"


def _figures(figures: Sequence[tuple[str, str]]) -> str:
    cards = "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
        for label, value in figures
    )
    return f'<div class="cards">{cards}</div>'


def _sample(sample: Sample) -> str:
    return (
        f'<pre><span class="prompt">{html.escape(sample.prompt)}</span>'
        f"{html.escape(sample.continuation)}</pre>"
    )


def _backend_table(rows: Sequence[BackendRow]) -> str:
    names = list(rows[0].reasons)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("op", "used here", *names))
    body = []
    for row in rows:
        cells = [f"<td><code>{html.escape(row.op)}</code></td><td>{html.escape(row.used)}</td>"]
        for name in names:
            ok, reason = row.reasons[name]
            mark = "yes" if ok else "no"
            cells.append(f'<td class="{mark}"><b>{mark}</b> {html.escape(reason)}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _settings_table(settings: Sequence[tuple[str, str]]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td><code>{html.escape(value)}</code></td></tr>"
        for name, value in settings
    )
    return f"<table>{rows}</table>"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2330; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 1rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; border-bottom: 1px solid #dde2ea; }
.note { color: #5a6475; margin: .3rem 0 .6rem; font-size: .9rem; }
.cards { display: flex; flex-wrap: wrap; gap: .7rem; }
.card { background: #f3f6fa; border-radius: .5rem; padding: .6rem .9rem; min-width: 8rem; }
.card b { display: block; font-size: 1.3rem; }
.card span { color: #5a6475; font-size: .82rem; }
.picture svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
pre { background: #f3f6fa; border-radius: .5rem; padding: .8rem; overflow-x: auto;
      font-size: .85rem; line-height: 1.35; }
.prompt { color: #1f5fb4; font-weight: 600; }
table { border-collapse: collapse; font-size: .82rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem;
         border-bottom: 1px solid #e6eaf0; }
td.no { color: #7a8394; }
td.yes b { color: #1b7a3d; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""
