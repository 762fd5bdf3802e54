// What blocked lanes wait for: whether it has come, and how to say it in a report.
#include <algorithm>
#include <cstdio>

#include "emu/machine.hpp"
#include "emu/system.hpp"

namespace dsk::emu {
namespace {

bool warpgroup_committed(const Warp& w, u64 groups) {
  const u32 first = w.index / 4 * 4;
  const auto& warps = w.cta->warps;
  for (u32 k = first; k < first + 4 && k < warps.size(); ++k) {
    if (!warps[k]->done && warps[k]->wgmma.committed < groups) return false;
  }
  return true;
}

std::string location(const Warp& w, u32 pc) {
  const InstInfo& info = w.cta->cluster->grid->program->info[pc];
  std::string text = "PTX line " + std::to_string(info.ptx_line);
  if (info.source.line != 0) text += ", source line " + std::to_string(info.source.line);
  return text;
}

std::string mbarrier_text(const Warp& w, const Split& s) {
  Cta& cta = *w.cta->cluster->ctas[s.id];
  const std::string where =
      "mbarrier at shared offset " + std::to_string(s.address - kSharedReserved);
  const Mbarrier* b = cta.find_mbarrier(s.address);
  if (b == nullptr) return "waits for the " + where + ", which is no longer initialized";
  return "waits for phase " + std::to_string(s.value) + " of the " + where + ": " +
         std::to_string(b->pending) + " of " + std::to_string(b->count) + " arrivals and " +
         std::to_string(b->tx) + " bytes are missing in phase " + std::to_string(b->phase) +
         "; last touched by warp " + std::to_string(b->last_warp) + " at " +
         location(w, b->last_pc) + ", initialized at " + location(w, b->init_pc);
}

std::string barrier_text(const Warp& w, const Split& s) {
  const NamedBarrier& b = w.cta->barriers[s.id];
  std::string arrived, missing;
  for (u32 k = 0; k < w.cta->warps.size(); ++k) {
    if (b.warps >> k & 1)
      arrived += " " + std::to_string(k);
    else if (!w.cta->warps[k]->done)
      missing += " " + std::to_string(k);
  }
  return "waits at barrier " + std::to_string(s.id) + ": " + std::to_string(b.arrived) + " of " +
         std::to_string(b.expected) + " threads have arrived (warps" + arrived + "; last warp " +
         std::to_string(b.last_warp) + " at " + location(w, b.last_pc) + "), not warps" +
         (missing.empty() ? " that have left" : missing);
}

std::string state_text(const Warp& w, const Split& s) {
  switch (s.wait) {
    case Wait::None:
      return "runs (polling or not yet scheduled)";
    case Wait::Converge: {
      char buffer[64];
      std::snprintf(buffer, sizeof buffer, "waits for other lanes of the warp (live 0x%08x)",
                    w.active_lanes());
      return buffer;
    }
    case Wait::Barrier:
      return barrier_text(w, s);
    case Wait::ClusterBarrier:
      return "waits at the cluster barrier: " + std::to_string(w.cta->cluster->barrier_arrived) +
             " threads have arrived";
    case Wait::Mbarrier:
      return mbarrier_text(w, s);
    case Wait::Wgmma:
      return "waits for " + std::to_string(s.value) +
             " wgmma groups that another warp of the warpgroup has not committed";
    case Wait::CpAsync:
      return "waits for cp.async groups";
    case Wait::Bulk:
      return "waits for bulk groups to complete";
    case Wait::BulkRead:
      return "waits for bulk groups to read their source";
    default:
      return "waits for the preceding grid (griddepcontrol.wait)";
  }
}

}  // namespace

bool wait_over(Warp& w, Split& s) {
  switch (s.wait) {
    case Wait::Barrier:
      return w.cta->barriers[s.id].generation >= s.value;
    case Wait::ClusterBarrier:
      return w.cta->cluster->barrier_phase >= s.value;
    case Wait::Mbarrier: {
      if (s.timed_out) return true;
      const Mbarrier* b = w.cta->cluster->ctas[s.id]->find_mbarrier(s.address);
      return b == nullptr || b->phase != s.value;
    }
    case Wait::CpAsync:
      return w.cp_async.reached(s.mask, s.value, AsyncOp::Stage::Done);
    case Wait::Bulk:
      return w.bulk.reached(s.mask, s.value, AsyncOp::Stage::Done);
    case Wait::BulkRead:
      return w.bulk.reached(s.mask, s.value, AsyncOp::Stage::Read);
    case Wait::Grid:
      return w.cta->cluster->grid->predecessor_done;
    case Wait::Wgmma:
      return warpgroup_committed(w, s.value);
    default:
      return true;
  }
}

std::vector<StuckWarp> describe(const Cluster& cluster) {
  std::vector<StuckWarp> out;
  for (const auto& cta : cluster.ctas) {
    for (const auto& warp : cta->warps) {
      for (const Split& s : warp->splits) {
        const Hazard h = make_hazard(*warp, s.pc, s.mask, "", "");
        StuckWarp stuck;
        stuck.kernel = h.kernel;
        stuck.device = cluster.grid->device;
        std::copy(h.block, h.block + 3, stuck.block);
        stuck.warp = h.warp;
        stuck.lanes = s.mask;
        stuck.ptx_line = h.ptx_line;
        stuck.source_file = h.source_file;
        stuck.source_line = h.source_line;
        stuck.role = h.role;
        stuck.state = h.message + state_text(*warp, s);
        for (const auto& o : cluster.observers) stuck.state += o->describe_wait(*warp, s.wait);
        out.push_back(std::move(stuck));
      }
    }
  }
  return out;
}

}  // namespace dsk::emu
