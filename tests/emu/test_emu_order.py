"""Lanes of a warp, the end of a CTA, and rules that hardware forgives: planted and repaired.

A formal finding stops nothing unless the launch is strict; it must still name both lines.
"""

import numpy as np
import pytest

emu = pytest.importorskip("dskernels.emu")
from planted import SEEDS, caught, check_hazard, drop, launch, planted  # noqa: E402
from ptx_kernel import text  # noqa: E402
from test_emu_races import BARRIERS, LOAD, STORE, removable_wait, wgmma_case  # noqa: E402


def formal(body, args, kind, without="FIX", alone=False, **options):
    """`body` is silent, also when strict; without the marked lines it has one kind of formal
    finding, which names the marked lines and is an error where formal findings are."""
    for seed in SEEDS:
        assert launch(body, args, seed, check="strict", **options).hazards == []
        broken = drop(body, without)
        found = launch(broken, args, seed, **options).hazards
        assert {(h.kind, h.severity) for h in found} == {(kind, "formal")}
        source = text(broken, len(args), options.get("shared", 8192))
        assert check_hazard(found[0], kind, source) or alone
        caught(broken, args, kind, seed, alone=alone, check="strict", **options)


# --- copies that are still under way when their CTA ends


def test_load_that_nobody_waits_for():
    body = BARRIERS.format(empty=1) + LOAD + " // BUG" + removable_wait("L", "%r90")
    planted(body, [np.zeros(64, np.uint32)], "copy-outlives-cta", "WAIT", alone=True)


def test_one_warp_that_waits_for_the_load_is_enough():
    wait = removable_wait("L", "%r90").replace(" // WAIT", "")
    only = "setp.lt.u32 %p1, %t, 32; @%p1 bra END;" + wait + "END:\n"
    body = BARRIERS.format(empty=1) + LOAD + only
    for seed in SEEDS:
        assert launch(body, [np.zeros(64, np.uint32)], seed).hazards == []


@pytest.mark.parametrize("read", ["", ".read"])
def test_store_whose_source_nobody_waits_for(read):
    body = (
        STORE.replace(" // BUG", "")
        + f"""
cp.async.bulk.global.shared::cta.bulk_group [%P0], [%s], 256; // BUG
cp.async.bulk.commit_group;
cp.async.bulk.wait_group{read} 0; // FIX
AFTER:
"""
    )
    formal(body, [np.zeros(64, np.uint32)], "store-outlives-cta", alone=True)


# --- lanes of one warp

LANE = "mad.lo.u32 %r1, %t, 4, %s; xor.b32 %r2, %t, 1; mad.lo.u32 %r3, %r2, 4, %s;\n"


@pytest.mark.parametrize("fix", ["bar.warp.sync 0xffffffff;", "bar.sync 0;"])
def test_lane_reads_what_another_wrote(fix):
    body = (
        LANE + f"st.shared.b32 [%r1], %t; // BUG\n{fix} // FIX\nld.shared.b32 %r4, [%r3]; // VICTIM"
    )
    formal(body, [], "missing-warp-sync")


def test_lane_overwrites_what_another_read():
    body = (
        LANE
        + "st.shared.b32 [%r1], %t;\nbar.warp.sync 0xffffffff;\nld.shared.b32 %r4, [%r3]; // BUG\n"
        + "bar.warp.sync 0xffffffff; // FIX\nst.shared.b32 [%r1], 1; // VICTIM"
    )
    formal(body, [], "missing-warp-sync")


def test_all_lanes_read_what_one_wrote():
    body = """
setp.eq.u32 %p1, %t, 0;
@%p1 st.shared.v2.b32 [%s], {%t, %t}; // BUG
bar.warp.sync 0xffffffff; // FIX
ld.shared.b32 %r4, [%s + 4]; // VICTIM
"""
    formal(body, [], "missing-warp-sync", threads=32)


def test_lane_stores_in_bulk_what_others_wrote():
    body = """
mad.lo.u32 %r1, %t, 4, %s;
setp.ne.u32 %p1, %t, 0;
st.shared.b32 [%r1], %t; // BUG
fence.proxy.async.shared::cta;
bar.warp.sync 0xffffffff; // FIX
@%p1 bra AFTER;
cp.async.bulk.global.shared::cta.bulk_group [%P0], [%s], 128; // VICTIM
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
AFTER:
"""
    formal(body, [np.zeros(32, np.uint32)], "missing-warp-sync", threads=32)


