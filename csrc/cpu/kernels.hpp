// The table of kernels that each target fills, and the choice among the targets.
#pragma once

#include <vector>

#include "params.hpp"

namespace dsk::cpu {

struct Kernels {
  const char* name;
  void (*quantize)(const RowwiseParams&);
  void (*rms_norm)(const RowwiseParams&);
  void (*swiglu)(const RowwiseParams&);
  void (*rope)(const RopeParams&);
  void (*gemm)(const GemmParams&);
  void (*mla_decode)(const DecodeParams&);
  void (*mla_prefill)(const PrefillParams&);
  void (*mla_prefill_backward)(const PrefillBackwardParams&);
  void (*mla_cache_append)(const AppendParams&);
  void (*moe_gate)(const GateParams&);
  void (*moe_gate_backward)(const GateBackwardParams&);
  void (*moe_permute)(const PermuteParams&);
  void (*moe_unpermute)(const UnpermuteParams&);
  void (*moe_unpermute_backward)(const UnpermuteParams&);
  void (*moe_experts)(const MoeParams&);
};

// The table in use: the best this processor runs, or the one DSK_CPU_TARGET names. Throws
// dsk::Error when that name is unknown, was not compiled in, or needs what the processor lacks.
const Kernels& kernels();
const char* target_reason();

// Switches the target from now on: for tests, which run every target in one process. An empty name
// returns to the default choice. Not to be called while kernels run.
void select_target(const char* name);
std::vector<const char*> available_targets();

}  // namespace dsk::cpu
