"""Planted hazards that are no races of data: clusters, barriers, fences of wgmma, memory that nobody
wrote, launches that cannot make progress. Each is caught on its line; its repair is silent."""

import shutil

import numpy as np
import pytest

emu = pytest.importorskip("dskernels.emu")
from dskernels._C import emu as raw  # noqa: E402
from planted import SEEDS, caught, drop, launch, planted  # noqa: E402
from ptx_kernel import text  # noqa: E402

CLUSTER = dict(grid=2, cluster=2, threads=32)
MEET = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"

# --- clusters

PEER = """
xor.b32 %r5, %c, 1;
mapa.shared::cluster.u32 %r6, %s, %r5;
mad.lo.u32 %r1, %t, 4, %s;
mad.lo.u32 %r3, %t, 4, %r6;
setp.ne.u32 %p1, %c, 0;
"""


@pytest.mark.parametrize("order", ["relaxed", "release"])
@pytest.mark.parametrize(
    "access", ["ld.shared::cluster.b32 %r4, [%r3];", "red.shared::cluster.add.u32 [%r3], 1;"]
)
def test_peer_exits_while_its_shared_memory_is_used(access, order):
    """Meeting at a barrier before the end is enough; it need not order memory."""
    body = (
        PEER
        + "st.shared.b32 [%r1], %t;\n"
        + MEET
        + f"@%p1 bra AFTER;\n{access} // BUG\nAFTER:\n"
        + f"barrier.cluster.arrive.{order}.aligned; // FIX\n"
        + "barrier.cluster.wait.aligned; // FIX\n"
    )
    planted(body, [], "dsmem-exited-cta", alone=True, **CLUSTER)


def test_multicast_to_a_peer_that_does_not_wait():
    body = (
        PEER
        + """
setp.ne.u32 %p2, %t, 0;
add.u32 %r90, %s, 4096;
@%p2 bra READY;
mbarrier.init.shared.b64 [%r90], 1;
mbarrier.arrive.expect_tx.shared.b64 _, [%r90], 256;
READY:
"""
        + MEET
        + """
or.pred %p3, %p1, %p2;
mov.u16 %h1, 3;
@%p3 bra WAIT;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%s], [%P0], 256, [%r90], %h1; // BUG
WAIT:
@%p1 bra END; // BROKEN
LOOP:
mbarrier.try_wait.parity.shared.b64 %p8, [%r90], 0;
@!%p8 bra LOOP;
END:
"""
    )
    data = [np.zeros(64, np.uint32)]
    good = drop(body, "BROKEN")
    planted(good, data, "dsmem-exited-cta", broken=body, alone=True, **CLUSTER)


def test_relaxed_cluster_barrier_orders_no_memory():
    body = (
        PEER
        + "st.shared::cluster.b32 [%r3], %t; // BUG\n"
        + "fence.acq_rel.cluster; // FIX\n"
        + "barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"
        + "ld.shared.b32 %r4, [%r1]; // VICTIM\n"
        + MEET
    )
    planted(body, [], "shared-race", **CLUSTER)


# CTA 1's first lane touches a barrier of CTA 0, which nothing has ordered behind its initialisation
# but a relaxed barrier.
SIGNALS = {
    "arrival": "mbarrier.arrive.shared::cluster.b64 _, [%r9]; // BUG\n",
    "copy": "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
    "[%r6+2048], [%s], 16, [%r9]; // BUG\n",
}


def signal_to_a_peer(signal, fence, order):
    return (
        PEER
        + """
add.u32 %r90, %s, 4096;
mapa.shared::cluster.u32 %r9, %r90, %r5;
setp.ne.u32 %p2, %t, 0;
st.shared.b32 [%r1], %t;
fence.proxy.async.shared::cta;
@%p2 bra READY;
mbarrier.init.shared.b64 [%r90], 1; // VICTIM
"""
        + fence
        + ("mbarrier.arrive.expect_tx.shared.b64 _, [%r90], 16;\n" if signal == "copy" else "")
        + f"READY:\nbarrier.cluster.arrive.{order}.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"
        + "@%p2 bra END;\n@!%p1 bra LOOP;\n"
        + SIGNALS[signal]
        + "bra END;\nLOOP:\nmbarrier.try_wait.parity.shared.b64 %p8, [%r90], 0;\n@!%p8 bra LOOP;\nEND:\n"
        + MEET
    )


