"""Mutants of the CUDA kernels that no test can catch, each with the reason why that is right.

Keyed by (file, source line, mutated line); an entry that no longer applies is reported as stale.
"""

EXPLAINED: dict[tuple[str, str, str], str] = {
    (
        "cuda/kernels/rowwise_quantize_transpose.cuh",
        "const bool inside = first_row + row < p.rows && left > 0;",
        "const bool inside = first_row + row < p.rows && left >= 0;",
    ): "The column behind the last one reads no element (left is 0 either way), and its scale is that "
    "of the last: a tile reaches behind x only where cols is no multiple of 64, so cols / 128 is "
    "the last group.",
}
