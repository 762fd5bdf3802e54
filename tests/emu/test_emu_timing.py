"""Profiles: exact counts (bank conflicts, sectors, bytes), and laws that a modelled time must obey.

No test compares with a GPU: that is bench/emu_timing.py, against published figures.
"""

import numpy as np
import pytest
from ptx_kernel import store, text

from dskernels import emu


def profile(body, *args, threads=32, grid=1, shared=0, sample=None, **model):
    """Launches a PTX kernel under the profiler; its one LaunchProfile."""
    module = emu.Module(text(body, len(args), shared))
    with emu.profiling("h100", sample_ctas=sample, **model) as recorded:
        module.kernel("k")[grid, threads](*args)
    (launch,) = recorded.launches
    return launch


def cycles(body, *args, **options):
    """Simulated cycles of the launch, without its fixed cost."""
    return profile(body, *args, **options).replay()["sample_cycles"]


def only(launch, opcode):
    (found,) = [i for i in launch.instructions if i["text"].startswith(opcode)]
    return found


@pytest.mark.parametrize(
    ("stride", "bits", "vector", "ways", "least"),
    [
        (4, 32, "", 1, 1),  # one word a bank
        (8, 32, "", 2, 1),
        (16, 32, "", 4, 1),
        (128, 32, "", 32, 1),  # one bank
        (132, 32, "", 1, 1),  # the padded column
        (0, 32, "", 1, 1),  # broadcast
        (2, 16, "", 1, 1),  # two threads a word
        (8, 64, "", 2, 2),  # 256 bytes need two cycles
        (16, 32, ".v4", 4, 4),
        (32, 32, ".v4", 8, 4),  # 16-byte pieces, every other one
        (128, 32, ".v4", 32, 4),
    ],
)
def test_bank_conflicts_are_exact(stride, bits, vector, ways, least):
    reg = {16: "%h0", 32: "%r1", 64: "%d1"}[bits]
    regs = "{%r1, %r2, %r3, %r4}" if vector else reg
    body = f"mad.lo.u32 %r0, %t, {stride}, %s; ld.shared{vector}.b{bits} {regs}, [%r0];"
    load = only(profile(body, shared=8192), "ld.shared")
    assert (load["requests"], load["wavefronts"], load["worst_wavefronts"]) == (1, ways, ways)
    assert load["least_wavefronts"] == least


@pytest.mark.parametrize(
    ("stride", "sectors", "least"), [(4, 4, 4), (0, 1, 1), (8, 8, 4), (32, 32, 4), (36, 32, 4)]
)
def test_sectors_are_exact(stride, sectors, least):
    x = np.zeros(4096, np.uint8)
    skew = -x.ctypes.data % 128
    body = f"mad.wide.u32 %d0, %t, {stride}, %P0; ld.global.u32 %r0, [%d0];"
    load = only(profile(body, x[skew:]), "ld.global")
    assert (load["sectors"], load["least_sectors"]) == (sectors, min(least, sectors))


