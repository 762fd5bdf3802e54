"""Register layouts as the PTX ISA words them, and the movers built on them."""

import numpy as np
import pytest

from .conftest import NUM


def ptx_a_row_col(lane, i, bits, k):
    """PTX ISA, multiplicand A of mma.m16n8k*: row and col of a_i."""
    group, in_group = lane >> 2, lane % 4
    if bits == 16:
        row = group if k == 8 and i < 2 or k == 16 and (i < 2 or 4 <= i < 6) else group + 8
        return row, in_group * 2 + (i & 1) + (8 if i >= 4 else 0)
    if bits == 32:
        return (group if i in (0, 2) else group + 8), in_group + (4 if i >= 2 else 0)
    row = group if (0 <= i < 4 or 8 <= i < 12) else group + 8
    return row, in_group * 4 + (i & 3) + (16 if i >= 8 else 0)


def ptx_b_row_col(lane, i, bits):
    group, in_group = lane >> 2, lane % 4
    if bits == 16:
        return in_group * 2 + (i & 1) + (8 if i >= 2 else 0), group
    if bits == 32:
        return in_group + (4 if i >= 1 else 0), group
    return in_group * 4 + (i & 3) + (16 if i >= 4 else 0), group


SHAPES = [(16, 8), (16, 16), (32, 4), (32, 8), (8, 16), (8, 32)]


@pytest.mark.parametrize("bits,k", SHAPES)
def test_multiplicands_as_documented(bits, k):
    for lane in range(32):
        for i in range(16 * k // 32):
            assert NUM.multiplicand_a(lane, i, bits) == ptx_a_row_col(lane, i, bits, k)
        for i in range(8 * k // 32):
            assert NUM.multiplicand_b(lane, i, bits) == ptx_b_row_col(lane, i, bits)


@pytest.mark.parametrize("bits,k", [*SHAPES, (4, 32), (4, 64), (1, 128), (1, 256)])
def test_multiplicands_cover_the_tile_once(bits, k):
    a = {NUM.multiplicand_a(t, i, bits) for t in range(32) for i in range(16 * k // 32)}
    b = {NUM.multiplicand_b(t, i, bits) for t in range(32) for i in range(8 * k // 32)}
    assert a == {(r, c) for r in range(16) for c in range(k)}
    assert b == {(r, c) for r in range(k) for c in range(8)}


def test_accumulator_as_documented():
    for lane in range(32):
        for i in range(128):
            row = (lane >> 2) + (8 if i % 4 >= 2 else 0)
            assert NUM.accumulator(lane, i) == (row, (i // 4) * 8 + (lane % 4) * 2 + (i & 1))


def test_integer_and_f64_m8_shapes():
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        assert NUM.f64_m8_a(lane) == (group, in_group)
        assert NUM.f64_b(lane, 0) == (in_group, group)
        for i in range(2):
            assert NUM.f64_m8_c(lane, i) == (group, in_group * 2 + i)
        for i in range(8):
            want = (group + 8 * (i & 1), in_group + 4 * (i >> 1))
            assert NUM.f64_m16_a(lane, i) == want


@pytest.mark.parametrize("bits,k", SHAPES)
def test_unpack_puts_elements_in_packed_rows(bits, k):
    rng = np.random.default_rng(bits + k)
    dtype = {8: np.uint8, 16: np.uint16, 32: np.uint32}[bits]
    for is_b, rows, count in ((False, 16, 16 * k * bits // 1024), (True, 8, 8 * k * bits // 1024)):
        regs = rng.integers(0, 1 << 32, (count, 32), dtype=np.uint64).astype(np.uint32)
        got = np.ascontiguousarray(NUM.unpack(regs, is_b)).view(dtype)
        assert got.shape == (rows, k)
        elements = np.ascontiguousarray(regs.T).view(dtype)  # [lane, element]
        for lane in range(32):
            for i in range(elements.shape[1]):
                if is_b:
                    col, row = NUM.multiplicand_b(lane, i, bits)
                else:
                    row, col = NUM.multiplicand_a(lane, i, bits)
                assert got[row, col] == elements[lane, i]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix_and_stmatrix(count, trans):
    rng = np.random.default_rng(count)
    rows = rng.integers(0, 1 << 16, (count, 8, 8), dtype=np.uint16)
    regs = NUM.ldmatrix(rows.view(np.uint8), trans)
    for m in range(count):
        matrix = rows[m].T if trans else rows[m]
        for lane in range(32):
            pair = matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert regs[m, lane] == int(pair[0]) | int(pair[1]) << 16
    back = NUM.stmatrix(regs, trans)
    np.testing.assert_array_equal(back.view(np.uint16).reshape(rows.shape), rows)
