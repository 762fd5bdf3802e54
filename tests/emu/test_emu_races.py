"""Planted hazards in shared memory: each is caught, by kind and line, and its repair is silent."""

import re
import shutil

import numpy as np
import pytest

emu = pytest.importorskip("dskernels.emu")
from planted import SEEDS, caught, drop, launch, planted  # noqa: E402


def line_of(source, marker="BUG"):
    """Number of the line that the comment `marker` ends."""
    return next(k for k, line in enumerate(source.splitlines(), 1) if f"// {marker}" in line)


# Pieces of kernels. sm: data from offset 0, mbarriers at 8064.
BARRIERS = """
setp.eq.u32 %p9, %t, 0;
add.u32 %r90, %s, 8064;
add.u32 %r91, %s, 8072;
@%p9 mbarrier.init.shared.b64 [%r90], 1;
@%p9 mbarrier.init.shared.b64 [%r91], {empty};
add.u32 %r92, %s, 8080;
@%p9 mbarrier.init.shared.b64 [%r92], 1;
@%p9 fence.mbarrier_init.release.cluster;
bar.sync 0;
"""
WAIT = """
{label}:
mbarrier.try_wait.parity.shared.b64 %p8, [{bar}], {parity};
@!%p8 bra {label};
"""


def removable_wait(label, bar):
    """A wait for phase 0 that `planted` takes out."""
    lines = WAIT.format(label=label, bar=bar, parity=0).strip().split("\n")
    return "\n" + "".join(f"{line} // WAIT\n" for line in lines)


OWN = "mad.lo.u32 %r1, %t, 4, %s;\n"


OTHER_WARP = "xor.b32 %r2, %t, 32; mad.lo.u32 %r3, %r2, 4, %s;\n"


def test_store_and_load_of_another_warp():
    body = (
        OWN
        + OTHER_WARP
        + """
st.shared.b32 [%r1], %t; // BUG
bar.sync 0; // FIX
ld.shared.b32 %r4, [%r3]; // VICTIM
"""
    )
    planted(body, [], "shared-race", "FIX")


def test_load_and_later_store_of_another_warp():
    body = (
        OWN
        + OTHER_WARP
        + """
st.shared.b32 [%r1], %t;
bar.sync 0;
ld.shared.b32 %r4, [%r3]; // BUG
bar.sync 0; // FIX
st.shared.b32 [%r1], 7; // VICTIM
"""
    )
    planted(body, [], "shared-race", "FIX")


def test_atomic_and_plain_access():
    body = """
atom.shared.add.u32 %r4, [%s], 1; // BUG
bar.sync 0; // FIX
ld.shared.b32 %r4, [%s]; // VICTIM
"""
    planted(body, [], "shared-race", "FIX")


def test_two_atomics_do_not_race():
    launch("atom.shared.add.u32 %r4, [%s], 1; atom.shared.max.u32 %r4, [%s], 1;", [])


def test_disjoint_bytes_of_one_word_do_not_race():
    launch("add.u32 %r1, %s, %t; cvt.u16.u32 %h1, %t; st.shared.b8 [%r1], %h1;", [])


def test_named_barrier_of_the_wrong_warps():
    """Warps 0 and 1 meet at barrier 1, warp 2 reads what they wrote without taking part."""
    body = (
        OWN
        + """
setp.ge.u32 %p1, %t, 64;
@%p1 bra READER;
st.shared.b32 [%r1], %t; // BUG
bar.sync 1, 64;
bar.sync 0; // FIX
ret;
READER:
bar.sync 0; // FIX
ld.shared.b32 %r4, [%s]; // VICTIM
"""
    )
    planted(body, [], "shared-race", "FIX", threads=96)


STORE = (
    OWN
    + """
st.shared.b32 [%r1], %t; // BUG
fence.proxy.async.shared::cta; // FENCE
bar.sync 0;
setp.ne.u32 %p1, %t, 0;
@%p1 bra AFTER;
"""
)


def test_missing_proxy_fence_before_a_bulk_store():
    body = (
        STORE
        + """
cp.async.bulk.global.shared::cta.bulk_group [%P0], [%s], 256; // VICTIM
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
AFTER:
"""
    )
    planted(body, [np.zeros(64, np.uint32)], "missing-proxy-fence", "FENCE")


def tensor_case():
    array = np.zeros((8, 16), np.uint32)
    return array, emu.tensor_map(array, (4, 16))


@pytest.mark.parametrize("op", ["cp.async.bulk", "cp.reduce.async.bulk"])
def test_missing_proxy_fence_before_a_tensor_store(op):
    array, tensor_map = tensor_case()
    place = np.frombuffer(tensor_map.data, np.uint8).copy()
    buffer = np.zeros(256, np.uint8)  # the map in global memory, 64-byte aligned
    start = -buffer.ctypes.data % 64
    buffer[start : start + 128] = place
    add = ".add" if "reduce" in op else ""
    body = (
        STORE
        + f"""
{op}.tensor.2d.global.shared::cta{add}.bulk_group [%P0, {{0, 4}}], [%s]; // VICTIM
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
AFTER:
"""
    )
    view = buffer[start : start + 128]
    for seed in SEEDS:
        array[...] = 0
        launch(body, [view, array], seed)
        assert np.array_equal(array[4:].reshape(-1), np.arange(64)) and not array[:4].any()
        caught(drop(body, "FENCE"), [view, array], "missing-proxy-fence", seed)


