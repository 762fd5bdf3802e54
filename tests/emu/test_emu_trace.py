"""Timelines of CTAs: the Chrome trace, the picture, and the command line around them."""

import json

import numpy as np
import pytest
from ptx_kernel import text

from dskernels import emu
from dskernels.emu.__main__ import main

FLOATS = ".reg .f32 %f<40>; mov.f32 %f0, 0f00000000;"
STAGE = 4096  # bytes

# A ring of two stages: warp 4 fills them with bulk copies, warps 0-3 wait, compute 300 FMAs and give
# the stage back. full[s] at shared 8192 + 8 s, empty[s] at 8208 + 8 s.
RING = (
    FLOATS
    + """
setp.ne.u32 %p0, %t, 0; @%p0 bra READY;
mbarrier.init.shared.b64 [%s+8192], 1; mbarrier.init.shared.b64 [%s+8200], 1;
mbarrier.init.shared.b64 [%s+8208], 4; mbarrier.init.shared.b64 [%s+8216], 4;
fence.mbarrier_init.release.cluster;
READY: bar.sync 0;
shr.u32 %r0, %t, 5; mov.u32 %r1, 0; and.b32 %r9, %t, 31;
setp.ne.u32 %p1, %r0, 4; @%p1 bra CONSUME;
setp.ne.u32 %p2, %r9, 0; @%p2 bra OUT;
FILL: and.b32 %r2, %r1, 1; shr.u32 %r3, %r1, 1; and.b32 %r3, %r3, 1; xor.b32 %r3, %r3, 1;
mad.lo.u32 %r4, %r2, 8, %s; mad.lo.u32 %r5, %r2, 4096, %s;
E: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r4+8208], %r3; @!%p3 bra E;
mbarrier.arrive.expect_tx.shared.b64 _, [%r4+8192], 4096;
mul.wide.u32 %d0, %r1, 4096; add.u64 %d0, %d0, %P0;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5], [%d0], 4096, [%r4+8192];
add.u32 %r1, %r1, 1; setp.lt.u32 %p4, %r1, 8; @%p4 bra FILL;
bra OUT;
CONSUME: and.b32 %r2, %r1, 1; shr.u32 %r3, %r1, 1; and.b32 %r3, %r3, 1;
mad.lo.u32 %r4, %r2, 8, %s;
F: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r4+8192], %r3; @!%p3 bra F;
"""
    + "fma.rn.f32 %f0, %f0, %f0, %f0;" * 300
    + """
setp.ne.u32 %p5, %r9, 0; @%p5 bra NEXT;
mbarrier.arrive.shared.b64 _, [%r4+8208];
NEXT: add.u32 %r1, %r1, 1; setp.lt.u32 %p4, %r1, 8; @%p4 bra CONSUME;
OUT:
"""
)


@pytest.fixture(scope="module")
def launch():
    source = np.zeros(8 * STAGE + 128, np.uint8)
    source = source[-source.ctypes.data % 128 :][: 8 * STAGE]
    module = emu.Module(text(RING, 1, shared=8224))
    with emu.profiling("h100", sample_ctas=None) as profile:
        module.kernel("k")[1, 160](source)
    return profile.launches[0]


def test_the_trace_is_a_chrome_trace(launch, tmp_path):
    launch.timeline().save(tmp_path / "t.json")
    trace = json.loads((tmp_path / "t.json").read_text())
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {e["ph"] for e in trace["traceEvents"]} == {"X", "M"}
    for e in spans:
        assert e["dur"] >= 0 and e["ts"] >= 0 and {"pid", "tid", "name", "cat"} <= set(e)
    assert {e["cat"] for e in spans} == {"warps", "copies", "slots"}
    named = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"]
    assert "warp  4 (warpgroup 1)" in named and "slot of mbarrier 8192 (4096 B)" in named


def test_spans_of_a_warp_do_not_overlap(launch):
    timeline = launch.timeline()
    assert timeline.num_warps == 5 and not timeline.cut
    for warp in range(5):
        mine = sorted((b, e) for w, _, _, _, b, e in timeline.spans if w == warp)
        assert mine
        assert all(b >= end - 1 for (_, end), (b, _) in zip(mine, mine[1:], strict=False))


def test_slots_are_loaded_then_full_then_loaded_again(launch):
    slots = launch.timeline().slots
    assert [(s.barrier, s.bytes, len(s.loading)) for s in slots] == [
        (8192, STAGE, 4),
        (8200, STAGE, 4),
    ]
    for slot in slots:
        times = [t for load, full in zip(slot.loading, slot.full, strict=True) for t in load + full]
        assert times == sorted(times)


def test_who_waits_for_whom(launch):
    """Computing takes four times the copy: the producer waits for slots, not the others for data."""
    waits = launch.timing.waits
    _, for_slots = waits["mbarrier", 8208]
    _, for_data = waits["mbarrier", 8192]
    # Six refills, each behind 300 dependent FMAs; the first fill is the consumers' only long wait.
    assert 3 * 1200 * 0.8 < for_slots < 3 * 1200 * 1.5
    assert for_data < 4 * 1500
    assert "mbarrier at 8208" in launch.timeline().label("mbarrier", 8208)
    assert "waits for data" in launch.timeline().label("mbarrier", 8192)


def test_the_picture_has_content(launch, tmp_path):
    pytest.importorskip("matplotlib")
    launch.timeline().draw(tmp_path / "t.png")
    from matplotlib import image

    pixels = image.imread(tmp_path / "t.png")[..., :3]
    assert pixels.shape[0] > 400 and pixels.shape[1] > 1000
    for colour in ("#3b9b57", "#c8402f"):  # issuing, and waiting for a free slot
        wanted = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(axis=-1) < 0.02).sum() > 2000
    with pytest.raises(ValueError, match="window"):
        launch.timeline().draw(tmp_path / "u.png", window=(5, 5))


def test_command_line(tmp_path, capsys):
    file = tmp_path / "ring.ptx"
    file.write_text(text(RING, 1, shared=8224))
    shape = ["--kernel", "k", "--grid", "2", "--block", "160", "u8:32768"]
    assert main(["stat", str(file), "--json", *shape]) == 0
    stat = json.loads(capsys.readouterr().out)
    low, high = stat["bracket_us"]
    assert low <= stat["modelled_us"] <= high and stat["clusters"] == {"recorded": 2, "total": 2}
    assert main(["stat", str(file), "--part", "h200", "--clock", "1.9", *shape]) == 0
    assert "on h200 at 1.900 GHz" in capsys.readouterr().out
    out = tmp_path / "t.json"
    assert main(["trace", str(file), "--out", str(out), "--sample", "1", *shape]) == 0
    assert "modelled" in capsys.readouterr().out
    assert json.loads(out.read_text())["traceEvents"]
    assert main(["trace", str(file), *shape]) == 1
    assert "expected --out" in capsys.readouterr().err
    assert main(["stat", str(file)]) == 1
    assert "--kernel: expected one of k" in capsys.readouterr().err
