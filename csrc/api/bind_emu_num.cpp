// Test-only Python face of the emulator's numerics: NumPy arrays in, NumPy arrays out. Bound as
// `_C._emu_num`; nothing in the package uses it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "api/bindings.hpp"
#include "emu/num/approx.hpp"
#include "emu/num/convert.hpp"
#include "emu/num/fragments.hpp"
#include "emu/num/tensor_map.hpp"
#include "emu/num/tensorcore.hpp"
#include "emu/num/wgmma_desc.hpp"

namespace py = pybind11;

namespace dsk::api {
namespace {

using namespace emu::num;  // this file exists to expose that namespace

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class E>
E pick(const std::map<std::string, E>& names, const std::string& name, const char* what) {
  const auto it = names.find(name);
  if (it == names.end()) throw std::invalid_argument(std::string(what) + ": unknown name " + name);
  return it->second;
}

const std::map<std::string, Format> kFormats = {{"f32", Format::f32},     {"tf32", Format::tf32},
                                                {"f16", Format::f16},     {"bf16", Format::bf16},
                                                {"e4m3", Format::e4m3},   {"e5m2", Format::e5m2},
                                                {"ue8m0", Format::ue8m0}, {"e2m1", Format::e2m1},
                                                {"e2m3", Format::e2m3},   {"e3m2", Format::e3m2}};
const std::map<std::string, Round> kRounds = {{"rn", Round::rn},
                                              {"rz", Round::rz},
                                              {"rm", Round::rm},
                                              {"rp", Round::rp},
                                              {"rna", Round::rna}};
const std::map<std::string, MmaType> kTypes = {
    {"f16", MmaType::f16},   {"bf16", MmaType::bf16}, {"tf32", MmaType::tf32},
    {"e4m3", MmaType::e4m3}, {"e5m2", MmaType::e5m2}, {"s8", MmaType::s8},
    {"u8", MmaType::u8},     {"s4", MmaType::s4},     {"u4", MmaType::u4},
    {"b1", MmaType::b1},     {"f64", MmaType::f64}};
const std::map<std::string, AccType> kAccs = {
    {"f32", AccType::f32}, {"f16", AccType::f16}, {"s32", AccType::s32}, {"f64", AccType::f64}};

py::array_t<uint32_t> encode_array(const std::string& format, const Array<double>& values,
                                   const std::string& round, bool satfinite, bool relu) {
  const CvtMode mode{pick(kRounds, round, "round"), satfinite, relu};
  const Format f = pick(kFormats, format, "format");
  py::array_t<uint32_t> out(values.size());
  for (py::ssize_t i = 0; i < values.size(); ++i) {
    out.mutable_data()[i] = encode(f, values.data()[i], mode);
  }
  return out;
}

py::array_t<double> decode_array(const std::string& format, const Array<uint32_t>& bits) {
  const Format f = pick(kFormats, format, "format");
  py::array_t<double> out(bits.size());
  for (py::ssize_t i = 0; i < bits.size(); ++i) {
    out.mutable_data()[i] = decode(f, bits.data()[i]);
  }
  return out;
}

// The hot array forms by name, on raw bytes: `widths` are bytes per element in and out.
template <class In, class Out>
py::array_t<Out> unary(void (*fn)(const In*, Out*, int), const Array<In>& in) {
  py::array_t<Out> out(in.size());
  fn(in.data(), out.mutable_data(), static_cast<int>(in.size()));
  return out;
}

template <class In, class Out>
py::array_t<Out> unary_scalar(Out (*fn)(In), const Array<In>& in) {
  py::array_t<Out> out(in.size());
  for (py::ssize_t i = 0; i < in.size(); ++i) out.mutable_data()[i] = fn(in.data()[i]);
  return out;
}

template <class Out>
py::array_t<Out> binary(void (*fn)(const float*, const float*, Out*, int), const Array<float>& a,
                        const Array<float>& b) {
  if (a.size() != b.size()) throw std::invalid_argument("b: expected as many elements as a");
  py::array_t<Out> out(a.size());
  fn(a.data(), b.data(), out.mutable_data(), static_cast<int>(a.size()));
  return out;
}

void bind_convert(py::module_& m) {
  m.def("encode", encode_array, py::arg("format"), py::arg("values"), py::arg("round") = "rn",
        py::arg("satfinite") = false, py::arg("relu") = false);
  m.def("decode", decode_array);
  m.def("f16_to_f32",
        [](const Array<uint16_t>& x) { return unary<uint16_t, float>(f16_to_f32, x); });
  m.def("bf16_to_f32",
        [](const Array<uint16_t>& x) { return unary<uint16_t, float>(bf16_to_f32, x); });
  m.def("e4m3_to_f32",
        [](const Array<uint8_t>& x) { return unary<uint8_t, float>(e4m3_to_f32, x); });
  m.def("e5m2_to_f32",
        [](const Array<uint8_t>& x) { return unary<uint8_t, float>(e5m2_to_f32, x); });
  m.def("f32_to_f16", [](const Array<float>& x) { return unary<float, uint16_t>(f32_to_f16, x); });
  m.def("f32_to_bf16",
        [](const Array<float>& x) { return unary<float, uint16_t>(f32_to_bf16, x); });
  m.def("f32_to_e4m3",
        [](const Array<float>& x) { return unary_scalar<float, uint8_t>(f32_to_e4m3, x); });
  m.def("f32_to_e5m2",
        [](const Array<float>& x) { return unary_scalar<float, uint8_t>(f32_to_e5m2, x); });
  m.def("f32_to_tf32_rna",
        [](const Array<float>& x) { return unary_scalar<float, uint32_t>(f32_to_tf32_rna, x); });
  m.def("f32_to_f16x2", [](const Array<float>& a, const Array<float>& b) {
    return binary<uint32_t>(f32_to_f16x2, a, b);
  });
  m.def("f32_to_bf16x2", [](const Array<float>& a, const Array<float>& b) {
    return binary<uint32_t>(f32_to_bf16x2, a, b);
  });
  m.def("f32_to_e4m3x2", [](const Array<float>& a, const Array<float>& b) {
    return binary<uint16_t>(f32_to_e4m3x2, a, b);
  });
  m.def("f32_to_e5m2x2", [](const Array<float>& a, const Array<float>& b) {
    return binary<uint16_t>(f32_to_e5m2x2, a, b);
  });
  m.def("e4m3x2_to_f16x2",
        [](const Array<uint16_t>& x) { return unary<uint16_t, uint32_t>(e4m3x2_to_f16x2, x); });
  m.def("e5m2x2_to_f16x2",
        [](const Array<uint16_t>& x) { return unary<uint16_t, uint32_t>(e5m2x2_to_f16x2, x); });
}

MmaKind make_kind(const std::string& unit, const std::string& d, const std::string& a,
                  const std::string& b, int k, const std::string& mode) {
  MmaKind kind;
  kind.unit = unit == "wgmma" ? MmaUnit::wgmma : MmaUnit::mma_sync;
  kind.d = pick(kAccs, d, "d");
  kind.a = pick(kTypes, a, "a");
  kind.b = pick(kTypes, b, "b");
  kind.k = k;
  kind.mode = mode == "fast" ? MmaMode::fast : MmaMode::exact;
  return kind;
}

struct Operands {
  Array<uint8_t> a;
  Array<uint8_t> b;
  py::array d;
  bool accumulate;
};

void check_operands(const MmaKind& kind, const Operands& o) {
  const size_t bytes = row_bytes(kind);
  const auto width = kind.d == AccType::f16 ? 2 : (kind.d == AccType::f64 ? 8 : 4);
  if (o.a.ndim() != 2 || o.b.ndim() != 2 || o.d.ndim() != 2 ||
      static_cast<size_t>(o.a.shape(1)) != bytes || static_cast<size_t>(o.b.shape(1)) != bytes) {
    throw std::invalid_argument("mma: expected a [m, " + std::to_string(bytes) + "] and b [n, " +
                                std::to_string(bytes) + "] of bytes, d [m, n]");
  }
  if (o.d.shape(0) != o.a.shape(0) || o.d.shape(1) != o.b.shape(0) || o.d.itemsize() != width ||
      !(o.d.flags() & py::array::c_style) || !o.d.writeable()) {
    throw std::invalid_argument("mma: d must be a writable C-contiguous [m, n] of " +
                                std::to_string(width) + "-byte elements");
  }
}

void run_mma(const MmaKind& kind, const Operands& o, bool reference, bool reuse_panel, int repeat) {
  check_operands(kind, o);
  const auto m = static_cast<int>(o.a.shape(0));
  const auto n = static_cast<int>(o.b.shape(0));
  const size_t bytes = row_bytes(kind);
  void* d = py::array(o.d).mutable_data();
  BPanel panel;
  for (int i = 0; i < repeat; ++i) {
    if (reference) {
      mma_reference(kind, o.a.data(), bytes, o.b.data(), bytes, m, n, d, static_cast<size_t>(n),
                    o.accumulate);
    } else {
      if (i == 0 || !reuse_panel) panel.load(kind, o.b.data(), bytes, n);
      mma(panel, o.a.data(), bytes, m, d, static_cast<size_t>(n), o.accumulate);
    }
  }
}

void bind_tensorcore(py::module_& m) {
  m.def("active_isa", active_isa);
  m.def("force_isa", [](const std::string& name) { force_isa(name.c_str()); });
  m.def(
      "mma",
      [](const std::string& unit, const std::string& d_type, const std::string& a_type,
         const std::string& b_type, int k, const Array<uint8_t>& a, const Array<uint8_t>& b,
         const py::array& d, const std::string& mode, bool accumulate, bool negate_a, bool negate_b,
         bool saturate, bool bit_xor, bool reference, bool reuse_panel, int repeat) {
        MmaKind kind = make_kind(unit, d_type, a_type, b_type, k, mode);
        kind.negate_a = negate_a;
        kind.negate_b = negate_b;
        kind.saturate = saturate;
        kind.bit_op = bit_xor ? BitOp::bit_xor : BitOp::bit_and;
        run_mma(kind, {a, b, d, accumulate}, reference, reuse_panel, repeat);
      },
      py::arg("unit"), py::arg("d_type"), py::arg("a_type"), py::arg("b_type"), py::arg("k"),
      py::arg("a"), py::arg("b"), py::arg("d"), py::arg("mode") = "exact",
      py::arg("accumulate") = true, py::arg("negate_a") = false, py::arg("negate_b") = false,
      py::arg("saturate") = false, py::arg("bit_xor") = false, py::arg("reference") = false,
      py::arg("reuse_panel") = false, py::arg("repeat") = 1);
  m.def("load_accumulator", [](const Array<uint32_t>& regs, int n, bool half) {
    const uint32_t* pointers[128];
    const int count = half ? n / 4 : n / 2;
    if (regs.ndim() != 2 || regs.shape(0) != count || regs.shape(1) != 32 || count > 128) {
      throw std::invalid_argument("regs: expected [" + std::to_string(count) + ", 32]");
    }
    for (int i = 0; i < count; ++i) pointers[i] = regs.data(i, 0);
    py::array_t<uint32_t> out({16, half ? n / 2 : n});
    load_accumulator(pointers, n, half ? AccType::f16 : AccType::f32, out.mutable_data(),
                     static_cast<size_t>(n));
    return out;
  });
  m.def("store_accumulator", [](const Array<uint32_t>& dense, int n, bool half) {
    const int count = half ? n / 4 : n / 2;
    if (dense.ndim() != 2 || dense.shape(0) != 16 || dense.shape(1) != (half ? n / 2 : n)) {
      throw std::invalid_argument("dense: expected 16 rows of n elements");
    }
    py::array_t<uint32_t> out({count, 32});
    uint32_t* pointers[128];
    for (int i = 0; i < count; ++i) pointers[i] = out.mutable_data(i, 0);
    store_accumulator(pointers, n, half ? AccType::f16 : AccType::f32, dense.data(),
                      static_cast<size_t>(n));
    return out;
  });
}

SmemDesc make_desc(uint32_t start, uint32_t lbo, uint32_t sbo, int base_offset, int swizzle) {
  SmemDesc desc;
  desc.start = start;
  desc.lbo = lbo;
  desc.sbo = sbo;
  desc.base_offset = static_cast<uint8_t>(base_offset);
  desc.swizzle = static_cast<Swizzle>(swizzle);
  return desc;
}

void bind_descriptor(py::module_& m) {
  m.def("encode_desc", [](uint32_t start, uint32_t lbo, uint32_t sbo, int base, int swizzle) {
    return encode_desc(make_desc(start, lbo, sbo, base, swizzle));
  });
  m.def("decode_desc", [](uint64_t bits) {
    const SmemDesc d = decode_desc(bits);
    return py::make_tuple(d.start, d.lbo, d.sbo, d.base_offset, static_cast<int>(d.swizzle),
                          d.reserved_bits);
  });
  m.def("swizzle_address", [](uint32_t address, int mode) {
    return swizzle_address(address, static_cast<Swizzle>(mode & 3));
  });
  m.def("gather_tile", [](uint64_t bits, bool mn_major, int mn, const Array<uint8_t>& smem,
                          uint32_t window_base, int repeat) {
    py::array_t<uint8_t> dense({mn < 0 ? 0 : mn, 32});
    std::memset(dense.mutable_data(), 0, static_cast<size_t>(dense.nbytes()));
    TileRead read;
    for (int i = 0; i < repeat; ++i) {
      read = gather_tile(decode_desc(bits), mn_major ? Major::mn : Major::k, mn, smem.data(),
                         window_base, static_cast<uint32_t>(smem.size()), dense.mutable_data());
    }
    py::list ranges;
    for (const ByteRange& r : *read.relative) {
      ranges.append(py::make_tuple(r.begin + read.base, r.bytes));
    }
    return py::make_tuple(read.ok, read.bad_address, dense, ranges);
  });
}

py::tuple coord(Coord c) { return py::make_tuple(c.row, c.col); }

void bind_fragments(py::module_& m) {
  m.def("accumulator", [](int lane, int e) { return coord(accumulator(lane, e)); });
  m.def("multiplicand_a", [](int l, int e, int bits) { return coord(multiplicand_a(l, e, bits)); });
  m.def("multiplicand_b", [](int l, int e, int bits) { return coord(multiplicand_b(l, e, bits)); });
  m.def("f64_m8_a", [](int l) { return coord(f64_m8_a(l)); });
  m.def("f64_m8_c", [](int l, int e) { return coord(f64_m8_c(l, e)); });
  m.def("f64_m16_a", [](int l, int e) { return coord(f64_m16_a(l, e)); });
  m.def("f64_b", [](int l, int e) { return coord(f64_b(l, e)); });
  m.def("matrix_element", [](int l, int h, bool t) { return coord(matrix_element(l, h, t)); });
  m.def("unpack", [](const Array<uint32_t>& regs, bool is_b) {
    const auto count = static_cast<int>(regs.shape(0));
    if (regs.ndim() != 2 || regs.shape(1) != 32 || count > 4) {
      throw std::invalid_argument("regs: expected [1..4, 32]");
    }
    const uint32_t* pointers[4];
    for (int i = 0; i < count; ++i) pointers[i] = regs.data(i, 0);
    const int pitch = is_b ? 16 * count : 16 * ((count + 1) / 2);
    py::array_t<uint8_t> rows({is_b ? 8 : 16, pitch});
    std::memset(rows.mutable_data(), 0, static_cast<size_t>(rows.nbytes()));
    (is_b ? unpack_b : unpack_a)(pointers, count, rows.mutable_data(), pitch);
    return rows;
  });
  m.def("ldmatrix", [](const Array<uint8_t>& rows, bool trans) {
    const auto count = static_cast<int>(rows.shape(0));
    if (rows.ndim() != 3 || rows.shape(1) != 8 || rows.shape(2) != 16 || count > 4) {
      throw std::invalid_argument("rows: expected [1..4, 8, 16]");
    }
    py::array_t<uint32_t> out({count, 32});
    uint32_t* pointers[4];
    for (int i = 0; i < count; ++i) pointers[i] = out.mutable_data(i, 0);
    ldmatrix(reinterpret_cast<const uint8_t (*)[8][16]>(rows.data()), count, trans, pointers);
    return out;
  });
  m.def("stmatrix", [](const Array<uint32_t>& regs, bool trans) {
    const auto count = static_cast<int>(regs.shape(0));
    if (regs.ndim() != 2 || regs.shape(1) != 32 || count > 4) {
      throw std::invalid_argument("regs: expected [1..4, 32]");
    }
    const uint32_t* pointers[4];
    for (int i = 0; i < count; ++i) pointers[i] = regs.data(i, 0);
    py::array_t<uint8_t> rows({count, 8, 16});
    stmatrix(pointers, count, trans, reinterpret_cast<uint8_t (*)[8][16]>(rows.mutable_data()));
    return rows;
  });
}

TensorMapArgs map_args(const py::dict& d) {
  TensorMapArgs a;
  const auto number = [&d](const char* name, uint64_t fallback) {
    return d.contains(name) ? d[name].cast<uint64_t>() : fallback;
  };
  a.type = static_cast<TmaType>(number("type", 0));
  a.rank = static_cast<uint32_t>(number("rank", 1));
  a.address = number("address", 0);
  a.interleave = static_cast<TmaInterleave>(number("interleave", 0));
  a.swizzle = static_cast<Swizzle>(number("swizzle", 0));
  a.l2_promotion = static_cast<uint8_t>(number("l2", 0));
  a.fill = static_cast<TmaFill>(number("fill", 0));
  const auto fill = [&d](const char* name, auto& out) {
    if (!d.contains(name)) return;
    const auto values = d[name].cast<std::vector<uint64_t>>();
    for (size_t i = 0; i < out.size() && i < values.size(); ++i) {
      out[i] = static_cast<std::decay_t<decltype(out[0])>>(values[i]);
    }
  };
  a.element_strides.fill(1);
  fill("dims", a.dims);
  fill("strides", a.strides);
  fill("box", a.box);
  fill("element_strides", a.element_strides);
  return a;
}

py::dict map_dict(const TensorMapArgs& a) {
  py::dict d;
  d["type"] = static_cast<int>(a.type);
  d["rank"] = a.rank;
  d["address"] = a.address;
  d["interleave"] = static_cast<int>(a.interleave);
  d["swizzle"] = static_cast<int>(a.swizzle);
  d["l2"] = static_cast<int>(a.l2_promotion);
  d["fill"] = static_cast<int>(a.fill);
  d["dims"] = std::vector<uint64_t>(a.dims.begin(), a.dims.begin() + a.rank);
  d["strides"] = std::vector<uint64_t>(a.strides.begin(), a.strides.begin() + a.rank - 1);
  d["box"] = std::vector<uint32_t>(a.box.begin(), a.box.begin() + a.rank);
  d["element_strides"] =
      std::vector<uint32_t>(a.element_strides.begin(), a.element_strides.begin() + a.rank);
  return d;
}

py::list walk(const py::dict& d, const std::vector<int32_t>& coords, uint32_t shared) {
  const TensorMapArgs args = map_args(d);
  const std::string why = check_tensor_map(args);
  if (!why.empty()) throw std::invalid_argument(why);
  if (coords.size() != args.rank) throw std::invalid_argument("coords: expected rank of them");
  std::vector<TmaRun> runs;
  walk_box(args, coords.data(), shared, runs);
  py::list out;
  for (const TmaRun& r : runs) out.append(py::make_tuple(r.global, r.shared, r.bytes, r.fill));
  return out;
}

void bind_tensor_map(py::module_& m) {
  m.def("check_tensor_map", [](const py::dict& d) { return check_tensor_map(map_args(d)); });
  m.def("encode_tensor_map", [](const py::dict& d) {
    const TensorMap map = encode_tensor_map(map_args(d));
    return py::bytes(reinterpret_cast<const char*>(map.bytes.data()), map.bytes.size());
  });
  m.def("decode_tensor_map", [](const std::string& bytes) {
    if (bytes.size() != 128) throw std::invalid_argument("bytes: expected 128");
    TensorMapArgs args;
    std::string error;
    const bool ok = decode_tensor_map(reinterpret_cast<const uint8_t*>(bytes.data()), args, error);
    return py::make_tuple(error, ok ? py::object(map_dict(args)) : py::object(py::none()));
  });
  m.def("replace_field",
        [](std::string bytes, const std::string& field, uint32_t ordinal, uint64_t value) {
          static const std::map<std::string, MapField> names = {
              {"global_address", MapField::global_address},
              {"rank", MapField::rank},
              {"box_dim", MapField::box_dim},
              {"global_dim", MapField::global_dim},
              {"global_stride", MapField::global_stride},
              {"element_stride", MapField::element_stride},
              {"elemtype", MapField::elemtype},
              {"interleave_layout", MapField::interleave_layout},
              {"swizzle_mode", MapField::swizzle_mode},
              {"fill_mode", MapField::fill_mode}};
          if (bytes.size() != 128) throw std::invalid_argument("bytes: expected 128");
          const std::string why = replace_field(reinterpret_cast<uint8_t*>(bytes.data()),
                                                pick(names, field, "field"), ordinal, value);
          return py::make_tuple(why, py::bytes(bytes));
        });
  m.def("refuse_im2col", refuse_im2col);
  m.def("box_bytes", [](const py::dict& d) { return box_bytes(map_args(d)); });
  m.def("shared_alignment", [](const py::dict& d) { return shared_alignment(map_args(d)); });
  m.def("walk_box", walk);
  m.def("fill_bytes", [](const py::dict& d, uint32_t bytes) {
    std::string out(bytes, '\x5a');
    write_fill(map_args(d), reinterpret_cast<uint8_t*>(out.data()), bytes);
    return py::bytes(out);
  });
}

const std::map<std::string, ApproxFn> kFns = {{"ex2", ApproxFn::ex2},   {"lg2", ApproxFn::lg2},
                                              {"rcp", ApproxFn::rcp},   {"rsqrt", ApproxFn::rsqrt},
                                              {"sqrt", ApproxFn::sqrt}, {"sin", ApproxFn::sin},
                                              {"cos", ApproxFn::cos},   {"tanh", ApproxFn::tanh}};

ApproxCtx approx_ctx(bool worst, uint64_t seed) {
  return {worst ? ApproxMode::worst : ApproxMode::nearest, seed};
}

void bind_approx(py::module_& m) {
  m.def(
      "approx_f32",
      [](const std::string& fn, const Array<float>& x, bool ftz, bool worst, uint64_t seed) {
        py::array_t<float> out(x.size());
        approx_f32(pick(kFns, fn, "fn"), x.data(), out.mutable_data(), static_cast<int>(x.size()),
                   ftz, approx_ctx(worst, seed));
        return out;
      },
      py::arg("fn"), py::arg("x"), py::arg("ftz") = false, py::arg("worst") = false,
      py::arg("seed") = 0);
  m.def(
      "approx_half",
      [](const std::string& fn, const Array<uint16_t>& x, bool bf16, bool ftz, bool worst,
         uint64_t seed) {
        py::array_t<uint16_t> out(x.size());
        const ApproxFn f = pick(kFns, fn, "fn");
        for (py::ssize_t i = 0; i < x.size(); ++i) {
          out.mutable_data()[i] =
              (bf16 ? approx_bf16 : approx_f16)(f, x.data()[i], ftz, approx_ctx(worst, seed));
        }
        return out;
      },
      py::arg("fn"), py::arg("x"), py::arg("bf16") = false, py::arg("ftz") = false,
      py::arg("worst") = false, py::arg("seed") = 0);
  m.def(
      "div_f32",
      [](const Array<float>& x, const Array<float>& y, bool full, bool ftz, bool worst,
         uint64_t seed) {
        if (x.size() != y.size()) throw std::invalid_argument("y: expected as many as x");
        py::array_t<float> out(x.size());
        for (py::ssize_t i = 0; i < x.size(); ++i) {
          out.mutable_data()[i] =
              (full ? full_div
                    : static_cast<float (*)(float, float, bool, const ApproxCtx&)>(approx_div))(
                  x.data()[i], y.data()[i], ftz, approx_ctx(worst, seed));
        }
        return out;
      },
      py::arg("x"), py::arg("y"), py::arg("full") = false, py::arg("ftz") = false,
      py::arg("worst") = false, py::arg("seed") = 0);
  m.def("approx_f64", [](const std::string& fn, const Array<double>& x) {
    py::array_t<double> out(x.size());
    const bool rcp = fn == "rcp";
    for (py::ssize_t i = 0; i < x.size(); ++i) {
      out.mutable_data()[i] = (rcp ? approx_rcp_f64 : approx_rsqrt_f64)(x.data()[i]);
    }
    return out;
  });
}

}  // namespace

void bind_emu_num(py::module_& parent) {
  py::module_ m = parent.def_submodule("_emu_num", "Emulator numerics, exposed for tests.");
  bind_convert(m);
  bind_tensorcore(m);
  bind_descriptor(m);
  bind_fragments(m);
  bind_tensor_map(m);
  bind_approx(m);
}

}  // namespace dsk::api
