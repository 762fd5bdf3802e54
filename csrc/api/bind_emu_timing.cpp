// Profiles of emulated launches: what ran, and the modelled time. dskernels/emu builds on it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "api/bindings.hpp"
#include "emu/timing/profiler.hpp"
#include "emu/timing/replay.hpp"

namespace py = pybind11;
using namespace dsk::emu;
using namespace dsk::emu::timing;

namespace {

const std::map<std::string, double Model::*> kNumbers = {
    {"clock_ghz", &Model::clock_ghz},
    {"hbm_gbytes", &Model::hbm_gbytes},
    {"hbm_efficiency", &Model::hbm_efficiency},
    {"l2_bytes", &Model::l2_bytes},
    {"l2_port", &Model::l2_port},
    {"burst", &Model::burst},
    {"launch_us", &Model::launch_us},
    {"alu", &Model::alu},
    {"predicate", &Model::predicate},
    {"convert", &Model::convert},
    {"special", &Model::special},
    {"fp64", &Model::fp64},
    {"shuffle", &Model::shuffle},
    {"shared", &Model::shared},
    {"l1", &Model::l1},
    {"l2", &Model::l2},
    {"hbm", &Model::hbm},
    {"dsmem", &Model::dsmem},
    {"dsmem_bytes", &Model::dsmem_bytes},
    {"tma", &Model::tma},
    {"tma_gap", &Model::tma_gap},
    {"mbar_arrive", &Model::mbar_arrive},
    {"mbar_wait", &Model::mbar_wait},
    {"barrier", &Model::barrier},
    {"cluster_barrier", &Model::cluster_barrier},
    {"wgmma_tail", &Model::wgmma_tail},
    {"branch", &Model::branch},
    {"fence_gpu", &Model::fence_gpu},
    {"fence_cta", &Model::fence_cta},
    {"fence_async", &Model::fence_async},
    {"cta_start", &Model::cta_start},
    {"issue_scale", &Model::issue_scale},
    {"tensor_scale", &Model::tensor_scale},
};
const std::map<std::string, u32 Model::*> kCounts = {
    {"num_sms", &Model::num_sms},
    {"window", &Model::window},
    {"shared_per_sm", &Model::shared_per_sm},
    {"registers_per_sm", &Model::registers_per_sm},
};

py::dict model_defaults() {
  const Model m;
  py::dict d;
  for (const auto& [name, member] : kNumbers) d[name.c_str()] = m.*member;
  for (const auto& [name, member] : kCounts) d[name.c_str()] = m.*member;
  return d;
}

Model model_of(const py::dict& d) {
  Model m;
  for (const auto& [key, value] : d) {
    const std::string name = py::cast<std::string>(key);
    const double number = py::cast<double>(value);
    if (const auto it = kNumbers.find(name); it != kNumbers.end()) {
      if (!(number >= 0)) throw py::value_error("model: " + name + " must not be negative");
      m.*it->second = number;
    } else if (const auto at = kCounts.find(name); at != kCounts.end()) {
      if (!(number >= 1)) throw py::value_error("model: " + name + " must be at least 1");
      m.*at->second = static_cast<u32>(number);
    } else {
      throw py::value_error("model: no parameter '" + name + "'");
    }
  }
  for (double Model::* must : {&Model::clock_ghz, &Model::hbm_gbytes, &Model::hbm_efficiency,
                               &Model::l2_bytes, &Model::l2_port, &Model::dsmem_bytes}) {
    if (m.*must == 0) throw py::value_error("model: a rate must not be 0");
  }
  return m;
}

py::dict location(const Recording& r, u32 pc) {
  const InstInfo& info = r.program->info[pc];
  py::dict d;
  d["pc"] = pc;
  d["text"] = r.program->texts[info.text];
  d["ptx_line"] = info.ptx_line;
  d["source_line"] = info.source.line;
  const auto it = r.module->file().files.find(info.source.file);
  d["source_file"] = it == r.module->file().files.end() ? "" : it->second;
  return d;
}

py::list instructions(const Recording& r) {
  const CostTable table(*r.program, Model{});
  py::list out;
  for (u32 pc = 0; pc < r.counts.size(); ++pc) {
    const PcCount& c = r.counts[pc];
    if (c.executed == 0) continue;
    py::dict d = location(r, pc);
    d["group"] = class_name(table.cost[pc].group);
    d["slots"] = table.cost[pc].slots;
    d["executed"] = c.executed;
    d["requests"] = c.requests;
    d["wavefronts"] = c.wavefronts;
    d["least_wavefronts"] = c.least;
    d["worst_wavefronts"] = c.worst;
    d["sectors"] = c.sectors;
    d["least_sectors"] = c.least_sectors;
    out.append(d);
  }
  return out;
}

py::dict bytes_dict(const Recording& r) {
  const GridTraffic t = grid_traffic(r);
  py::dict d;
  d["l2_read"] = t.read, d["l2_written"] = t.written;
  d["unique_read"] = t.unique_read, d["unique_written"] = t.unique_written;
  const double scale = r.scale();
  d["shared_read"] = static_cast<double>(r.shared_read) * scale;
  d["shared_written"] = static_cast<double>(r.shared_written) * scale;
  d["wgmma_operands"] = static_cast<double>(r.wgmma_shared) * scale;
  d["dsmem"] = static_cast<double>(r.remote) * scale;
  d["l1_hit_sectors"] = static_cast<double>(r.l1_hits) * scale;
  return d;
}

py::list traffic_list(const Recording& r) {
  py::list out;
  for (const auto& [base, t] : r.traffic) {
    py::dict d;
    d["name"] = t.name;
    d["bytes"] = t.bytes;
    d["read"] = t.read;
    d["written"] = t.written;
    out.append(d);
  }
  return out;
}

py::tuple triple(const Dim3& d) { return py::make_tuple(d.x, d.y, d.z); }

py::list warps_list(const ClusterRecord& c) {
  py::list out;
  for (const WarpRecord& w : c.warps) {
    py::dict d;
    d["cta"] = w.cta;
    d["index"] = w.index;
    d["instructions"] = w.events.size();
    out.append(d);
  }
  return out;
}

py::dict operation_dict(const Recording& r, const UnitSpan& s) {
  const Operation& op = r.clusters.front().operations[s.operation];
  py::dict d;
  d["warp"] = op.warp;
  d["pc"] = op.pc;
  d["begin"] = s.begin, d["end"] = s.end, d["freed"] = s.freed;
  d["bytes"] = op.shared_bytes;
  d["offset"] = op.shared_offset >= kSharedReserved ? op.shared_offset - kSharedReserved : 0;
  d["ranks"] = op.ranks;
  d["barrier"] = -1;  // the mbarrier that its landing completes, in the CTA of lowest rank
  if (!op.nodes.empty()) {
    const Node& n = r.clusters.front().nodes[op.nodes.front()];
    d["barrier"] = static_cast<i64>(n.place) - kSharedReserved;
  }
  d["store"] = op.kind == AsyncKind::BulkStore || op.kind == AsyncKind::TensorStore ||
               op.kind == AsyncKind::BulkReduce || op.kind == AsyncKind::TensorReduce;
  return d;
}

u32 detail_of(State s, u32 detail) {
  return s == State::Mbarrier && detail >= kSharedReserved ? detail - kSharedReserved : detail;
}

py::dict trace_dict(const Recording& r, const Timing& t) {
  py::dict d;
  py::list spans, tensor, copies;
  for (const Span& s : t.spans) {
    spans.append(py::make_tuple(s.warp, state_name(s.state), detail_of(s.state, s.detail), s.pc,
                                s.begin, s.end));
  }
  for (const UnitSpan& s : t.tensor_spans) tensor.append(operation_dict(r, s));
  for (const UnitSpan& s : t.copy_spans) copies.append(operation_dict(r, s));
  d["spans"] = spans, d["tensor"] = tensor, d["copies"] = copies;
  d["cut"] = t.spans_cut;
  d["cycles"] = t.sample_cycles;
  d["warps"] = warps_list(r.clusters.front());
  py::dict where;
  for (u32 pc = 0; pc < r.counts.size(); ++pc) {
    if (r.counts[pc].executed != 0) where[py::int_(pc)] = location(r, pc);
  }
  d["where"] = where;
  return d;
}

py::dict timing_dict(const Recording& r, const Timing& t, bool trace) {
  py::dict d;
  d["us"] = t.microseconds;
  d["cycles"] = t.cycles, d["sample_cycles"] = t.sample_cycles;
  d["floor_hbm_us"] = t.floor_hbm_us, d["floor_l2_us"] = t.floor_l2_us;
  d["floor_tensor_us"] = t.floor_tensor_us;
  d["ctas_per_sm"] = t.ctas_per_sm, d["waves"] = t.waves;
  d["miss"] = t.miss, d["hbm_bytes"] = t.hbm_bytes, d["l2_bytes"] = t.l2_bytes;
  py::dict busy;
  busy["tensor"] = t.tensor, busy["issue"] = t.issue, busy["shared memory"] = t.shared;
  busy["L2"] = t.l2, busy["HBM"] = t.hbm, busy["special functions"] = t.special;
  d["busy"] = busy;
  d["bottleneck"] = t.bottleneck;
  py::list waits;
  for (const auto& [key, total] : t.waits) {
    waits.append(py::make_tuple(state_name(key.first), detail_of(key.first, key.second),
                                total.times, total.cycles));
  }
  d["waits"] = waits;
  d["warp_cycles"] = t.warp_cycles;
  if (trace) d["trace"] = trace_dict(r, t);
  return d;
}

py::dict run_replay(const Recording& r, const py::dict& model, u32 ctas_per_sm, u32 registers,
                    double unique_bytes, bool trace) {
  ReplayOptions o;
  o.model = model_of(model);
  o.ctas_per_sm = ctas_per_sm, o.registers = registers;
  o.unique_bytes = unique_bytes;
  o.trace = trace;
  Timing t;
  {
    const py::gil_scoped_release unlocked;
    t = replay(r, o);
  }
  return timing_dict(r, t, trace);
}

}  // namespace

