#include "emu/num/convert.hpp"

#include <bit>
#include <cmath>
#include <limits>

#include "emu/num/isa.hpp"

#if DSK_NUM_X86
#include <immintrin.h>
#endif

namespace dsk::emu::num {
namespace {

struct Spec {
  int bits;   // storage width
  int ebits;  // exponent field
  int mbits;  // fraction field
  int bias;
  bool has_inf;
  bool has_nan;
  uint32_t max_finite;  // magnitude code of the largest finite value
  uint32_t nan;         // canonical NaN (formats without NaN: what NaN becomes)
};

// tf32 is held in an f32 word; its codes here are the word's upper 19 bits.
constexpr Spec kSpecs[] = {
    {32, 8, 23, 127, true, true, 0x7f7fffff, 0x7fffffff},  // f32
    {32, 8, 10, 127, true, true, 0x3fbff, 0x3ffff},        // tf32
    {16, 5, 10, 15, true, true, 0x7bff, 0x7fff},           // f16
    {16, 8, 7, 127, true, true, 0x7f7f, 0x7fff},           // bf16
    {8, 4, 3, 7, false, true, 0x7e, 0x7f},                 // e4m3
    {8, 5, 2, 15, true, true, 0x7b, 0x7f},                 // e5m2
    {8, 8, 0, 127, false, true, 0xfe, 0xff},               // ue8m0
    {4, 2, 1, 1, false, false, 0x7, 0x7},                  // e2m1
    {6, 2, 3, 1, false, false, 0x1f, 0x1f},                // e2m3
    {6, 3, 2, 3, false, false, 0x1f, 0x1f},                // e3m2
};

const Spec& spec_of(Format f) { return kSpecs[static_cast<int>(f)]; }

bool rounds_up(Round round, bool negative, double whole, double rest) {
  switch (round) {
    case Round::rn:
      return rest > 0.5 || (rest == 0.5 && std::fmod(whole, 2.0) != 0.0);
    case Round::rna:
      return rest >= 0.5;
    case Round::rm:
      return negative && rest > 0.0;
    case Round::rp:
      return !negative && rest > 0.0;
    case Round::rz:
      return false;
  }
  return false;
}

// Does a magnitude beyond the largest finite value stay there under this rounding direction?
bool overflow_stays_finite(Round round, bool negative) {
  return round == Round::rz || (round == Round::rm && !negative) ||
         (round == Round::rp && negative);
}

// Magnitude code of a finite a >= 0 before overflow handling (may exceed max_finite).
uint32_t round_magnitude(const Spec& s, double a, Round round, bool negative) {
  if (a == 0.0) return 0;
  const int min_exp = 1 - s.bias;
  int e = std::ilogb(a);
  if (e < min_exp) e = min_exp;
  if (e > s.bias + 1) return 0xffffffffu;
  const double scaled = std::ldexp(a, s.mbits - e);
  double whole = std::floor(scaled);
  if (rounds_up(round, negative, whole, scaled - whole)) whole += 1.0;
  // A carry into the next binade or out of the subnormals lands on the right code by itself.
  return static_cast<uint32_t>(whole) + (static_cast<uint32_t>(e - min_exp) << s.mbits);
}

uint32_t encode_ue8m0(double value, CvtMode mode) {
  const Spec& s = spec_of(Format::ue8m0);
  if (std::isnan(value) || value < 0.0) return s.nan;
  if (std::isinf(value)) return mode.satfinite ? s.max_finite : s.nan;
  if (value <= 0x1p-127) return 0;
  const int e = std::ilogb(value);
  const double rest = std::ldexp(value, -e) - 1.0;
  const int code = e + 127 + (rounds_up(mode.round, false, 1.0, rest) ? 1 : 0);
  if (code <= 254) return static_cast<uint32_t>(code);
  return mode.satfinite || mode.round == Round::rz ? s.max_finite : s.nan;
}

inline float bits_float(uint32_t u) { return std::bit_cast<float>(u); }
inline uint32_t float_bits(float f) { return std::bit_cast<uint32_t>(f); }

// Branch-free scalar kernels: the array functions below inline them and GCC vectorises the loops.
[[gnu::always_inline]] inline uint16_t bf16_from(float value) {
  const uint32_t u = float_bits(value);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded);
}

// Saturating rounding to an 8-bit float with kM fraction bits. Subnormals are rounded by adding a
// power of two whose ulp is the format's quantum.
template <int kM, uint32_t kBiasShift, uint32_t kMinNormal, uint32_t kMagic, uint32_t kMaxCode>
[[gnu::always_inline]] inline uint8_t fp8_from(float value) {
  const uint32_t u = float_bits(value);
  const uint32_t a = u & 0x7fffffffu;
  const uint32_t half = (1u << (22 - kM)) - 1;
  uint32_t normal = ((a + half + ((a >> (23 - kM)) & 1)) >> (23 - kM)) - (kBiasShift << kM);
  normal = normal > kMaxCode ? kMaxCode : normal;
  const float small = bits_float(a < kMinNormal ? a : 0u) + bits_float(kMagic);
  const uint32_t subnormal = float_bits(small) - kMagic;
  uint32_t code = a < kMinNormal ? subnormal : normal;
  code |= (u >> 24) & 0x80u;
  return static_cast<uint8_t>(a > 0x7f800000u ? 0x7fu : code);
}

[[gnu::always_inline]] inline uint8_t e4m3_from(float v) {
  return fp8_from<3, 120, 0x3c800000u, 0x46800000u, 0x7e>(v);
}
[[gnu::always_inline]] inline uint8_t e5m2_from(float v) {
  return fp8_from<2, 112, 0x38800000u, 0x43000000u, 0x7b>(v);
}

[[gnu::always_inline]] inline uint16_t f16_from(float value) {
  const uint32_t u = float_bits(value);
  const uint32_t a = u & 0x7fffffffu;
  uint32_t normal = ((a + 0xfffu + ((a >> 13) & 1)) >> 13) - (112u << 10);
  normal = a >= 0x477ff000u ? 0x7c00u : normal;
  const float small = bits_float(a < 0x38800000u ? a : 0u) + bits_float(0x3f000000u);
  uint32_t code = a < 0x38800000u ? float_bits(small) - 0x3f000000u : normal;
  code |= (u >> 16) & 0x8000u;
  return static_cast<uint16_t>(a > 0x7f800000u ? 0x7fffu : code);
}

[[gnu::always_inline]] inline float f16_value(uint16_t h) {
  const uint32_t a = h & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  // A subnormal's integer fraction times 2^-24 is exact, and never a subnormal float.
  const float small = static_cast<float>(static_cast<int>(a < 0x400u ? a : 0u)) * 0x1p-24f;
  uint32_t u = a < 0x400u ? float_bits(small) : (a << 13) + (112u << 23);
  u = a >= 0x7c00u ? 0x7f800000u : u;
  u |= sign;
  return bits_float(a > 0x7c00u ? 0x7fffffffu : u);
}

// e5m2 is f16's upper byte; e4m3's fields fit an f16 scaled by 2^-8, and every value is exact
// there.
[[gnu::always_inline]] inline uint16_t e5m2_to_half(uint8_t x) {
  const uint32_t h = static_cast<uint32_t>(x) << 8;
  return static_cast<uint16_t>((h & 0x7fffu) > 0x7c00u ? 0x7fffu : h);
}
[[gnu::always_inline]] inline uint16_t e4m3_to_half(uint8_t x) {
  const uint32_t a = x & 0x7fu;
  const uint32_t sign = static_cast<uint32_t>(x & 0x80u) << 8;
  // Subnormal m * 2^-9, m in 1..7: normal in f16; built from m's leading bit.
  const uint32_t m = a & 7u;
  const uint32_t lead = m >= 4u ? 2u : (m >= 2u ? 1u : 0u);
  const uint32_t tiny = m == 0u ? 0u : ((6u + lead) << 10) | ((m << (10u - lead)) & 0x3ffu);
  const uint32_t code = a < 8u ? tiny : (a << 7) + (8u << 10);
  return static_cast<uint16_t>(a == 0x7fu ? 0x7fffu : (code | sign));
}

}  // namespace

