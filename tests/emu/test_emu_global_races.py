"""Planted hazards in global memory: across warps, CTAs, grids, streams and devices."""

from contextlib import ExitStack

import numpy as np
import pytest

emu = pytest.importorskip("dskernels.emu")
from dskernels._C import emu as raw  # noqa: E402
from planted import SEEDS, check_hazard, drop, launch, planted  # noqa: E402
from ptx_kernel import text  # noqa: E402

# P0: data, P1: flag. CTA 0 writes, CTA 1 reads.
SPLIT = """
mov.u32 %r10, %ctaid.x;
mad.wide.u32 %A0, %t, 4, %P0;
setp.ne.u32 %p1, %r10, 0;
@%p1 bra READER;
"""
SPIN = """
LOOP:
{load} %r2, [%P1];
setp.eq.u32 %p2, %r2, 0;
@%p2 bra LOOP;
"""


def handshake(release, acquire, before="", after=""):
    """CTA 0 stores and tells CTA 1 through a flag, which then loads."""
    return (
        SPLIT
        + "st.global.u32 [%A0], %t; // BUG\n"
        + before
        + release
        + ";\nret;\nREADER:\n"
        + SPIN.format(load=acquire)
        + after
        + "\nld.global.u32 %r3, [%A0]; // VICTIM\n"
    )


def flags():
    return [np.zeros(64, np.uint32), np.zeros(4, np.uint32)]


GPU = "fence.acq_rel.gpu;\n"
RELEASE, ACQUIRE = "st.release.gpu.global.u32 [%P1], 1", "ld.acquire.gpu.global.u32"
STORE, LOAD = "st.relaxed.gpu.global.u32 [%P1], 1", "ld.relaxed.gpu.global.u32"
PAIR = dict(grid=2, threads=32, shared=0)

