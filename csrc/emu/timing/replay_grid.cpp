// From a few CTAs to a launch: what runs at once, how often, and what that means for the whole
// grid.
#include <algorithm>
#include <cmath>

#include "emu/timing/replay_impl.hpp"

namespace dsk::emu::timing {
namespace {

constexpr double kJoinGap = 12;            // issue spans closer than this are drawn as one
constexpr std::size_t kMaxSpans = 400000;  // of a trace
constexpr u32 kSimulatedWaves = 3;

u32 residents(const Recording& r, const ReplayOptions& o) {
  if (o.ctas_per_sm != 0) return o.ctas_per_sm;
  const Model& m = o.model;
  const u32 threads = (static_cast<u32>(r.config.block.count()) + 31) / 32 * 32;
  u32 n = std::min(m.max_blocks_per_sm, m.max_threads_per_sm / threads);
  n = std::min(n, m.shared_per_sm / (r.shared_bytes + kSharedReserved));
  const u32 guess = std::min<u32>(255, (r.program->peak_registers + 7 + 8) / 8 * 8);
  const u32 registers = o.registers != 0 ? (o.registers + 7) / 8 * 8 : guess;
  n = std::min(n, m.registers_per_sm / (registers * threads));
  return std::max(1u, n);
}

}  // namespace

void Replay::plan() {
  cluster_size_ = static_cast<u32>(recording_.config.cluster.count());
  const u32 per_sm = residents(recording_, options_);
  out_.ctas_per_sm = per_sm;
  const double sms = std::max(1u, m_.num_sms / cluster_size_);  // groups of SMs
  const double per_group = recording_.clusters_total / sms;
  slots_ = std::min<u32>(per_sm, static_cast<u32>(std::ceil(per_group)));
  out_.waves = std::max(1.0, std::ceil(per_group) / slots_);
  waves_ = std::min<u32>(kSimulatedWaves, static_cast<u32>(std::ceil(out_.waves)));
  active_sms_ = std::min<double>(m_.num_sms, double(recording_.clusters_total) * cluster_size_);
  traffic_ = grid_traffic(recording_);
  out_.l2_bytes = traffic_.read + traffic_.written;
  double unique = traffic_.unique_read + traffic_.unique_written;
  if (options_.unique_bytes != 0) unique = options_.unique_bytes;
  out_.hbm_bytes = std::min(unique, out_.l2_bytes);
  out_.miss = out_.l2_bytes > 0 ? out_.hbm_bytes / out_.l2_bytes : 0;
  const double hbm = m_.hbm_gbytes * m_.hbm_efficiency / m_.clock_ghz;  // bytes per cycle
  for (u32 k = 0; k < cluster_size_; ++k) {
    auto sm = std::make_unique<Sm>();
    sm->l2_rate = std::min(m_.l2_port, m_.l2_bytes / active_sms_);
    sm->port_rate = m_.l2_port;
    sm->burst = m_.burst;
    sm->hbm_rate = hbm / active_sms_;
    sms_.push_back(std::move(sm));
  }
  wave_end_.assign(waves_, 0);
}

void Replay::start(u32 slot, u32 wave, double time) {
  live_.push_back(std::make_unique<Instance>());
  Instance& in = *live_.back();
  in.record = &recording_.clusters[started_ % recording_.clusters.size()];
  in.traced = options_.trace && started_ == 0;
  ++started_;
  in.slot = slot, in.wave = wave;
  in.nodes.resize(in.record->nodes.size());
  for (std::size_t k = 0; k < in.nodes.size(); ++k) {
    in.nodes[k].left = in.record->nodes[k].contributions;
  }
  u32 most = 0;
  for (const WarpRecord& w : in.record->warps) most = std::max(most, w.index / 4 + 1);
  in.groups.resize(std::size_t{most} * cluster_size_);
  for (u32 k = 0; k < in.record->warps.size(); ++k) {
    const WarpRecord& record = in.record->warps[k];
    in.warps.push_back(std::make_unique<WarpSim>());
    WarpSim& w = *in.warps.back();
    w.record = &record;
    w.in = &in;
    w.number = k;
    w.sm = sms_[record.cta % cluster_size_].get();
    w.part = &w.sm->parts[record.index % 4];
    w.group = &in.groups[record.cta * most + record.index / 4];
    w.ready.assign(recording_.program->num_virtual, time);
    w.producer.assign(recording_.program->num_virtual, Producer::Arithmetic);
    w.time = w.begin = w.drawn = time;
    w.order_tag = ++tags_;
    ++in.running;
  }
  for (auto& w : in.warps) prepare(*w);
}

void Replay::finish_warp(WarpSim& w) {
  close_span(w);
  Instance& in = *w.in;
  const double over = std::max(w.time, w.drain);
  end_ = std::max(end_, over);
  wave_end_[in.wave] = std::max(wave_end_[in.wave], over);
  out_.warp_cycles += w.time - w.begin;
  w.ready = {}, w.producer = {};
  if (--in.running != 0) return;
  double last = 0;
  for (const auto& each : in.warps) last = std::max(last, std::max(each->time, each->drain));
  if (in.wave + 1 < waves_) start(in.slot, in.wave + 1, last + m_.cta_start);
}

// --- what is kept for people

void Replay::note(WarpSim& w, State s, u32 detail, double begin, double end) {
  if (end <= begin) return;
  WaitTotal& total = out_.waits[{s, detail}];
  ++total.times;
  total.cycles += end - begin;
  if (!w.in->traced) return;
  const bool small = s == State::Result || s == State::Busy;
  if (small && end - begin < kJoinGap) {  // part of issuing, unless many of them follow each other
    w.small = s;
    return;
  }
  close_span(w);
  if (out_.spans.size() >= kMaxSpans) {
    out_.spans_cut = true;
    return;
  }
  const u32 pc = w.at < w.order.size() ? w.record->events[w.order[w.at]] & kPcMask : 0;
  out_.spans.push_back({w.number, s, detail, pc, begin, end});
  w.drawn = end;
}

void Replay::busy(WarpSim& w, double begin, double end) {
  WaitTotal& total = out_.waits[{State::Issue, 0}];
  ++total.times;
  total.cycles += end - begin;
  if (!w.in->traced) return;
  if (w.has_open && begin - w.open.end < kJoinGap) {
    w.open.end = w.drawn = end;
    return;
  }
  close_span(w);
  if (begin - w.drawn >= kJoinGap && out_.spans.size() < kMaxSpans) {
    out_.spans.push_back({w.number, w.small, 0, w.open.pc, w.drawn, begin});
  }
  w.drawn = end;
  const u32 pc = w.record->events[w.order[w.at]] & kPcMask;
  w.open = {w.number, State::Issue, 0, pc, begin, end};
  w.has_open = true;
}

void Replay::close_span(WarpSim& w) {
  if (!w.has_open) return;
  w.has_open = false;
  if (out_.spans.size() < kMaxSpans) {
    out_.spans.push_back(w.open);
  } else {
    out_.spans_cut = true;
  }
}

void Replay::name_bottleneck() {
  const std::pair<double, const char*> uses[] = {
      {out_.tensor, "tensor"}, {out_.issue, "issue"}, {out_.shared, "shared memory"},
      {out_.l2, "L2"},         {out_.hbm, "HBM"},     {out_.special, "special functions"}};
  const auto top = *std::max_element(std::begin(uses), std::end(uses));
  out_.bottleneck = top.first >= 0.6 ? top.second : "latency";
}

void Replay::conclude() {
  out_.sample_cycles = end_;
  double cycles = end_;
  if (out_.waves > waves_) {
    const double step = waves_ > 1 ? (wave_end_.back() - wave_end_.front()) / (waves_ - 1) : end_;
    cycles += (out_.waves - waves_) * step;
  }
  const double hz = m_.clock_ghz * 1e3;  // cycles per microsecond
  out_.floor_hbm_us = out_.hbm_bytes / (m_.hbm_gbytes * m_.hbm_efficiency) * 1e-3;
  out_.floor_l2_us = out_.l2_bytes / m_.l2_bytes / hz;
  double tensor = 0, issued = 0, shared = 0, l2 = 0, hbm = 0, special = 0;
  for (const auto& sm : sms_) {
    tensor += sm->tensor.busy, shared += sm->shared.busy;
    l2 += sm->l2.busy, hbm += sm->hbm.busy;
    double mma = 0;
    for (const Partition& p : sm->parts) {
      issued += p.issued / 4;
      mma += p.pipe_busy[static_cast<u32>(Pipe::Tensor)] / 4;
      special += p.pipe_busy[static_cast<u32>(Pipe::Special)] / 4;
    }
    tensor += mma;
  }
  const double total = end_ * cluster_size_;
  if (total > 0) {
    out_.tensor = tensor / total, out_.issue = issued / total, out_.shared = shared / total;
    out_.l2 = l2 / total, out_.hbm = hbm / total, out_.special = special / total;
  }
  out_.cycles = cycles;
  out_.floor_tensor_us = end_ > 0 ? tensor / cluster_size_ / hz * (cycles / end_) : 0;
  const double us = std::max({cycles / hz, out_.floor_hbm_us, out_.floor_l2_us});
  out_.microseconds = us + m_.launch_us;
  name_bottleneck();
}

Timing Replay::run() {
  plan();
  for (u32 slot = 0; slot < slots_; ++slot) start(slot, 0, 0);
  while (!queue_.empty()) {
    WarpSim& w = *queue_.top().warp;
    queue_.pop();
    step(w);
  }
  for (const auto& in : live_) {
    if (in->running != 0) throw Error("timing: a replayed warp waits for what never comes");
  }
  conclude();
  return std::move(out_);
}

const char* state_name(State s) {
  static const char* const names[kStates] = {"issue", "mbarrier", "barrier", "cluster barrier",
                                             "wgmma", "copies",   "memory",  "result",
                                             "busy",  "fence"};
  return names[static_cast<u32>(s)];
}

GridTraffic grid_traffic(const Recording& r) {
  GridTraffic g;
  const double scale = r.scale();
  for (const auto& [base, t] : r.traffic) {
    const double read = static_cast<double>(t.read) * scale;
    const double written = static_cast<double>(t.written) * scale;
    const auto touched = [&](const std::vector<bool>& lines) {
      const auto n = static_cast<double>(std::count(lines.begin(), lines.end(), true));
      return std::min(static_cast<double>(t.bytes), n * 128 * scale);
    };
    g.read += read, g.written += written;
    g.unique_read += std::min(read, touched(t.read_lines));
    g.unique_written += std::min(written, touched(t.written_lines));
  }
  return g;
}

Timing replay(const Recording& recording, const ReplayOptions& options) {
  if (!recording.complete || recording.clusters.empty()) {
    throw Error("timing: the launch has not finished, or none of its CTAs was recorded");
  }
  return Replay(recording, options).run();
}

}  // namespace dsk::emu::timing