def test_own_words_and_shuffles_need_no_warp_sync():
    own = LANE + "st.shared.b32 [%r1], %t; ld.shared.b32 %r4, [%r1]; st.shared.b32 [%r1], %r4;\n"
    met = "shfl.sync.bfly.b32 %r5, %r4, 1, 31, 0xffffffff; ld.shared.b32 %r4, [%r3];"
    for seed in SEEDS:
        assert launch(own + met, [], seed, check="strict").hazards == []


# --- stores of the same bytes, masks that name too few lanes


@pytest.mark.parametrize("place", ["shared", "global"])
def test_stores_of_equal_bytes(place):
    """Compilers let all warps store what they all hold."""
    address = "%s" if place == "shared" else "%P0"
    body = f"""
shr.u32 %r5, %t, 5;
mov.b32 %r5, 7; // FIX
st.{place}.b32 [{address}], %r5; // BUG
"""
    data = [np.zeros(4, np.uint32)]
    for seed in SEEDS:
        (found,) = launch(body, data, seed).hazards
        assert (found.kind, found.severity) == ("equal-stores", "formal")
        caught(drop(body, "FIX"), data, f"{place}-race", seed)


def test_mask_that_names_too_few_lanes():
    """Undefined in PTX. While the whole warp executes it, hardware lets all lanes take part."""
    body = """
mov.b32 %r5, 0x11111111; // BUG
mov.b32 %r5, 0xffffffff; // FIX
shfl.sync.bfly.b32 %r4, %t, 2, 31, %r5; // BUG
mad.wide.u32 %A0, %t, 4, %P0; st.global.b32 [%A0], %r4;
"""
    out = np.zeros(32, np.uint32)
    formal(body, [out], "member-mask", threads=32, alone=True)
    assert np.array_equal(out, np.arange(32) ^ 2)
    half = drop(body, "FIX").replace("0x11111111", "0x1111")
    apart = "setp.ge.u32 %p1, %t, 16; @%p1 bra END;\n" + half + "END:\n"
    caught(apart, [out], "member-mask", threads=32, alone=True)


# --- wgmma


def test_operand_that_drained_before_wgmma_reads_it():
    """Two barriers after the stores no kernel is known to need the proxy fence: formal."""
    body = drop(wgmma_case("").replace("bar.sync 0;", "bar.sync 1, 128; bar.sync 0;"), "FENCE")
    for seed in SEEDS:
        found = launch(body, [], seed, threads=128).hazards
        assert {(h.kind, h.severity) for h in found} == {("missing-proxy-fence", "formal")}
    with pytest.raises(emu.HazardError) as error:
        launch(drop(wgmma_case(""), "FENCE"), [], threads=128)
    assert error.value.hazards[0].kind == "missing-proxy-fence"


def test_wait_of_one_warp_is_for_the_whole_group():
    """A wgmma group is the warpgroup's: over for the warp that waits, over for all four. Kernels
    let one thread free a stage that all of them have read."""
    alone = """wgmma.wait_group.sync.aligned 0;
setp.ge.u32 %p2, %t, 32;
@%p2 bra LATER;
st.shared.b32 [%r1 + 512], 1;
LATER:"""
    for seed in SEEDS:
        launch(wgmma_case(alone), [], seed, threads=128)


# --- one lane that arrives at an mbarrier for its warp

OTHER = "setp.ge.u32 %p2, %t, 32; @%p2 bra OTHER;\n"
ARRIVE = "@%p9 mbarrier.arrive.shared.b64 _, [%r91]; // BUG\n"


def handed_over(first, arrive, then, empty=1):
    """Warp 0 does `first` and `arrive`, warp 1 `then` once the barrier's phase is complete."""
    barriers = (
        BARRIERS.format(empty=empty)
        + "mad.lo.u32 %r1, %t, 4, %s;\nst.shared.b32 [%r1], 0;\nfence.proxy.async;\n"
    )
    wait = removable_wait("L", "%r91").replace(" // WAIT", "")
    return (
        barriers
        + "bar.sync 0;\n"
        + OTHER
        + first
        + arrive
        + "bra END;\nOTHER:"
        + wait
        + then
        + "\nEND:"
    )


SYNC = "bar.warp.sync 0xffffffff; // FIX\n"


@pytest.mark.parametrize(
    "first, then",
    [
        ("st.shared.b32 [%r1], %t; // VICTIM\n", "ld.shared.b32 %r4, [%r1 - 128];"),
        ("st.shared.b32 [%r1], %t; // VICTIM\n", "st.shared.b32 [%r1 - 128], 7;"),
        ("ld.shared.b32 %r4, [%r1]; // VICTIM\n", "st.shared.b32 [%r1 - 128], 7;"),
    ],
)
def test_one_lane_arrives_for_its_warp(first, then):
    formal(handed_over(first, SYNC + ARRIVE, then), [], "early-arrival")