@pytest.mark.parametrize("signal", SIGNALS)
def test_mbarrier_of_a_peer_that_has_not_fenced_its_initialisation(signal):
    body = signal_to_a_peer(signal, "fence.mbarrier_init.release.cluster; // FIX\n", "relaxed")
    planted(body, [], "mbarrier-init-unordered", **CLUSTER)


def test_a_fence_of_mbarriers_is_for_those_initialised_before_it():
    fence = "fence.mbarrier_init.release.cluster;\n"
    body = signal_to_a_peer("arrival", "", "relaxed")
    init = "mbarrier.init.shared.b64 [%r90], 1; // VICTIM\n"
    caught(body.replace(init, fence + init), [], "mbarrier-init-unordered", **CLUSTER)


def test_a_cluster_barrier_that_orders_memory_orders_initialisations():
    stats = launch(signal_to_a_peer("arrival", "", "release"), [], **CLUSTER)
    assert not stats.hazards


def flag_between_ctas(release, acquire):
    """CTA 0 stores into CTA 1 and sets a flag there."""
    return (
        PEER
        + "add.u32 %r8, %s, 4096;\nmapa.shared::cluster.u32 %r9, %r8, %r5;\n"
        + "st.shared.b32 [%r8], 0;\n"
        + MEET
        + "@%p1 bra READER;\nst.shared::cluster.b32 [%r3], %t; // BUG\n"
        + f"st.{release}.shared::cluster.b32 [%r9], 1;\nbra END;\nREADER:\n"
        + f"ld.{acquire}.shared.b32 %r4, [%r8];\nsetp.eq.u32 %p2, %r4, 0;\n@%p2 bra READER;\n"
        + "ld.shared.b32 %r4, [%r1]; // VICTIM\nEND:\n"
        + MEET
    )


@pytest.mark.parametrize(
    "release, acquire",
    [
        ("release.cta", "acquire.cluster"),
        ("release.cluster", "acquire.cta"),
        ("relaxed.cluster", "acquire.cluster"),
        ("release.cluster", "relaxed.cluster"),
    ],
)
def test_flag_in_distributed_shared_memory(release, acquire):
    good = flag_between_ctas("release.cluster", "acquire.cluster")
    bad = flag_between_ctas(release, acquire)
    planted(good, [], "shared-race", broken=bad, **CLUSTER)


# --- barriers

INIT = """
setp.ne.u32 %p1, %t, 0;
add.u32 %r90, %s, 4096;
@%p1 bra READY;
mbarrier.init.shared.b64 [%r90], 1; // FIX
READY:
bar.sync 0;
"""
WAIT = "{0}:\nmbarrier.try_wait.parity.shared.b64 %p8, [%r90], {1}; // BUG\n@!%p8 bra {0};\n"


def test_uninitialized_mbarrier():
    body = INIT + "@!%p1 mbarrier.arrive.shared.b64 _, [%r90]; // BUG\n"
    planted(body, [], "mbarrier-uninitialized", alone=True)


def test_slot_filled_again_without_waiting_for_it():
    """More arrivals than the phase expects, while its bytes are still on the way."""
    body = (
        INIT
        + "@!%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r90], 16; // BUG\n"
        + "@!%p1 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r90], 16; // WAIT\n"
        + "@!%p1 mbarrier.arrive.shared.b64 _, [%r90]; // BUG\n"
    )
    planted(body, [], "mbarrier-over-arrival", "WAIT", alone=True)


def test_missing_bytes_are_a_deadlock():
    body = (
        INIT
        + "@!%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r90], 256;\n"
        + "@!%p1 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r90], {};\n"
        + WAIT.format("LOOP", 0)
    )
    launch(body.format(256), [])
    stuck(
        body.format(128),
        "0 of 1 arrivals and 128 bytes are missing in phase 0; last touched by warp 0",
    )


def test_lost_arrival_is_a_deadlock():
    body = INIT.replace("], 1;", "], 2;") + "@!%p1 mbarrier.arrive.shared.b64 _, [%r90];\n" * 2
    body += WAIT.format("LOOP", 0)
    launch(body, [])
    lost = body.replace("@!%p1 mbarrier.arrive.shared.b64 _, [%r90];\n", "", 1)
    stuck(lost, "1 of 2 arrivals and 0 bytes are missing in phase 0")


def test_wait_for_the_wrong_phase_is_a_deadlock():
    body = INIT + "@!%p1 mbarrier.arrive.shared.b64 _, [%r90];\n" + WAIT.format("LOOP", "{}")
    launch(body.format(0), [])
    stuck(body.format(1), "waits for phase 1")


