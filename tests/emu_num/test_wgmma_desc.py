"""Descriptor fields, bounds, footprints, and the round trip TMA swizzle -> canonical descriptor."""

import numpy as np
import pytest

from .conftest import NUM

WIDTHS = {1: 32, 2: 64, 3: 128}


def test_fields_round_trip():
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, lbo, sbo = (int(v) * 16 for v in rng.integers(0, 1 << 14, 3))
        base, swizzle = int(rng.integers(8)), int(rng.integers(4))
        bits = NUM.encode_desc(start, lbo, sbo, base, swizzle)
        assert NUM.decode_desc(bits) == (start, lbo, sbo, base, swizzle, False)
        layout = {0: 0, 3: 1, 2: 2, 1: 3}[swizzle]  # PTX: 0 none, 1 128B, 2 64B, 3 32B
        want = start >> 4 | (lbo >> 4) << 16 | (sbo >> 4) << 32 | base << 49 | layout << 62
        assert bits == want


@pytest.mark.parametrize("bit", [14, 15, 30, 31, 46, 47, 48, *range(52, 62)])
def test_reserved_bits_are_reported(bit):
    assert NUM.decode_desc(1 << bit)[5]
    assert not NUM.decode_desc(~(sum(1 << b for b in RESERVED)) & (2**64 - 1))[5]


RESERVED = [14, 15, 30, 31, 46, 47, 48, *range(52, 62)]


def test_unrepresentable_fields_are_refused():
    for args in ((8, 0, 0, 0, 0), (0, 1 << 18, 0, 0, 0), (0, 0, 17, 0, 0), (0, 0, 0, 8, 0)):
        with pytest.raises(ValueError, match="wgmma descriptor"):
            NUM.encode_desc(*args)


def tma_write(smem, matrix, box_cols, swizzle, at):
    """A [rows, bytes] matrix written by column boxes of `box_cols` bytes, one after another."""
    rows, cols = matrix.shape
    data = np.ascontiguousarray(matrix)
    args = {
        "type": 0,
        "rank": 2,
        "dims": [cols, rows],
        "strides": [cols],
        "box": [box_cols, rows],
        "swizzle": swizzle,
    }
    flat = data.reshape(-1)
    for i, column in enumerate(range(0, cols, box_cols)):
        base = at + i * box_cols * rows
        for source, offset, length, fill in NUM.walk_box(args, [column, 0], base):
            assert not fill
            smem[base + offset : base + offset + length] = flat[source : source + length]


@pytest.mark.parametrize("swizzle", [1, 2, 3])
@pytest.mark.parametrize("rows", [64, 128, 256])
def test_k_major_reads_back_what_tma_wrote(swizzle, rows):
    width = WIDTHS[swizzle]
    rng = np.random.default_rng(swizzle)
    matrix = rng.integers(0, 256, (rows, 2 * width), dtype=np.uint8)
    smem = rng.integers(0, 256, 1 << 17, dtype=np.uint8)
    at = 3072
    tma_write(smem, matrix, width, swizzle, at)
    for k in range(0, 2 * width, 32):
        start = at + (k // width) * width * rows + k % width
        desc = NUM.encode_desc(start, 16, 8 * width, 0, swizzle)
        ok, _, dense, _ = NUM.gather_tile(desc, False, rows, smem, 0, 1)
        assert ok
        np.testing.assert_array_equal(dense, matrix[:, k : k + 32])


@pytest.mark.parametrize("swizzle", [1, 2, 3])
@pytest.mark.parametrize("rows", [64, 128])
def test_mn_major_reads_back_what_tma_wrote(swizzle, rows):
    """The matrix is [k, mn] in memory; boxes of one swizzle width along mn, k rows each."""
    width, depth = WIDTHS[swizzle], 32
    rng = np.random.default_rng(10 + swizzle)
    matrix = rng.integers(0, 1 << 16, (depth, rows), dtype=np.uint16)
    smem = rng.integers(0, 256, 1 << 16, dtype=np.uint8)
    at = 1024
    tma_write(smem, matrix.view(np.uint8), width, swizzle, at)
    for k in range(0, depth, 16):
        lbo, sbo = width * depth, 8 * width
        desc = NUM.encode_desc(at + k * width, lbo, sbo, 0, swizzle)
        ok, _, dense, _ = NUM.gather_tile(desc, True, rows, smem, 0, 1)
        assert ok
        np.testing.assert_array_equal(dense.view(np.uint16), matrix[k : k + 16].T)


def test_base_offset_shifts_the_swizzle_phase():
    """A pattern starting 3 rows of 128 bytes past its alignment, read with base offset 3."""
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 256, (64, 128), dtype=np.uint8)
    smem = np.zeros(1 << 14, np.uint8)
    origin = 1024 + 3 * 128
    for r in range(64):
        for chunk in range(8):
            at = origin + r * 128 + (chunk ^ (r % 8)) * 16
            smem[at : at + 16] = rows[r, chunk * 16 : chunk * 16 + 16]
    desc = NUM.encode_desc(origin, 16, 1024, 3, 3)
    ok, _, dense, _ = NUM.gather_tile(desc, False, 64, smem, 0, 1)
    assert ok
    np.testing.assert_array_equal(dense, rows[:, :32])


def test_outside_shared_memory_is_flagged():
    smem = np.zeros(8192, np.uint8)
    inside = NUM.encode_desc(0, 16, 1024, 0, 3)
    assert NUM.gather_tile(inside, False, 64, smem, 0, 1)[0]
    ok, bad, dense, ranges = NUM.gather_tile(inside, False, 72, smem, 0, 1)
    assert (ok, bad) == (False, 8192)
    assert not dense.any() and ranges[-1][0] + ranges[-1][1] > 8192
    ok, bad, _, _ = NUM.gather_tile(inside, False, 64, smem, 16, 1)
    assert (ok, bad) == (False, 0)
    far = NUM.encode_desc(262128, 262128, 262128, 0, 0)
    ok, bad, _, _ = NUM.gather_tile(far, True, 256, smem, 0, 1)
    assert (ok, bad) == (False, 262128)
    shifted = NUM.encode_desc(65536 + 1024, 16, 1024, 0, 3)
    assert NUM.gather_tile(shifted, False, 56, smem, 65536, 1)[0]


@pytest.mark.parametrize("mn", [-8, 0, 4, 12, 264])
def test_impossible_tile_heights_are_refused(mn):
    with pytest.raises(ValueError, match=f"got {mn}"):
        NUM.gather_tile(0, False, mn, np.zeros(64, np.uint8), 0, 1)


def test_any_descriptor_is_safe():
    """Random bits: a flagged address or a gather, never a fault. ASan runs this too."""
    rng = np.random.default_rng(4)
    smem = rng.integers(0, 256, 4096, dtype=np.uint8)
    outcomes = set()
    for _ in range(3000):
        bits = int(rng.integers(0, 1 << 63)) * 2 + int(rng.integers(2))
        if rng.integers(2):
            bits &= ~0x3F8000003FFF  # small strides and starts: some tiles fit
        mn = int(rng.integers(1, 33)) * 8
        ok, bad, _, ranges = NUM.gather_tile(bits, bool(rng.integers(2)), mn, smem, 0, 1)
        assert ok == all(b + n <= 4096 for b, n in ranges)
        assert ok or bad >= 4096
        outcomes.add(ok)
    assert outcomes == {True, False}
