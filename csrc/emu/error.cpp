#include "emu/error.hpp"

#include <cstdio>

namespace dsk::emu {
namespace {

std::string place(u32 ptx_line, const std::string& file, u32 line) {
  std::string s = "PTX line " + std::to_string(ptx_line);
  if (line != 0) s += " (" + (file.empty() ? "source" : file) + ":" + std::to_string(line) + ")";
  return s;
}

std::string block_text(const u32* b) {
  return "(" + std::to_string(b[0]) + "," + std::to_string(b[1]) + "," + std::to_string(b[2]) + ")";
}

std::string warp_text(u32 warp, const std::string& role) {
  return " warp " + std::to_string(warp) + (role.empty() ? "" : " (" + role + ")") + " ";
}

std::string lanes_text(u32 lanes) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "lanes 0x%08x", lanes);
  return buffer;
}

std::string join(const std::vector<Hazard>& hazards) {
  std::string s;
  for (const Hazard& h : hazards) s += (s.empty() ? "" : "\n") + h.text();
  return s;
}

std::string join(const std::string& headline, const std::vector<StuckWarp>& warps) {
  constexpr std::size_t kShown = 64;
  std::string s = headline;
  for (std::size_t k = 0; k < warps.size() && k < kShown; ++k) {
    const StuckWarp& w = warps[k];
    s += "\n  " + w.kernel + " block " + block_text(w.block) + warp_text(w.warp, w.role) +
         lanes_text(w.lanes) + " at " + place(w.ptx_line, w.source_file, w.source_line) + ": " +
         w.state;
  }
  if (warps.size() > kShown) {
    s += "\n  ... and " + std::to_string(warps.size() - kShown) + " more";
  }
  return s;
}

}  // namespace

std::string Hazard::text() const {
  return std::string(severity == Severity::Error ? "error" : "formal") + " [" + kind + "] " +
         kernel + " block " + block_text(block) + warp_text(warp, role) + lanes_text(lanes) +
         " at " + place(ptx_line, source_file, source_line) + ": " + message;
}

HazardError::HazardError(std::vector<Hazard> hazards)
    : Error(join(hazards)), hazards_(std::move(hazards)) {}

DeadlockError::DeadlockError(const std::string& headline, std::vector<StuckWarp> warps)
    : Error(join(headline, warps)), warps_(std::move(warps)) {}

}  // namespace dsk::emu
