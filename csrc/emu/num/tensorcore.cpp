#include "emu/num/tensorcore.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "emu/num/convert.hpp"
#include "emu/num/fragments.hpp"
#include "emu/num/isa.hpp"
#include "emu/num/tensorcore_impl.hpp"

namespace dsk::emu::num {
namespace {

constexpr const char* kTypeNames[] = {"f16", "bf16", "tf32", "e4m3", "e5m2", "s8",
                                      "u8",  "s4",   "u4",   "b1",   "f64"};
constexpr const char* kAccNames[] = {"f32", "f16", "s32", "f64"};

std::string describe(const MmaKind& k) {
  return std::string(k.unit == MmaUnit::wgmma ? "wgmma" : "mma.sync") + " k" + std::to_string(k.k) +
         "." + kAccNames[static_cast<int>(k.d)] + "." + kTypeNames[static_cast<int>(k.a)] + "." +
         kTypeNames[static_cast<int>(k.b)];
}

[[noreturn]] void refuse(const MmaKind& kind, const std::string& why) {
  throw std::invalid_argument("tensor core: " + describe(kind) + ": " + why);
}

bool in_enum(const MmaKind& k) {
  return k.a <= MmaType::f64 && k.b <= MmaType::f64 && k.d <= AccType::f64 &&
         k.unit <= MmaUnit::mma_sync && k.mode <= MmaMode::fast && k.bit_op <= BitOp::bit_xor;
}

bool types_pair(MmaType a, MmaType b) {
  if (a == b) return true;
  if (is_fp8(a) && is_fp8(b)) return true;
  return is_integer(a) && is_integer(b) && bits_of(a) == bits_of(b);
}

bool accumulator_fits(MmaType a, AccType d) {
  if (is_integer(a)) return d == AccType::s32;
  if (a == MmaType::f64) return d == AccType::f64;
  if (d == AccType::f16) return a == MmaType::f16 || is_fp8(a);
  return d == AccType::f32;
}

bool k_fits(const MmaKind& kind) {
  const int bits = bits_of(kind.a);
  const int row_bits = kind.k * bits;
  if (kind.unit == MmaUnit::wgmma) return bits != 64 && bits != 4 && row_bits == 256;
  if (kind.a == MmaType::f64) return kind.k == 4 || kind.k == 8 || kind.k == 16;
  return row_bits == 128 || row_bits == 256;
}

// A finite operand is (-1)^negative * sig * 2^(exp - frac).
struct Operand {
  bool negative = false;
  bool nan = false;
  bool inf = false;
  int64_t sig = 0;
  int exp = 0;
};

struct FloatFields {
  int ebits;
  int mbits;
  int bias;
};

FloatFields fields_of(MmaType type) {
  switch (type) {
    case MmaType::f16:
      return {5, 10, 15};
    case MmaType::bf16:
      return {8, 7, 127};
    case MmaType::e4m3:
      return {4, 3, 7};
    case MmaType::e5m2:
      return {5, 2, 15};
    default:
      return {8, 10, 127};  // tf32
  }
}

Operand split(uint32_t code, const FloatFields& f, bool fn_format) {
  const uint32_t field = (code >> f.mbits) & ((1u << f.ebits) - 1);
  const uint32_t mantissa = code & ((1u << f.mbits) - 1);
  const uint32_t top = (1u << f.ebits) - 1;
  Operand o;
  o.negative = (code >> (f.ebits + f.mbits)) & 1;
  if (field == top && fn_format) {
    o.nan = mantissa == (1u << f.mbits) - 1;
  } else if (field == top) {
    o.nan = mantissa != 0;
    o.inf = mantissa == 0;
  }
  // Subnormals keep the smallest normal exponent: the hardware does not normalise them.
  o.sig = field == 0 ? mantissa : mantissa | (1u << f.mbits);
  o.exp = static_cast<int>(field == 0 ? 1 : field) - f.bias;
  return o;
}

uint32_t element_code(MmaType type, const uint8_t* row, int index) {
  switch (bits_of(type)) {
    case 8:
      return row[index];
    case 16: {
      uint16_t v;
      std::memcpy(&v, row + 2 * index, 2);
      return v;
    }
    case 32: {
      uint32_t v;
      std::memcpy(&v, row + 4 * index, 4);
      return v >> 13;  // tf32: the low 13 bits are not read
    }
    case 4:
      return (row[index / 2] >> (4 * (index % 2))) & 15u;
    default:
      return (row[index / 8] >> (index % 8)) & 1u;
  }
}

Operand operand(MmaType type, const uint8_t* row, int index) {
  return split(element_code(type, row, index), fields_of(type), type == MmaType::e4m3);
}

Operand split_c(const void* d, AccType type) {
  if (type == AccType::f16) {
    uint16_t v;
    std::memcpy(&v, d, 2);
    return split(v, {5, 10, 15}, false);
  }
  uint32_t v;
  std::memcpy(&v, d, 4);
  return split(v, {8, 23, 127}, false);
}

int64_t shift_toward_zero(int64_t magnitude, int left) {
  if (left >= 0) return magnitude << std::min(left, 30);
  return left <= -63 ? 0 : magnitude >> -left;
}

// The running group's state: specials are sticky, the rest is one exact integer sum.
struct GroupSum {
  bool nan = false;
  bool plus_inf = false;
  bool minus_inf = false;
  int64_t total = 0;

