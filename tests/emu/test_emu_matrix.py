"""mma.sync, wgmma and the matrix moves against matrix products with fragments by PTX's tables."""

import numpy as np
import pytest

pytest.importorskip("dskernels.emu")
from ptx_kernel import fill_shared, load, results, run, store

# Element type: bits, and encoding of small integers.
BITS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8}


def encode(x, t):
    """Small integers as bit patterns of type t."""
    if t == "f16":
        return x.astype(np.float16).view(np.uint16)
    f = x.astype(np.float32).view(np.uint32)
    if t == "bf16":
        return (f >> 16).astype(np.uint16)
    if t == "tf32":
        return f
    if t in ("s8", "u8"):
        return x.astype(np.int8).view(np.uint8)
    half = x.astype(np.float16).view(np.uint16)
    if t == "e5m2":  # the upper byte of a half
        return (half >> 8).astype(np.uint8)
    e, m = (f >> 23 & 255).astype(np.int64), f >> 20 & 7
    value = np.where(x == 0, 0, (e - 127 + 7) << 3 | m)
    return (value | (f >> 31) << 7).astype(np.uint8)


def integers(rng, shape, t):
    return rng.integers(0 if t == "u8" else -2, 3, shape)


def pack(values, per):
    """Lists of `per` element codes to 32-bit registers."""
    out = 0
    for k, v in enumerate(values):
        out |= int(v) << (32 // per * k)
    return out


def pack_c(c, acc):
    """16 x n accumulators to registers [lane][register]."""
    n = c.shape[1]
    out = []
    for lane in range(32):
        g, q = lane >> 2, lane & 3
        regs = []
        for block in range(n // 8):
            for h in range(2):
                pair = c[g + 8 * h, block * 8 + 2 * q : block * 8 + 2 * q + 2]
                if acc == "f16":
                    regs.append(pack(encode(pair, "f16"), 2))
                elif acc == "f32":
                    regs += [int(v) for v in encode(pair, "tf32")]
                else:
                    regs += [int(v) & 0xFFFFFFFF for v in pair]
        out.append(regs)
    return np.array(out, np.uint32)


def fragment_a(a, t, k):
    """16 x k matrix to registers [lane][register]."""
    e = 32 // BITS[t]
    codes = encode(a, t)
    return np.array(
        [
            [
                pack(codes[(lane >> 2) + 8 * (r & 1), (lane & 3) * e + 4 * e * (r >> 1) :][:e], e)
                for r in range(k // (2 * e))
            ]
            for lane in range(32)
        ],
        np.uint32,
    )


def fragment_b(b, t, k):
    """k x 8 matrix to registers [lane][register]."""
    e = 32 // BITS[t]
    codes = encode(b, t)
    return np.array(
        [
            [
                pack(codes[(lane & 3) * e + 4 * e * r :, lane >> 2][:e], e)
                for r in range(k // (4 * e))
            ]
            for lane in range(32)
        ],
        np.uint32,
    )


MMA = [
    *[(k, "f32", t, t) for k in (8, 16) for t in ("f16", "bf16")],
    *[(k, "f16", "f16", "f16") for k in (8, 16)],
    *[(k, "f32", "tf32", "tf32") for k in (4, 8)],
    *[(32, "f32", a, b) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")],
    *[(k, "s32", a, b) for k in (16, 32) for a in ("s8", "u8") for b in ("s8", "u8")],
]


@pytest.mark.parametrize("k, acc, ta, tb", MMA)
def test_mma_sync(k, acc, ta, tb):
    rng = np.random.default_rng(k)
    a, b = integers(rng, (16, k), ta), integers(rng, (k, 8), tb)
    c = rng.integers(-9, 10, (16, 8))
    frags = [fragment_a(a, ta, k), fragment_b(b, tb, k), pack_c(c, acc)]
    body, at, lists = "", 10, []
    for p, f in enumerate(frags):
        n = f.shape[1]
        for r in range(n):
            body += f"mad.lo.u32 %r0, %t, {n}, {r};" + load(f"%r{at + r}", p, index="%r0")
        lists.append("{" + ",".join(f"%r{at + r}" for r in range(n)) + "}")
        at += n
    n = frags[2].shape[1]
    d = [f"%r{100 + r}" for r in range(n)]
    body += (
        f"mma.sync.aligned.m16n8k{k}.row.col.{acc}.{ta}.{tb}.{acc} "
        f"{{{','.join(d)}}}, {lists[0]}, {lists[1]}, {lists[2]};\n"
    )
    for r in range(n):
        body += f"mad.lo.u32 %r0, %t, {n}, {r};" + store(d[r], 3, index="%r0")
    out = results((32, n))
    run(body, *[np.ascontiguousarray(f) for f in frags], out)
    assert np.array_equal(out, pack_c(a @ b + c, acc))


def test_mma_sync_saturates():
    limit = 2**31 - 5
    ones = np.full((32, 4), 0x7F7F7F7F, np.uint32)
    out = results(32)
    for suffix, want in ((".satfinite", 2**31 - 1), ("", limit + 32 * 127 * 127 - 2**32)):
        run(
            load("%r1", 0) + f"mov.b32 %r2, {limit};"
            f"mma.sync.aligned.m16n8k32.row.col{suffix}.s32.s8.s8.s32 {{%r3,%r4,%r5,%r6}},"
            "{%r1,%r1,%r1,%r1},{%r1,%r1},{%r2,%r2,%r2,%r2};" + store("%r6", 1),
            ones,
            out,
        )
        assert (out.view(np.int32) == want).all()


# --- ldmatrix, stmatrix, movmatrix


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_stmatrix(count, trans):
    rng = np.random.default_rng(count)
    m = rng.integers(0, 65536, (4, 8, 8)).astype(np.uint16)
    t = ".trans" if trans else ""
    regs = [f"%r{10 + k}" for k in range(count)]
    seen = m.transpose(0, 2, 1) if trans else m
    want = np.array(
        [
            [pack(seen[k, lane >> 2, 2 * (lane & 3) : 2 * (lane & 3) + 2], 2) for k in range(count)]
            for lane in range(32)
        ]
    )
    # ptxas takes the modifiers in other orders than PTX's manual has, and compilers print them so.
    names = [f"m8n8.x{count}{t}.shared.b16", f"x{count}{t}.m8n8.shared::cta.b16"]
    names += [f"x{count}.m8n8.shared.b16.trans"] if trans else []
    for name in names:
        out, back = results((32, count)), results((4, 8, 8), np.uint16)
        body = fill_shared(0, m.nbytes, 32) + "mad.lo.u32 %r5, %t, 16, %s;"
        body += f"ldmatrix.sync.aligned.{name} {{{','.join(regs)}}}, [%r5];"
        for k in range(count):
            body += f"mad.lo.u32 %r0, %t, {count}, {k};" + store(regs[k], 1, index="%r0")
        body += f"stmatrix.sync.aligned.{name} [%r5 + 512], {{{','.join(regs)}}};bar.sync 0;"
        for k in range(4):
            body += f"mad.lo.u32 %r6, %t, 4, %s; ld.shared.b32 %r7, [%r6 + {512 + 128 * k}];"
            body += f"add.u32 %r0, %t, {32 * k};" + store("%r7", 2, index="%r0")
        run(body, m, out, back, shared=1024)
        assert np.array_equal(out, want)
        assert np.array_equal(back[:count], m[:count]) and (back[count:] == 0xFFFF).all()  # poison


def test_movmatrix():
    m = np.arange(64, dtype=np.uint16).reshape(8, 8)
    out = results((8, 8), np.uint16)
    run(
        load("%r1", 0) + "movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;" + store("%r2", 1), m, out
    )
    assert np.array_equal(out, m.T)


# --- wgmma: operands in shared memory without swizzle (8 x 16-byte core matrices) or with 128
# bytes of it, A optionally in registers


def k_major(codes):
    """Rows x k to core matrices: (bytes, leading offset along k, stride offset along rows)."""
    rows, k = codes.shape
    per = 16 // codes.itemsize
    blocks = codes.reshape(rows // 8, 8, k // per, per).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(blocks).view(np.uint8).reshape(-1), 128, 128 * (k // per), 0


def mn_major_swizzled(codes):
    """Rows x 16 to 128-byte swizzled atoms of 64 (or all) rows x 8 k, rows contiguous."""
    rows, k = codes.shape
    out = np.zeros((rows // 64, k // 8, 8, 8, 8), codes.dtype)  # atoms, k, chunk, element
    for r in range(rows):
        for kk in range(k):
            chunk = (r % 64 // 8) ^ (kk % 8)
            out[r // 64, kk // 8, kk % 8, chunk, r % 8] = codes[r, kk]
    return out.view(np.uint8).reshape(-1), 1024 * (k // 8), 1024, 1


def descriptor(start, leading, stride, swizzle):
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | swizzle << 62


def wgmma(acc, ta, tb, n, a, b, *, registers=False, major=(0, 0), negate=(1, 1), suffix="", c=None):
    k = 256 // BITS[ta]
    image, descriptors = b"", []
    for x, t, mn in ((a, ta, major[0]), (b.T, tb, major[1])):
        data, leading, stride, swizzle = (mn_major_swizzled if mn else k_major)(encode(x, t))
        descriptors.append(descriptor(len(image), leading, stride, swizzle))
        image += data.tobytes() + bytes(-len(data) % 1024)
    image = np.frombuffer(image, np.uint8).copy()
    body = fill_shared(0, len(image), 128)
    body += "cvt.u64.u32 %d9, %s; shr.u64 %d9, %d9, 4;"
    for x, value in enumerate(descriptors):
        body += f"mov.b64 %d{x}, {value}; add.u64 %d{x}, %d{x}, %d9;"
    count = n // 4 if acc == "f16" else n // 2
    source_a = "%d0"
    a_regs = np.concatenate([fragment_a(a[16 * w : 16 * w + 16], ta, k) for w in range(4)])
    if registers:
        for r in range(4):
            body += f"mad.lo.u32 %r0, %t, 4, {r};" + load(f"%r{4 + r}", 1, index="%r0")
        source_a = "{%r4,%r5,%r6,%r7}"
    initial = np.zeros((64, n), np.int64) if c is None else c
    c_regs = np.concatenate([pack_c(initial[16 * w : 16 * w + 16], acc) for w in range(4)])
    d = [f"%r{20 + r}" for r in range(count)]
    for r in range(count):
        body += f"mad.lo.u32 %r0, %t, {count}, {r};" + load(d[r], 2, index="%r0")
    scales = ""
    if acc != "s32":
        scales = f", {negate[0]}, {negate[1]}"
        if BITS[ta] == 16:
            scales += f", {major[1]}" if registers else f", {major[0]}, {major[1]}"
    body += (
        f"setp.ne.b32 %p1, {int(c is not None)}, 0; wgmma.fence.sync.aligned;"
        f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{acc}.{ta}.{tb}{suffix} {{{','.join(d)}}}, "
        f"{source_a}, %d1, %p1{scales};"
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n"
    )
    for r in range(count):
        body += f"mad.lo.u32 %r0, %t, {count}, {r};" + store(d[r], 3, index="%r0")
    out = results((128, count))
    run(body, image, a_regs, c_regs, out, threads=128, shared=len(image))
    want = initial + negate[0] * negate[1] * (a @ b)
    return out, np.concatenate([pack_c(want[16 * w : 16 * w + 16], acc) for w in range(4)])


WGMMA = [
    *[("f32", t, t) for t in ("f16", "bf16", "tf32")],
    ("f16", "f16", "f16"),
    *[(acc, a, b) for acc in ("f32", "f16") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")],
    *[("s32", a, b) for a in ("s8", "u8") for b in ("s8", "u8")],
]


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("acc, ta, tb", WGMMA)
def test_wgmma(acc, ta, tb, registers):
    rng = np.random.default_rng([*ta.encode(), *tb.encode()])
    k = 256 // BITS[ta]
    for n in (8, 48 if acc == "s32" else 8 * int(rng.integers(2, 9))):
        a, b = integers(rng, (64, k), ta), integers(rng, (k, n), tb)
        c = rng.integers(-9, 10, (64, n)) if n == 8 else None
        out, want = wgmma(acc, ta, tb, n, a, b, registers=registers, c=c)
        assert np.array_equal(out, want), (n, registers)


@pytest.mark.parametrize("major", [(0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("t", ["f16", "bf16"])
def test_wgmma_mn_major(t, major):
    rng = np.random.default_rng(9)
    for n in (64, 128):
        a, b = integers(rng, (64, 16), t), integers(rng, (16, n), t)
        out, want = wgmma("f32", t, t, n, a, b, major=major)
        assert np.array_equal(out, want)
        if major[0] == 0:
            out, want = wgmma("f32", t, t, n, a, b, major=major, registers=True)
            assert np.array_equal(out, want)


@pytest.mark.parametrize("negate", [(-1, 1), (1, -1), (-1, -1)])
def test_wgmma_negates_operands(negate):
    rng = np.random.default_rng(10)
    for t in ("bf16", "tf32", "e4m3"):
        k = 256 // BITS[t]
        a, b = integers(rng, (64, k), t), integers(rng, (k, 8), t)
        c = rng.integers(-9, 10, (64, 8))
        out, want = wgmma("f32", t, t, 8, a, b, negate=negate, c=c)
        assert np.array_equal(out, want)


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_wgmma_every_width(n):
    rng = np.random.default_rng(n)
    a, b = integers(rng, (64, 32), "e4m3"), integers(rng, (32, n), "e4m3")
    out, want = wgmma("f32", "e4m3", "e4m3", n, a, b)
    assert np.array_equal(out, want)


def test_wgmma_satfinite():
    a, b = np.full((64, 32), 127), np.full((32, 8), 127)
    c = np.full((64, 8), 2**31 - 9)
    out, _ = wgmma("s32", "s8", "s8", 8, a, b, c=c, suffix=".satfinite")
    assert (out.view(np.int32) == 2**31 - 1).all()
