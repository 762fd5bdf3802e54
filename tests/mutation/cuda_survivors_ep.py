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