def test_missing_warp_at_a_named_barrier_is_a_deadlock():
    body = """
setp.ge.u32 %p1, %t, {};
@%p1 bra OTHERS;
bar.sync 1, 64; // BUG
OTHERS:
"""
    launch(body.format(64), [])
    stuck(body.format(32), "32 of 64 threads have arrived (warps 0; last warp 0 at PTX line")


def stuck(body, words, **options):
    source = text(body, 0, options.get("shared", 8192)).splitlines()
    for seed in SEEDS:
        with pytest.raises(emu.DeadlockError) as e:
            launch(body, [], seed, **options)
        waiting = [w for w in e.value.warps if "// BUG" in source[w.ptx_line - 1]]
        assert waiting and any(words in w.state for w in waiting), e.value


def test_participants_that_disagree_on_a_barrier():
    body = "setp.ge.u32 %p1, %t, 32;\nselp.u32 %r1, 96, {}, %p1;\nbar.sync 1, %r1; // BUG\n"
    broken = body.format(64)
    planted(body.format(96), [], "barrier-count-mismatch", broken=broken, threads=96, alone=True)


def test_aligned_instruction_without_the_whole_warp():
    body = """
setp.ge.u32 %p1, %t, {};
@%p1 bra OTHERS;
bar.sync 1, 64; // BUG
bra END;
OTHERS:
bar.sync 1, 64; // BUG
END:
"""
    planted(body.format(32), [], "partial-warp", broken=body.format(48), alone=True)


# --- wgmma

D = ",".join(f"%r{20 + k}" for k in range(4))
WGMMA = f"""
mad.lo.u32 %r1, %t, 4, %s;
st.shared.b32 [%r1], 0;
st.shared.b32 [%r1 + 512], 0;
st.shared.b32 [%r1 + 1024], 0;
st.shared.b32 [%r1 + 1536], 0;
st.shared.b32 [%r1 + 2048], 0; // WRITTEN
fence.proxy.async;
bar.sync 0;
cvt.u64.u32 %d9, %s; shr.u64 %d9, %d9, 4;
mov.b64 %d0, {128 >> 4 << 16 | 256 >> 4 << 32}; add.u64 %d0, %d0, %d9;
add.u64 %d1, %d0, 128; setp.ne.b32 %p1, 0, 0;
mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
wgmma.fence.sync.aligned; // FENCE
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{D}}}, %d0, %d1, %p1, 1, 1, 0, 0; // BUG
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0; // WAIT
add.u32 %r30, %r20, 1; // VICTIM
wgmma.wait_group.sync.aligned 0;
"""


@pytest.mark.parametrize(
    "without, kind", [("FENCE", "wgmma-missing-fence"), ("WAIT", "wgmma-result-before-wait")]
)
def test_wgmma_without_its_fence_or_wait(without, kind):
    planted(WGMMA, [], kind, without, threads=128, alone=True)


# --- memory that nobody wrote


def strict(body, args, kind="uninitialized-read", **options):
    caught(body, args, kind, alone=True, check="strict", **options)


def test_shared_memory_that_nobody_wrote():
    body = "mad.lo.u32 %r1, %t, 4, %s;\nst.shared.b32 [%r1], %t; // FIX\nld.shared.b32 %r2, [%r1]; // BUG\n"
    for seed in SEEDS:
        assert launch(body, [], seed, check="strict").hazards == []
        strict(drop(body, "FIX"), [], seed=seed)
    formal = launch(drop(body, "FIX"), []).hazards
    assert [(h.kind, h.severity) for h in formal] == [("uninitialized-read", "formal")]


def test_half_of_a_word_that_nobody_wrote():
    body = (
        "mad.lo.u32 %r1, %t, 4, %s;\nst.shared.b16 [%r1], 0;\nst.shared.b16 [%r1 + 2], 0; // FIX\n"
    )
    body += "ld.shared.b32 %r2, [%r1]; // BUG\n"
    assert launch(body, [], check="strict").hazards == []
    strict(drop(body, "FIX"), [])


def test_wgmma_reads_shared_memory_that_nobody_wrote():
    assert launch(WGMMA, [], threads=128, check="strict").hazards == []
    strict(drop(WGMMA, "WRITTEN"), [], threads=128)