int bits_of(Format format) { return spec_of(format).bits; }

double decode(Format format, uint32_t bits) {
  const Spec& s = spec_of(format);
  if (format == Format::tf32) bits >>= 13;
  const uint32_t mantissa_mask = (1u << s.mbits) - 1;
  if (format == Format::ue8m0) {
    const int code = static_cast<int>(bits & 0xffu);
    return code == 255 ? std::numeric_limits<double>::quiet_NaN() : std::ldexp(1.0, code - 127);
  }
  const uint32_t exponent = (bits >> s.mbits) & ((1u << s.ebits) - 1);
  const uint32_t mantissa = bits & mantissa_mask;
  const bool negative = (bits >> (s.mbits + s.ebits)) & 1;
  const uint32_t magnitude = (exponent << s.mbits) | mantissa;
  double value;
  if (magnitude > s.max_finite) {
    const bool infinite = s.has_inf && mantissa == 0;
    value = infinite ? std::numeric_limits<double>::infinity()
                     : std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<double>(mantissa), 1 - s.bias - s.mbits);
  } else {
    value = std::ldexp(static_cast<double>(mantissa + mantissa_mask + 1),
                       static_cast<int>(exponent) - s.bias - s.mbits);
  }
  return negative ? -value : value;
}

uint32_t encode(Format format, double value, CvtMode mode) {
  if (mode.relu && (value < 0.0 || value == 0.0)) value = 0.0;
  if (format == Format::ue8m0) return encode_ue8m0(value, mode);
  const Spec& s = spec_of(format);
  const int shift = format == Format::tf32 ? 13 : 0;
  // The canonical tf32 NaN is the whole word's.
  if (std::isnan(value)) return shift ? 0x7fffffffu : s.nan;
  const bool negative = std::signbit(value);
  const uint32_t sign = static_cast<uint32_t>(negative) << (s.ebits + s.mbits);
  const double a = std::fabs(value);
  uint32_t code = std::isinf(a) ? 0xffffffffu : round_magnitude(s, a, mode.round, negative);
  if (code > s.max_finite) {
    const bool finite = mode.satfinite || !s.has_nan ||
                        (!std::isinf(a) && overflow_stays_finite(mode.round, negative));
    if (finite) {
      code = s.max_finite;
    } else if (s.has_inf) {
      code = ((1u << s.ebits) - 1) << s.mbits;
    } else {
      return s.nan;
    }
  }
  return (sign | code) << shift;
}

