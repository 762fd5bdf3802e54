// What the launchers' bindings share, one bind_launch_<stem> each. Addresses come as integers from
// tensors that the caller has checked and keeps alive; `machine` is "cuda" or "emu".
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/launch/context.hpp"

namespace dsk::api {

void bind_launch_rowwise(pybind11::module_& launch);
void bind_launch_gemm(pybind11::module_& launch);
void bind_launch_mla(pybind11::module_& launch);
void bind_launch_mla_prefill(pybind11::module_& launch);
void bind_launch_mla_fused(pybind11::module_& launch);
void bind_launch_ep(pybind11::module_& launch);
void bind_launch_moe(pybind11::module_& launch);

inline launch::Context& context_of(const std::string& machine, int ordinal) {
  if (machine == "cuda") return launch::context(launch::Machine::kCuda, ordinal);
  if (machine == "emu") return launch::context(launch::Machine::kEmulated, ordinal);
  throw std::invalid_argument("machine: expected cuda or emu, got " + machine);
}

inline device::cu::Stream stream_of(uint64_t handle) {
  return reinterpret_cast<device::cu::Stream>(handle);
}

template <typename T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

using Address = uint64_t;
using On = std::tuple<std::string, int, uint64_t, int>;  // machine, ordinal, stream, num_sms

inline launch::LaunchOn launch_on(const On& on) {
  const auto& [machine, ordinal, stream, num_sms] = on;
  return {context_of(machine, ordinal), stream_of(stream), num_sms};
}

}  // namespace dsk::api