def test_device_memory_that_nobody_wrote():
    """Allocated on the device: unwritten. The same bytes lent by the host: the host's business."""
    body = "mad.wide.u32 %A0, %t, 4, %P0;\nst.global.u32 [%A0], %t; // FIX\nld.global.u32 %r1, [%A0]; // BUG\n"
    for broken in (False, True):
        memory = raw.allocate(0, 256, "scratch")
        try:
            if broken:
                strict(drop(body, "FIX"), [memory])
            else:
                assert launch(body, [memory], check="strict").hazards == []
                assert launch(drop(body, "FIX"), [memory], check="strict").hazards == []
        finally:
            raw.release(memory)
    assert launch(drop(body, "FIX"), [np.zeros(64, np.uint32)], check="strict").hazards == []


# --- no progress

SPIN = """
mov.u32 %r10, %ctaid.x;
setp.eq.u32 %p1, %r10, {setter};
@%p1 bra SET;
LOOP:
ld.acquire.gpu.global.u32 %r1, [%P0]; // BUG
setp.eq.u32 %p2, %r1, 0;
@%p2 bra LOOP;
ret;
SET:
st.release.gpu.global.u32 [%P0], {value}; // SET
"""


def spinning(body, flag, **options):
    with pytest.raises(emu.DeadlockError, match="livelock") as e:
        launch(body, [flag], threads=32, **options)
    source = text(body, 1, options.get("shared", 8192)).splitlines()
    lines = range(next(k for k, s in enumerate(source, 1) if "// BUG" in s), len(source))
    assert all(w.ptx_line in lines for w in e.value.warps)
    return e.value


def test_waiting_for_a_cta_that_cannot_be_resident():
    """One SM that holds one block of this size: block 0 waits for block 1 for ever."""
    options = dict(grid=2, shared=200 << 10)
    body = SPIN.format(setter=1, value=1)
    sms = 132
    try:
        raw.set_num_sms(0, 1)
        error = spinning(body, np.zeros(1, np.uint32), **options)
        assert "1 clusters of 'k', the first with block (1,0,0), cannot start" in str(error)
        assert "it holds 1 at once" in str(error)
        launch(SPIN.format(setter=0, value=1), [np.zeros(1, np.uint32)], threads=32, **options)
        raw.set_num_sms(0, 2)
        launch(body, [np.zeros(1, np.uint32)], threads=32, **options)
    finally:
        raw.set_num_sms(0, sms)


def test_spinning_on_a_flag_that_nobody_sets():
    """The report says what is polled, what it holds, and who wrote it last."""
    launch(SPIN.format(setter=1, value=1), [np.zeros(1, np.uint32)], grid=2, threads=32)
    error = spinning(SPIN.format(setter=1, value=0), np.zeros(1, np.uint32), grid=2)
    line = next(
        k for k, s in enumerate(text(SPIN.format(setter=1, value=0), 1, 8192).splitlines(), 1)
        if "// SET" in s
    )  # fmt: skip
    state = error.warps[0].state
    assert "last read offset 0 of 'p0' (holds 0), last written by block (1,0,0) warp 0" in state
    assert f"PTX line {line}" in state


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_cuda_source_lines_of_a_global_race():
    source = """
extern "C" __global__ void handover(int* data, int* flag) {
  if (blockIdx.x == 0) {
    data[threadIdx.x] = 1;  // WRITE
#ifdef FIXED
    __threadfence();
#endif
    __syncthreads();
    if (threadIdx.x == 0) atomicExch(flag, 1);
  } else {
    if (threadIdx.x == 0) {
      while (atomicAdd(flag, 0) == 0) {}
      __threadfence();
    }
    __syncthreads();
    data[threadIdx.x] += 1;  // READ
  }
}
"""
    lines = {
        next(k for k, s in enumerate(source.splitlines(), 1) if f"// {m}" in s)
        for m in ("WRITE", "READ")
    }
    fixed = emu.Module(emu.compile(source, options=["-DFIXED"])).kernel("handover")
    broken = emu.Module(emu.compile(source)).kernel("handover")
    for seed in SEEDS:
        data, flag = np.zeros(64, np.int32), np.zeros(1, np.int32)
        fixed[2, 64](data, flag, seed=seed)
        assert np.array_equal(data, np.full(64, 2))
        with pytest.raises(emu.HazardError) as e:
            broken[2, 64](data, np.zeros(1, np.int32), seed=seed)
        assert e.value.hazards[0].kind == "global-race"
        assert e.value.hazards[0].source_line in lines