float f16_to_f32(uint16_t bits) { return f16_value(bits); }
float e4m3_to_f32(uint8_t bits) { return f16_value(e4m3_to_half(bits)); }
float e5m2_to_f32(uint8_t bits) { return f16_value(e5m2_to_half(bits)); }
uint16_t f32_to_f16(float value) { return f16_from(value); }
uint16_t f32_to_bf16(float value) { return bf16_from(value); }
uint8_t f32_to_e4m3(float value) { return e4m3_from(value); }
uint8_t f32_to_e5m2(float value) { return e5m2_from(value); }

uint32_t f32_to_tf32_rna(float value) {
  const uint32_t u = float_bits(value);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  if ((u & 0x7fffffffu) == 0x7f800000u) return u;
  return (u + 0x1000u) & ~0x1fffu;
}

// One loop body, compiled for each instruction set (GCC vectorises it under the wider targets).
#define DSK_LANES(name, args, forward, body)                                       \
  namespace {                                                                      \
  DSK_AVX512 void name##_avx512 args{body} DSK_AVX2 void name##_avx2 args { body } \
  void name##_scalar args { body }                                                 \
  }                                                                                \
  void name args {                                                                 \
    switch (isa()) {                                                               \
      case Isa::avx512:                                                            \
      case Isa::avx512_bf16:                                                       \
        return name##_avx512 forward;                                              \
      case Isa::avx2:                                                              \
        return name##_avx2 forward;                                                \
      case Isa::scalar:                                                            \
        return name##_scalar forward;                                              \
    }                                                                              \
  }