def aligned(count):
    """Zeros, float32, at a 128-byte boundary as memory of a GPU is."""
    whole = np.zeros(count + 32, np.float32)
    return whole[-whole.ctypes.data % 128 // 4 :][:count]


def test_bytes_by_level():
    x, y = aligned(1024), aligned(1024)
    body = (
        "mov.u32 %r0, %ctaid.x; shl.b32 %r0, %r0, 10; mad.lo.u32 %r0, %t, 4, %r0;"
        "cvt.u64.u32 %d0, %r0; add.u64 %d1, %d0, %P0; add.u64 %d2, %d0, %P1;"
        "ld.global.b32 %r1, [%d1]; ld.global.b32 %r2, [%P0]; st.global.b32 [%d2], %r1;"
    )
    launch = profile(body, x, y, threads=256, grid=4)
    b = launch.bytes
    assert b["unique_read"] == b["unique_written"] == b["l2_written"] == 4 * 1024
    # Every CTA reads its KiB; the others also read x[0], once: then their L1 has it.
    assert b["l2_read"] == 4 * 1024 + 3 * 32


def dependent(n):
    return "fma.rn.f32 %f0, %f0, %f0, %f0;" * n


FLOATS = ".reg .f32 %f<40>; mov.f32 %f0, 0f00000000;"


def test_a_chain_pays_latency_and_many_warps_pay_issue_slots():
    chain = cycles(FLOATS + dependent(2000)) - cycles(FLOATS + dependent(1000))
    assert chain == pytest.approx(4000, rel=0.01)
    # Eight warps a sub-partition: 8 x 1000 instructions in 8000 cycles, however long the chain.
    many = cycles(FLOATS + dependent(2000), threads=1024, issue_scale=1)
    many -= cycles(FLOATS + dependent(1000), threads=1024, issue_scale=1)
    assert many == pytest.approx(8000, rel=0.01)


def test_special_functions_take_eight_cycles_a_warp():
    def body(n):
        return FLOATS + "".join(f"ex2.approx.ftz.f32 %f{1 + k % 32}, %f0;" for k in range(n))

    spent = cycles(body(2000), threads=256) - cycles(body(1000), threads=256)
    assert spent == pytest.approx(2 * 1000 * 8, rel=0.01)


def test_bank_conflicts_cost_their_cycles():
    def body(stride, n):
        load = "ld.shared.b32 %r1, [%r0];" * n
        return f"mad.lo.u32 %r0, %t, {stride}, %s;" + load

    for stride, ways in ((4, 1), (16, 4), (128, 32)):
        spent = cycles(body(stride, 400), shared=16384, threads=128)
        spent -= cycles(body(stride, 200), shared=16384, threads=128)
        assert spent == pytest.approx(4 * 200 * ways, rel=0.02)


def wgmma(n, count, columns=256):
    """`n` groups of `count` products m64nXk32 on one warpgroup, each group waited for."""
    regs = ", ".join(f"%q{k}" for k in range(columns // 2))
    one = (
        f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3 {{{regs}}}, %d0, %d1, "
        "1, 1, 1;"
    ).replace(", 1, 1, 1;", ", %p0, 1, 1;")
    group = "wgmma.fence.sync.aligned;" + one * count
    group += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    zero = "".join(f"mov.f32 %q{k}, 0f00000000;" for k in range(columns // 2))
    # K-major, 128-byte swizzle, 1024 bytes between groups of eight rows.
    descriptor = (
        "shr.u32 %r0, %s, 4; cvt.u64.u32 %d0, %r0; or.b64 %d0, %d0, 0x4000004000010000;"
        "mov.b64 %d1, %d0; setp.eq.u32 %p0, %r0, %r0;"
    )
    return f".reg .f32 %q<{columns // 2}>;" + zero + descriptor + group * n


def test_wgmma_takes_half_its_columns_in_cycles():
    for columns in (256, 128, 64):
        few = cycles(wgmma(1, 8, columns), threads=128, shared=65536)
        many = cycles(wgmma(1, 40, columns), threads=128, shared=65536)
        # A from shared memory: 64 rows more to read, which at 64 columns just fits.
        assert (many - few) / 32 == pytest.approx(columns / 2, rel=0.02)


def test_waiting_for_every_wgmma_costs_its_tail():
    together = cycles(wgmma(1, 16), threads=128, shared=65536)
    alone = cycles(wgmma(16, 1), threads=128, shared=65536)
    assert 15 * 60 < alone - together < 15 * 90


COPY = (
    "mov.u32 %r0, %ctaid.x; shl.b32 %r0, %r0, 8; add.u32 %r0, %r0, %t; mul.wide.u32 %d0, %r0, 16;"
    "add.u64 %d1, %d0, %P0; add.u64 %d2, %d0, %P1;"
    "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1]; st.global.v4.b32 [%d2], {%r1, %r2, %r3, %r4};"
)


def copy(ctas, **options):
    x, y = aligned(ctas * 1024), aligned(ctas * 1024)
    return profile(COPY, x, y, threads=256, grid=ctas, **options)


def test_twice_the_bytes_take_twice_the_time():
    # 268 and 537 MB; eight of the CTAs run.
    times = [copy(ctas, sample=8, launch_us=0).timing for ctas in (32768, 65536)]
    assert times[1].modelled_us / times[0].modelled_us == pytest.approx(2, rel=0.03)
    assert times[0].hbm_bytes == 32768 * 8192
    assert times[0].bottleneck == "HBM"
    assert 1 <= times[0].modelled_us / times[0].floors_us["hbm"] < 1.3
    assert times[0].low_us <= times[0].modelled_us <= times[0].high_us


def test_a_part_with_more_bandwidth_is_faster():
    launch = copy(32768, sample=4, launch_us=0)
    ratio = launch.time("h100").modelled_us / launch.time("h200").modelled_us
    assert 1.2 < ratio < 1.5  # 4.8 to 3.35


def test_a_sample_stands_for_the_grid():
    whole, part = copy(264), copy(264, sample=3)
    assert part.sampled == (3, 264) and whole.sampled == (264, 264)
    assert part.modelled_us == pytest.approx(whole.modelled_us, rel=0.02)
    assert part.bytes == whole.bytes


def test_a_complete_run_records_the_sample_only():
    x, y = aligned(264 * 1024), aligned(264 * 1024)
    x[:] = 1
    module = emu.Module(text(COPY, 2))
    with emu.profiling("h100", sample_ctas=3, complete=True) as recorded:
        module.kernel("k")[264, 256](x, y)
    (launch,) = recorded.launches
    assert launch.sampled == (3, 264)
    assert (y == 1).all()
    assert launch.modelled_us == copy(264, sample=3).modelled_us


def test_waves_follow_one_another():
    """A CTA that fills its SM: one wave, then ten, each a CTA's time and its start."""
    body = FLOATS + dependent(2000)

    def us(ctas):
        options = {"shared": 200 * 1024, "sample": 2, "launch_us": 0, "cta_start": 0}
        return profile(body, grid=ctas, **options).modelled_us

    assert us(132) == pytest.approx(us(1), rel=0.01)
    assert us(1320) == pytest.approx(10 * us(132), rel=0.02)
    assert us(133) == pytest.approx(2 * us(132), rel=0.02)


def test_barrier_waits_are_named():
    # Warp 0 computes before it arrives: the others wait at barrier 3.
    body = FLOATS + "setp.lt.u32 %p0, %t, 32; @!%p0 bra MEET;" + dependent(500)
    launch = profile(body + "MEET: bar.sync 3, 128;", threads=128)
    waits = launch.timing.waits
    times, waited = waits["barrier", 3]
    assert times == 4 and 3 * 1900 < waited < 3 * 2300
    assert "barrier 3" in launch.report()


def test_a_profile_leaves_the_emulator_as_it_was():
    x, y = np.arange(1024, dtype=np.float32), np.zeros(4096, np.float32)
    copy(4, sample=1)
    module = emu.Module(text(COPY, 2))
    x = np.arange(4096, dtype=np.float32)
    stats = module.kernel("k")[4, 256](x, y)
    np.testing.assert_array_equal(x, y)
    assert stats.profile is None


def test_profile_of_a_launch():
    x, y = np.arange(2048, dtype=np.float32), np.zeros(2048, np.float32)
    stats = emu.Module(text(COPY, 2)).kernel("k")[2, 256](x, y, profile=True)
    np.testing.assert_array_equal(x, y)
    assert stats.profile.sampled == (2, 2)
    assert stats.profile.mix["global"] == 2 * 8 * 2
    assert "modelled" in stats.profile.report()


def test_what_cannot_be_profiled_is_said():
    with pytest.raises(ValueError, match="part: expected one of h100"):
        emu.profiling("b200")
    with pytest.raises(ValueError, match="no parameter 'clock'"):
        emu.profiling("h100", clock=2)
    with pytest.raises(ValueError, match="sample_ctas"):
        emu.profiling("h100", sample_ctas=0)
    with emu.profiling("h100"), pytest.raises(emu.EmuError, match="another profiler"):
        emu.profiling("h100").__enter__()
    with emu.profiling("h100") as nothing:
        pass
    assert nothing.launches == []


def test_a_grid_whose_ctas_wait_for_each_other_needs_all_of_them():
    body = (
        "mov.u64 %d0, %P0; setp.eq.u32 %p0, %t, 0; @%p0 atom.global.add.u32 %r0, [%d0], 1;"
        "AGAIN: ld.volatile.global.u32 %r1, [%d0]; setp.lt.u32 %p1, %r1, 2; @%p1 bra AGAIN;"
    )

    def sampled(complete):
        with emu.profiling("h100", sample_ctas=1, complete=complete) as recorded:
            emu.Module(text(body, 1)).kernel("k")[2, 32](np.zeros(1, np.uint32))
        return recorded.launches[0].sampled

    with pytest.raises(emu.DeadlockError):
        sampled(False)
    # All of a kernel without wgmma runs unless told otherwise: later launches may go by its results.
    assert sampled(True) == sampled(None) == (1, 2)
    assert profile(body, np.zeros(1, np.uint32), grid=2).modelled_us > 0


def test_registers_in_memory_order_survive_reordering():
    """Stores and loads of the reordered code still depend on each other in the model."""
    body = FLOATS + "st.shared.f32 [%s], %f0; ld.shared.f32 %f1, [%s];" + store("%t", 0)
    assert profile(body, np.zeros(32, np.uint32), shared=1024).modelled_us > 0


@pytest.mark.parametrize("busy", [100, 10000])
def test_polls_count_once_however_often_the_schedule_polls(busy):
    """CTA 0 works for a while and sets a flag, CTA 1 polls it."""
    body = f"""
setp.ne.u32 %p1, %ctaid.x, 0;
@%p1 bra POLL;
mov.b32 %r1, 0;
WORK: add.u32 %r1, %r1, 1;
setp.lt.u32 %p2, %r1, {busy};
@%p2 bra WORK;
st.release.gpu.global.u32 [%P0], 1;
ret;
POLL: ld.acquire.gpu.global.u32 %r1, [%P0];
setp.eq.u32 %p2, %r1, 0;
@%p2 bra POLL;
"""
    launch = profile(body, np.zeros(1, np.uint32), grid=2)
    assert only(launch, "ld.acquire")["executed"] == 1


def test_strong_loads_of_different_words_all_count():
    body = "".join(f"ld.volatile.global.u32 %r1, [%P0 + {4 * k}];" for k in (0, 1, 1, 2))
    launch = profile("mov.u32 %r9, 0;" + body, np.zeros(4, np.uint32), threads=1)
    assert sum(i["executed"] for i in launch.instructions if "ld.volatile" in i["text"]) == 4
