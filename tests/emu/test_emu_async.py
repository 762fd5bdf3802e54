"""Asynchronous copies and mbarriers against NumPy: cp.async, bulk and tensor copies, st.async."""

import itertools

import numpy as np
import pytest

emu = pytest.importorskip("dskernels.emu")
from ptx_kernel import fill_shared, results, run, store  # noqa: E402

SEEDS = [None, 0, 1]
BAR = "add.u32 %r90, %s, 4096; setp.eq.u32 %p9, %t, 0;"
INIT = BAR + "@%p9 mbarrier.init.shared.b64 [%r90], {count}; fence.mbarrier_init.release.cluster;"
CLUSTER_SYNC = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"


def wait(parity=0, label="WAIT", form="try_wait.parity"):
    return f"{label}: mbarrier.{form}.shared::cta.b64 %p8, [%r90], {parity}; @!%p8 bra {label};\n"


def dump(words, pointer, threads=32):
    """PTX that copies shared words from offset 0 to a parameter's array."""
    out = "bar.sync 0;"
    for start in range(0, words, threads):
        out += f"add.u32 %r80, %t, {start}; mad.lo.u32 %r81, %r80, 4, %s; ld.shared.b32 %r82, [%r81];"
        out += store("%r82", pointer, index="%r80")
    return out


