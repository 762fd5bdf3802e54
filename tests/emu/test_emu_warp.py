"""Instructions between the lanes of a warp, the threads of a block and through memory words."""

import numpy as np
import pytest

emu = pytest.importorskip("dskernels.emu")
from ptx_kernel import load, results, run, store  # noqa: E402

LANES = np.arange(32)


def shuffled(mode, lane, b, c):
    """Source lane and predicate of shfl, from PTX's pseudocode."""
    bval, cval, seg = b & 31, c & 31, c >> 8 & 31
    low, high = lane & seg, (lane & seg) | (cval & ~seg)
    j = {"up": lane - bval, "down": lane + bval, "bfly": lane ^ bval, "idx": low | bval & ~seg}
    ok = j[mode] >= high if mode == "up" else j[mode] <= high
    return (j[mode] if ok else lane), ok


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode):
    x = np.random.default_rng(1).integers(0, 2**32, 32, dtype=np.uint64).astype(np.uint32)
    for b in (0, 1, 3, 8, 17, 31):
        for c in (0, 31, 0x1800 | 7, 0x1F1F, 0x1000 | 15, 0x181F):
            out, ok = results(32), results(32)
            body = load("%r1", 0) + f"shfl.sync.{mode}.b32 %r2|%p1, %r1, {b}, {c}, 0xffffffff;"
            run(body + "selp.b32 %r3, 1, 0, %p1;" + store("%r2", 1) + store("%r3", 2), x, out, ok)
            want = [shuffled(mode, lane, b, c) for lane in range(32)]
            assert out.tolist() == [int(x[j]) for j, _ in want], (b, c)
            assert ok.tolist() == [int(p) for _, p in want], (b, c)


def test_shfl_with_an_index_per_lane_and_half_of_the_warp():
    x = (LANES * 7 + 3).astype(np.uint32)
    index = ((LANES * 5 + 1) % 16).astype(np.uint32)
    out = results(32)
    body = load("%r1", 0) + load("%r2", 1) + "mov.b32 %r3, 0; setp.lt.u32 %p1, %t, 16;"
    body += "@%p1 shfl.sync.idx.b32 %r3, %r1, %r2, 31, 0xffff;" + store("%r3", 2)
    run(body, x, index, out)
    assert np.array_equal(out, np.where(LANES < 16, x[index], 0))


@pytest.mark.parametrize("members", [0xFFFFFFFF, 0x0F0F0F0F, 1 << 31])
def test_vote(members):
    inside = (members >> LANES & 1).astype(bool)
    for x in (LANES % 3, LANES * 0, LANES * 0 + 1):
        x = x.astype(np.uint32)
        outs = [results(32) for _ in range(4)]
        body = load("%r1", 0) + load("%r2", 1) + "setp.ne.b32 %p1, %r1, 0; setp.ne.b32 %p2, %r2, 0;"
        body += "@!%p2 bra END;"
        for k, mode in enumerate(["all", "any", "uni"]):
            body += f"vote.sync.{mode}.pred %p3, %p1, {members}; selp.b32 %r3, 1, 0, %p3;"
            body += store("%r3", 2 + k)
        body += f"vote.sync.ballot.b32 %r3, !%p1, {members};" + store("%r3", 5) + "END:"
        run(body, x, inside.astype(np.uint32), *outs)
        hits = x[inside] != 0
        want = [hits.all(), hits.any(), hits.all() or not hits.any()]
        for out, w in zip(outs, want, strict=False):
            assert (out[inside] == int(w)).all()
        ballot = sum(1 << int(k) for k in LANES[inside] if x[k] == 0)
        assert (outs[3][inside] == ballot).all()


