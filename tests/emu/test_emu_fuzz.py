"""Malformed PTX never crashes the emulator: a few fixed mutants here, more at night, and
`python tests/emu/fuzz_ptx.py --seconds 600` for as long as one likes."""

import fuzz_ptx
import numpy as np
import ptx_kernel
import pytest

from dskernels import emu


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (200, 10**6))]
)
def test_mutants_do_not_crash(first):
    code, lines = fuzz_ptx.child(first, 60)
    endings = [line.split()[1] for line in lines if line[:1].isdigit() and " " in line]
    assert code == 0, lines[-20:]
    assert len(endings) == 60 and len(set(endings)) >= 3, endings


@pytest.mark.parametrize(
    "instruction",
    [
        "mov.u32 _, %t;",
        "add.s32 _, %t, %t;",
        "cvt.u64.u32 _, %t;",
        "activemask.b32 _;",
        "vote.sync.any.pred _, %p0, -1;",
    ],
)
def test_a_result_nobody_may_drop_is_refused_with_its_line(instruction):
    text = ptx_kernel.text(instruction, 1)
    line = 1 + text[: text.index(instruction)].count("\n")
    with pytest.raises(emu.PtxError, match=f"PTX line {line}: .* is `_`, expected a register"):
        emu.Module(text)


def test_results_that_may_be_dropped():
    """`_` stands for what PTX lets a kernel ignore; what is kept is right."""
    out = np.zeros(32, np.uint32)
    body = """
    ld.global.v2.b32 {_, %r1}, [%P0];
    mov.b64 %d0, {%t, 7};
    mov.b64 {_, %r2}, %d0;
    setp.lt.u32 _|%p1, %t, 5;
    elect.sync _|%p2, -1;
    selp.u32 %r3, 1, 0, %p1;
    selp.u32 %r4, 2, 0, %p2;
    add.u32 %r5, %r2, %r3;
    add.u32 %r5, %r5, %r4;
    """
    ptx_kernel.run(body + ptx_kernel.store("%r5", 0), out)
    lane = np.arange(32)
    assert (out == 7 + (lane >= 5) + 2 * (lane == 0)).all()