namespace dsk::api {

void bind_emu_timing(py::module_& root) {
  py::module_ m = root.def_submodule("emu_timing", "Profiles of emulated launches.");
  py::class_<Recording, std::shared_ptr<Recording>>(m, "Recording")
      .def_property_readonly("kernel", [](const Recording& r) { return r.program->name; })
      .def_property_readonly("grid", [](const Recording& r) { return triple(r.config.grid); })
      .def_property_readonly("block", [](const Recording& r) { return triple(r.config.block); })
      .def_property_readonly("cluster", [](const Recording& r) { return triple(r.config.cluster); })
      .def_readonly("shared_bytes", &Recording::shared_bytes)
      .def_readonly("complete", &Recording::complete)
      .def_readonly("clusters_total", &Recording::clusters_total)
      .def_property_readonly("clusters_recorded",
                             [](const Recording& r) { return r.clusters.size(); })
      .def_property_readonly("warp_instructions",
                             [](const Recording& r) { return r.launch.warp_instructions; })
      .def_property_readonly("hazards", [](const Recording& r) { return r.launch.hazards; })
      .def_property_readonly("host_seconds", [](const Recording& r) { return r.launch.seconds; })
      .def("instructions", &instructions)
      .def("bytes", &bytes_dict)
      .def("traffic", &traffic_list)
      .def("replay", &run_replay, py::arg("model"), py::arg("ctas_per_sm") = 0,
           py::arg("registers") = 0, py::arg("unique_bytes") = 0.0, py::arg("trace") = false);
  py::class_<Profiler>(m, "Profiler")
      .def(py::init<u32, std::optional<bool>, bool, bool>(), py::arg("sample"), py::arg("complete"),
           py::arg("check"), py::arg("fast"))
      .def("start", &Profiler::start)
      .def("stop", &Profiler::stop)
      .def("recordings", &Profiler::recordings);
  m.def("model_defaults", &model_defaults);
}

}  // namespace dsk::api
