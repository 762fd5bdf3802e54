"""Charts, traces and the command line: what they show is what was simulated."""

import json
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
import zlib
from collections import Counter

import numpy as np
import pytest

from dskernels.pipeline import Costs, Op, Work, add_comms, make, simulate
from dskernels.pipeline.cli import main
from dskernels.pipeline.draw import COLOURS, IDLE, SECOND_F, ascii, sample, svg
from dskernels.pipeline.raster import png
from dskernels.pipeline.trace import events

KNOWN = simulate(make("dualpipe", 4, 8), Costs(fb=3))
SVG = "{http://www.w3.org/2000/svg}"


def _compute(result):
    return [
        (rank, i, a)
        for rank, acts in enumerate(result.schedule.actions)
        for i, a in enumerate(acts)
        if a.op in (Op.F, Op.B, Op.BI, Op.W, Op.FB)
    ]


def test_svg_has_a_box_for_every_half_of_every_action():
    root = ET.fromstring(svg(KNOWN))
    tips = Counter(
        rect.find(f"{SVG}title").text.split("  ")[0]
        for rect in root.iter(f"{SVG}rect")
        if rect.find(f"{SVG}title") is not None
    )
    want = Counter()
    for _, _, action in _compute(KNOWN):
        want[str(action)] += len(action.atoms)
    assert tips == want
    assert "dualpipe: 4 ranks, 8 micro-batches, makespan 26" in root.find(f"{SVG}text").text


def test_svg_places_boxes_in_time():
    root = ET.fromstring(svg(KNOWN, width=1064))
    scale = (1064 - 52 - 12) / KNOWN.makespan
    for rect in root.iter(f"{SVG}rect"):
        tip = rect.find(f"{SVG}title")
        if tip is not None:
            start, end = (float(x) for x in re.search(r"(\S+) \.\. (\S+)$", tip.text).groups())
            assert float(rect.get("x")) == pytest.approx(52 + start * scale, abs=0.02)
            assert float(rect.get("width")) == pytest.approx((end - start) * scale, abs=0.02)


def test_svg_shows_communication_and_escapes_titles():
    work = [Work(attn=1, mlp=1, dispatch=1, combine=1, attn_bi=1, mlp_bi=1)] * 2
    result = simulate(make("1f1b", 2, 2), Costs(work=work, p2p_bytes=1, p2p_bandwidth=1))
    text = svg(result, title="a < b & c")
    assert "a &lt; b &amp; c" in text
    names = [t.text for t in ET.fromstring(text).iter(f"{SVG}title")]
    assert names.count("dispatch") == 4 and "0SEND_F0" in names


def test_large_schedules_are_drawn_by_pixel_columns():
    result = simulate(make("1f1b", 16, 512))
    text = svg(result)
    assert len(text) < 2_000_000
    ET.fromstring(text)
    with pytest.raises(ValueError, match="width must be at least 200"):
        svg(result, width=10)


def _decode_png(data: bytes) -> np.ndarray:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            kind + body
        )
        chunks[kind] = chunks.get(kind, b"") + body
        at += 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:].reshape(height, width, 3)


