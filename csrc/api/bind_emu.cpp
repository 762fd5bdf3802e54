// The Python face of the emulator's System: thin, no policy. dskernels/emu builds on it.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "api/bindings.hpp"
#include "emu/memory.hpp"
#include "emu/num/tensor_map.hpp"
#include "emu/system.hpp"
#include "emu/table.hpp"

namespace py = pybind11;
using namespace dsk::emu;

namespace {

using Triple = std::array<u32, 3>;
Dim3 dim(const Triple& t) { return {t[0], t[1], t[2]}; }

PyObject *emu_error, *ptx_error, *hazard_error, *deadlock_error;

PyObject* new_exception(py::module_& m, const char* name, const char* doc, PyObject* base) {
  const std::string full = std::string("dskernels.emu.") + name;
  PyObject* type = PyErr_NewExceptionWithDoc(full.c_str(), doc, base, nullptr);
  m.add_object(name, py::reinterpret_borrow<py::object>(type));
  return type;
}

void raise(PyObject* type, const std::exception& e, const char* attribute, py::object value) {
  py::object error = py::reinterpret_borrow<py::object>(type)(e.what());
  if (attribute != nullptr) error.attr(attribute) = value;
  PyErr_SetObject(type, error.ptr());
}

void translate(std::exception_ptr p) {
  try {
    if (p) std::rethrow_exception(p);
  } catch (const HazardError& e) {
    raise(hazard_error, e, "hazards", py::cast(e.hazards()));
  } catch (const DeadlockError& e) {
    raise(deadlock_error, e, "warps", py::cast(e.warps()));
  } catch (const PtxError& e) {
    raise(ptx_error, e, "line", py::cast(e.line()));
  } catch (const Error& e) {
    raise(emu_error, e, nullptr, py::none());
  }
}

py::dict kernel_info(const Module& module, const std::string& name) {
  const Program& p = module.kernel(name);
  py::list params;
  for (const KernelParam& k : p.params) {
    py::dict d;
    d["name"] = k.name;
    d["offset"] = k.offset;
    d["size"] = k.size;
    d["align"] = k.align;
    d["type"] = type_name(k.type);
    params.append(d);
  }
  std::vector<u32> rows;
  for (std::size_t k = 0; k + 1 < p.info.size(); ++k) rows.push_back(p.info[k].entry);
  py::dict info;
  info["params"] = params;
  info["param_bytes"] = p.param_bytes;
  info["instructions"] = p.code.size() - 1;
  info["table_rows"] = rows;
  info["static_shared"] = p.static_shared;
  info["local_bytes"] = p.local_bytes;
  info["register_bytes"] = p.register_bytes;
  info["peak_registers"] = p.peak_registers;
  info["max_threads"] = p.max_threads;
  const Dim3 c = p.required_cluster;
  info["required_cluster"] = Triple{c.x, c.y, c.z};
  return info;
}

py::dict stats_dict(const LaunchStats& s) {
  py::dict d;
  d["kernel"] = s.kernel;
  d["warp_instructions"] = s.warp_instructions;
  d["thread_instructions"] = s.thread_instructions;
  d["async_operations"] = s.async_operations;
  d["wgmma"] = s.wgmma;
  d["seconds"] = s.seconds;
  d["hazards"] = s.hazards;
  return d;
}

u64 launch(u64 stream, std::shared_ptr<const Module> module, const std::string& kernel,
           const Triple& grid, const Triple& block, const Triple& cluster, u32 shared,
           const py::bytes& params, u64 seed, bool check, int numerics, bool programmatic,
           u64 max_instructions, bool strict) {
  LaunchConfig config;
  config.grid = dim(grid);
  config.block = dim(block);
  config.cluster = dim(cluster);
  config.dynamic_shared = shared;
  config.seed = seed;
  config.check = check;
  config.strict = strict ? Strict::All : Strict::No;
  config.programmatic = programmatic;
  config.max_instructions = max_instructions;
  if (numerics < 0 || numerics > static_cast<int>(Numerics::Worst)) {
    throw py::value_error("numerics: expected 0..2, got " + std::to_string(numerics));
  }
  config.numerics = static_cast<Numerics>(numerics);
  const std::string bytes = params;
  const py::gil_scoped_release unlocked;  // with DSK_EMU_SEEDS the launch runs to its end
  return System::instance().launch(stream, std::move(module), kernel, config, bytes.data(),
                                   bytes.size());
}

py::bytes tensor_map(u64 address, int type, const std::vector<u64>& dims,
                     const std::vector<u64>& strides, const std::vector<u32>& box,
                     const std::vector<u32>& element_strides, int interleave, int swizzle,
                     int fill) {
  num::TensorMapArgs args;
  if (dims.empty() || dims.size() > 5 || strides.size() + 1 != dims.size() ||
      box.size() != dims.size() || element_strides.size() != dims.size()) {
    throw py::value_error(
        "tensor_map: expected 1..5 dims, one stride fewer, equally many box and "
        "element_strides");
  }
  args.type = static_cast<num::TmaType>(type);
  args.rank = static_cast<u32>(dims.size());
  args.address = address;
  for (std::size_t k = 0; k < dims.size(); ++k) {
    args.dims[k] = dims[k];
    args.box[k] = box[k];
    args.element_strides[k] = element_strides[k];
    if (k > 0) args.strides[k - 1] = strides[k - 1];
  }
  args.interleave = static_cast<num::TmaInterleave>(interleave);
  args.swizzle = static_cast<num::Swizzle>(swizzle);
  args.fill = static_cast<num::TmaFill>(fill);
  const num::TensorMap map = num::encode_tensor_map(args);
  return py::bytes(reinterpret_cast<const char*>(map.bytes.data()), map.bytes.size());
}

py::list table() {
  py::list rows;
  for (const Entry& e : instruction_table()) {
    py::dict d;
    d["pattern"] = e.pattern;
    d["full_pattern"] = describe_pattern(e.pattern);
    d["summary"] = e.summary;
    d["min_sm"] = e.min_sm;
    rows.append(d);
  }
  return rows;
}

void bind_errors(py::module_& m) {
  emu_error = new_exception(m, "EmuError", "Any error of the emulator.", PyExc_RuntimeError);
  ptx_error = new_exception(m, "PtxError", "PTX that cannot be parsed or is not supported; .line.",
                            emu_error);
  hazard_error = new_exception(m, "HazardError", "The kernel broke a rule; .hazards.", emu_error);
  deadlock_error = new_exception(m, "DeadlockError", "No warp can go on; .warps.", emu_error);
  py::register_exception_translator(&translate);
  py::class_<Hazard>(m, "Hazard")
      .def_readonly("kind", &Hazard::kind)
      .def_readonly("kernel", &Hazard::kernel)
      .def_readonly("warp", &Hazard::warp)
      .def_readonly("role", &Hazard::role)
      .def_readonly("lanes", &Hazard::lanes)
      .def_readonly("ptx_line", &Hazard::ptx_line)
      .def_readonly("source_file", &Hazard::source_file)
      .def_readonly("source_line", &Hazard::source_line)
      .def_readonly("message", &Hazard::message)
      .def_property_readonly(
          "severity",
          [](const Hazard& h) { return h.severity == Severity::Error ? "error" : "formal"; })
      .def_property_readonly(
          "block",
          [](const Hazard& h) { return py::make_tuple(h.block[0], h.block[1], h.block[2]); })
      .def("__repr__", &Hazard::text);
  py::class_<StuckWarp>(m, "StuckWarp")
      .def_readonly("kernel", &StuckWarp::kernel)
      .def_readonly("device", &StuckWarp::device)
      .def_readonly("warp", &StuckWarp::warp)
      .def_readonly("role", &StuckWarp::role)
      .def_readonly("lanes", &StuckWarp::lanes)
      .def_readonly("ptx_line", &StuckWarp::ptx_line)
      .def_readonly("source_file", &StuckWarp::source_file)
      .def_readonly("source_line", &StuckWarp::source_line)
      .def_readonly("state", &StuckWarp::state)
      .def_property_readonly("block", [](const StuckWarp& s) {
        return py::make_tuple(s.block[0], s.block[1], s.block[2]);
      });
}

void bind_system(py::module_& m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("launch", &launch, py::arg("stream"), py::arg("module"), py::arg("kernel"), py::arg("grid"),
        py::arg("block"), py::arg("cluster"), py::arg("shared"), py::arg("params"), py::arg("seed"),
        py::arg("check"), py::arg("fast"), py::arg("programmatic"), py::arg("max_instructions") = 0,
        py::arg("strict") = false);
  m.def("synchronize", [] { System::instance().synchronize(); }, Unlocked());
  m.def("synchronize", [](u64 s) { System::instance().synchronize(s); }, Unlocked());
  m.def("create_stream", [](u32 device) { return System::instance().create_stream(device); });
  m.def("destroy_stream", [](u64 s) { System::instance().destroy_stream(s); });
  m.def("create_event", [] { return System::instance().create_event(); });
  m.def("record", [](u64 s, u64 e) { System::instance().record(s, e); });
  m.def("wait", [](u64 s, u64 e) { System::instance().wait(s, e); });
  m.def("stats", [](u64 launch) { return stats_dict(System::instance().stats(launch)); });
  m.def("set_threads", [](u32 n) { System::instance().set_threads(n); });
  m.def("set_device_count", [](u32 n) { System::instance().set_device_count(n); });
  m.def("device_count", [] { return System::instance().device_count(); });
  m.def("set_num_sms", [](u32 device, u32 n) {
    DeviceProperties p = System::instance().properties(device);
    p.num_sms = n;
    System::instance().set_properties(device, p);
  });
  m.def("set_printer", [](std::function<void(const std::string&)> print) {
    System::instance().set_printer(std::move(print));
  });
  m.def("allocate", [](u32 device, u64 bytes, const std::string& name) {
    return System::instance().allocate(device, bytes, name);
  });
  m.def("release", [](u64 address) { System::instance().release(address); });
  m.def("symbol", [](u32 device, std::shared_ptr<const Module> module, const std::string& name) {
    return System::instance().symbol(device, module, name);
  });
  m.def("lend", [](u64 base, u64 bytes, bool read_only, const std::string& name) {
    AddressSpace::instance().lend(base, bytes, read_only, name);
  });
  m.def("take_back", [](u64 base, u64 bytes) { AddressSpace::instance().take_back(base, bytes); });
}

}  // namespace

namespace dsk::api {

void bind_emu(py::module_& root) {
  py::module_ m = root.def_submodule("emu", "The Hopper emulator.");
  bind_errors(m);
  py::class_<Module, std::shared_ptr<Module>>(m, "Module")
      .def_property_readonly("name", &Module::name)
      .def("kernels", &Module::kernel_names)
      .def("kernel_info", &kernel_info);
  m.def(
      "load",
      [](const std::string& text, const std::string& name) {
        return std::const_pointer_cast<Module>(Module::load(text, name));
      },
      py::call_guard<py::gil_scoped_release>());
  bind_system(m);
  m.def("tensor_map", &tensor_map);
  m.def("table", &table);
  m.def("host_isa", &host_isa);
}

}  // namespace dsk::api