  void add_inf(bool negative) { (negative ? minus_inf : plus_inf) = true; }
  bool is_nan() const { return nan || (plus_inf && minus_inf); }
};

void write_result(const SumModel& model, AccType type, const GroupSum& sum, int max_exp, void* d) {
  const int scale = max_exp - model.fraction_bits;
  if (type == AccType::f16) {
    uint16_t bits;
    if (sum.is_nan()) {
      bits = 0x7fff;
    } else if (sum.plus_inf || sum.minus_inf) {
      bits = sum.minus_inf ? 0xfc00 : 0x7c00;
    } else {
      const double value = std::ldexp(static_cast<double>(sum.total), scale);
      bits = static_cast<uint16_t>(encode(Format::f16, value));
      if (bits == 0x8000) bits = 0;
    }
    std::memcpy(d, &bits, 2);
    return;
  }
  float value;
  if (sum.is_nan()) {
    value = std::bit_cast<float>(0x7fffffffu);
  } else if (sum.plus_inf || sum.minus_inf) {
    value = sum.minus_inf ? -std::numeric_limits<float>::infinity()
                          : std::numeric_limits<float>::infinity();
  } else {
    uint64_t magnitude = static_cast<uint64_t>(std::llabs(sum.total));
    const int top = magnitude == 0 ? 0 : std::bit_width(magnitude) - 1;
    const int lowest_kept = std::max(top + scale, -126) - model.kept_bits - scale;
    if (lowest_kept > 0) {
      magnitude = lowest_kept > 62 ? 0 : (magnitude >> lowest_kept) << lowest_kept;
    }
    value = static_cast<float>(std::ldexp(static_cast<double>(magnitude), scale));
    if (sum.total < 0 && magnitude != 0) value = -value;
  }
  std::memcpy(d, &value, 4);
}

void float_group(const MmaKind& kind, const SumModel& model, const uint8_t* a, const uint8_t* b,
                 int group, void* d, bool accumulate) {
  struct Product {
    int64_t sig;
    int exp;
    bool negative;
  };
  Product products[64];
  int count = 0;
  GroupSum sum;
  Operand c;
  if (accumulate) c = split_c(d, kind.d);
  const int c_fraction = kind.d == AccType::f16 ? 10 : 23;
  sum.nan = c.nan;
  if (c.inf) sum.add_inf(c.negative);
  const bool c_counts = c.sig != 0 && !c.nan && !c.inf;
  int max_exp = c_counts ? c.exp : model.zero_exp;
  const bool flip = kind.negate_a != kind.negate_b;
  for (int i = 0; i < kind.k; ++i) {
    if (sum_position(kind, i) / model.group != group) continue;
    const Operand x = operand(kind.a, a, i);
    const Operand y = operand(kind.b, b, i);
    const bool negative = (x.negative != y.negative) != flip;
    if (x.nan || y.nan || (x.inf && y.sig == 0) || (y.inf && x.sig == 0)) {
      sum.nan = true;
    } else if (x.inf || y.inf) {
      sum.add_inf(negative);
    } else if (x.sig != 0 && y.sig != 0) {
      products[count++] = {x.sig * y.sig, x.exp + y.exp, negative};
      max_exp = std::max(max_exp, x.exp + y.exp);
    }
  }
  const int fraction = fields_of(kind.a).mbits + fields_of(kind.b).mbits;
  for (int i = 0; i < count; ++i) {
    const Product& p = products[i];
    const int64_t t = shift_toward_zero(p.sig, model.fraction_bits - fraction - (max_exp - p.exp));
    sum.total += p.negative ? -t : t;
  }
  if (c_counts) {
    const int64_t t =
        shift_toward_zero(c.sig, model.fraction_bits - c_fraction - (max_exp - c.exp));
    sum.total += c.negative ? -t : t;
  }
  write_result(model, kind.d, sum, max_exp, d);
}

int64_t integer_value(MmaType type, const uint8_t* row, int index) {
  const uint32_t code = element_code(type, row, index);
  if (type == MmaType::s8) return static_cast<int8_t>(code);
  if (type == MmaType::s4) return static_cast<int>(code ^ 8u) - 8;
  return code;
}

void integer_element(const MmaKind& kind, const uint8_t* a, const uint8_t* b, void* d,
                     bool accumulate) {
  int64_t sum = 0;
  for (int i = 0; i < kind.k; ++i) {
    const int64_t x = integer_value(kind.a, a, i);
    const int64_t y = integer_value(kind.b, b, i);
    sum += kind.a == MmaType::b1 && kind.bit_op == BitOp::bit_xor ? x ^ y : x * y;
  }
  if (accumulate) {
    int32_t c;
    std::memcpy(&c, d, 4);
    sum += c;
  }
  if (kind.saturate) {
    sum = std::clamp<int64_t>(sum, std::numeric_limits<int32_t>::min(),
                              std::numeric_limits<int32_t>::max());
  }
  const auto wrapped = static_cast<uint32_t>(static_cast<uint64_t>(sum));
  std::memcpy(d, &wrapped, 4);
}

void f64_element(const MmaKind& kind, const uint8_t* a, const uint8_t* b, void* d,
                 bool accumulate) {
  double sum = 0.0;
  if (accumulate) std::memcpy(&sum, d, 8);
  const bool flip = kind.negate_a != kind.negate_b;
  for (int i = 0; i < kind.k; ++i) {
    double x;
    double y;
    std::memcpy(&x, a + 8 * i, 8);
    std::memcpy(&y, b + 8 * i, 8);
    sum = std::fma(flip ? -x : x, y, sum);
  }
  std::memcpy(d, &sum, 8);
}

float operand_f32(MmaType type, const uint8_t* row, int index) {
  const uint32_t code = element_code(type, row, index);
  switch (type) {
    case MmaType::f16:
      return f16_to_f32(static_cast<uint16_t>(code));
    case MmaType::bf16:
      return bf16_to_f32(static_cast<uint16_t>(code));
    case MmaType::e4m3:
      return e4m3_to_f32(static_cast<uint8_t>(code));
    case MmaType::e5m2:
      return e5m2_to_f32(static_cast<uint8_t>(code));
    default:
      return std::bit_cast<float>(code << 13);
  }
}

void fast_element(const MmaKind& kind, const uint8_t* a, const uint8_t* b, void* d,
                  bool accumulate) {
  float sum = 0.0f;
  uint16_t half = 0;
  if (accumulate && kind.d == AccType::f16) {
    std::memcpy(&half, d, 2);
    sum = f16_to_f32(half);
  } else if (accumulate) {
    std::memcpy(&sum, d, 4);
  }
  const bool flip = kind.negate_a != kind.negate_b;
  for (int i = 0; i < kind.k; ++i) {
    const float x = operand_f32(kind.a, a, i);
    sum = std::fma(flip ? -x : x, operand_f32(kind.b, b, i), sum);
  }
  if (kind.d == AccType::f16) {
    half = f32_to_f16(sum);
    std::memcpy(d, &half, 2);
  } else {
    std::memcpy(d, &sum, 4);
  }
}

size_t acc_bytes(AccType type) { return type == AccType::f16 ? 2 : (type == AccType::f64 ? 8 : 4); }

void check_shape(const MmaKind& kind, int m, int n, size_t pitch, const char* name) {
  if (m < 1 || n < 1 || n > 256) {
    refuse(kind, "expected m >= 1 and 1 <= n <= 256, got m " + std::to_string(m) + ", n " +
                     std::to_string(n));
  }
  if (pitch < row_bytes(kind)) {
    refuse(kind, std::string(name) + ": expected a pitch of at least " +
                     std::to_string(row_bytes(kind)) + " bytes, got " + std::to_string(pitch));
  }
}

}  // namespace

int bits_of(MmaType type) {
  constexpr int kBits[] = {16, 16, 32, 8, 8, 8, 8, 4, 4, 1, 64};
  return kBits[static_cast<int>(type)];
}

bool is_integer(MmaType type) { return type >= MmaType::s8 && type <= MmaType::b1; }
bool is_fp8(MmaType type) { return type == MmaType::e4m3 || type == MmaType::e5m2; }

void check_kind(const MmaKind& kind) {
  if (!in_enum(kind))
    throw std::invalid_argument("tensor core: an enum of the kind is out of range");
  if (!types_pair(kind.a, kind.b)) refuse(kind, "A and B types do not combine");
  if (!accumulator_fits(kind.a, kind.d)) refuse(kind, "no such accumulator for these operands");
  if (!k_fits(kind)) refuse(kind, "no such k on this unit");
}

size_t row_bytes(const MmaKind& kind) {
  check_kind(kind);
  return static_cast<size_t>(kind.k) * static_cast<size_t>(bits_of(kind.a)) / 8;
}

bool is_widened_fp8(const MmaKind& kind) {
  return kind.unit == MmaUnit::mma_sync && is_fp8(kind.a) && kind.mode == MmaMode::exact;
}

int sum_position(const MmaKind& kind, int k) {
  if (!is_widened_fp8(kind)) return k;
  return (k / 4) * 2 + k % 2 + ((k / 2) % 2) * (kind.k / 2);
}

void add_c(AccType type, const void* c, void* d) {
  if (type == AccType::f16) {
    uint16_t x;
    uint16_t y;
    std::memcpy(&x, c, 2);
    std::memcpy(&y, d, 2);
    const uint16_t sum = f32_to_f16(f16_to_f32(x) + f16_to_f32(y));
    std::memcpy(d, &sum, 2);
    return;
  }
  float x;
  float y;
  std::memcpy(&x, c, 4);
  std::memcpy(&y, d, 4);
  float sum = x + y;
  if (std::isnan(sum)) sum = std::bit_cast<float>(0x7fffffffu);
  std::memcpy(d, &sum, 4);
}

SumModel sum_model(const MmaKind& kind) {
  SumModel model;
  model.zero_exp = kind.d == AccType::f16 ? -21 : -133;
  if (is_widened_fp8(kind)) {
    model.group = kind.k / 2;
  } else if (is_fp8(kind.a)) {
    model.fraction_bits = 13;
    model.kept_bits = 13;
    model.group = 32;
  } else if (kind.a == MmaType::tf32) {
    model.group = 8;
  }
  model.group = std::min(model.group, kind.k);
  return model;
}

ElementView view_element(MmaType type, const uint8_t* row, int index) {
  const Operand o = operand(type, row, index);
  const bool special = o.nan || o.inf;
  return {operand_f32(type, row, index), o.exp, o.sig == 0 && !special, special};
}

void mma_element(const MmaKind& kind, const SumModel& model, const uint8_t* a, const uint8_t* b,
                 void* d, bool accumulate) {
  if (is_integer(kind.a)) return integer_element(kind, a, b, d, accumulate);
  if (kind.a == MmaType::f64) return f64_element(kind, a, b, d, accumulate);
  if (kind.mode == MmaMode::fast) return fast_element(kind, a, b, d, accumulate);
  const bool widened = is_widened_fp8(kind);
  uint32_t c = 0;
  if (widened && accumulate) std::memcpy(&c, d, acc_bytes(kind.d));
  for (int group = 0; group < kind.k / model.group; ++group) {
    float_group(kind, model, a, b, group, d, group != 0 || (accumulate && !widened));
  }
  if (widened && accumulate) add_c(kind.d, &c, d);
}

PanelForm panel_form(const MmaKind& kind) {
  if (is_integer(kind.a) || kind.a == MmaType::f64) return PanelForm::none;
  if (kind.mode == MmaMode::fast) return PanelForm::fp32;
  return sum_model(kind).fraction_bits == 13 ? PanelForm::exact_f32 : PanelForm::exact_f64;
}

void BPanel::load(const MmaKind& kind, const uint8_t* rows, size_t pitch, int n) {
  check_shape(kind, 1, n, pitch, "B");
  const size_t bytes = row_bytes(kind);
  kind_ = kind;
  n_ = n;
  raw_.resize(bytes * static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) {
    std::memcpy(raw_.data() + bytes * static_cast<size_t>(i), rows + pitch * static_cast<size_t>(i),
                bytes);
  }
  const PanelForm form = panel_form(kind);
  isa_ = form == PanelForm::none ? Isa::scalar : isa();
#if DSK_NUM_X86
  if (isa_ == Isa::avx512_bf16 && !takes_bf16(kind)) isa_ = Isa::avx512;
#endif
  special_ = false;
  if (isa_ == Isa::scalar) return;
  const int blocks = (n + block_columns(form) - 1) / block_columns(form);
  storage_.resize(block_bytes(form, kind.k) * static_cast<size_t>(blocks) + 64);
  columns_.assign(static_cast<size_t>(blocks * block_columns(form)), 0);
#if DSK_NUM_X86
  if (isa_ == Isa::avx512_bf16) {
    return build_panel_bf16(kind, raw_.data(), n, PanelAccess::base(*this));
  }
  const auto build = isa_ == Isa::avx512 ? build_panel_avx512 : build_panel_avx2;
  build(kind, raw_.data(), bytes, n, PanelAccess::base(*this), columns_.data());
#endif
  special_ = std::find(columns_.begin(), columns_.end(), uint8_t{1}) != columns_.end();
}

void mma(const BPanel& b, const uint8_t* a, size_t pitch, int m, void* d, size_t ldd,
         bool accumulate) {
  const MmaKind& kind = b.kind();
  check_shape(kind, m, b.n(), pitch, "A");
  if (ldd < static_cast<size_t>(b.n())) {
    refuse(kind, "expected ldd >= n = " + std::to_string(b.n()) + ", got " + std::to_string(ldd));
  }
#if DSK_NUM_X86
  if (PanelAccess::isa(b) != Isa::scalar) {
    const auto run = PanelAccess::isa(b) == Isa::avx512_bf16 ? mma_bf16
                     : PanelAccess::isa(b) == Isa::avx512    ? mma_avx512
                                                             : mma_avx2;
    return run(b, a, pitch, m, d, ldd, accumulate);
  }
#endif
  const size_t bytes = row_bytes(kind);
  mma_reference(kind, a, pitch, PanelAccess::raw(b), bytes, m, b.n(), d, ldd, accumulate);
}

void mma_reference(const MmaKind& kind, const uint8_t* a, size_t a_pitch, const uint8_t* b,
                   size_t b_pitch, int m, int n, void* d, size_t ldd, bool accumulate) {
  check_shape(kind, m, n, a_pitch, "A");
  check_shape(kind, m, n, b_pitch, "B");
  const SumModel model = sum_model(kind);
  const size_t width = acc_bytes(kind.d);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      auto* out = static_cast<std::byte*>(d) +
                  (static_cast<size_t>(i) * ldd + static_cast<size_t>(j)) * width;
      mma_element(kind, model, a + a_pitch * static_cast<size_t>(i),
                  b + b_pitch * static_cast<size_t>(j), out, accumulate);
    }
  }
}