def test_one_lane_arrives_and_a_copy_overwrites():
    first = "ld.shared.b32 %r4, [%r1]; // VICTIM\n"
    then = "setp.eq.u32 %p9, %t, 32;" + LOAD + removable_wait("M", "%r90").replace(" // WAIT", "")
    body = handed_over(first, SYNC + ARRIVE, then)
    for seed in SEEDS:
        args = [np.zeros(64, np.uint32)]
        kinds = {h.kind for h in launch(body, args, seed).hazards}
        assert kinds == {"formal-proxy-order"}
        found = launch(drop(body, "FIX"), args, seed).hazards
        assert {h.kind for h in found} == {"formal-proxy-order", "early-arrival"}


@pytest.mark.parametrize(
    "first, arrive, then, empty",
    [
        ("st.shared.b32 [%r1], %t;", "mbarrier.arrive.shared.b64 _, [%r91];", "ld", 32),
        ("@%p9 st.shared.b32 [%r1], %t;", ARRIVE, "ld.shared.b32 %r4, [%s];", 1),
        ("ld.shared.b32 %r4, [%r1];", ARRIVE, "ld.shared.b32 %r4, [%r1 - 128];", 1),
        ("st.shared.b32 [%r1], %t;", ARRIVE + "bar.sync 1, 64;", "bar.sync 1, 64;ld", 1),
    ],
    ids=["every lane arrives", "its own store", "nobody writes", "a barrier later"],
)
def test_arrival_that_leaves_nothing_out(first, arrive, then, empty):
    then = then if "[" in then else then + ".shared.b32 %r4, [%r1 - 128];"
    body = handed_over(first + "\n", arrive + "\n", then, empty)
    for seed in SEEDS:
        assert launch(body, [], seed, check="strict").hazards == []


# --- a tile of fewer rows than wgmma takes: what lies behind it may change meanwhile


def rows_case(use, offset=1024):
    """A copy overwrites 8 rows of A (rows 32 to 39 for offset 1024: the third warp's) that a
    warpgroup multiplies, and waits for nobody without the FIX; `use` comes after the results."""
    d = ",".join(f"%r{20 + k}" for k in range(4))
    zero = "".join(f"mov.b32 %r{20 + k}, 0;" for k in range(4))
    stores = "".join(f"@!%p2 st.shared.b32 [%r1 + {512 * k}], 0;" for k in range(5))
    fix = removable_wait("E", "%r91").replace("// WAIT", "// FIX")
    load = LOAD.replace("[%s], [%P0]", f"[%s + {offset}], [%P0]") + " // VICTIM"
    done = removable_wait("L", "%r90").replace(" // WAIT", "")
    return (
        BARRIERS.format(empty=128)
        + f"""
setp.ge.u32 %p2, %t, 128; mad.lo.u32 %r1, %t, 4, %s; {stores}
fence.proxy.async;
bar.sync 0;
@%p2 bra COPY;
cvt.u64.u32 %d9, %s; shr.u64 %d9, %d9, 4;
mov.b64 %d0, {128 >> 4 << 16 | 256 >> 4 << 32}; add.u64 %d0, %d0, %d9;
add.u64 %d1, %d0, 128; setp.ne.b32 %p1, 0, 0; {zero}
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{d}}}, %d0, %d1, %p1, 1, 1, 0, 0; // BUG
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
{use}
mbarrier.arrive.shared.b64 _, [%r91];
bra END;
COPY: setp.eq.u32 %p9, %t, 128;{fix}{load}{done}END:"""
    )


USE = "mov.b32 %r60, %r22;"


@pytest.mark.parametrize("use", ["", "setp.lt.u32 %p3, %t, 64; @%p3 " + USE])
def test_race_of_rows_whose_results_nobody_uses(use):
    formal(rows_case(use), [np.zeros(64, np.uint32)], "shared-race", threads=160)


@pytest.mark.parametrize("use", [USE, "setp.eq.u32 %p3, %t, 64; @%p3 " + USE])
def test_race_of_rows_whose_results_are_used(use):
    args = [np.zeros(64, np.uint32)]
    planted(rows_case(use), args, "shared-race", "FIX", threads=160)


def test_race_of_the_first_rows_is_an_error():
    args = [np.zeros(64, np.uint32)]
    planted(rows_case("", 0), args, "shared-race", "FIX", threads=160)