# --- cp.async


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async(size, seed):
    x = np.random.default_rng(1).integers(0, 2**32, 32 * size // 4, dtype=np.uint64)
    x, out = x.astype(np.uint32), results(32 * size // 4)
    cop = "cg" if size == 16 else "ca"
    body = f"mad.wide.u32 %A0, %t, {size}, %P0; mad.lo.u32 %r1, %t, {size}, %s;"
    body += f"cp.async.{cop}.shared.global.L2::128B [%r1], [%A0], {size};"
    body += "cp.async.commit_group; cp.async.wait_group 0;" + dump(len(x), 1)
    run(body, x, out, shared=1024, seed=seed)
    assert np.array_equal(out, x)


def test_cp_async_zero_fill_and_ignored_source():
    x, out = np.arange(1, 129, dtype=np.uint32), results(128)
    body = "mad.wide.u32 %A0, %t, 16, %P0; mad.lo.u32 %r1, %t, 16, %s; and.b32 %r2, %t, 3;"
    body += "shl.b32 %r3, %r2, 2; setp.eq.u32 %p2, %t, 7; @%p2 bra IGNORE;"
    body += "cp.async.cg.shared.global [%r1], [%A0], 16, %r3; bra JOIN; IGNORE:"
    body += "cp.async.ca.shared.global [%r1], [%A0], 16, %p2; JOIN:"
    run(body + "cp.async.wait_all;" + dump(128, 1), x, out, shared=1024)
    want = x.reshape(32, 4) * (np.arange(4) < (np.arange(32) % 4)[:, None])
    want[7] = 0
    assert np.array_equal(out.reshape(32, 4), want)


@pytest.mark.parametrize("seed", SEEDS)
def test_cp_async_groups_in_order(seed):
    x, out = np.arange(96, dtype=np.uint32), results(32)
    body = "mad.wide.u32 %A0, %t, 4, %P0; mad.lo.u32 %r1, %t, 4, %s;"
    for k in range(3):
        body += f"cp.async.ca.shared.global [%r1 + {128 * k}], [%A0 + {128 * k}], 4;"
        body += "cp.async.commit_group;"
    body += "cp.async.wait_group 1; ld.shared.b32 %r2, [%r1]; ld.shared.b32 %r3, [%r1 + 128];"
    run(body + "add.u32 %r2, %r2, %r3;" + store("%r2", 1), x, out, shared=1024, seed=seed)
    assert np.array_equal(out, x[:32] + x[32:64])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("noinc, count", [(".noinc", 64), ("", 1)])
def test_cp_async_arrives_at_an_mbarrier(noinc, count, seed):
    x, out = np.arange(64, dtype=np.uint32), results(64)
    body = INIT.format(count=count) + "bar.sync 0; mad.wide.u32 %A0, %t, 4, %P0;"
    body += "mad.lo.u32 %r1, %t, 4, %s; cp.async.ca.shared.global [%r1], [%A0], 4;"
    body += f"cp.async.mbarrier.arrive{noinc}.shared.b64 [%r90];"
    if not noinc:  # the pending count grew by one a thread: one arrival is left
        body += "bar.sync 0; @%p9 mbarrier.arrive.shared.b64 _, [%r90];"
    body += wait() + "xor.b32 %r2, %t, 32; mad.lo.u32 %r3, %r2, 4, %s; ld.shared.b32 %r4, [%r3];"
    run(body + store("%r4", 1, index="%r2"), x, out, threads=64, shared=8192, seed=seed)
    assert np.array_equal(out, x)


# --- bulk copies


@pytest.mark.parametrize("seed", SEEDS)
def test_bulk_load_and_store(seed):
    x, out = np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
    body = INIT.format(count=1) + "bar.sync 0; createpolicy.fractional.L2::evict_first.b64 %d1;"
    body += "@!%p9 bra END; mbarrier.arrive.expect_tx.shared.b64 _, [%r90], 1024;"
    body += "cp.async.bulk.prefetch.L2.global [%P0], 1024;"
    body += "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
    body += "[%s], [%P0], 1024, [%r90], %d1;" + wait()
    body += "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%P1], [%s], 512, %d1;"
    body += "add.u64 %d2, %P1, 512; add.u32 %r3, %s, 512;"
    body += "cp.async.bulk.global.shared::cta.bulk_group [%d2], [%r3], 512;"
    body += "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END:"
    run(body, x, out, shared=8192, seed=seed)
    assert np.array_equal(out, x)


@pytest.mark.parametrize("seed", SEEDS)
def test_bulk_multicast(seed):
    x, out = np.arange(64, dtype=np.uint32), results((4, 64))
    body = INIT.format(count=1) + CLUSTER_SYNC
    body += "@%p9 mbarrier.arrive.expect_tx.shared.b64 _, [%r90], 256;"
    body += "setp.eq.u32 %p1, %c, 2; and.pred %p1, %p1, %p9; mov.b16 %h1, 0xf;"
    body += "@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    body += ".multicast::cluster [%s], [%P0], 256, [%r90], %h1;" + wait()
    body += "mad.wide.u32 %P1, %c, 256, %P1;" + dump(64, 1) + CLUSTER_SYNC
    run(body, x, out, grid=4, cluster=4, shared=8192, seed=seed)
    assert np.array_equal(out, np.tile(x, (4, 1)))


@pytest.mark.parametrize("seed", SEEDS)
def test_bulk_copy_to_another_cta(seed):
    x, out = np.arange(64, dtype=np.uint32), results((2, 64))
    body = INIT.format(count=1) + CLUSTER_SYNC + fill_shared(0, 256, 32)
    body += "@%p9 mbarrier.arrive.expect_tx.shared.b64 _, [%r90], 256;"
    body += "xor.b32 %r10, %c, 1; mapa.shared::cluster.u32 %r11, %s, %r10; add.u32 %r11, %r11, 512;"
    body += "mapa.shared::cluster.u32 %r12, %r90, %r10;"
    body += "mad.lo.u32 %r13, %t, 4, %s; ld.shared.b32 %r14, [%r13]; mad.lo.u32 %r14, %c, 1000, %r14;"
    body += "st.shared.b32 [%r13], %r14; add.u32 %r14, %r14, 32; st.shared.b32 [%r13 + 128], %r14;"
    body += "fence.proxy.async; bar.sync 0; setp.ne.u32 %p7, %t, 0; @%p7 bra NEXT;"
    body += "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
    body += "[%r11], [%s], 256, [%r12]; NEXT:" + wait() + "add.u32 %s, %s, 512;"
    body += "mad.wide.u32 %P1, %c, 256, %P1;" + dump(64, 1) + CLUSTER_SYNC
    run(body, x, out, grid=2, cluster=2, shared=8192, seed=seed)
    assert np.array_equal(out, np.stack([x + 1000, x]))


REDUCTIONS = {
    "add": lambda a, b: a + b,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "inc": lambda a, b: np.where(a >= b, 0, a + 1),
    "dec": lambda a, b: np.where((a == 0) | (a > b), b, a - 1),
}
BULK_REDUCE = [
    *[(op, "uint32", "u32") for op in ("add", "min", "max", "inc", "dec")],
    *[(op, "int32", "s32") for op in ("add", "min", "max")],
    *[(op, "uint64", "u64") for op in ("add", "min", "max")],
    *[(op, "int64", "s64") for op in ("min", "max")],
    *[(op, "uint32", "b32") for op in ("and", "or", "xor")],
    *[(op, "uint64", "b64") for op in ("and", "or", "xor")],
    *[("add", f"float{b}", f"f{b}") for b in (32, 64)],
    *[(op, "float16", "f16") for op in ("add", "min", "max")],
]


@pytest.mark.parametrize("op, dtype, t", BULK_REDUCE)
def test_bulk_reduction(op, dtype, t):
    rng = np.random.default_rng([*op.encode(), *t.encode()])
    low = -20 if dtype[0] in "if" else 0
    a, b = (rng.integers(low, 50, 64).astype(dtype) for _ in range(2))
    out, noftz = a.copy(), ".noftz" if t == "f16" and op == "add" else ""
    body = fill_shared(0, b.nbytes, 32) + "setp.eq.u32 %p9, %t, 0; @!%p9 bra END;"
    body += f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{op}{noftz}.{t} [%P1], [%s], "
    body += f"{b.nbytes}; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END:"
    run(body, b, out, shared=1024)
    assert np.array_equal(out, REDUCTIONS[op](a, b).astype(dtype))


# --- tensor copies


def map_bytes(tensor_map):
    """A 64-byte aligned copy of a map, as a kernel finds it in global memory."""
    buffer = np.zeros(256, np.uint8)
    start = -buffer.ctypes.data % 64
    view = buffer[start : start + 128]
    view[...] = np.frombuffer(tensor_map.data, np.uint8)
    return view


def box_of(x, origin, box, fill=0):
    """The box of x at origin, with `fill` outside."""
    out = np.full(box, fill, x.dtype)
    for index in itertools.product(*[range(b) for b in box]):
        at = tuple(o + k for o, k in zip(origin, index, strict=True))
        if all(0 <= v < n for v, n in zip(at, x.shape, strict=True)):
            out[index] = x[at]
    return out


SHAPES = {1: ((40,), (16,)), 2: ((9, 12), (4, 8)), 3: ((5, 6, 8), (2, 3, 4)),
          4: ((3, 4, 5, 8), (2, 2, 3, 4)), 5: ((2, 3, 2, 3, 8), (1, 2, 2, 2, 4))}  # fmt: skip


def coordinates(origin):
    return "{" + ", ".join(str(c) for c in reversed(origin)) + "}"


def tensor_load(rank, origin, bytes_, extra=""):
    return (
        f"@%p9 mbarrier.arrive.expect_tx.shared.b64 _, [%r90], {bytes_};"
        f"@%p9 cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile"
        f".mbarrier::complete_tx::bytes{extra} [%s], [%P0, {coordinates(origin)}], [%r90]"
        + (", %h1;" if extra else ";")
    )


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("where", ["inside", "before", "beyond"])
def test_tensor_load(rank, where):
    shape, box = SHAPES[rank]
    x = np.arange(1, 1 + np.prod(shape), dtype=np.uint32).reshape(shape)
    origin = [
        {"inside": n - b, "before": -1, "beyond": n - b + 1}[where]
        for n, b in zip(shape, box, strict=True)
    ]
    n = int(np.prod(box))
    out = results(-(-n // 32) * 32)
    body = "prefetch.tensormap [%P0];" + INIT.format(count=1) + "bar.sync 0;"
    body += f"cp.async.bulk.prefetch.tensor.{rank}d.L2.global.tile [%P0, {coordinates(origin)}];"
    body += tensor_load(rank, origin, 4 * n) + wait() + dump(n, 2)
    run(body, map_bytes(emu.tensor_map(x, box)), x, out, shared=8192)
    assert np.array_equal(out[:n].reshape(box), box_of(x, origin, box))


@pytest.mark.parametrize("seed", SEEDS)
def test_tensor_multicast_halves(seed):
    """Each of two CTAs loads one half for both, as a cluster's GEMM does."""
    x, out = np.arange(128, dtype=np.uint32).reshape(8, 16), results((2, 64))
    body = INIT.format(count=1) + CLUSTER_SYNC + "mov.b16 %h1, 3; mad.lo.u32 %s, %c, 128, %s;"
    body += tensor_load(2, (0, 0), 256, ".multicast::cluster").replace("{0, 0}", "{0, %r70}")
    body = body.replace("mov.b16 %h1", "shl.b32 %r70, %c, 1; mov.b16 %h1") + wait()
    body += "mov.u32 %s, sm; mad.wide.u32 %P2, %c, 256, %P2;" + dump(64, 2) + CLUSTER_SYNC
    run(body, map_bytes(emu.tensor_map(x, (2, 16))), x, out, grid=2, cluster=2, shared=8192, seed=seed)
    assert np.array_equal(out.reshape(2, 4, 16), np.stack([x[:4], x[:4]]))


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("op", ["", "add", "min", "max", "xor"])
def test_tensor_store_and_reduction(rank, op):
    shape, box = SHAPES[rank]
    x = np.arange(7, 7 + np.prod(shape), dtype=np.uint32).reshape(shape)
    n = int(np.prod(box))
    data = (np.arange(n, dtype=np.uint32) * 3).reshape(box)
    origin = [v - b + (k == 0) for k, (v, b) in enumerate(zip(shape, box, strict=True))]
    out = x.copy()
    name = f"cp.reduce.async.bulk.tensor.{rank}d" if op else f"cp.async.bulk.tensor.{rank}d"
    body = fill_shared(2, data.nbytes, 32) + "setp.eq.u32 %p9, %t, 0; @!%p9 bra END;"
    body += f"{name}.global.shared::cta{'.' + op if op else ''}.tile.bulk_group "
    body += f"[%P0, {coordinates(origin)}], [%s];"
    body += "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END:"
    run(body, map_bytes(emu.tensor_map(out, box)), out, data, shared=8192)
    want = x.copy()
    for index in itertools.product(*[range(b) for b in box]):
        at = tuple(o + k for o, k in zip(origin, index, strict=True))
        if all(0 <= v < m for v, m in zip(at, shape, strict=True)):
            want[at] = REDUCTIONS[op](x[at], data[index]) if op else data[index]
    assert np.array_equal(out, want)


def test_tensormap_replace_and_publish():
    """Turns a map of one matrix into a map of a part of another, as grouped kernels do."""
    first = np.zeros((8, 16), np.uint32)
    x, out = np.arange(12 * 32, dtype=np.uint32).reshape(12, 32), results(32)
    body = INIT.format(count=1) + fill_shared(0, 128, 32) + "@!%p9 bra EDITED;"
    edit = "tensormap.replace.tile.{}.shared::cta.b1024.{} [%s]{};"
    body += edit.format("global_address", "b64", ", %P1")
    body += edit.format("global_dim", "b32", ", 0, 32") + edit.format("global_dim", "b32", ", 1, 5")
    body += "mov.b64 %d3, 128;" + edit.format("global_stride", "b64", ", 0, %d3")
    body += edit.format("box_dim", "b32", ", 0, 8") + edit.format("box_dim", "b32", ", 1, 4")
    body += edit.format("element_stride", "b32", ", 1, 1") + edit.format("rank", "b32", ", 1")
    body += edit.format("elemtype", "b32", ", 2") + edit.format("swizzle_mode", "b32", ", 0")
    body += edit.format("fill_mode", "b32", ", 0") + edit.format("interleave_layout", "b32", ", 0")
    body += "EDITED: bar.warp.sync 0xffffffff;"
    body += "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned "
    body += "[%P2], [%s], 128; fence.proxy.tensormap::generic.acquire.gpu [%P2], 128;"
    body += "fence.proxy.async; bar.sync 0; mov.b64 %P0, %P2;"
    body += tensor_load(2, (3, 8), 128) + wait() + dump(32, 3)
    target = map_bytes(emu.tensor_map(first, (4, 16)))
    target[...] = 0
    run(body, map_bytes(emu.tensor_map(first, (4, 16))), x, target, out, shared=8192)
    assert np.array_equal(out.reshape(4, 8), box_of(x[:5], (3, 8), (4, 8)))


# --- st.async, red.async


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("form, n", [("b32", 1), ("v2.b32", 2), ("v4.u32", 4), ("b64", 1), ("v2.s64", 2)])
def test_st_async(form, n, seed):
    reg, size = ("%d", 8) if "64" in form else ("%r", 4)
    words = 32 * n * size // 4
    x, out = np.arange(words, dtype=np.uint32), results((2, words))
    body = INIT.format(count=1) + f"@%p9 mbarrier.arrive.expect_tx.shared.b64 _, [%r90], {4 * words};"
    body += CLUSTER_SYNC + "xor.b32 %r10, %c, 1; mapa.shared::cluster.u32 %r11, %s, %r10;"
    body += f"mapa.shared::cluster.u32 %r12, %r90, %r10; mad.lo.u32 %r11, %t, {n * size}, %r11;"
    body += f"mad.wide.u32 %A0, %t, {n * size}, %P0;"
    values = [f"{reg}{20 + k}" for k in range(n)]
    for k in range(n):
        body += f"ld.global.b{8 * size} {values[k]}, [%A0 + {k * size}];"
    operand = f"{{{','.join(values)}}}" if n > 1 else values[0]
    body += f"st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.{form} [%r11], {operand}, "
    body += "[%r12];" + wait() + f"mad.wide.u32 %P1, %c, {4 * words}, %P1;" + dump(words, 1)
    run(body + CLUSTER_SYNC, x, out, grid=2, cluster=2, shared=8192, seed=seed)
    assert np.array_equal(out, np.stack([x, x]))


@pytest.mark.parametrize("op, t", [*[("add", t) for t in ("u32", "s32", "u64")],
    ("min", "u32"), ("max", "s32"), ("inc", "u32"), ("dec", "u32"), ("and", "b32"), ("or", "b32"),
    ("xor", "b32")])  # fmt: skip
def test_red_async(op, t):
    size = int(t[1:]) // 8
    dtype = f"u{size}"
    x, start = (np.arange(32) * 5 % 37).astype(dtype), (np.arange(32) * 3 % 31).astype(dtype)
    out, words = results((2, 32), dtype), 8 * size
    reg = "%d" if size == 8 else "%r"
    body = INIT.format(count=1) + f"@%p9 mbarrier.arrive.expect_tx.shared.b64 _, [%r90], {32 * size};"
    body += fill_shared(1, 32 * size, 32) + CLUSTER_SYNC + "xor.b32 %r10, %c, 1;"
    body += "mapa.shared::cluster.u32 %r11, %s, %r10; mapa.shared::cluster.u32 %r12, %r90, %r10;"
    body += f"mad.lo.u32 %r11, %t, {size}, %r11; mad.wide.u32 %A0, %t, {size}, %P0;"
    body += f"ld.global.b{8 * size} {reg}20, [%A0];"
    body += "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes"
    body += f".{op}.{t} [%r11], {reg}20, [%r12];" + wait()
    body += f"mad.wide.u32 %P2, %c, {4 * words}, %P2;" + dump(words, 2) + CLUSTER_SYNC
    run(body, x, start, out, grid=2, cluster=2, shared=8192)
    want = REDUCTIONS[op](start, x).astype(dtype)
    assert np.array_equal(out, np.stack([want, want]))


# --- mbarriers


def test_mbarrier_states():
    """Tokens, counts, drops and transactions, step by step in one thread."""
    out, pending = results(8), results(2)
    body = INIT.format(count=5) + "@!%p9 ret; mov.b32 %r20, 0;"

    def probe(slot, token="%d1", form="test_wait"):
        return (
            f"mbarrier.{form}.shared.b64 %p1, [%r90], {token}; selp.b32 %r1, 1, 0, %p1;"
            f"st.global.b32 [%P0 + {4 * slot}], %r1;"
        )

    body += "mbarrier.arrive.shared.b64 %d1, [%r90]; mbarrier.pending_count.b64 %r2, %d1;"
    body += "st.global.b32 [%P1], %r2;" + probe(0)
    body += "mbarrier.arrive.noComplete.shared.b64 %d2, [%r90], 2; mbarrier.pending_count.b64 %r2, %d2;"
    body += "st.global.b32 [%P1 + 4], %r2; mbarrier.arrive_drop.shared.b64 %d3, [%r90];" + probe(1)
    body += "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r90], 24;"
    body += "mbarrier.arrive.release.cta.shared::cta.b64 _, [%r90];" + probe(2)
    body += "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r90], 24;" + probe(3)
    body += probe(4, "0", "test_wait.parity") + probe(5, "1", "test_wait.parity")
    # The second phase expects four: one dropped.
    body += "mbarrier.arrive.shared.b64 %d4, [%r90], 4;" + probe(6, "%d4", "try_wait")
    body += "mbarrier.arrive_drop.noComplete.shared.b64 %d4, [%r90], 3;"
    body += "mbarrier.arrive_drop.expect_tx.shared.b64 %d4, [%r90], 0;"
    body += probe(7, "%d4", "try_wait.acquire.cta") + "mbarrier.inval.shared.b64 [%r90];"
    run(body, out, pending, shared=8192)
    assert out.tolist() == [0, 0, 0, 1, 1, 0, 1, 1]
    assert pending.tolist() == [5, 4]


def test_try_wait_with_a_time_limit_gives_up():
    out = results(1)
    body = INIT.format(count=1) + "@!%p9 ret; mbarrier.try_wait.parity.shared.b64 %p1, [%r90], 0, 100;"
    run(body + "selp.b32 %r1, 1, 0, %p1; st.global.b32 [%P0], %r1;", out, shared=8192)
    assert out[0] == 0