HANDSHAKES = {
    "release": (handshake(RELEASE, ACQUIRE), handshake(STORE, ACQUIRE)),
    "acquire": (handshake(RELEASE, ACQUIRE), handshake(RELEASE, LOAD)),
    "fence before the store": (handshake(STORE, LOAD, GPU, GPU), handshake(STORE, LOAD, "", GPU)),
    "fence after the load": (handshake(STORE, LOAD, GPU, GPU), handshake(STORE, LOAD, GPU, "")),
    "release by an atomic": (
        handshake("red.release.gpu.global.add.u32 [%P1], 1", ACQUIRE),
        handshake("red.relaxed.gpu.global.add.u32 [%P1], 1", ACQUIRE),
    ),
    "acquire by an atomic": (
        handshake(RELEASE, "atom.acquire.gpu.global.or.b32").replace("[%P1];\nset", "[%P1], 0;\nset"),
        handshake(RELEASE, "atom.relaxed.gpu.global.or.b32").replace("[%P1];\nset", "[%P1], 0;\nset"),
    ),
    "volatile flag": (
        handshake("st.volatile.global.u32 [%P1], 1", "ld.volatile.global.u32", "membar.gl;\n", GPU),
        handshake("st.volatile.global.u32 [%P1], 1", "ld.volatile.global.u32", "", GPU),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HANDSHAKES)
def test_missing_half_of_a_handshake(name):
    good, bad = HANDSHAKES[name]
    planted(good, flags(), "global-race", broken=bad, **PAIR)


@pytest.mark.parametrize("write", [STORE, "red.global.add.u32 [%P1], 1"])
def test_who_sees_a_fenced_write_may_store_there(write):
    """The write is part of the release pattern: its reader, fenced, knows of it as of the rest."""
    body = SPLIT + GPU.replace("\n", " // FIX\n") + write + "; // BUG\nret;\nREADER:\n"
    body += SPIN.format(load=LOAD) + GPU + "st.global.u32 [%P1], 0; // VICTIM\n"
    planted(body, flags(), "global-race", **PAIR)


NARROW = {
    "release": handshake(RELEASE.replace("gpu", "cta"), ACQUIRE),
    "release in a cluster": handshake(RELEASE.replace("gpu", "cluster"), ACQUIRE),
    "acquire": handshake(RELEASE, ACQUIRE.replace("gpu", "cta")),
    "fence": handshake(STORE, LOAD, GPU.replace("gpu", "cta"), GPU),
    "fence after": handshake(STORE, LOAD, GPU, GPU.replace("gpu", "cta")),
}


@pytest.mark.parametrize("name", NARROW)
def test_scope_that_ends_at_the_cta(name):
    """The flag itself may be reported first: it is not morally strong between the CTAs."""
    bad = NARROW[name]
    if "fence" not in name:
        bad = bad.replace("[%P1], 1;", "[%P1], 1; // BUG").replace(
            "r2, [%P1];", "r2, [%P1]; // BUG"
        )
    good = handshake(STORE, LOAD, GPU, GPU)
    planted(good, flags(), "scope-too-narrow", broken=bad, **PAIR)


@pytest.mark.parametrize(
    "bad", ["st.global.u32 [%P1], 1", "red.relaxed.cta.global.add.u32 [%P1], 1"]
)
def test_flag_that_is_not_strong_enough(bad):
    kind = "global-race" if bad.startswith("st") else "scope-too-narrow"
    broken = handshake(bad + "; // BUG\nmov.u32 %r9, 0", ACQUIRE).replace(
        "r2, [%P1];", "r2, [%P1]; // VICTIM"
    )
    planted(handshake(RELEASE, ACQUIRE), flags(), kind, broken=broken, **PAIR)


ORDERLESS = {
    "write and write": "st.global.u32 [%P0], %r10; // BUG\n",
    "atomic and store": SPLIT
    + "red.global.add.u32 [%P0], 1; // BUG\nret;\nREADER: st.global.u32 [%P0], 1; // VICTIM\n",
    "read and later write": SPLIT
    + "ld.global.u32 %r1, [%A0]; // BUG\nret;\nREADER: st.global.u32 [%A0], 1; // VICTIM\n",
}


@pytest.mark.parametrize("name", ORDERLESS)
def test_ctas_without_any_order(name):
    disjoint = SPLIT + "READER: mad.wide.u32 %A1, %r10, 2, %P0; cvt.u16.u32 %h1, %t;"
    disjoint += "setp.eq.u32 %p3, %t, 0; @%p3 st.global.b16 [%A1], %h1;"
    planted(disjoint, flags(), "global-race", broken=ORDERLESS[name], **PAIR)


def test_warps_of_one_cta():
    body = """
mad.wide.u32 %A0, %t, 4, %P0;
xor.b32 %r2, %t, 32;
mad.wide.u32 %A1, %r2, 4, %P0;
st.global.u32 [%A0], %t; // BUG
bar.sync 0; // FIX
ld.global.u32 %r3, [%A1]; // VICTIM
"""
    planted(body, [np.zeros(64, np.uint32)], "global-race")


BARRIER = """
bar.sync 0;
setp.ne.u32 %p1, %t, 0;
@%p1 bra PASSED;
atom.acq_rel.gpu.global.add.u32 %r3, [%P1], 1;
WAIT:
ld.acquire.gpu.global.u32 %r3, [%P1];
setp.lt.u32 %p2, %r3, {count};
@%p2 bra WAIT;
PASSED:
bar.sync 0;
"""


def test_grid_barrier():
    """Every CTA reads what another wrote before a barrier of all; a barrier that lets the last one
    be late is caught."""
    body = (
        "mov.u32 %r10, %ctaid.x; mad.wide.u32 %A0, %r10, 4, %P0;\n"
        "xor.b32 %r11, %r10, 1; mad.wide.u32 %A1, %r11, 4, %P0;\n"
        "setp.ne.u32 %p3, %t, 0;\n"
        "@%p3 bra STORED;\nst.global.u32 [%A0], %t; // BUG\nSTORED:\n"
        + BARRIER
        + "ld.global.u32 %r3, [%A1]; // VICTIM\n"
    )
    options = dict(grid=4, threads=64, shared=0)
    planted(body.format(count=4), flags(), "global-race", broken=body.format(count=1), **options)


SOURCE = """
mad.lo.u32 %r1, %t, 4, %s;
st.shared.b32 [%r1], %t;
fence.proxy.async;
bar.sync 0;
setp.ne.u32 %p1, %t, 0;
@%p1 bra AFTER;
"""


@pytest.mark.parametrize("op", ["cp.async.bulk", "cp.reduce.async.bulk"])
def test_result_of_a_bulk_store_read_early(op):
    add = ".add.u32" if "reduce" in op else ""
    body = (
        SOURCE
        + f"""
{op}.global.shared::cta.bulk_group{add} [%P0], [%s], 256; // BUG
cp.async.bulk.commit_group;
cp.async.bulk.wait_group.read 0;
cp.async.bulk.wait_group 0; // FIX
ld.global.u32 %r2, [%P0]; // VICTIM
AFTER:
"""
    )
    planted(body, [np.zeros(64, np.uint32)], "global-race")


def test_bulk_stores_to_one_place_need_a_wait():
    store = "cp.async.bulk.global.shared::cta.bulk_group [%P0], [%s], 256; // BUG\n"
    commit = "cp.async.bulk.commit_group;\n"
    body = SOURCE + store + commit + "cp.async.bulk.wait_group 0; // FIX\n" + store + commit
    planted(body + "AFTER:\n", [np.zeros(64, np.uint32)], "global-race")


def test_bulk_reductions_of_many_ctas_are_atomic():
    out = np.zeros(64, np.uint32)
    body = (
        SOURCE
        + """
cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%P0], [%s], 256;
cp.async.bulk.commit_group;
AFTER:
"""
    )
    for seed in SEEDS:
        launch(body, [out], seed, grid=4)
    assert np.array_equal(out, 4 * len(SEEDS) * np.arange(64))


def test_bulk_load_of_what_the_kernel_wrote_needs_a_proxy_fence():
    body = """
setp.ne.u32 %p1, %t, 0;
@%p1 bra AFTER;
st.global.u32 [%P0], 1; // BUG
fence.proxy.async; // FIX
mbarrier.init.shared.b64 [%s + 4096], 1;
mbarrier.arrive.expect_tx.shared.b64 _, [%s + 4096], 256;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%P0], 256, [%s + 4096];
LOOP:
mbarrier.try_wait.parity.shared.b64 %p8, [%s + 4096], 0;
@!%p8 bra LOOP;
AFTER:
"""
    body = body.replace("[%s + 4096];\nLOOP", "[%s + 4096]; // VICTIM\nLOOP")
    planted(body, [np.zeros(64, np.uint32)], "missing-proxy-fence")


# --- tensor maps edited on the device

EDIT = "tensormap.replace.tile.fill_mode.global.b1024.b32 [%P0], 0; // BUG\n"
USE = """
mbarrier.init.shared.b64 [%s + 4096], 1;
mbarrier.arrive.expect_tx.shared.b64 _, [%s + 4096], 256;
mov.b32 %r5, 0;
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%P0, {%r5, %r5}], [%s + 4096]; // VICTIM
LOOP:
mbarrier.try_wait.parity.shared.b64 %p8, [%s + 4096], 0;
@!%p8 bra LOOP;
"""


def map_in_memory():
    array = np.zeros((8, 16), np.uint32)
    buffer = np.zeros(256, np.uint8)
    start = -buffer.ctypes.data % 64
    buffer[start : start + 128] = np.frombuffer(emu.tensor_map(array, (16, 4)).data, np.uint8)
    return buffer[start : start + 128], array


@pytest.mark.parametrize("missing", ["RELEASE", "ACQUIRE"])
def test_tensor_map_edited_and_used_without_its_fences(missing):
    body = (
        "setp.ne.u32 %p1, %t, 0;\n@%p1 bra AFTER;\n"
        + EDIT
        + "fence.proxy.tensormap::generic.release.gpu; // RELEASE\n"
        + "fence.proxy.tensormap::generic.acquire.gpu [%P0], 128; // ACQUIRE\n"
        + USE
        + "AFTER:\n"
    )
    for seed in SEEDS:
        view, array = map_in_memory()
        launch(body, [view, array], seed)
        with pytest.raises(emu.HazardError) as e:
            launch(drop(body, missing), [view, array], seed)
        hazard = e.value.hazards[0]
        assert check_hazard(hazard, "stale-tensor-map", text(drop(body, missing), 2, 8192))
        assert missing.lower() in hazard.message


# --- grids


class Queue:
    """Launches that are not waited for until `finish`."""

    def __init__(self):
        self.stack, self.sources = ExitStack(), []

    def launch(self, stream, body, *args, programmatic=False, seed=0):
        source = text(body, len(args))
        module = emu.Module(source)
        params = module.kernel("k").pack(args, self.stack)
        one = (1, 1, 1)
        raw.launch(stream, module._handle, "k", one, (32, 1, 1), one, 0, params, seed, True, False,
                   programmatic)  # fmt: skip

    def finish(self):
        with self.stack:
            raw.synchronize()


WRITE = "mad.wide.u32 %A0, %t, 4, %P0;\nst.global.u32 [%A0], %t; // BUG\n"
READ = "mad.wide.u32 %A0, %t, 4, %P0;\nld.global.u32 %r1, [%A0]; // VICTIM\n"


def expect(queue, kind, *bodies):
    with pytest.raises(emu.HazardError) as e:
        queue.finish()
    lines = {
        k
        for body in bodies
        for k, line in enumerate(text(body, 1).splitlines(), 1)
        if "// BUG" in line or "// VICTIM" in line
    }
    hazard = e.value.hazards[0]
    assert hazard.kind == kind and hazard.ptx_line in lines, hazard


@pytest.fixture
def stream():
    other = raw.create_stream(0)
    yield other
    raw.destroy_stream(other)


def test_streams_need_an_event(stream):
    data, event = np.zeros(32, np.uint32), raw.create_event()
    for ordered in (True, False):
        queue = Queue()
        queue.launch(0, WRITE, data)
        if ordered:
            raw.record(0, event)
            raw.wait(stream, event)
        queue.launch(stream, READ, data)
        if ordered:
            queue.finish()
        else:
            expect(queue, "global-race", WRITE, READ)


def test_event_recorded_too_early_orders_nothing(stream):
    data, event = np.zeros(32, np.uint32), raw.create_event()
    queue = Queue()
    raw.record(0, event)
    queue.launch(0, WRITE, data)
    raw.wait(stream, event)
    queue.launch(stream, READ, data)
    expect(queue, "global-race", WRITE, READ)


def test_waiting_for_one_stream_does_not_order_the_other(stream):
    """The emulator has run both by then; the program did not wait for it."""
    data, mine = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    queue = Queue()
    queue.launch(stream, WRITE, data)
    queue.launch(0, READ, mine)
    raw.synchronize(0)
    queue.launch(0, READ, data)
    expect(queue, "global-race", WRITE, READ)
    queue = Queue()
    queue.launch(stream, WRITE, data)
    raw.synchronize(stream)
    queue.launch(0, READ, data)
    queue.finish()


@pytest.mark.parametrize("trigger", ["griddepcontrol.launch_dependents;\n", ""])
def test_dependent_launch_needs_its_wait(trigger):
    """Whether or not the first kernel lets the second start early: the attribute alone does."""
    data = np.zeros(32, np.uint32)
    wait = "griddepcontrol.wait;\n"
    for seed in (0, 1, 2):
        queue = Queue()
        queue.launch(0, trigger + WRITE, data, seed=seed)
        queue.launch(0, wait + READ, data, programmatic=True, seed=seed)
        queue.finish()
        queue = Queue()
        queue.launch(0, trigger + WRITE, data, seed=seed)
        queue.launch(0, READ, data, programmatic=True, seed=seed)
        expect(queue, "missing-grid-wait", trigger + WRITE, READ)


def test_dependent_launch_and_the_grid_before_the_last():
    """What two grids ago wrote is over only if the grid between waited for it."""
    data, other = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    wait, early = "griddepcontrol.wait;\n", "griddepcontrol.launch_dependents;\n"
    queue = Queue()
    queue.launch(0, early + WRITE, data)
    queue.launch(0, early + READ, other, programmatic=True)
    queue.launch(0, wait + READ, data, programmatic=True)
    queue.finish()
    queue = Queue()
    queue.launch(0, early + WRITE, data)
    queue.launch(0, early + READ, other, programmatic=True)
    queue.launch(0, READ, data, programmatic=True)
    expect(queue, "missing-grid-wait", early + WRITE, READ)


def test_devices_need_system_scope():
    before = raw.device_count()
    raw.set_device_count(2)
    body = "st.global.u32 [%P0], 1; // BUG\nst.release.{}.global.u32 [%P1], 1; // BUG\n"
    wait = "LOOP: ld.acquire.sys.global.u32 %r1, [%P1]; // VICTIM\nsetp.eq.u32 %p1, %r1, 0;\n"
    wait += "@%p1 bra LOOP;\nld.global.u32 %r2, [%P0]; // VICTIM\n"
    try:
        for scope in ("sys", "gpu"):
            data, flag = flags()
            queue = Queue()
            queue.launch(0, body.format(scope), data, flag)
            queue.launch(1, wait, data, flag)
            if scope == "sys":
                queue.finish()
                continue
            with pytest.raises(emu.HazardError) as e:
                queue.finish()
            assert e.value.hazards[0].kind == "scope-too-narrow"
    finally:
        raw.set_device_count(before)