def _rgb(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def test_png_decodes_and_shows_the_same_boxes():
    pixels = _decode_png(png(KNOWN, width=1300))
    assert pixels.shape[1] == 1300
    scale = (1300 - 90 - 20) / KNOWN.makespan
    for rank, i, action in _compute(KNOWN):
        x = round(90 + (KNOWN.start[rank][i] + 0.12) * scale)
        y = 56 + rank * 40 + 3
        first = action.atoms[0]
        if first.op is Op.F:
            want = SECOND_F if first.direction else COLOURS[Op.F]
            assert pixels[y, x].tolist() == _rgb(want), (rank, str(action))
    middle = pixels[56 + 3, round(90 + 0.5 * scale)].tolist()
    assert middle == _rgb(COLOURS[Op.F])  # rank 0 begins at once
    assert pixels[56 + 40 + 3, round(90 + 0.5 * scale)].tolist() == _rgb(IDLE)  # rank 1 waits


def test_ascii_chart():
    lines = ascii(KNOWN, width=26).splitlines()
    assert lines[1] == "rank  0 |FFFfiwfXXX.xxxbb.xxxbbIWIW|"
    assert lines[4] == "rank  3 |fffFIWFxxx.XXXBB.XXXBBiwiw|"
    for rank in range(4):
        row = lines[1 + rank][9:-1]
        assert len(row) == 26
        assert row.count(".") == 26 - KNOWN.busy[rank]
    assert ascii(KNOWN, colour=True).count("\x1b[0m") == 400
    assert sample(KNOWN, 0, 26)[0].op is Op.F


def test_trace_is_complete_and_its_arrows_have_two_ends():
    result = simulate(make("dualpipe", 4, 8), Costs(fb=3, p2p_latency=0.5))
    made = events(result, microseconds=1000)
    boxes = [e for e in made if e["ph"] == "X" and e["cat"] not in ("p2p", "inside")]
    assert len(boxes) == len(_compute(result))
    assert max(e["ts"] + e["dur"] for e in boxes) == pytest.approx(1000 * result.makespan)
    begins = Counter(e["id"] for e in made if e["ph"] == "s")
    ends = Counter(e["id"] for e in made if e["ph"] == "f")
    assert begins == ends and set(begins.values()) == {1}
    assert any(e["ph"] == "C" and e["name"] == "memory" for e in made)


# --- the command line -----------------------------------------------------------------------------


def run(capsys, *args):
    status = main(args)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_simulate_prints_the_fixed_keys(capsys):
    status, out, _ = run(
        capsys, "simulate", "--schedule", "dualpipe", "--ranks", "8", "--microbatches", "20",
        "--f", "1", "--bi", "1", "--w", "1", "--fb", "3", "--json",
    )  # fmt: skip
    result = json.loads(out)
    assert status == 0
    assert result["makespan"] == 66
    assert result["bubble"] == [6] * 8
    assert result["bubble_formula"] == 6
    assert result["peak_activations"] == [9] * 8


def test_simulate_counts_ranks_as_devices(capsys):
    _, out, _ = run(capsys, "simulate", "--schedule", "dualpipev", "--ranks", "4", "--json",
                    "--microbatches", "20", "--fb", "3")  # fmt: skip
    result = json.loads(out)
    assert (result["ranks"], result["stages"], len(result["bubble"])) == (4, 8, 4)
    _, out, _ = run(capsys, "simulate", "--schedule", "interleaved", "--ranks", "4", "--json",
                    "--microbatches", "8", "--virtual-stages", "3")  # fmt: skip
    assert json.loads(out)["stages"] == 12


@pytest.mark.parametrize(
    "args, words",
    [
        (("simulate", "--ranks", "7"), "even number of ranks"),
        (("simulate", "--straggler", "x"), "--straggler must look like 1=1.5; got 'x'"),
        (("simulate", "--slow-link", "1=2"), "--slow-link must look like 1-2=1.5"),
        (("simulate", "--w", "-1"), "w must be >= 0"),
        (("simulate", "--file", "/nonexistent.csv"), "No such file"),
        (("cost", "--cluster", "abacus"), "cluster must be one of"),
        (("cost", "--model", "gpt"), "model must be deepseek-v3"),
        (("cost", "--set", "luck=2"), "'luck' is none of"),
        (("tune", "--schedules", "1f1b,magic"), "must be one of"),
        (("export", "--schedule", "dualpipe"), "2 directions"),
    ],
)
def test_bad_requests_are_refused_in_words(capsys, args, words):
    status, out, err = run(capsys, *args)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and words in err


def test_stragglers_and_slow_links_reach_the_simulator(capsys):
    base = ("simulate", "--schedule", "1f1b", "--ranks", "4", "--microbatches", "8", "--json",
            "--p2p-latency", "0.1")  # fmt: skip
    calm = json.loads(run(capsys, *base)[1])["makespan"]
    slow = json.loads(run(capsys, *base, "--straggler", "2=1.5")[1])["makespan"]
    link = json.loads(run(capsys, *base, "--slow-link", "1-2=9")[1])["makespan"]
    assert slow > calm and link > calm


def test_compare_gives_every_schedule_the_same_work(capsys):
    rows = json.loads(run(capsys, "compare", "--ranks", "8", "--microbatches", "32", "--json")[1])
    assert len(rows) == 8
    assert {round(sum(r["busy"]), 6) for r in rows} == {8 * 32 * 3.0}
    text = run(capsys, "compare", "--ranks", "4", "--microbatches", "6")[1]
    assert "dualpipe: dualpipe on 4 ranks needs microbatches at least 8" in text


def test_show_and_export_write_files(capsys, tmp_path):
    names = [str(tmp_path / n) for n in ("a.svg", "a.png", "a.json")]
    base = ("--schedule", "zbv", "--ranks", "3", "--microbatches", "8")
    status, out, _ = run(capsys, "show", *base, "--actions", "--svg", names[0], "--png", names[1],
                         "--trace", names[2])  # fmt: skip
    assert status == 0 and "rank 0: 0F0" in out
    ET.parse(names[0])
    _decode_png((tmp_path / "a.png").read_bytes())
    assert json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    for form, suffix in (("compute_comms", "csv"), ("json", "json")):
        path = str(tmp_path / f"list.{suffix}")
        assert run(capsys, "export", *base, "--format", form, "--output", path)[0] == 0
        again = json.loads(run(capsys, "simulate", "--file", path, "--json")[1])
        direct = json.loads(run(capsys, "simulate", *base, "--json")[1])
        assert again["makespan"] == direct["makespan"]
    page = tmp_path / "page.html"
    assert run(capsys, "export", "--format", "html", "--output", str(page))[0] == 0
    assert page.read_text().startswith("<!doctype html>")


def test_an_edited_file_is_validated(capsys, tmp_path):
    path = tmp_path / "edited.csv"
    path.write_text("0F0,0B0\n1F0,1B0,1B0\n")
    status, _, err = run(capsys, "simulate", "--file", str(path))
    assert status == 2 and "needs one B" in err


def test_cost_prints_the_fixed_keys(capsys):
    status, out, _ = run(capsys, "cost", "--model", "deepseek-v3", "--cluster", "h800", "--gpus",
                         "2048", "--json")  # fmt: skip
    result = json.loads(out)
    assert status == 0
    assert result["gpu_hours_per_trillion_tokens"] == pytest.approx(180e3, rel=0.1)
    assert 0.3 < result["mfu"] < 0.5
    assert result["step_time_s"] == pytest.approx(19.926, rel=0.1)
    assert result["assumptions"]["comm_sms"]["value"] == 20
    text = run(capsys, "cost", "--inference", "all")[1]
    assert "production-decode" in text and "24-hour mean" in text


def test_tune_explains_its_winner(capsys):
    args = ("tune", "--schedules", "1f1b,dualpipev", "--microbatch-sizes", "1", "--keep", "3")
    result = json.loads(run(capsys, *args, "--json")[1])
    steps = [r["step_time_s"] for r in result["found"]]
    assert steps == sorted(steps) and len(steps) == 3
    assert all(r["peak_memory_gb"] <= 80 for r in result["found"])
    assert result["best"]["schedule"] == "dualpipev"
    assert "takes" in result["explanation"] and result["simulated"] <= result["candidates"]
    status, _, err = run(capsys, *args, "--memory", "5")
    assert status == 2 and "no candidate fits" in err


def test_help_has_examples_and_starts_without_a_request():
    done = subprocess.run(
        [sys.executable, "-m", "dskernels.pipeline", "simulate", "--help"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "examples:" in done.stdout and "--fb" in done.stdout


def test_schedules_and_pictures_do_not_import_torch():
    """The package's own __init__ may; this part must not need it."""
    code = (
        "import sys, types; p = types.ModuleType('dskernels'); p.__path__ = ['dskernels'];"
        "sys.modules['dskernels'] = p;"
        "from dskernels.pipeline import make, simulate, draw, raster, trace, page, tune, cli;"
        "draw.svg(simulate(make('zbv', 2, 4)));"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    ).replace(
        "import make, simulate, draw", "import make, simulate; from dskernels.pipeline import draw"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_lists_with_comms_draw_like_those_without():
    plain, full = make("zb1p", 3, 5), add_comms(make("zb1p", 3, 5))
    assert svg(simulate(plain)) == svg(simulate(full))
