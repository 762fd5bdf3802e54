#include "emu/num/approx.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "emu/num/convert.hpp"

namespace dsk::emu::num {
namespace {

constexpr uint32_t kNan32 = 0x7fffffffu;
constexpr double kTwoPi = 6.283185307179586;

double evaluate(ApproxFn fn, double x) {
  switch (fn) {
    case ApproxFn::ex2:
      return std::exp2(x);
    case ApproxFn::lg2:
      return x == 0.0 ? -std::numeric_limits<double>::infinity() : std::log2(x);
    case ApproxFn::rcp:
      return x == 0.0 ? std::copysign(std::numeric_limits<double>::infinity(), x) : 1.0 / x;
    case ApproxFn::rsqrt:
      return x == 0.0 ? std::copysign(std::numeric_limits<double>::infinity(), x)
                      : 1.0 / std::sqrt(x);
    case ApproxFn::sqrt:
      return std::sqrt(x);
    case ApproxFn::sin:
      return std::sin(x);
    case ApproxFn::cos:
      return std::cos(x);
    case ApproxFn::tanh:
      return std::tanh(x);
  }
  throw std::invalid_argument("approx: unknown function");
}

double ulp_f32(double value) {
  const int e = std::max(std::ilogb(value), -126);
  return std::ldexp(1.0, e - 23);
}

// The documented bound as an absolute error at (x, exact), f32 forms (PTX ISA, each instruction).
double bound_f32(ApproxFn fn, double x, double exact) {
  const double size = std::fabs(exact);
  switch (fn) {
    case ApproxFn::ex2:
      return 2.0 * ulp_f32(exact);
    case ApproxFn::lg2:
      return x > 0.5 && x < 2.0 ? std::exp2(-22.6) : size * 0x1p-22;
    case ApproxFn::rcp:
      return ulp_f32(exact);
    case ApproxFn::rsqrt:
      return size * std::exp2(-22.9);
    case ApproxFn::sqrt:
      return size * 0x1p-23;
    case ApproxFn::sin:
    case ApproxFn::cos:
      return std::fabs(x) <= kTwoPi ? std::exp2(-20.5) : std::exp2(-14.7);
    case ApproxFn::tanh:
      return size * 0x1p-11;
  }
  return 0.0;
}

bool moves_up(const ApproxCtx& ctx, uint64_t input) {
  uint64_t z = ctx.seed * 0x9e3779b97f4a7c15u + input + 0x632be59bd9b4e019u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return ((z ^ (z >> 31)) & 1) != 0;
}

// The representable value farthest from `exact` in one direction, still within `bound`. Where the
// format's grid is coarser than the bound, the nearest value.
uint32_t worst(Format format, double exact, double bound, bool up) {
  const double target = up ? exact + bound : exact - bound;
  const uint32_t bits = encode(format, target, {up ? Round::rm : Round::rp});
  const double value = decode(format, bits);
  const bool crossed = up ? value < exact : value > exact;
  return crossed || !std::isfinite(value) ? encode(format, exact) : bits;
}

bool bounded_by_one(ApproxFn fn) { return fn >= ApproxFn::sin; }

uint32_t round_result(Format format, ApproxFn fn, double exact, double bound, uint32_t input,
                      const ApproxCtx& ctx) {
  const bool special = exact == 0.0 || !std::isfinite(exact);
  if (ctx.mode == ApproxMode::nearest || special || decode(format, input) == 0.0) {
    return encode(format, exact);
  }
  const uint32_t bits = worst(format, exact, bound, moves_up(ctx, input));
  if (bounded_by_one(fn) && std::fabs(decode(format, bits)) > 1.0) return encode(format, exact);
  return bits;
}

float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

float f32_from(uint32_t bits) { return std::bit_cast<float>(bits); }

uint16_t flush_half(uint16_t x, int exponent_bits) {
  const auto exponent = static_cast<uint16_t>(((1u << exponent_bits) - 1) << (15 - exponent_bits));
  return (x & exponent) == 0 ? static_cast<uint16_t>(x & 0x8000u) : x;
}

uint16_t approx_half(Format format, ApproxFn fn, uint16_t x, bool ftz, const ApproxCtx& ctx) {
  if (fn != ApproxFn::ex2 && fn != ApproxFn::tanh) {
    throw std::invalid_argument("approx: 16-bit forms exist for ex2 and tanh only");
  }
  const bool is_f16 = format == Format::f16;
  const int exponent_bits = is_f16 ? 5 : 8;
  if (ftz) x = flush_half(x, exponent_bits);
  const double value = decode(format, x);
  const double exact = evaluate(fn, value);
  double bound;
  if (fn == ApproxFn::ex2) {
    bound = exact * (is_f16 ? std::exp2(-9.9) : 0x1p-7);
  } else {
    bound = is_f16 ? std::exp2(-10.987) : 0x1p-8;
  }
  const auto bits = static_cast<uint16_t>(round_result(format, fn, exact, bound, x, ctx));
  return ftz ? flush_half(bits, exponent_bits) : bits;
}

float divide(float x, float y, bool ftz, const ApproxCtx& ctx) {
  const double exact = static_cast<double>(x) / static_cast<double>(y);
  uint32_t bits;
  if (ctx.mode == ApproxMode::nearest || exact == 0.0 || !std::isfinite(exact)) {
    bits = encode(Format::f32, exact);
  } else {
    const uint64_t input =
        (uint64_t{std::bit_cast<uint32_t>(x)} << 32) | std::bit_cast<uint32_t>(y);
    bits = worst(Format::f32, exact, 2.0 * ulp_f32(exact), moves_up(ctx, input));
  }
  const float result = f32_from(bits);
  return ftz ? flush(result) : result;
}

double clear_low_word(double x) {
  return std::bit_cast<double>(std::bit_cast<uint64_t>(x) & 0xffffffff00000000u);
}

double flush_f64(double x) { return std::fabs(x) < 0x1p-1022 ? std::copysign(0.0, x) : x; }

}  // namespace

float approx_f32(ApproxFn fn, float x, bool ftz, const ApproxCtx& ctx) {
  if (ftz) x = flush(x);
  const double exact = evaluate(fn, static_cast<double>(x));
  if (std::isnan(exact)) return f32_from(kNan32);
  const double bound = exact == 0.0 || std::isinf(exact) ? 0.0 : bound_f32(fn, x, exact);
  const float result =
      f32_from(round_result(Format::f32, fn, exact, bound, std::bit_cast<uint32_t>(x), ctx));
  return ftz ? flush(result) : result;
}

void approx_f32(ApproxFn fn, const float* x, float* out, int n, bool ftz, const ApproxCtx& ctx) {
  for (int i = 0; i < n; ++i) out[i] = approx_f32(fn, x[i], ftz, ctx);
}

float approx_div(float x, float y, bool ftz, const ApproxCtx& ctx) {
  if (ftz) {
    x = flush(x);
    y = flush(y);
  }
  const float size = std::fabs(y);
  if (size > 0x1p126f && std::isfinite(y)) {
    // 1/y is subnormal and flushed inside the instruction.
    if (std::isnan(x) || std::isinf(x)) return f32_from(kNan32);
    return std::copysign(0.0f, std::signbit(x) != std::signbit(y) ? -1.0f : 1.0f);
  }
  return divide(x, y, ftz, ctx);
}

float full_div(float x, float y, bool ftz, const ApproxCtx& ctx) {
  return ftz ? divide(flush(x), flush(y), true, ctx) : divide(x, y, false, ctx);
}

void approx_div(const float* x, const float* y, float* out, int n, bool ftz, const ApproxCtx& ctx) {
  for (int i = 0; i < n; ++i) out[i] = approx_div(x[i], y[i], ftz, ctx);
}

uint16_t approx_f16(ApproxFn fn, uint16_t x, bool ftz, const ApproxCtx& ctx) {
  return approx_half(Format::f16, fn, x, ftz, ctx);
}

uint16_t approx_bf16(ApproxFn fn, uint16_t x, bool ftz, const ApproxCtx& ctx) {
  return approx_half(Format::bf16, fn, x, ftz, ctx);
}

double approx_rcp_f64(double x) {
  const double result = evaluate(ApproxFn::rcp, flush_f64(x));
  return std::isnan(result) ? std::bit_cast<double>(uint64_t{0x7fffffff} << 32)
                            : clear_low_word(flush_f64(result));
}

double approx_rsqrt_f64(double x) {
  const double result = evaluate(ApproxFn::rsqrt, flush_f64(x));
  return std::isnan(result) ? std::bit_cast<double>(uint64_t{0x7fffffff} << 32)
                            : clear_low_word(flush_f64(result));
}

}  // namespace dsk::emu::num
