// One target's kernels as a table for dispatch.cpp.
#include "cpu/kernels/table.hpp"

#define DSK_STRING_(x) #x
#define DSK_STRING(x) DSK_STRING_(x)

namespace dsk::cpu::DSK_CPU_NS {

// External linkage despite const: dispatch.cpp declares it.
extern const Kernels kTable;
const Kernels kTable = {
    .name = DSK_STRING(DSK_CPU_NS),
    .quantize = quantize,
    .rms_norm = rms_norm,
    .swiglu = swiglu,
    .rope = rope,
    .gemm = gemm,
    .mla_decode = mla_decode,
    .mla_prefill = mla_prefill,
    .mla_prefill_backward = mla_prefill_backward,
    .mla_cache_append = mla_cache_append,
    .moe_gate = moe_gate,
    .moe_gate_backward = moe_gate_backward,
    .moe_permute = moe_permute,
    .moe_unpermute = moe_unpermute,
    .moe_unpermute_backward = moe_unpermute_backward,
    .moe_experts = moe_experts,
};

}  // namespace dsk::cpu::DSK_CPU_NS
