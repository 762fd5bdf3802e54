// The entry points of one target, as its translation units see each other.
#pragma once

#include "cpu/kernels.hpp"

namespace dsk::cpu::DSK_CPU_NS {

void quantize(const RowwiseParams& p);
void rms_norm(const RowwiseParams& p);
void swiglu(const RowwiseParams& p);
void rope(const RopeParams& p);
void gemm(const GemmParams& p);
void mla_decode(const DecodeParams& p);
void mla_prefill(const PrefillParams& p);
void mla_prefill_backward(const PrefillBackwardParams& p);
void mla_cache_append(const AppendParams& p);
void moe_gate(const GateParams& p);
void moe_gate_backward(const GateBackwardParams& p);
void moe_permute(const PermuteParams& p);
void moe_unpermute(const UnpermuteParams& p);
void moe_unpermute_backward(const UnpermuteParams& p);
void moe_experts(const MoeParams& p);

}  // namespace dsk::cpu::DSK_CPU_NS
