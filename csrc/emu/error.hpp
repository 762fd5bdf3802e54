// Everything the emulator can say against a kernel. Errors are exceptions; nothing aborts.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "emu/types.hpp"

namespace dsk::emu {

// Base of all emulator errors.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// PTX that cannot be parsed or uses what the emulator does not support; carries the PTX line.
class PtxError : public Error {
 public:
  PtxError(u32 line, const std::string& what)
      : Error("PTX line " + std::to_string(line) + ": " + what), line_(line) {}
  u32 line() const { return line_; }

 private:
  u32 line_;
};

enum class Severity : u8 {
  Error,   // a result can be wrong on hardware
  Formal,  // the memory model asks for more than shipping kernels do
};

// One finding, located: who (kernel, block, warp, lanes), where (PTX line, CUDA line), what.
struct Hazard {
  std::string kind;  // a stable slug, e.g. "shared-out-of-bounds"
  Severity severity = Severity::Error;
  std::string kernel;
  u32 block[3] = {0, 0, 0};
  u32 warp = 0;
  std::string role;  // what the warp does, where that shows: "warpgroup 1, wgmma"
  u32 lanes = 0;     // mask of the lanes concerned
  u32 ptx_line = 0;
  std::string source_file;
  u32 source_line = 0;
  std::string message;

  std::string text() const;
};

// A hazard that stopped the kernel, or hazards collected until its end.
class HazardError : public Error {
 public:
  explicit HazardError(std::vector<Hazard> hazards);
  const std::vector<Hazard>& hazards() const { return hazards_; }

 private:
  std::vector<Hazard> hazards_;
};

// Where one warp stands when nothing moves any more.
struct StuckWarp {
  std::string kernel;
  u32 device = 0;
  u32 block[3] = {0, 0, 0};
  u32 warp = 0;
  std::string role;
  u32 lanes = 0;
  u32 ptx_line = 0;
  std::string source_file;
  u32 source_line = 0;
  std::string state;  // what it waits for, with the barrier's state
};

class DeadlockError : public Error {
 public:
  DeadlockError(const std::string& headline, std::vector<StuckWarp> warps);
  const std::vector<StuckWarp>& warps() const { return warps_; }

 private:
  std::vector<StuckWarp> warps_;
};

}  // namespace dsk::emu
