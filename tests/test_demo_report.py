"""The report page, the progress line, and what they show."""

import io
import re
from html.parser import HTMLParser

import pytest
import torch

import dskernels as dsk
from model import DeepseekConfig, DeepseekV3
from model.pictures import MODEL_OPS, backend_rows, dualpipe_charts, gate_names
from model.progress import ProgressLine, format_seconds
from model.report import BackendRow, ReportData, Sample, load_svg, loss_svg, render, write_report
from model.trainer import History

pytest.importorskip("matplotlib")


def history(steps=40, gates=2, experts=4):
    records, loads = [], []
    for i in range(1, steps + 1):
        records.append(
            {"step": i, "tokens": i * 1000, "bits": 2 + 6 / i, "mtp_bits": 2.2 + 6 / i, "lr": 1e-3}
        )
        loads.append(torch.full((gates, experts), 10) + torch.arange(experts))
    evals = [{"step": 20, "tokens": 20000, "bits_per_byte": 2.7}]
    return History(records, evals, loads)


def data(**changes):
    values = dict(
        title="Run <1>",
        figures=[("held-out bits/byte", "2.345")],
        history=history(),
        baselines={"order-2 Witten-Bell": 2.56, "unigram": 4.45},
        final_bits=2.345,
        load_labels=["layer 1", "MTP 1"],
        settings=[("seq_len", "256")],
        backends=[
            BackendRow(
                "gemm", "cpu: native", {"cpu": (True, "native"), "cuda": (False, "no driver")}
            )
        ],
        samples=[Sample("Sample", "if a < b:", " return '&'")],
        charts=[("DualPipe", '<svg id="pipe"></svg>')],
    )
    return ReportData(**{**values, **changes})


class Checker(HTMLParser):
    """Collects headings and everything a browser would fetch; insists on balanced tags."""

    VOID = {"meta", "br", "img", "link", "use", "path", "rect", "image"}

    def __init__(self):
        super().__init__()
        self.open, self.headings, self.fetched = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:")):
                self.fetched.append(value)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"unbalanced </{tag}>"

    def handle_data(self, text):
        if self.open and self.open[-1] == "h2":
            self.headings.append(text)


def check(page):
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    return checker


class TestReport:
    def test_page_is_complete_and_self_contained(self):
        checker = check(render(data()))
        assert checker.headings == [
            *("Loss", "Expert load", "Sample", "Backends", "DualPipe", "Settings")
        ]
        assert checker.fetched == []

    def test_text_is_escaped(self):
        page = render(data())
        assert (
            "Run &lt;1&gt;" in page
            and "if a &lt; b:" in page
            and "return &#x27;&amp;&#x27;" in page
        )
        assert "no driver" in page and '<svg id="pipe">' in page

    def test_missing_parts_are_left_out(self):
        page = render(data(history=History(), backends=[], charts=[], samples=[], settings=[]))
        assert check(page).headings == []

    def test_loss_plot_shows_every_series(self):
        picture = loss_svg(data())
        for label in ("train", "train, MTP", "held out", "order-2 Witten-Bell 2.560", "2.345"):
            assert f">{label}<" in picture

    def test_load_map_follows_the_counts(self):
        """One picture per gate; a hot expert changes it, an equal load leaves it blank."""
        picture = load_svg(data())
        assert picture.count("<image") == 2 + 1  # two gates and the colour bar
        assert ">layer 1<" in picture and ">MTP 1<" in picture
        hot = history()
        for loads in hot.loads:
            loads[0, 0] += 100
        images = [re.findall(r"<image[^>]*>", load_svg(data(history=h))) for h in (history(), hot)]
        assert images[0][0] != images[1][0] and images[0][1] == images[1][1]

    def test_long_runs_stay_small(self):
        page = render(data(history=history(steps=2000, gates=4, experts=8)))
        assert len(page) < 700_000

    def test_write_replaces_at_once(self, tmp_path):
        path = tmp_path / "new" / "report.html"
        write_report(path, data())
        write_report(path, data(title="Second"))
        assert "Second" in path.read_text(encoding="utf-8")
        assert [p.name for p in path.parent.iterdir()] == ["report.html"]


class TestPictures:
    def test_backend_rows_say_what_dsk_says(self):
        rows = backend_rows()
        assert [row.op for row in rows] == list(MODEL_OPS)
        for row in rows:
            assert row.used == dsk.supports(row.op).reason
            for name, (ok, reason) in row.reasons.items():
                assert (ok, reason) == tuple(dsk.supports(row.op, backend=name)) and reason

    def test_gate_names_match_the_model(self):
        model = DeepseekV3(DeepseekConfig.tiny())
        assert len(gate_names(model.config)) == len(model.moe_gates())

    def test_dualpipe_chart(self):
        pytest.importorskip("dskernels.pipeline.draw")
        [(heading, picture)] = dualpipe_charts()
        assert "DualPipe" in heading and picture.startswith("<svg")
        page = render(data(charts=dualpipe_charts()))
        check(page)

    def test_no_chart_without_the_simulator(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert dualpipe_charts() == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestProgress:
    def test_terminal_rewrites_one_line(self):
        stream = Terminal()
        line = ProgressLine(stream)
        line.update("a long line", force=True)
        line.update("short", force=True)
        line.close()
        assert stream.getvalue() == "\ra long line\rshort      \n"

    def test_pipe_gets_plain_lines_now_and_then(self):
        stream = io.StringIO()
        line = ProgressLine(stream, plain_period=1000)
        for i in range(5):
            line.update(f"step {i}")
        line.update("last", force=True)
        line.close()
        assert stream.getvalue() == "step 0\nlast\n"

    def test_seconds(self):
        assert [format_seconds(s) for s in (0, 59.6, 3599, 3661)] == [
            *("0:00", "1:00", "59:59", "1:01:01")
        ]