@pytest.mark.parametrize("bits", [32, 64])
def test_match(bits):
    members = 0x7FFFFFFE
    inside = (members >> LANES & 1).astype(bool)
    for x in (LANES // 5 + (LANES % 2 << 31), LANES * 0 + 9):
        x = x.astype(f"u{bits // 8}")
        any_, all_, p = results(32), results(32), results(32)
        body = load("%r1" if bits == 32 else "%d1", 0, bits)
        reg = "%r1" if bits == 32 else "%d1"
        body += "sub.u32 %r5, %t, 1; setp.ge.u32 %p2, %r5, 30; @%p2 bra END;"
        body += f"match.any.sync.b{bits} %r2, {reg}, {members};" + store("%r2", 1)
        body += f"match.all.sync.b{bits} %r2|%p1, {reg}, {members};" + store("%r2", 2)
        body += "selp.b32 %r3, 1, 0, %p1;" + store("%r3", 3) + "END:"
        run(body, x, any_, all_, p)
        for lane in LANES[inside]:
            same = sum(1 << int(k) for k in LANES[inside] if x[k] == x[lane])
            assert any_[lane] == same
            assert all_[lane] == (members if same == members else 0)
            assert p[lane] == int(same == members)


def test_redux():
    x = np.random.default_rng(2).integers(0, 2**32, 32, dtype=np.uint64).astype(np.uint32)
    signed = x.view(np.int32)
    want = {
        "add.u32": int(x.astype(np.uint64).sum()) & 0xFFFFFFFF,
        "add.s32": int(x.astype(np.uint64).sum()) & 0xFFFFFFFF,
        "min.u32": int(x.min()),
        "max.u32": int(x.max()),
        "min.s32": int(signed.min()) & 0xFFFFFFFF,
        "max.s32": int(signed.max()) & 0xFFFFFFFF,
        "and.b32": int(np.bitwise_and.reduce(x)),
        "or.b32": int(np.bitwise_or.reduce(x)),
        "xor.b32": int(np.bitwise_xor.reduce(x)),
    }
    for op, value in want.items():
        out = results(32)
        run(load("%r1", 0) + f"redux.sync.{op} %r2, %r1, 0xffffffff;" + store("%r2", 1), x, out)
        assert (out == value).all(), op
    out = results(32)
    body = load("%r1", 0) + "setp.ge.u32 %p1, %t, 28; mov.b32 %r2, 0;"
    run(body + "@%p1 redux.sync.min.u32 %r2, %r1, 0xf0000000;" + store("%r2", 1), x, out)
    assert (out[28:] == x[28:].min()).all()


def test_elect_and_activemask():
    one, leader, active = results(32), results(32), results(32)
    body = "setp.ge.u32 %p1, %t, 9; mov.b32 %r1, 0; mov.b32 %r2, 77; mov.b32 %r4, 0;"
    body += "@!%p1 bra END; elect.sync %r2|%p2, 0xfffffe00; selp.b32 %r1, 1, 0, %p2;"
    body += "activemask.b32 %r4; bar.warp.sync 0xfffffe00;"
    run(body + "END:" + store("%r1", 0) + store("%r2", 1) + store("%r4", 2), one, leader, active)
    assert one.tolist() == [0] * 9 + [1] + [0] * 22
    assert leader.tolist() == [77] * 9 + [9] * 23
    assert active.tolist() == [0] * 9 + [0xFFFFFE00] * 23


# --- block barriers


@pytest.mark.parametrize("prefix", ["bar", "bar.cta", "barrier", "barrier.cta"])
@pytest.mark.parametrize("seed", [None, 3])
def test_barrier_reductions(prefix, seed):
    aligned = ".aligned" if prefix.startswith("barrier") else ""
    x = (np.arange(96) % 7 == 3).astype(np.uint32)
    outs = [results(96) for _ in range(3)]
    body = load("%r1", 0) + "setp.ne.b32 %p1, %r1, 0;"
    body += f"{prefix}.red.popc{aligned}.u32 %r2, 1, %p1;" + store("%r2", 1)
    for k, op in enumerate(["and", "or"]):
        body += f"{prefix}.red.{op}{aligned}.pred %p2, 2, 96, !%p1; selp.b32 %r2, 1, 0, %p2;"
        body += store("%r2", 2 + k)
    run(body, x, *outs, threads=96, seed=seed)
    assert (outs[0] == x.sum()).all() and (outs[1] == 0).all() and (outs[2] == 1).all()


@pytest.mark.parametrize("prefix", ["bar", "bar.cta", "barrier", "barrier.cta"])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_producer_arrives_consumer_syncs(prefix, seed):
    out = results(32)
    body = "setp.ge.u32 %p1, %t, 32; @%p1 bra PRODUCER;"
    body += f"{prefix}.sync 1, 64; mad.lo.u32 %r1, %t, 4, %s; ld.shared.b32 %r2, [%r1];"
    body += store("%r2", 0) + "ret; PRODUCER: sub.u32 %r3, %t, 32; mad.lo.u32 %r1, %r3, 4, %s;"
    body += f"st.shared.b32 [%r1], %t; {prefix}.arrive 1, 64;"
    run(body, out, threads=64, shared=128, seed=seed)
    assert out.tolist() == list(range(32, 64))


def test_cluster_barrier_and_remote_memory():
    out = results(4 * 32)
    body = "xor.b32 %r1, %c, 1; mapa.shared::cluster.u32 %r2, %s, %r1;"
    body += "mad.lo.u32 %r3, %t, 4, %r2; mad.lo.u32 %r4, %c, 100, %t;"
    body += "getctarank.shared::cluster.u32 %r8, %r3; setp.ne.u32 %p1, %r8, %r1; @%p1 trap;"
    body += "st.shared::cluster.b32 [%r3], %r4;"
    body += "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
    body += "mad.lo.u32 %r5, %t, 4, %s; ld.shared.b32 %r6, [%r5]; mov.u32 %r9, %ctaid.x;"
    body += "mad.lo.u32 %r7, %r9, 32, %t;" + store("%r6", 0, index="%r7")
    body += "barrier.cluster.arrive; barrier.cluster.wait;"
    body += "red.shared::cluster.add.u32 [%r3], 1; barrier.cluster.arrive; barrier.cluster.wait;"
    body += "ld.shared::cluster.b32 %r6, [%r5]; add.u32 %r4, %r8, %r6; setp.lt.u32 %p1, %r6, 1;"
    body += "@%p1 trap;"
    run(body, out, grid=4, cluster=2, shared=128)
    want = [(rank ^ 1) * 100 + t for _ in range(2) for rank in range(2) for t in range(32)]
    assert out.tolist() == want


@pytest.mark.parametrize("cluster", [1, 4])
def test_every_cta_knows_its_cluster(cluster):
    size, rank = results(4), results(4)
    body = "mov.u32 %r9, %ctaid.x; mov.u32 %r1, %cluster_nctarank; mov.u32 %r2, %cluster_ctarank;"
    body += store("%r1", 0, index="%r9") + store("%r2", 1, index="%r9")
    run(body, size, rank, grid=4, cluster=cluster, threads=1)
    assert size.tolist() == [cluster] * 4
    assert rank.tolist() == [i % cluster for i in range(4)]


# --- atomics


def wrap(v, bits):
    return v & ((1 << bits) - 1)


def sign(v, t):
    bits = int(t[1:])
    return v - (1 << bits) if t[0] == "s" and v >> (bits - 1) else v


ATOMIC = {
    "add": lambda a, b, t: a + b,
    "min": lambda a, b, t: a if sign(a, t) <= sign(b, t) else b,
    "max": lambda a, b, t: a if sign(a, t) >= sign(b, t) else b,
    "and": lambda a, b, t: a & b,
    "or": lambda a, b, t: a | b,
    "xor": lambda a, b, t: a ^ b,
    "exch": lambda a, b, t: b,
    "inc": lambda a, b, t: 0 if a >= b else a + 1,
    "dec": lambda a, b, t: b if a == 0 or a > b else a - 1,
}
ATOMIC_TYPES = [
    *[("add", t) for t in ("u32", "s32", "u64")],
    *[(op, t) for op in ("min", "max") for t in ("u32", "s32", "u64", "s64")],
    *[(op, t) for op in ("and", "or", "xor", "exch") for t in ("b32", "b64")],
    *[(op, "u32") for op in ("inc", "dec")],
]


def register(bits):
    return {16: "%h", 32: "%r", 64: "%d"}[bits]


@pytest.mark.parametrize("op, t", ATOMIC_TYPES)
def test_atom_and_red(op, t):
    bits, rng = int(t[1:]), np.random.default_rng([*op.encode(), *t.encode()])
    reg, dtype = register(bits), f"u{bits // 8}"
    start = rng.integers(0, 2**bits, 32, dtype=np.uint64).astype(dtype)
    x = rng.integers(0, 2**bits, 32, dtype=np.uint64).astype(dtype)
    x[::3], start[1::4] = start[::3], 0
    want = [wrap(ATOMIC[op](int(a), int(b), t), bits) for a, b in zip(start, x, strict=True)]
    orders = ("", ".relaxed.gpu", ".acquire.cta", ".release.cluster", ".acq_rel.sys")
    forms = [f"atom{order}.global.{op}.{t}" for order in orders]
    if op == "add" and t in ("u32", "s32", "u64"):  # libraries write the order last
        forms += [f"atom.add.release.gpu.{t}", f"atom.global.add.acq_rel.cta.{t}"]
    for form in forms:
        word, old = start.copy(), results(32, dtype)
        body = load(reg + "1", 1, bits) + f"mad.wide.u32 %A0, %t, {bits // 8}, %P0;"
        body += f"{form} {reg}2, [%A0], {reg}1;" + store(reg + "2", 2, bits)
        run(body, word, x, old)
        assert word.tolist() == want and old.tolist() == start.tolist(), form
    if op == "exch":
        return
    word = start.copy()
    body = load(reg + "1", 1, bits) + f"mad.wide.u32 %A0, %t, {bits // 8}, %P0;"
    run(body + f"red.relaxed.gpu.global.{op}.{t} [%A0], {reg}1;", word, x)
    assert word.tolist() == want


def test_atomics_on_one_word_in_shared_memory():
    old, total = results(256), results(1)
    body = "setp.eq.u32 %p1, %t, 0; @%p1 st.shared.b32 [%s], 5; bar.sync 0;"
    body += "atom.shared.add.u32 %r1, [%s], 2; bar.sync 0;" + store("%r1", 0)
    body += "ld.shared.b32 %r2, [%s]; @%p1 st.global.b32 [%P1], %r2;"
    for seed in (None, 1, 2):
        run(body, old, total, threads=256, shared=16, seed=seed)
        assert sorted(old.tolist()) == list(range(5, 517, 2)) and total[0] == 517


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_compare_and_swap(bits):
    reg, dtype = register(bits), f"u{bits // 8}"
    start, old = np.arange(32).astype(dtype), results(32, dtype)
    word, expected = start.copy(), np.where(LANES % 2, LANES, 99).astype(dtype)
    body = load(reg + "1", 1, bits) + f"mov.b{bits} {reg}2, 500;"
    body += f"mad.wide.u32 %A0, %t, {bits // 8}, %P0;"
    body += f"atom.global.cas.b{bits} {reg}3, [%A0], {reg}1, {reg}2;" + store(reg + "3", 2, bits)
    run(body, word, expected, old)
    assert word.tolist() == np.where(LANES % 2, 500, LANES).tolist()
    assert old.tolist() == start.tolist()


def halves(x, t):
    """Values of packed halves or bfloats; and back."""
    if t == "f16":
        return x.view(np.float16).astype(np.float32)
    return (x.astype(np.uint32) << 16).view(np.float32)


def to_halves(v, t):
    v = v.astype(np.float32)
    return (
        v.astype(np.float16).view(np.uint16)
        if t == "f16"
        else (v.view(np.uint32) >> 16).astype(np.uint16)
    )


@pytest.mark.parametrize("t", ["f32", "f64"])
def test_float_atomics(t):
    bits = int(t[1:])
    reg, dtype = register(bits), f"f{bits // 8}"
    start, x = (LANES * 0.5).astype(dtype), (LANES - 7.25).astype(dtype)
    word, old = start.copy(), results(32, dtype)
    body = load(reg + "1", 1, bits) + f"mad.wide.u32 %A0, %t, {bits // 8}, %P0;"
    body += f"atom.global.add.{t} {reg}2, [%A0], {reg}1; red.global.add.{t} [%A0], {reg}1;"
    run(body + store(reg + "2", 2, bits), word, x, old)
    assert np.array_equal(word, start + 2 * x) and np.array_equal(old, start)


@pytest.mark.parametrize("t", ["f16", "bf16", "f16x2", "bf16x2"])
def test_half_atomics(t):
    base, bits = t.replace("x2", ""), 32 if "x2" in t else 16
    reg, n = register(bits), 32 * bits // 16
    start, x = to_halves(np.arange(n) % 8, base), to_halves(np.arange(n) % 5 - 2, base)
    word, old = start.copy(), results(n, np.uint16)
    body = load(reg + "1", 1, bits) + f"mad.wide.u32 %A0, %t, {bits // 8}, %P0;"
    body += f"atom.global.add.noftz.{t} {reg}2, [%A0], {reg}1;" + store(reg + "2", 2, bits)
    run(body + f"red.global.add.noftz.{t} [%A0], {reg}1;", word, x, old)
    assert np.array_equal(halves(word, base), halves(start, base) + 2 * halves(x, base))
    assert np.array_equal(old, start)


@pytest.mark.parametrize("op", ["add", "min", "max"])
@pytest.mark.parametrize("t, n", [("f16", 8), ("bf16", 4), ("f16x2", 2), ("bf16x2", 4), ("f32", 4)])
def test_vector_atomics(t, n, op):
    if t == "f32" and op != "add":
        return
    base, bits = t.replace("x2", ""), 16 if t in ("f16", "bf16") else 32
    reg, per = register(bits), n * (2 if "x2" in t else 1)
    a, b = np.arange(32 * per) % 8, np.arange(32 * per)[::-1] % 7
    if t == "f32":
        start, x = a.astype(np.float32), b.astype(np.float32)
    else:
        start, x = to_halves(a, base), to_halves(b, base)
    word, old = start.copy(), results(start.shape, start.dtype)
    body = (
        f"mad.wide.u32 %A0, %t, {n * bits // 8}, %P0; mad.wide.u32 %A1, %t, {n * bits // 8}, %P1;"
    )
    body += f"mad.wide.u32 %A2, %t, {n * bits // 8}, %P2;"
    sources, dests = [], []
    for k in range(n):
        sources.append(f"{reg}{10 + k}")
        dests.append(f"{reg}{20 + k}")
        body += f"ld.global.b{bits} {reg}{10 + k}, [%A1 + {k * bits // 8}];"
    noftz = "" if t == "f32" else ".noftz"
    body += (
        f"atom.global.{op}{noftz}.v{n}.{t} {{{','.join(dests)}}}, [%A0], {{{','.join(sources)}}};"
    )
    body += f"red.global.{op}{noftz}.v{n}.{t} [%A0], {{{','.join(sources)}}};"
    for k in range(n):
        body += f"st.global.b{bits} [%A2 + {k * bits // 8}], {dests[k]};"
    run(body, word, x, old)
    want = {"add": a + 2 * b, "min": np.minimum(a, b), "max": np.maximum(a, b)}[op]
    got = word if t == "f32" else halves(word, base)
    assert np.array_equal(got, want) and np.array_equal(old, start)


def test_lanes_that_wait_keep_their_predicates():
    """The upper half waits with a predicate while the lower half, in code behind it, writes 16-bit
    registers: they must not have been given the predicate's place."""
    out, other = results(32), results(32)
    body = "setp.lt.u32 %p2, %t, 16; @%p2 bra LOW;"
    body += "MEET: setp.ge.u32 %p1, %t, 16; bar.warp.sync -1; selp.b32 %r1, 1, 0, %p1;"
    body += store("%r1", 0) + "bra.uni END;"
    body += "LOW: cvt.u16.u32 %h1, %t; add.u16 %h2, %h1, 1; mul.lo.u16 %h3, %h2, %h1;"
    body += "cvt.u32.u16 %r2, %h3;" + store("%r2", 1) + "bra.uni MEET; END:"
    run(body, out, other)
    assert out.tolist() == (LANES >= 16).tolist()
    assert other[:16].tolist() == (LANES * (LANES + 1))[:16].tolist()
