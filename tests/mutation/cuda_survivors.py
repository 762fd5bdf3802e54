"""Mutants of the CUDA kernels that no test can catch, each with the reason why that is right.

Keyed by (file, source line, mutated line); an entry that no longer applies is reported as stale.
"""

from cuda_survivors_ep import REASONS as OF_EP

EXPLAINED: dict[tuple[str, str, str], str] = {
    (
        "cuda/kernels/rowwise_quantize_transpose.cuh",
        "const bool inside = first_row + row < p.rows && left > 0;",
        "const bool inside = first_row + row < p.rows && left >= 0;",
    ): "The column behind the last one reads no element (left is 0 either way), and its scale is that "
    "of the last: a tile reaches behind x only where cols is no multiple of 64, so cols / 128 is "
    "the last group.",
    (
        "cuda/kernels/rowwise_rms_norm.cuh",
        "const float4 x = left > 0 ? *kept : make_float4(0.f, 0.f, 0.f, 0.f);",
        "const float4 x = left >= 0 ? *kept : make_float4(0.f, 0.f, 0.f, 0.f);",
    ): "The lane just behind the row's end multiplies whatever it reads from its own slot by a weight "
    "of 0: 0, or a NaN, which amax drops; and it stores nothing.",
    (
        "cuda/tile/quantize.cuh",
        "const uint32_t code = magnitude < 6.103515625e-05f ? subnormal : normal;",
        "const uint32_t code = magnitude <= 6.103515625e-05f ? subnormal : normal;",
    ): "2^-14 itself has the same code on both branches: 64 units of 2^-20 are the smallest normal.",
    (
        "cuda/tile/quantize.cuh",
        "const uint32_t code = magnitude < 6.103515625e-05f ? subnormal : normal;",
        "const uint32_t code = magnitude < (6.103515625e-05f * 1.0625f) ? subnormal : normal;",
    ): "Up to 2^-13 normal values are units of 2^-20 apart as subnormal ones are: both branches give "
    "the same code.",
    (
        "cuda/tile/quantize.cuh",
        "return left >= kCount && reinterpret_cast<uintptr_t>(at) % (kCount * sizeof(T)) == 0;",
        "return left > kCount && reinterpret_cast<uintptr_t>(at) % (kCount * sizeof(T)) == 0;",
    ): "The row's last whole run then goes element by element: slower, the same values.",
    (
        "cuda/kernels/moe_layout.cuh",
        "const int begin = min(lane * per_lane, p.experts);",
        "const int begin = (lane * per_lane);",
    ): "A lane that begins behind the last expert ends there: no expert is its own either way.",
    (
        "cuda/kernels/moe_experts_backward.cuh",
        "for (int column = threadIdx.x % kWarp * 4; column < p.width; column += kWarp * 4) {",
        "for (int column = threadIdx.x % kWarp * 4; column <= p.width; column += kWarp * 4) {",
    ): "A run with nothing left of the row loads zeros without reading, and stores nothing.",
    (
        "cuda/kernels/moe_gate.cuh",
        "const bool whole = whole_ && k + kGateSlab <= depth;",
        "const bool whole = whole_ && k + kGateSlab < depth;",
    ): "The last whole slab then goes element by element: slower, the same values.",
    (
        "cuda/kernels/moe_gate.cuh",
        "const int last = min(first + per_rank, slabs);",
        "const int last = (first + per_rank);",
    ): "Slabs behind the depth are loaded as zeros, nothing being read, and add zeros to the sums.",
    (
        "cuda/kernels/moe_gate.cuh",
        "if (first < last) load(first);",
        "if (first <= last) load(first);",
    ): "A slab too many is loaded into registers, zeros behind the depth, and never used.",
    (
        "cuda/kernels/moe_gate.cuh",
        "if (i + 1 < last) load(i + 1);",
        "if (i + 1 <= last) load(i + 1);",
    ): "A slab too many is loaded into registers, zeros behind the depth, and never used.",
    (
        "cuda/kernels/moe_gate.cuh",
        "for (int i = threadIdx.x; i < kGateTokens * kGateExperts; i += kGateThreads) {",
        "for (int i = threadIdx.x; i <= kGateTokens * kGateExperts; i += kGateThreads) {",
    ): "Thread 0's element more lies where is_last is kept, which it writes itself afterwards.",
    (
        "cuda/kernels/moe_gate_backward.cuh",
        "if (p.k > 0) slab.load(p, row, column, 0);",
        "if (p.k >= 0) slab.load(p, row, column, 0);",
    ): "Without depth the load finds nothing inside, and what it makes of that is not used.",
    (
        "cuda/kernels/moe_gate_backward.cuh",
        "if (k + kProductSlab < p.k) slab.load(p, row, column, k + kProductSlab);",
        "if (k + kProductSlab <= p.k) slab.load(p, row, column, k + kProductSlab);",
    ): "A slab behind the depth is loaded into registers, zeros without reading, and never used.",
    (
        "cuda/kernels/moe_layout.cuh",
        "for (int e = threadIdx.x; e < p.experts; e += kMoeChunk) smem.total[e] = 0;",
        "for (int e = threadIdx.x; e <= p.experts; e += kMoeChunk) smem.total[e] = 0;",
    ): "The element more is an unused total, or is_last, which is written behind two barriers.",
    (
        "cuda/kernels/moe_permute.cuh",
        "for (int i = threadIdx.x; i < kPermuteWarps * p.experts; i += kMoeChunk) {",
        "for (int i = threadIdx.x; i <= kPermuteWarps * p.experts; i += kMoeChunk) {",
    ): "The element more lies in the first row's place, which is written behind two barriers.",
    (
        "cuda/kernels/moe_unpermute.cuh",
        "for (int first = 0; first < p.topk; first += kRowsInFlight<T>) {",
        "for (int first = 0; first <= p.topk; first += kRowsInFlight<T>) {",
    ): "A run of choices behind the last has no row: it loads nothing and adds nothing.",
    (
        "cuda/kernels/moe_unpermute.cuh",
        "for (int column = threadIdx.x % kWarp * 4; column < p.depth; column += kWarp * 4) {",
        "for (int column = threadIdx.x % kWarp * 4; column <= p.depth; column += kWarp * 4) {",
    ): "A run with nothing left of the row loads zeros without reading, and stores nothing.",
    (
        "cuda/tile/gate_choice.cuh",
        "__syncwarp();  // nobody still reads what is overwritten",
        ";  // nobody still reads what is overwritten",
    ): "The reductions before it need what every lane has read, so nobody still reads. It stays, "
    "because PTX orders memory at barriers only.",
    (
        "cuda/tile/gate_choice.cuh",
        "for (int e = lane; e < p.experts; e += kWarp) value[e] = __fdiv_rn(value[e], sum);",
        "for (int e = lane; e <= p.experts; e += kWarp) value[e] = __fdiv_rn(value[e], sum);",
    ): "The one element more is behind the scores, or the first key, which is written afterwards.",
    (
        "cuda/tile/gate_choice.cuh",
        "for (int e = lane; e < p.experts; e += kWarp) value[e] = sigmoid(value[e]);",
        "for (int e = lane; e <= p.experts; e += kWarp) value[e] = sigmoid(value[e]);",
    ): "The one element more is behind the scores, or the first key, which is written afterwards.",
    (
        "cuda/tile/gate_choice.cuh",
        "if (p.num_groups > 1) limit_groups(p, s);",
        "if (p.num_groups >= 1) limit_groups(p, s);",
    ): "A single group is always chosen, so nobody is out of the running: slower, the same choice.",
    (
        "cuda/tile/mla_dequantize.cuh",
        "if (lane / 2 >= min(tokens.count, kTurned)) return;",
        "if (lane / 2 > min(tokens.count, kTurned)) return;",
    ): "One token more is a hint to L2, which reads nothing into the program.",
    (
        "cuda/kernels/mla_schedule.cuh",
        "__syncwarp();",
        ";",
    ): "All lanes have met at the shuffles before it, behind their stores; the emulator takes that for "
    "enough, as hardware does. PTX promises an order of memory for the barrier only, so it stays.",
    (
        "cuda/kernels/mla_decode.cuh",
        "__syncwarp();",
        ";",
    ): "Lanes that have parted at a branch meet behind it again, in the emulator always, on hardware "
    "where ptxas says so. wgmma needs the whole warp and PTX does not promise it, so the barrier stays.",
    (
        "cuda/tile/mla_load.cuh",
        "__syncwarp();",
        ";",
    ): "The other lanes must not load before lane 0 has waited for the place to be free. In the emulator "
    "lanes meet behind a branch; PTX does not promise it, so the barrier stays.",
    (
        "cuda/tile/mla_dequantize.cuh",
        "__syncwarp();",
        ";",
    ): "One lane announces what the whole warp has stored. The race checker takes lanes that have not "
    "parted for one agent, as they are in step on hardware; PTX asks for the barrier.",
    (
        "cuda/kernels/mla_prefill.cuh",
        "smem.q_ring.init(kPrefillMath / 32);",
        "smem.q_ring.init(kPrefillMath / 32 + 1);",
    ): "Q is loaded once: nobody waits for its stage to be free.",
    (
        "cuda/kernels/mla_prefill.cuh",
        "smem.q_ring.init(kPrefillMath / 32);",
        "smem.q_ring.init(kPrefillMath / 32 - 1);",
    ): "Q is loaded once: nobody waits for its stage to be free.",
    (
        "cuda/kernels/mla_prefill_backward.cuh",
        "if (row < job.kept_length) own[i] = p.statistics[at];",
        "if (row <= job.kept_length) own[i] = p.statistics[at];",
    ): "The row behind the request's last is not stored, whatever its statistics; reading them stays "
    "inside the workspace, whose requests are padded to 64 rows and which has 64 more.",
    (
        "cuda/kernels/mla_prefill_backward.cuh",
        "smem.kept_ring.init(1);",
        "smem.kept_ring.init(1 + 1);",
    ): "The kept rows are loaded once: nobody waits for their place to be free.",
    (
        "cuda/kernels/mla_prefill.cuh",
        "ptx::named_barrier_sync(kPrefillWarpgroupOnly + half, kPrefillWarpgroup);",
        ";",
    ): "A warp overwrites the 16 rows of A that are its own share of the products, and its own wait has "
    "ended them; the emulator takes that for enough. PTX does not promise which warp reads what, so the "
    "barrier stays.",
    (
        "cuda/kernels/mla_prefill_backward.cuh",
        "ptx::named_barrier_sync(kBackwardWarpgroupOnly + half, kBackwardWarpgroup);",
        ";",
    ): "A warp overwrites the 16 rows of A that are its own share of the products, and its own wait has "
    "ended them; the emulator takes that for enough. PTX does not promise which warp reads what, so the "
    "barrier stays.",
    (
        "cuda/kernels/gemm_bf16.cuh",
        "ptx::fence_accumulators(sum);",
        ";",
    ): "A fence for the compiler, which is no instruction: this compiler keeps the sums where they "
    "are without it too. Nothing but the fence makes it.",
    (
        "cuda/kernels/gemm_bf16.cuh",
        "min(tile.row_end - row, kMmaM), tile.n_start, tile.group,",
        "(tile.row_end - row), tile.n_start, tile.group,",
    ): "The only rows that are counted against it are the 64 of the fragment, and a tile of more "
    "than 64 rows is whole either way.",
    (
        "cuda/kernels/gemm_fp8_1d1d.cuh",
        "min(tile.row_end - row, kMmaM), tile.n_start, tile.group, false};",
        "(tile.row_end - row), tile.n_start, tile.group, false};",
    ): "The only rows that are counted against it are the 64 of the fragment, and a tile of more "
    "than 64 rows is whole either way.",
    (
        "cuda/kernels/gemm_fp8_1d2d.cuh",
        "place.rows_left = min(place.rows_left - first_row, kMmaM);",
        "place.rows_left = (place.rows_left - first_row);",
    ): "The only rows that are counted against it are the 64 of the fragment, and a tile of more "
    "than 64 rows is whole either way.",
    (
        "cuda/kernels/gemm_fp8_swiglu.cuh",
        "ResultPlace place{tile.a_row, min(tile.row_end - tile.a_row, Shape::kBlockM),",
        "ResultPlace place{tile.a_row, (tile.row_end - tile.a_row),",
    ): "The only rows that are counted against it are the 64 of the fragment, and a tile of more "
    "than 64 rows is whole either way.",
    (
        "cuda/kernels/gemm_fp8_swiglu.cuh",
        "const bool whole = at.rows_left >= Shape::kBlockM || at.clipped;",
        "const bool whole = at.rows_left > Shape::kBlockM || at.clipped;",
    ): "A tile of exactly 64 rows then goes out by 16-byte copies instead of TMA: slower, the same "
    "values.",
    (
        "cuda/kernels/gemm_fp8_swiglu.cuh",
        "int parity = 0;",
        "int parity = 1;",
    ): "The two buffers change names.",
    (
        "cuda/kernels/gemm_fp8_swiglu.cuh",
        "parity ^= 1;",
        ";",
    ): "The barrier before the panel is stored already lies between a tile's reads of the maxima and "
    "the next tile's writes; the second buffer is not needed while it does.",
    (
        "cuda/kernels/gemm_runs.cuh",
        "for (int base = 0; base < p.rows; base += kThreads) {",
        "for (int base = 0; base <= p.rows; base += kThreads) {",
    ): "One more turn over rows that do not exist, where p.rows is a multiple of kThreads: none "
    "starts a run or ends one.",
    (
        "cuda/tile/gemm_promote.cuh",
        "for (uint32_t skipped = (1u << at_.stage) - 1; end > 0; skipped = 0) {",
        "for (uint32_t skipped = (1u << at_.stage) - 1; end >= 0; skipped = 0) {",
    ): "One more round in which no stage is the tile's: it leaves the position where it was.",
    (
        "cuda/tile/gemm_promote.cuh",
        "const uint32_t mine = ((1u << min(end, kStages)) - 1) & ~skipped;",
        "const uint32_t mine = ((1u << (end)) - 1) & ~skipped;",
    ): "Only bits below kStages are looked at, and PTX's shift by 32 or more gives zero, of which all "
    "bits below are set after the subtraction. The minimum is for C++, where that is undefined.",
    (
        "cuda/tile/gemm_scheduler.cuh",
        "if (num_m_blocks > 1) {  // else no divisions",
        "if (num_m_blocks >= 1) {  // else no divisions",
    ): "With one block of rows the divisions find what was set without them.",
    (
        "cuda/tile/gemm_promote.cuh",
        "constexpr bool kOverlapsItself = kN <= 64 || (kN <= 128 && kMathWarpgroups == 1);",
        "constexpr bool kOverlapsItself = kN < 64 || (kN <= 128 && kMathWarpgroups == 1);",
    ): "Only how many products are under way at once: each k block's sums, and their order, are the "
    "same.",
    (
        "cuda/tile/gemm_promote.cuh",
        "constexpr bool kOverlapsItself = kN <= 64 || (kN <= 128 && kMathWarpgroups == 1);",
        "constexpr bool kOverlapsItself = kN <= 64 || (kN < 128 && kMathWarpgroups == 1);",
    ): "Only how many products are under way at once: each k block's sums, and their order, are the "
    "same.",
    (
        "cuda/tile/gemm_scales.cuh",
        "const int block_row = tile.group * block_rows + min(row[i], block_rows - 1);",
        "const int block_row = tile.group * block_rows + (row[i]);",
    ): "A row behind the group's last scales columns that D does not have: whatever is read there, "
    "the next group's scales or TMA's zeros, is stored nowhere.",
}
EXPLAINED.update({mutant: why for why, mutants in OF_EP.items() for mutant in mutants})