void load_accumulator(const uint32_t* const* regs, int n, AccType type, void* dense, size_t ldd) {
  if (type == AccType::f16) {
    auto* out = static_cast<uint16_t*>(dense);
    for (int r = 0; r < n / 4; ++r) {
      for (int lane = 0; lane < 32; ++lane) {
        const Coord c = accumulator(lane, 2 * r);
        std::memcpy(out + static_cast<size_t>(c.row) * ldd + c.col, regs[r] + lane, 4);
      }
    }
    return;
  }
#if DSK_NUM_X86
  if (isa() >= Isa::avx512) return load_accumulator_avx512(regs, n, dense, ldd);
#endif
  auto* out = static_cast<uint32_t*>(dense);
  for (int r = 0; r < n / 2; ++r) {
    for (int lane = 0; lane < 32; ++lane) {
      const Coord c = accumulator(lane, r);
      out[static_cast<size_t>(c.row) * ldd + static_cast<size_t>(c.col)] = regs[r][lane];
    }
  }
}

void store_accumulator(uint32_t* const* regs, int n, AccType type, const void* dense, size_t ldd) {
  if (type == AccType::f16) {
    const auto* in = static_cast<const uint16_t*>(dense);
    for (int r = 0; r < n / 4; ++r) {
      for (int lane = 0; lane < 32; ++lane) {
        const Coord c = accumulator(lane, 2 * r);
        std::memcpy(regs[r] + lane, in + static_cast<size_t>(c.row) * ldd + c.col, 4);
      }
    }
    return;
  }
#if DSK_NUM_X86
  if (isa() >= Isa::avx512) return store_accumulator_avx512(regs, n, dense, ldd);
#endif
  const auto* in = static_cast<const uint32_t*>(dense);
  for (int r = 0; r < n / 2; ++r) {
    for (int lane = 0; lane < 32; ++lane) {
      const Coord c = accumulator(lane, r);
      regs[r][lane] = in[static_cast<size_t>(c.row) * ldd + static_cast<size_t>(c.col)];
    }
  }
}

}  // namespace dsk::emu::num
