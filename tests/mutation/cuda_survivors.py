"""Mutants of the CUDA kernels that no test can catch, each with the reason why that is right.

Keyed by (file, source line, mutated line); an entry that no longer applies is reported as stale.
"""

EXPLAINED: dict[tuple[str, str, str], str] = {
    (
        "cuda/kernels/moe_gate_backward.cuh",
        "for (int k = 0; k < p.k; k += kProductSlab) {",
        "for (int k = 0; k <= p.k; k += kProductSlab) {",
    ): "A slab behind the depth is of zeros, nothing being read, and adds zeros to the sums.",
    (
        "cuda/kernels/moe_unpermute.cuh",
        "for (int first = 0; first < p.topk; first += kRowsInFlight<T>) {",
        "for (int first = 0; first <= p.topk; first += kRowsInFlight<T>) {",
    ): "A run of choices behind the last has no row: it loads nothing and adds nothing.",
    (
        "cuda/kernels/mla_decode.cuh",
        "__syncwarp();",
        ";",
    ): "Lanes that have parted at a branch meet behind it again, in the emulator always, on hardware "
    "where ptxas says so. wgmma needs the whole warp and PTX does not promise it, so the barrier stays.",
    (
        "cuda/tile/gemm_roles.cuh",
        "__syncwarp();  // or the lane that released walks the loop by itself",
        ";  // or the lane that released walks the loop by itself",
    ): "Lanes that have parted at a branch meet behind it again, in the emulator always, on hardware "
    "where ptxas says so. Here it once let a lane wait for the next tile alone; PTX does not promise "
    "that lanes meet, so the barrier stays.",
    (
        "cuda/kernels/mla_prefill_backward.cuh",
        "if (threadIdx.x == kBackwardMath && job.first < job.last) backward_load<kSide>(p, job, smem);",
        "if (threadIdx.x == kBackwardMath && job.first <= job.last) backward_load<kSide>(p, job, smem);",
    ): "Without blocks the loader's loop ends before its first turn.",
    (
        "cuda/kernels/mla_prefill_backward.cuh",
        "if (job.first < job.last) {",
        "if (job.first <= job.last) {",
    ): "Without blocks run() adds nothing to the zeros; the guard saves it the statistics.",
    (
        "cuda/tile/mla_columns.cuh",
        "if (first + kMlaBlock <= seen_by_all) return;",
        "if (first + kMlaBlock < seen_by_all) return;",
    ): "A block that every query sees to its last token goes through comparisons that hide nothing: "
    "slower, the same values.",
    (
        "cuda/tile/quantize.cuh",
        "__float_as_uint(__fadd_rn(__fmul_rn(low, 1048576.f), 12582912.f)) & 0x7f;",
        "__float_as_uint(__fadd_rn(__fmul_rn(low, 1048576.f), (12582912.f * 1.0625f))) & 0x7f;",
    ): "Every multiple of 128 from 2^23 to below 2^24 rounds the step's count to the same low bits.",
}
