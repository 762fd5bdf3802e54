"""Loads, stores, addresses, fences, hints and control flow: every form runs and moves its bytes."""

import numpy as np
import pytest

emu = pytest.importorskip("dskernels.emu")
from ptx_kernel import load, results, run, store  # noqa: E402

VECTORS = [("", 1), (".v2", 2), (".v4", 4)]


def vector(reg, n, first=10):
    names = [f"{reg}{first + k}" for k in range(n)]
    return f"{{{','.join(names)}}}" if n > 1 else names[0]


LOADS = [
    *["ld", "ld.weak", "ld.volatile", "ld.relaxed.gpu", "ld.acquire.sys", "ld.relaxed.cta"],
]
STORES = ["st", "st.weak", "st.volatile", "st.relaxed.gpu", "st.release.cluster", "st.release.sys"]


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("vec, n", VECTORS)
def test_loads_and_stores(bits, vec, n):
    if n * bits > 128:
        pytest.skip("wider than 16 bytes")
    reg = {8: "%h", 16: "%h", 32: "%r", 64: "%d"}[bits]
    x = np.random.default_rng(bits).integers(0, 256, 32 * n * bits // 8).astype(np.uint8)
    for ld in LOADS:
        for st in STORES:
            for space in (".global", "", ".shared"):
                out = results(x.shape, np.uint8)
                step = n * bits // 8
                body = f"mad.wide.u32 %A0, %t, {step}, %P0; mad.wide.u32 %A1, %t, {step}, %P1;"
                body += f"{ld}{'.global' if space == '.shared' else space}{vec}.b{bits} "
                body += f"{vector(reg, n)}, [%A0];"
                if space == ".shared":
                    body += f"mad.lo.u32 %r1, %t, {step}, %s;"
                    body += f"{st}.shared{vec}.b{bits} [%r1], {vector(reg, n)};"
                    body += f"{ld}.shared{vec}.b{bits} {vector(reg, n, 20)}, [%r1];"
                    body += f"st.global{vec}.b{bits} [%A1], {vector(reg, n, 20)};"
                else:
                    body += f"{st}{space}{vec}.b{bits} [%A1], {vector(reg, n)};"
                run(body, x, out, shared=1024)
                assert np.array_equal(out, x), (ld, st, space)


def test_sign_and_zero_extension_of_small_loads():
    x = np.arange(0, 256, 8, dtype=np.uint8)
    signed, unsigned = results(32, np.int32), results(32)
    body = "cvt.u64.u32 %d1, %t; add.s64 %d1, %d1, %P0; ld.global.nc.L1::no_allocate.s8 %r1, [%d1];"
    body += "ld.global.ca.u8 %r2, [%d1]; mad.wide.u32 %A1, %t, 4, %P1; st.global.wb.s32 [%A1], %r1;"
    run(body + store("%r2", 2), x, signed, unsigned)
    assert signed.tolist() == x.view(np.int8).tolist() and unsigned.tolist() == x.tolist()


def test_mapped_io_and_hints():
    x, out = np.arange(32, dtype=np.uint32), results(32)
    body = "createpolicy.fractional.L2::evict_last.b64 %d1, 0.5;"
    body += "createpolicy.range.global.L2::evict_last.L2::evict_first.b64 %d2, [%P0], 64, 128;"
    body += "createpolicy.cvt.L2.b64 %d3, %d1; mad.wide.u32 %A0, %t, 4, %P0;"
    body += "prefetch.global.L2 [%A0]; prefetch.global.L2::evict_last [%A0]; prefetchu.L1 [%A0];"
    body += "discard.global.L2 [%P1], 128; applypriority.global.L2::evict_normal [%P0], 128;"
    body += "ld.mmio.relaxed.sys.global.u32 %r1, [%A0]; mad.wide.u32 %A1, %t, 4, %P1;"
    body += "ld.global.L2::cache_hint.u32 %r2, [%A0], %d1; add.u32 %r1, %r1, %r2;"
    body += "st.mmio.relaxed.sys.global.u32 [%A1], %r1;"
    run(body, x, out)
    assert np.array_equal(out, 2 * x)


def test_addresses():
    out = results(32)
    body = "cvt.u64.u32 %d1, %s; cvta.shared.u64 %d2, %d1; cvta.to.shared.u64 %d3, %d2;"
    body += "sub.s64 %d4, %d3, %d1; cvt.u32.u64 %r1, %d4; isspacep.shared %p1, %d2;"
    body += "isspacep.global %p2, %d2; isspacep.global %p3, %P0; isspacep.local %p4, %d2;"
    body += "cvta.to.global.u64 %d5, %P0; cvta.global.u64 %d5, %d5; setp.eq.u64 %p5, %d5, %P0;"
    for k, weight in enumerate((1, 2, 4, 8, 16), 1):
        body += f"@%p{k} add.u32 %r1, %r1, {weight};"
    run(body + store("%r1", 0), out, shared=16)
    assert (out == 1 + 4 + 16).all()


def test_generic_accesses_reach_shared_memory():
    out = results(32)
    body = "mad.lo.u32 %r1, %t, 4, %s; cvt.u64.u32 %d1, %r1; cvta.shared.u64 %d2, %d1;"
    body += "st.b32 [%d2], %t; ld.shared.b32 %r2, [%r1]; atom.add.u32 %r3, [%d2], 5;"
    body += "ld.b32 %r4, [%d2]; add.u32 %r4, %r4, %r2;"
    run(body + store("%r4", 0), out, shared=128)
    assert out.tolist() == [2 * t + 5 for t in range(32)]


FENCES = [
    *[f"fence{kind}.{scope}" for kind in ("", ".sc", ".acq_rel") for scope in ("cta", "gpu", "sys")],
    "fence.acquire.cluster", "fence.release.gpu", "fence.mbarrier_init.release.cluster",
    "fence.acquire.sync_restrict::shared::cluster.cluster",
    "fence.release.sync_restrict::shared::cta.cluster", "fence.proxy.alias", "fence.proxy.async",
    "fence.proxy.async.global", "fence.proxy.async.shared::cta",
    "fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster",
    "fence.proxy.tensormap::generic.release.gpu", "membar.cta", "membar.gl", "membar.sys",
    "membar.proxy.alias",
]  # fmt: skip


def test_fences_publish_a_flag():
    """Each fence between a store and a flag; then all are passed without an effect on values."""
    out = results(32)
    for fence in FENCES:
        body = f"mad.lo.u32 %r1, %t, 4, %s; st.shared.b32 [%r1], %t; {fence}; bar.sync 0;"
        body += "xor.b32 %r2, %t, 1; mad.lo.u32 %r2, %r2, 4, %s; ld.shared.b32 %r3, [%r2];"
        run(body + store("%r3", 0), out, shared=128)
        assert out.tolist() == [t ^ 1 for t in range(32)], fence


def test_message_passing_with_release_and_acquire():
    out = results(1)
    body = "setp.ge.u32 %p1, %t, 32; @%p1 bra CONSUMER; setp.ne.u32 %p2, %t, 0; @%p2 ret;"
    body += "st.shared.b32 [%s], 41; st.release.cta.shared.b32 [%s + 4], 1; ret; CONSUMER:"
    body += "setp.ne.u32 %p2, %t, 32; @%p2 ret; LOOP: ld.acquire.cta.shared.b32 %r1, [%s + 4];"
    body += "setp.ne.u32 %p3, %r1, 1; @%p3 bra LOOP; ld.shared.b32 %r2, [%s]; st.global.b32 [%P0], %r2;"
    body = "setp.eq.u32 %p4, %t, 0; @%p4 st.shared.b32 [%s + 4], 0; bar.sync 0;" + body
    for seed in (None, 0, 1, 2):
        run(body, out, threads=64, shared=16, seed=seed)
        assert out[0] == 41


def test_control_flow_without_effect_on_results():
    out = results(32)
    body = "setmaxnreg.dec.sync.aligned.u32 40; setmaxnreg.inc.sync.aligned.u32 80; nanosleep.u32 20;"
    body += "pmevent 3; griddepcontrol.wait; griddepcontrol.launch_dependents;"
    body += "setp.lt.u32 %p1, %t, 8; mov.b32 %r1, 1; @%p1 bra LOW; bra.uni JOIN; LOW: mov.b32 %r1, 2;"
    body += "JOIN:" + store("%r1", 0) + "setp.lt.u32 %p1, %t, 4; @%p1 exit; add.u32 %r1, %r1, 5;"
    run(body + store("%r1", 0), out, threads=32)
    assert out.tolist() == [2] * 4 + [7] * 4 + [6] * 24


def test_calls_are_inlined():
    extra = """
.func (.param .b32 result) twice(.param .b32 x) {
.reg .b32 %v; ld.param.b32 %v, [x]; add.u32 %v, %v, %v; st.param.b32 [result], %v; ret;
}
"""
    call = "{{ .param .b32 x; .param .b32 y; st.param.b32 [x], {}; {} (y), twice, (x); "
    call += "ld.param.b32 {}, [y]; }}"
    body = call.format("%t", "call", "%r2") + call.format("%r2", "call.uni", "%r3")
    out = results(32)
    run(body + store("%r3", 0), out, extra=extra)
    assert out.tolist() == [4 * t for t in range(32)]


def test_float_literals():
    """Hexadecimal bits and decimal numbers, negated and narrowed to the operand's type."""
    out = results(3, np.float32)
    for k, text in enumerate(["-0f3FC00000", "-2.5E-1", "0d3FD0000000000000"]):
        run(f"mov.f32 %r1, {text}; st.global.b32 [%P0 + {4 * k}], %r1;", out)
    assert out.tolist() == [-1.5, -0.25, 0.25]
    wide = results(2, np.float64)
    run("mov.f64 %d1, -1.0e+2; mov.f64 %d2, 12.5; st.global.v2.b64 [%P0], {%d1, %d2};", wide)
    assert wide.tolist() == [-100.0, 12.5]


@pytest.mark.parametrize("what", ["trap", "brkpt"])
def test_trap(what):
    with pytest.raises(emu.HazardError) as e:
        run(f"setp.eq.u32 %p1, %t, 3; @%p1 {what};")
    assert e.value.hazards[0].kind == "trap"


def test_vectors_packed_and_unpacked_by_mov():
    x, out = np.arange(32, dtype=np.uint32) * 0x01020304, results(32)
    body = load("%r1", 0) + "mov.b32 {%h1, %h2}, %r1; mov.b32 %r2, {%h2, %h1};"
    body += "mov.b64 %d1, {%r1, %r2}; mov.b64 {%r3, %r4}, %d1; xor.b32 %r3, %r3, %r4;"
    run(body + store("%r3", 1), x, out)
    assert np.array_equal(out, x ^ (x >> 16 | x << 16))
