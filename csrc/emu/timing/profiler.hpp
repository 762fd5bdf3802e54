// Records every launch of the process while it is on.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "emu/timing/record.hpp"

namespace dsk::emu::timing {

class Profiler {
 public:
  // sample: clusters of each grid that are recorded (0: all). complete: whether the others run too;
  // otherwise they do not, and the results are incomplete. By default those of kernels without
  // wgmma do. check: hazard checking as the launch
  // asks for it, instead of none. fast: tensor cores in plain fp32.
  Profiler(u32 sample, std::optional<bool> complete, bool check, bool fast)
      : sample_(sample), complete_(complete), check_(check), fast_(fast) {}
  ~Profiler() { stop(); }
  Profiler(const Profiler&) = delete;
  Profiler& operator=(const Profiler&) = delete;

  // Throws Error if another one is on.
  void start();
  void stop();
  std::vector<std::shared_ptr<Recording>> recordings() const;

 private:
  void on_launch(Grid& grid);
  const u32 sample_;
  const std::optional<bool> complete_;
  const bool check_, fast_;
  bool on_ = false;
  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<Recording>> recordings_;
};

}  // namespace dsk::emu::timing
