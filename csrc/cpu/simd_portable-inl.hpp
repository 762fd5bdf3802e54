// F32 in plain C++, for any processor: eight lanes that a compiler may vectorise as it can.
// Included by simd.hpp inside the target's namespace.

struct F32 {
  float lane[8];
};
constexpr int kLanes = 8;

template <typename Function>
DSK_INLINE F32 each(Function function) {
  F32 result;
  for (int i = 0; i < kLanes; ++i) result.lane[i] = function(i);
  return result;
}

DSK_INLINE F32 zero() { return F32{}; }
DSK_INLINE F32 set1(float v) {
  return each([&](int) { return v; });
}
DSK_INLINE F32 load(const float* p) {
  return each([&](int i) { return p[i]; });
}
DSK_INLINE void store(float* p, F32 v) { std::memcpy(p, v.lane, sizeof(v.lane)); }
DSK_INLINE F32 add(F32 a, F32 b) {
  return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
DSK_INLINE F32 sub(F32 a, F32 b) {
  return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
DSK_INLINE F32 mul(F32 a, F32 b) {
  return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
DSK_INLINE F32 div(F32 a, F32 b) {
  return each([&](int i) { return a.lane[i] / b.lane[i]; });
}
// Not fused: a software fma would cost a hundred times more, and no result depends on it.
DSK_INLINE F32 fma(F32 a, F32 b, F32 c) {
  return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
DSK_INLINE F32 sqrt(F32 a) {
  return each([&](int i) { return std::sqrt(a.lane[i]); });
}
DSK_INLINE F32 neg(F32 a) {
  return each([&](int i) { return -a.lane[i]; });
}
DSK_INLINE F32 abs(F32 a) {
  return each([&](int i) { return std::fabs(a.lane[i]); });
}
// max(a, b) and min(a, b) return b when either is NaN: put the accumulator second to skip NaNs.
DSK_INLINE F32 max(F32 a, F32 b) {
  return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
DSK_INLINE F32 min(F32 a, F32 b) {
  return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
DSK_INLINE F32 round_even(F32 a) {
  return each([&](int i) { return std::nearbyintf(a.lane[i]); });
}
DSK_INLINE float reduce_add(F32 a) {
  const float* v = a.lane;
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
DSK_INLINE float reduce_max(F32 a) {
  float result = a.lane[0];
  for (int i = 1; i < kLanes; ++i) result = a.lane[i] > result ? a.lane[i] : result;
  return result;
}

// p * 2^n, where n rounds x / ln 2: out of range by x, not by n, which may itself be infinite.
DSK_INLINE F32 ldexp_clamped(F32 p, F32 n, F32 x) {
  return each([&](int i) {
    if (x.lane[i] < -87.3f) return 0.0f;
    if (x.lane[i] > 88.73f) return INFINITY;
    if (x.lane[i] != x.lane[i]) return x.lane[i];
    return std::ldexp(p.lane[i], static_cast<int>(n.lane[i]));
  });
}

DSK_INLINE F32 load_bf16(const uint16_t* p) {
  return each([&](int i) {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  });
}
DSK_INLINE void store_bf16(uint16_t* p, F32 v) {
  for (int i = 0; i < kLanes; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &v.lane[i], 4);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    p[i] = static_cast<uint16_t>((nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

DSK_INLINE F32 load_f16(const uint16_t* p) {
  return each([&](int i) {
    const int sign = p[i] >> 15, exponent = p[i] >> 10 & 31, mantissa = p[i] & 1023;
    float value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                  : exponent     ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25)
                                 : std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -value : value;
  });
}
DSK_INLINE void store_f16(uint16_t* p, F32 v) {
  for (int i = 0; i < kLanes; ++i) {
    const float magnitude = std::fabs(v.lane[i]);
    uint32_t code;
    if (!(magnitude == magnitude)) {
      code = 0x7e00;
    } else if (magnitude < 6.103515625e-5f) {  // below 2^-14: multiples of 2^-24
      code = static_cast<uint32_t>(std::nearbyintf(magnitude * 16777216.0f));
    } else {
      uint32_t bits;
      std::memcpy(&bits, &magnitude, 4);
      bits = (bits + 0xfff + (bits >> 13 & 1)) >> 13;
      code = bits >= (143u << 10) ? 0x7c00 : bits - (112u << 10);
    }
    p[i] = static_cast<uint16_t>(code | (std::signbit(v.lane[i]) ? 0x8000 : 0));
  }
}

DSK_INLINE F32 load_e4m3(const uint8_t* p) {
  return each([&](int i) {
    const int exponent = p[i] >> 3 & 15, mantissa = p[i] & 7;
    float value = (p[i] & 0x7f) == 0x7f ? NAN
                  : exponent ? std::ldexp(static_cast<float>(8 + mantissa), exponent - 10)
                             : static_cast<float>(mantissa) * 0.001953125f;
    return p[i] & 0x80 ? -value : value;
  });
}

// Round to nearest even, saturating at 448; NaN -> 0x7f.
DSK_INLINE void store_e4m3(uint8_t* p, F32 v) {
  for (int i = 0; i < kLanes; ++i) {
    const float magnitude = std::fabs(v.lane[i]);
    uint32_t bits, code;
    std::memcpy(&bits, &magnitude, 4);
    if (!(magnitude == magnitude)) {
      code = 0x7f;
    } else if (magnitude < 0.015625f) {  // below 2^-6: multiples of 2^-9
      code = static_cast<uint32_t>(std::nearbyintf(magnitude * 512.0f));
    } else {
      code = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
      if (code > 0x7e) code = 0x7e;
    }
    p[i] = static_cast<uint8_t>(code | (std::signbit(v.lane[i]) ? 0x80 : 0));
  }
}