def test_fence_after_the_barrier_counts_too():
    """The memory model asks for a proxy fence on the path from the writes to the copy, anywhere."""
    body = (
        STORE.replace("fence.proxy.async.shared::cta; // FENCE\n", "")
        + """
fence.proxy.async.shared::cta;
cp.async.bulk.global.shared::cta.bulk_group [%P0], [%s], 256; // VICTIM
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
AFTER:
"""
    )
    launch(body, [np.zeros(64, np.uint32)])


@pytest.mark.parametrize(
    "wait", ["cp.async.bulk.wait_group.read 0;", "cp.async.bulk.wait_group 0;"]
)
def test_bulk_store_source_reused_early(wait):
    body = (
        STORE.replace(" // BUG", "")
        + f"""
cp.async.bulk.global.shared::cta.bulk_group [%P0], [%s], 256; // BUG
cp.async.bulk.commit_group;
{wait} // WAIT
AFTER:
bar.sync 0;
st.shared.b32 [%r1], 9; // VICTIM
"""
    )
    planted(body, [np.zeros(64, np.uint32)], "shared-race", "WAIT")


def test_wait_group_that_leaves_the_newest_group_pending():
    body = (
        STORE.replace(" // BUG", "")
        + """
cp.async.bulk.global.shared::cta.bulk_group [%P0], [%s], 128;
cp.async.bulk.commit_group;
add.u32 %r5, %s, 128;
add.u64 %d1, %P0, 128;
cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r5], 128; // BUG
cp.async.bulk.commit_group;
cp.async.bulk.wait_group.read 1;
cp.async.bulk.wait_group.read 0; // FIX
AFTER:
bar.sync 0;
st.shared.b32 [%r1], 9; // VICTIM
"""
    )
    planted(body, [np.zeros(64, np.uint32)], "shared-race", "FIX")


COPY = """
mad.wide.u32 %A0, %t, 4, %P0;
cp.async.ca.shared.global [%r1], [%A0], 4; // BUG
cp.async.commit_group;
"""


def test_cp_async_read_before_its_wait():
    body = (
        OWN
        + COPY
        + """
cp.async.wait_group 0; // WAIT
ld.shared.b32 %r4, [%r1]; // VICTIM
"""
    )
    planted(body, [np.arange(64, dtype=np.uint32)], "shared-race", "WAIT")


def test_cp_async_of_another_warp_needs_a_barrier_too():
    body = (
        OWN
        + OTHER_WARP
        + COPY
        + """
cp.async.wait_all;
bar.sync 0; // FIX
ld.shared.b32 %r4, [%r3]; // VICTIM
"""
    )
    planted(body, [np.arange(64, dtype=np.uint32)], "shared-race", "FIX")


def test_wait_all_closes_the_open_group():
    body = (
        OWN
        + COPY.replace("cp.async.commit_group;\n", "")
        + """
cp.async.wait_all; // WAIT
ld.shared.b32 %r4, [%r1]; // VICTIM
"""
    )
    planted(body, [np.arange(64, dtype=np.uint32)], "shared-race", "WAIT")


def test_cp_async_through_an_mbarrier():
    body = (
        BARRIERS.format(empty=64)
        + OWN
        + OTHER_WARP
        + COPY.replace(
            "cp.async.commit_group;\n", "cp.async.mbarrier.arrive.noinc.shared.b64 [%r91];"
        )
        + removable_wait("L", "%r91")
        + "\nld.shared.b32 %r4, [%r3]; // VICTIM\n"
    )
    planted(body, [np.arange(64, dtype=np.uint32)], "shared-race", "WAIT")


LOAD = """
@%p9 mbarrier.arrive.expect_tx.shared.b64 _, [%r90], 256;
@%p9 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%P0], 256, [%r90];"""


def test_bulk_load_read_before_its_mbarrier():
    body = (
        BARRIERS.format(empty=2)
        + OWN
        + LOAD
        + " // BUG"
        + removable_wait("L", "%r90")
        + "\nld.shared.b32 %r4, [%r1]; // VICTIM\n"
    )
    planted(body, [np.arange(64, dtype=np.uint32)], "shared-race", "WAIT")


def test_slot_overwritten_while_it_is_read():
    """The second load into a slot must come after every reader's arrival at the empty barrier."""
    body = (
        BARRIERS.format(empty=64)
        + OWN
        + LOAD
        + WAIT.format(label="L", bar="%r90", parity=0)
        + "ld.shared.b32 %r4, [%r1]; // BUG\n"
        + "mbarrier.arrive.shared.b64 _, [%r91];\n"
        + removable_wait("E", "%r91")
        + LOAD.replace("%r90", "%r92")
        + " // VICTIM"
        + WAIT.format(label="M", bar="%r92", parity=0)
    )
    planted(body, [np.arange(64, dtype=np.uint32)], "shared-race", "WAIT")


