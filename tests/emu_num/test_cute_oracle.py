"""Descriptors, fragments and ldmatrix against CuTe's layout algebra.

`cute_golden.txt` holds one digest a line of what `cute_oracle.cpp` prints; the slow test rebuilds
the oracle from PyPI's CuTe headers and shows that the file is what they say.
"""

import numpy as np
import pytest

from . import cute_golden
from .conftest import NUM

LINES = cute_golden.GOLDEN.read_text().splitlines()
# CuTe 4.2 gives 4-bit m16n8k32 B a thread stride of 4 in k, so threads overlap: not a layout.
BROKEN_IN_CUTE = "F m16n8k32 B 4"
DESCRIPTORS = [line.split() for line in LINES if line.startswith("D")]
FRAGMENTS = [line for line in LINES if line.startswith("F") and not line.startswith(BROKEN_IN_CUTE)]
MMA = sorted({line for line in FRAGMENTS if " S " not in line and " D " not in line})
COPIES = [line for line in FRAGMENTS if line not in MMA]


def element_addresses(desc: int, mn_major: bool, rows: int, size: int) -> list[int]:
    """Where gather_tile reads each element, recovered from memory that holds its own addresses."""
    smem = np.arange(1 << 15, dtype=np.uint16).view(np.uint8)
    ok, _, dense, ranges = NUM.gather_tile(desc, mn_major, rows, smem, 0, 1)
    assert ok
    first_byte = dense.view(np.uint16).astype(np.int64) * 2
    if size == 1:
        addresses = (first_byte[:, :, None] + np.arange(2)).reshape(rows, 32)
    else:
        addresses = first_byte[:, :: size // 2]
    touched = np.zeros(smem.size, bool)
    touched[np.unique(addresses.reshape(-1, 1) + np.arange(size))] = True
    covered = np.zeros(smem.size, bool)
    for begin, length in ranges:
        assert not covered[begin : begin + length].any(), "ranges overlap"
        covered[begin : begin + length] = True
    assert (touched == covered).all(), "the footprint is not what was read"
    return addresses.reshape(-1).tolist()


@pytest.mark.parametrize("words", DESCRIPTORS, ids=lambda w: "-".join(w[1:6]))
def test_descriptor_addresses_equal_cute(words):
    size, mn_major, rows, start = (int(w) for w in words[1:5])
    desc = int(words[5], 16) | (start >> 4)
    addresses = element_addresses(desc, bool(mn_major), rows, size)
    assert cute_golden.digest(addresses) == words[6]


def test_oracle_covers_every_swizzle_and_major():
    kinds = {(int(w[1]), int(w[2]), int(w[5], 16) >> 62) for w in DESCRIPTORS}
    assert kinds == {(s, 0, z) for s in (1, 2, 4) for z in range(4)} | {(2, 1, z) for z in range(4)}


def m8_layout(operand, bits):
    """Coordinates of the m8n8 shapes."""
    if bits == 64:
        return {
            "A": lambda t, v: NUM.f64_m8_a(t),
            "B": lambda t, v: NUM.f64_b(t, v)[::-1],
            "C": NUM.f64_m8_c,
        }[operand]
    return {
        "A": lambda t, v: (t // 4, 4 * (t % 4) + v),
        "B": lambda t, v: (t // 4, 4 * (t % 4) + v),
        "C": NUM.f64_m8_c,
    }[operand]


def layout_of(name, operand, bits):
    """(thread, value) -> (row, col) with B as (n, k), as CuTe orders it."""
    if name.startswith("m8"):
        return m8_layout(operand, bits)
    if operand == "C":
        return lambda t, v: shift(NUM.accumulator(t % 32, v), 16 * (t // 32))
    if bits == 64:
        pick = {"A": NUM.f64_m16_a, "B": lambda t, v: NUM.f64_b(t, v)[::-1]}
        return pick[operand]
    if operand == "A":
        return lambda t, v: shift(NUM.multiplicand_a(t % 32, v, bits), 16 * (t // 32))
    return lambda t, v: NUM.multiplicand_b(t, v, bits)[::-1]


def shift(coord, rows):
    return coord[0] + rows, coord[1]


@pytest.mark.parametrize("line", MMA)
def test_fragments_equal_cute(line):
    _, name, operand, bits, threads, values, want = line.split()
    coord = layout_of(name, operand, int(bits))
    leading = 64 if name.startswith("wgmma") else 8
    if name.startswith("m16") and operand != "B":
        leading = 16
    indices = []
    for t in range(int(threads)):
        for v in range(int(values)):
            row, col = coord(t, v)
            indices.append(row + leading * col)
    assert cute_golden.digest(indices) == want


@pytest.mark.parametrize("line", [line for line in COPIES if line.split()[2] == "D"])
def test_matrix_copies_equal_cute(line):
    """Bits are numbered from the row side: matrix * 1024 + row * 128 + 16 * column."""
    _, name, _, _, _, _, want_rows_or_regs = line.split()
    loads, count, trans = name.startswith("ldsm"), int(name[4]), name[5] == "t"
    other = next(x for x in COPIES if x.startswith(f"F {name} S")).split()[6]
    regs_digest = want_rows_or_regs if loads else other
    rows_digest = other if loads else want_rows_or_regs
    bits = []
    for lane in range(32):
        for matrix in range(count):
            for half in range(2):
                row, col = NUM.matrix_element(lane, half, trans)
                first = matrix * 1024 + row * 128 + col * 16
                bits.extend(range(first, first + 16))
    assert cute_golden.digest(bits) == regs_digest
    addressed = [((t % (8 * count)) * 128 + b) for t in range(32) for b in range(128)]
    assert cute_golden.digest(addressed) == rows_digest


@pytest.mark.slow
def test_golden_file_is_what_cute_says():
    why = cute_golden.missing()
    if why:
        pytest.skip(why)
    assert cute_golden.run_oracle() == LINES
