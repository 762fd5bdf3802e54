// The approximate PTX functions, within their documented error.
//
// nearest: the correctly rounded value (error at most 0.5 ulp, inside every documented bound).
// worst: the correctly rounded value moved by the largest documented error that stays inside the
// bound, up or down by (seed, input): a kernel that survives both signs does not lean on the
// emulator being better than the hardware. Special values are exact in both.
#pragma once

#include <cstdint>

namespace dsk::emu::num {

enum class ApproxFn : uint8_t { ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh };
enum class ApproxMode : uint8_t { nearest, worst };

struct ApproxCtx {
  ApproxMode mode = ApproxMode::nearest;
  uint64_t seed = 0;
};

// f32 forms; ftz flushes subnormal inputs and results to sign-preserving zero. sin, cos and tanh of
// f32; tanh has no .ftz form (pass false).
float approx_f32(ApproxFn fn, float x, bool ftz, const ApproxCtx& ctx = {});
void approx_f32(ApproxFn fn, const float* x, float* out, int n, bool ftz,
                const ApproxCtx& ctx = {});

// div.approx.f32 and div.full.f32 (2 ulp). approx: for |y| in (2^126, 2^128) the result is 0 (or
// NaN if x is infinite), as documented.
float approx_div(float x, float y, bool ftz, const ApproxCtx& ctx = {});
float full_div(float x, float y, bool ftz, const ApproxCtx& ctx = {});
void approx_div(const float* x, const float* y, float* out, int n, bool ftz,
                const ApproxCtx& ctx = {});

// f16 and bf16 patterns: ex2 and tanh only (others throw std::invalid_argument).
// ex2.approx.ftz.bf16 flushes subnormals; ex2.approx.f16 does not unless ftz.
uint16_t approx_f16(ApproxFn fn, uint16_t x, bool ftz, const ApproxCtx& ctx = {});
uint16_t approx_bf16(ApproxFn fn, uint16_t x, bool ftz, const ApproxCtx& ctx = {});

// rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64 (low 32 result bits zero; subnormals flushed).
double approx_rcp_f64(double x);
double approx_rsqrt_f64(double x);

}  // namespace dsk::emu::num
