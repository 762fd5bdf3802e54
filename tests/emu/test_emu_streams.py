"""Kernels that overlap: streams, events, devices, and programmatic dependent launch."""

from contextlib import ExitStack

import numpy as np
import pytest

emu = pytest.importorskip("dskernels.emu")
from dskernels._C import emu as raw  # noqa: E402
from ptx_kernel import text  # noqa: E402

# P0[0]: flag, P1[0]: value.
SPIN = "LOOP: ld.acquire.sys.global.u32 %r1, [%P0]; setp.ne.u32 %p1, %r1, 1; @%p1 bra LOOP;"
SET = "st.release.sys.global.u32 [%P0], 1;"


class Queue:
    """Launches without waiting; arrays stay lent until `finish`."""

    def __init__(self):
        self.stack = ExitStack()
        self.streams = set()

    def launch(self, stream, body, *args, programmatic=False, seed=0):
        module = emu.Module(text(body, len(args)))
        kernel = module.kernel("k")
        params = kernel.pack(args, self.stack)
        one = (1, 1, 1)
        raw.launch(stream, module._handle, "k", one, (32, 1, 1), one, 0, params, seed, True, False,
                   programmatic)  # fmt: skip
        self.streams.add(stream)

    def finish(self):
        try:
            raw.synchronize()
        finally:
            self.stack.close()


@pytest.fixture
def arrays():
    return np.zeros(1, np.uint32), np.zeros(1, np.uint32)


@pytest.mark.parametrize("programmatic", [True, False])
def test_programmatic_launch(arrays, programmatic):
    """The first kernel needs the second to start early; the second waits for the first's result."""
    flag, value = arrays
    queue = Queue()
    queue.launch(0, "griddepcontrol.launch_dependents;" + SPIN + "st.global.u32 [%P1], 7;", *arrays)
    second = SET + "griddepcontrol.wait; ld.global.u32 %r2, [%P1]; add.u32 %r2, %r2, 1;"
    queue.launch(0, second + "st.global.u32 [%P1], %r2;", *arrays, programmatic=programmatic)
    if programmatic:
        queue.finish()
        assert flag[0] == 1 and value[0] == 8
    else:
        with pytest.raises(emu.DeadlockError, match="livelock"):
            queue.finish()


def test_streams_run_side_by_side(arrays):
    other = raw.create_stream(0)
    queue = Queue()
    queue.launch(0, SPIN + "st.global.u32 [%P1], 5;", *arrays)
    queue.launch(other, SET, *arrays)
    queue.finish()
    raw.destroy_stream(other)
    assert arrays[1][0] == 5


def test_events_order_streams(arrays):
    other, event = raw.create_stream(0), raw.create_event()
    queue = Queue()
    queue.launch(0, "st.global.u32 [%P1], 3;", *arrays)
    raw.record(0, event)
    raw.wait(other, event)
    body = "ld.global.u32 %r1, [%P1]; mul.lo.u32 %r1, %r1, 10; st.global.u32 [%P1], %r1;"
    queue.launch(other, body, *arrays)
    queue.finish()
    raw.destroy_stream(other)
    assert arrays[1][0] == 30


def test_devices_run_side_by_side(arrays):
    before = raw.device_count()
    raw.set_device_count(2)
    try:
        queue = Queue()
        queue.launch(0, SPIN + "st.global.u32 [%P1], 9;", *arrays)
        queue.launch(1, SET, *arrays)
        queue.finish()
    finally:
        raw.set_device_count(before)
    assert arrays[1][0] == 9


def test_the_cause_is_reported_before_the_deadlock_it_leaves(arrays):
    """The first stream waits for the second, whose kernel fails."""
    raw.set_device_count(2)
    flag, value = arrays
    queue = Queue()
    queue.launch(raw.create_stream(0), SPIN, *arrays)
    queue.launch(raw.create_stream(1), "ld.global.u32 %r2, [%P1+64];" + SET, *arrays)
    with pytest.raises(emu.HazardError, match="global-out-of-bounds"):
        queue.finish()
    raw.synchronize()  # nothing is left over for the next call