DSK_LANES(f16_to_f32, (const uint16_t* in, float* out, int n), (in, out, n),
          for (int i = 0; i < n; ++i) out[i] = f16_value(in[i]);)
DSK_LANES(bf16_to_f32, (const uint16_t* in, float* out, int n), (in, out, n),
          for (int i = 0; i < n; ++i) out[i] = bits_float(static_cast<uint32_t>(in[i]) << 16);)
DSK_LANES(e4m3_to_f32, (const uint8_t* in, float* out, int n), (in, out, n),
          for (int i = 0; i < n; ++i) out[i] = f16_value(e4m3_to_half(in[i]));)
DSK_LANES(e5m2_to_f32, (const uint8_t* in, float* out, int n), (in, out, n),
          for (int i = 0; i < n; ++i) out[i] = f16_value(e5m2_to_half(in[i]));)
DSK_LANES(f32_to_f16, (const float* in, uint16_t* out, int n), (in, out, n),
          for (int i = 0; i < n; ++i) out[i] = f16_from(in[i]);)
DSK_LANES(f32_to_bf16, (const float* in, uint16_t* out, int n), (in, out, n),
          for (int i = 0; i < n; ++i) out[i] = bf16_from(in[i]);)
DSK_LANES(
    f32_to_f16x2, (const float* a, const float* b, uint32_t* out, int n), (a, b, out, n),
    for (int i = 0; i < n;
         ++i) { out[i] = (static_cast<uint32_t>(f16_from(a[i])) << 16) | f16_from(b[i]); })
DSK_LANES(
    f32_to_bf16x2, (const float* a, const float* b, uint32_t* out, int n), (a, b, out, n),
    for (int i = 0; i < n;
         ++i) { out[i] = (static_cast<uint32_t>(bf16_from(a[i])) << 16) | bf16_from(b[i]); })
DSK_LANES(
    f32_to_e4m3x2, (const float* a, const float* b, uint16_t* out, int n), (a, b, out, n),
    for (int i = 0; i < n;
         ++i) { out[i] = static_cast<uint16_t>((e4m3_from(a[i]) << 8) | e4m3_from(b[i])); })
DSK_LANES(
    f32_to_e5m2x2, (const float* a, const float* b, uint16_t* out, int n), (a, b, out, n),
    for (int i = 0; i < n;
         ++i) { out[i] = static_cast<uint16_t>((e5m2_from(a[i]) << 8) | e5m2_from(b[i])); })
DSK_LANES(
    e4m3x2_to_f16x2, (const uint16_t* in, uint32_t* out, int n), (in, out, n),
    for (int i = 0; i < n; ++i) {
      const uint32_t high = e4m3_to_half(static_cast<uint8_t>(in[i] >> 8));
      out[i] = (high << 16) | e4m3_to_half(static_cast<uint8_t>(in[i] & 0xff));
    })
DSK_LANES(
    e5m2x2_to_f16x2, (const uint16_t* in, uint32_t* out, int n), (in, out, n),
    for (int i = 0; i < n; ++i) {
      const uint32_t high = e5m2_to_half(static_cast<uint8_t>(in[i] >> 8));
      out[i] = (high << 16) | e5m2_to_half(static_cast<uint8_t>(in[i] & 0xff));
    })

#undef DSK_LANES

void convert_lanes(Format from, Format to, CvtMode mode, const uint32_t* in, uint32_t* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = encode(to, decode(from, in[i]), mode);
}

}  // namespace dsk::emu::num
