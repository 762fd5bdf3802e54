// Small floating-point formats and PTX `cvt` between them, bit exact.
//
// Scalar functions take any input; array functions take `n` lanes (32 for a warp) and give the same
// bits as the scalar ones. NaN results are the format's canonical NaN, as `cvt` produces them.
#pragma once

#include <cstdint>

namespace dsk::emu::num {

// e2m1, e2m3, e3m2 and ue8m0 are Blackwell `cvt` formats; sm_90 code may still carry them in
// memory.
enum class Format : uint8_t { f32, tf32, f16, bf16, e4m3, e5m2, ue8m0, e2m1, e2m3, e3m2 };

// rna: to nearest, ties away from zero (`cvt.rna.tf32.f32`). rm: toward -inf, rp: toward +inf.
enum class Round : uint8_t { rn, rz, rm, rp, rna };

struct CvtMode {
  Round round = Round::rn;
  bool satfinite = false;  // finite overflow and infinity become the largest finite value
  bool relu = false;       // negative results (and -0) become +0; NaN stays NaN
};

int bits_of(Format format);  // storage bits: 32, 32 (tf32), 16, 16, 8, 8, 8, 4, 6, 6

// Exact value of a bit pattern (bits above the format's width are ignored; tf32 ignores its low
// 13).
double decode(Format format, uint32_t bits);

// One correct rounding of `value` into `format`. f32/f16/bf16/e4m3/e5m2 sources are exact in
// double, so this is every float-to-float `cvt` with a single destination element. Formats without
// infinity turn overflow without satfinite into NaN (e4m3); formats without NaN turn NaN into +max.
// ue8m0 has neither sign nor zero: values <= 2^-127 give 0, negatives give NaN.
uint32_t encode(Format format, double value, CvtMode mode = {});

// Fast scalar forms.
float f16_to_f32(uint16_t bits);
inline float bf16_to_f32(uint16_t bits) { return __builtin_bit_cast(float, uint32_t{bits} << 16); }
float e4m3_to_f32(uint8_t bits);
float e5m2_to_f32(uint8_t bits);
uint16_t f32_to_f16(float value);       // .rn
uint16_t f32_to_bf16(float value);      // .rn
uint8_t f32_to_e4m3(float value);       // .rn.satfinite
uint8_t f32_to_e5m2(float value);       // .rn.satfinite
uint32_t f32_to_tf32_rna(float value);  // low 13 bits zero

// Array forms (run-time choice of AVX-512 or plain C++). No alignment needed; out may not overlap
// in. `cvt.*x2 d, a, b` packs a into the upper half, b into the lower.
void f16_to_f32(const uint16_t* in, float* out, int n);
void bf16_to_f32(const uint16_t* in, float* out, int n);
void e4m3_to_f32(const uint8_t* in, float* out, int n);
void e5m2_to_f32(const uint8_t* in, float* out, int n);
void f32_to_f16(const float* in, uint16_t* out, int n);
void f32_to_bf16(const float* in, uint16_t* out, int n);
void f32_to_f16x2(const float* a, const float* b, uint32_t* out, int n);
void f32_to_bf16x2(const float* a, const float* b, uint32_t* out, int n);
void f32_to_e4m3x2(const float* a, const float* b, uint16_t* out, int n);  // .rn.satfinite
void f32_to_e5m2x2(const float* a, const float* b, uint16_t* out, int n);  // .rn.satfinite
void e4m3x2_to_f16x2(const uint16_t* in, uint32_t* out, int n);            // .rn (exact)
void e5m2x2_to_f16x2(const uint16_t* in, uint32_t* out, int n);            // .rn (exact)

// Any other pair: out[i] = encode(to, decode(from, in[i]), mode), patterns held in uint32_t.
void convert_lanes(Format from, Format to, CvtMode mode, const uint32_t* in, uint32_t* out, int n);

}  // namespace dsk::emu::num
