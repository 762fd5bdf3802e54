"""What people use the emulator through: the command line, the pytest fixture, DSK_EMU_SEEDS."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

emu = pytest.importorskip("dskernels.emu")
from planted import drop  # noqa: E402
from ptx_kernel import text  # noqa: E402

from dskernels.emu.__main__ import main  # noqa: E402
from dskernels.testing.emu import emu_kernel  # noqa: E402, F401

# Every warp stores its number where all others store theirs, or next to them.
RACY = "mov.u32 %r1, %ctaid.x;\nst.global.u32 [%P0], %r1; // BUG\n"
TICKET = """
mov.u32 %r1, %ctaid.x;
mad.wide.u32 %A0, %r1, 4, %P0;
setp.ne.u32 %p1, %t, 0;
@%p1 bra END;
atom.global.add.u32 %r2, [%P1], 1;
st.global.u32 [%A0], %r2; // TICKET
st.global.u32 [%A0], %r1;
END:
"""


def saved(tmp_path, body, params):
    path = tmp_path / "kernel.ptx"
    path.write_text(text(body, params, 4096))
    return str(path)


def run_main(capsys, *arguments):
    status = main(list(arguments))
    return status, capsys.readouterr()


def test_json_of_a_hazard(tmp_path, capsys):
    path = saved(tmp_path, RACY, 1)
    launch = ["--kernel", "k", "--grid", "2", "--json"]
    status, out = run_main(capsys, "check", path, "i32:4", *launch)
    found = json.loads(out.out)
    assert status == 1 and not found["ok"] and found["error"] == "HazardError"
    hazard = found["hazards"][0]
    assert hazard["kind"] == "global-race" and hazard["severity"] == "error"
    assert "// BUG" in open(path).read().splitlines()[hazard["ptx_line"] - 1]


def test_json_of_a_deadlock_and_of_a_refusal(tmp_path, capsys):
    path = saved(tmp_path, "setp.ne.u32 %p1, %t, 0;\n@!%p1 bar.sync 1, 64;\nbar.sync 1, 64;\n", 0)
    status, out = run_main(capsys, "run", path, "--kernel", "k", "--block", "32", "--json")
    assert status == 1 and json.loads(out.out)["error"] in ("HazardError", "DeadlockError")
    path = saved(tmp_path, "bar.sync 1, 64;\n", 0)
    status, out = run_main(capsys, "run", path, "--kernel", "k", "--block", "32", "--json")
    assert status == 1 and "barrier 1" in json.loads(out.out)["message"]
    path = saved(tmp_path, "frobnicate.u32 %r1, %r2;\n", 0)
    status, out = run_main(capsys, "check", path, "--json")
    found = json.loads(out.out)
    assert status == 1 and found["error"] == "PtxError" and found["line"] > 1


def test_json_and_text_without_errors(tmp_path, capsys):
    body = "mad.lo.u32 %r1, %t, 4, %s;\nld.shared.b32 %r2, [%r1];\n"
    path = saved(tmp_path, body, 0)
    status, out = run_main(capsys, "check", path, "--kernel", "k", "--json")
    found = json.loads(out.out)
    assert status == 0 and found["ok"] and found["schedules"] == 9 and found["kernel"] == "k"
    assert [h["kind"] for h in found["hazards"]] == ["uninitialized-read"]
    status, out = run_main(capsys, "run", path, "--kernel", "k")
    assert status == 0 and "no error, 1 formal findings" in out.out
    status, out = run_main(capsys, "check", path, "--json")
    assert json.loads(out.out) == {"ok": True, "kernels": ["k"]}


def test_fixture_passes_a_right_kernel(emu_kernel, tmp_path):  # noqa: F811
    out, count = np.zeros(8, np.uint32), np.zeros(1, np.uint32)
    kernel = emu_kernel(saved(tmp_path, drop(TICKET, "TICKET"), 2), "k")
    assert kernel[8, 32](out, count).warp_instructions > 0
    assert np.array_equal(out, np.arange(8)) and count[0] == 8


def test_fixture_finds_hazards_order_and_formal_findings(emu_kernel, tmp_path):  # noqa: F811
    with pytest.raises(emu.HazardError, match="global-race"):
        emu_kernel(emu.Module(text(RACY, 1)), "k")[2, 32](np.zeros(1, np.uint32))
    ticket = TICKET.replace("st.global.u32 [%A0], %r1;\n", "")
    with pytest.raises(AssertionError, match="array 0 of 'k' depends on the schedule"):
        emu_kernel(text(ticket, 2), "k")[8, 32](np.zeros(8, np.uint32), np.zeros(1, np.uint32))
    unwritten = text("ld.shared.b32 %r2, [%s]; // BUG\n", 0, 64)
    with pytest.raises(AssertionError, match="uninitialized-read"):
        emu_kernel(unwritten, "k")[1, 32]()
    emu_kernel(unwritten, "k", allow=("uninitialized-read",))[1, 32]()


SEEDED = """
import numpy as np, torch
import dskernels as dsk
from dskernels import emu
from pathlib import Path
import sys

def tickets(path):
    out = np.zeros(8, np.uint32)
    count = np.zeros(1, np.uint32)
    emu.Module(Path(path)).kernel("k")[8, 32](out, count)
    return out, count

out, count = tickets(sys.argv[1])
assert np.array_equal(out, np.arange(8)) and count[0] == 8, (out, count)
try:
    tickets(sys.argv[2])
except emu.HazardError as error:
    print(error)
if emu.available():
    x = torch.randn(8, 256)
    print(torch.equal(dsk.quantize(x, backend="emu").data.view(torch.uint8),
                      dsk.quantize(x, backend="ref").data.view(torch.uint8)))
else:
    print(True)
"""


def test_launches_over_seeds(tmp_path):
    """A result that depends on the order of CTAs is named by buffer and place; ops work under it."""
    right, wrong = tmp_path / "right.ptx", tmp_path / "wrong.ptx"
    right.write_text(text(drop(TICKET, "TICKET"), 2))
    wrong.write_text(text(TICKET.replace("st.global.u32 [%A0], %r1;\n", ""), 2))
    done = subprocess.run(
        [sys.executable, "-c", SEEDED, str(right), str(wrong)],
        env={**os.environ, "DSK_EMU_SEEDS": "4"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "[order-dependent-result] k" in done.stdout and "'p0' depends on" in done.stdout
    assert "and seed" in done.stdout and done.stdout.strip().endswith("True")
