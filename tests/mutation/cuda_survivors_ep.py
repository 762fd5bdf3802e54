"""Mutants of the expert-parallel kernels that no test can catch; see cuda_survivors.py.

The reason first, then (file, source line, mutated line) of all it holds for.
"""

REASONS: dict[str, list[tuple[str, str, str]]] = {
    "One more turn, in which nothing is there: no load, no vote, no sum, no store.": [
        (
            "cuda/tile/ep_signals.cuh",
            "for (int begin = 0; begin < count; begin += kEpInFlight) {",
            "for (int begin = 0; begin <= count; begin += kEpInFlight) {",
        ),
        (
            "cuda/kernels/ep_forward.cuh",
            "for (int begin = 0; begin < tokens; begin += kEpWarp) {",
            "for (int begin = 0; begin <= tokens; begin += kEpWarp) {",
        ),
        (
            "cuda/kernels/ep_low_latency.cuh",
            "for (int first = 0; first < runs; first += kEpWarp) {",
            "for (int first = 0; first <= runs; first += kEpWarp) {",
        ),
    ],
    "Weights are not rounded: read row by row, where they lie, they have the same sum.": [
        (
            "cuda/kernels/ep_combine.cuh",
            "const float sum = place >= 0",
            "const float sum = place > 0",
        ),
    ],
    "The barrier at the end of rank_tokens comes before the places are read, too.": [
        ("cuda/kernels/ep_forward.cuh", "__syncthreads();", ";"),
    ],
    "The lane behind the last choice names no rank.": [
        (
            "cuda/kernels/ep_low_latency.cuh",
            "for (int k = 0; k < p.row.topk; ++k) {",
            "for (int k = 0; k <= p.row.topk; ++k) {",
        ),
    ],
    "Each part then copies the rest of its row as well: slower, the same bytes.": [
        (
            "cuda/kernels/ep_low_latency.cuh",
            "copy_row(data + part * kPart, from + part * kPart, "
            "min(kPart, p.row.row_bytes - part * kPart));",
            "copy_row(data + part * kPart, from + part * kPart, (p.row.row_bytes - part * kPart));",
        ),
    ],
    "One more look before giving up.": [
        (
            "cuda/tile/ep_signals.cuh",
            "for (uint32_t poll = 0; poll < g.max_polls; ++poll) {",
            "for (uint32_t poll = 0; poll <= g.max_polls; ++poll) {",
        ),
    ],
    (
        "Lanes of a warp run in step in the emulator, which looks for races between warps only; "
        "hardware may let a lane run ahead."
    ): [
        ("cuda/kernels/ep_dispatch.cuh", "__syncwarp();", ";"),
    ],
}