def wgmma_case(after):
    """A warpgroup multiplies what lies at sm; `after` comes before its wait."""
    d = ",".join(f"%r{20 + k}" for k in range(4))
    zero = "".join(f"mov.b32 %r{20 + k}, 0;" for k in range(4))
    return f"""
mad.lo.u32 %r1, %t, 4, %s;
st.shared.b32 [%r1], 0; // WRITE
st.shared.b32 [%r1 + 512], 0;
st.shared.b32 [%r1 + 1024], 0;
st.shared.b32 [%r1 + 1536], 0;
st.shared.b32 [%r1 + 2048], 0;
fence.proxy.async; // FENCE
bar.sync 0;
cvt.u64.u32 %d9, %s; shr.u64 %d9, %d9, 4;
mov.b64 %d0, {128 >> 4 << 16 | 256 >> 4 << 32}; add.u64 %d0, %d0, %d9;
add.u64 %d1, %d0, 128; setp.ne.b32 %p1, 0, 0; {zero}
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{d}}}, %d0, %d1, %p1, 1, 1, 0, 0; // BUG
wgmma.commit_group.sync.aligned;
{after}
wgmma.wait_group.sync.aligned 0;
"""


def test_operand_overwritten_while_wgmma_reads():
    body = wgmma_case("""wgmma.wait_group.sync.aligned 0; // FIX
bar.sync 0;
st.shared.b32 [%r1 + 2048], 1; // VICTIM""")
    planted(body, [], "shared-race", "FIX", threads=128)


def test_slot_overwritten_by_a_load_while_wgmma_reads():
    body = BARRIERS.format(empty=1) + wgmma_case(
        """wgmma.wait_group.sync.aligned 0; // FIX
bar.sync 0;"""
        + LOAD
        + " // VICTIM"
        + WAIT.format(label="L", bar="%r90", parity=0)
    )
    planted(body, [np.arange(64, dtype=np.uint32)], "shared-race", "FIX", threads=128)


def test_missing_proxy_fence_before_wgmma():
    """Every warp's stores need a fence; the hazard names the wgmma and a store."""
    body = wgmma_case("").replace("// WRITE", "// BUG").replace("// BUG\nwgmma", "// VICTIM\nwgmma")
    launch(body, [], threads=128)
    with pytest.raises(emu.HazardError) as e:
        launch(drop(body, "FENCE"), [], threads=128)
    assert e.value.hazards[0].kind == "missing-proxy-fence"
    assert "wgmma reads" in e.value.hazards[0].message


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("seed", SEEDS)
def test_cuda_source_lines(seed):
    source = """
extern "C" __global__ void reverse(int* x) {
  __shared__ int s[64];
  s[threadIdx.x] = x[threadIdx.x];  // WRITE
#ifdef FIXED
  __syncthreads();
#endif
  x[threadIdx.x] = s[63 - threadIdx.x];  // READ
}
"""
    x = np.arange(64, dtype=np.int32)
    emu.Module(emu.compile(source, options=["-DFIXED"])).kernel("reverse")[1, 64](x, seed=seed)
    assert np.array_equal(x, np.arange(64)[::-1])
    with pytest.raises(emu.HazardError) as e:
        emu.Module(emu.compile(source)).kernel("reverse")[1, 64](x, seed=seed)
    hazard = e.value.hazards[0]
    lines = {line_of(source, "WRITE"), line_of(source, "READ")}
    assert hazard.kind == "shared-race" and hazard.source_line in lines
    named = re.search(r"source line (\d+)", hazard.message)
    assert {hazard.source_line, int(named[1])} == lines


def test_distributed_shared_memory_without_a_cluster_barrier():
    body = """
xor.b32 %r5, %c, 1;
mapa.shared::cluster.u32 %r6, %s, %r5;
mad.lo.u32 %r1, %t, 4, %s;
mad.lo.u32 %r3, %t, 4, %r6;
st.shared::cluster.b32 [%r3], %t; // BUG
barrier.cluster.arrive.release.aligned; // FIX
barrier.cluster.wait.acquire.aligned; // FIX
ld.shared.b32 %r4, [%r1]; // VICTIM
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
"""
    planted(body, [], "shared-race", "FIX", grid=2, cluster=2, threads=32)


def test_distributed_atomics_after_the_cluster_barrier():
    body = """
xor.b32 %r5, %c, 1;
mapa.shared::cluster.u32 %r6, %s, %r5;
st.shared.b32 [%s], 0;
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
ld.shared.b32 %r4, [%s]; // VICTIM
barrier.cluster.arrive.aligned; // FIX
barrier.cluster.wait.aligned; // FIX
red.shared::cluster.add.u32 [%r6], 1; // BUG
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
"""
    planted(body, [], "shared-race", "FIX", grid=2, cluster=2, threads=32)
