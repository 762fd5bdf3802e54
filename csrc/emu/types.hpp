// Vocabulary of the emulator: widths, lanes, PTX scalar types and state spaces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace dsk::emu {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i8 = std::int8_t;
using i16 = std::int16_t;
using i32 = std::int32_t;
using i64 = std::int64_t;

inline constexpr int kLanes = 32;
inline constexpr u32 kFullMask = 0xffffffffu;

// A generic address carries its window in the top byte; 0 is global memory, where the emulated
// address IS the host address. Shared addresses inside the window are shared::cluster addresses:
// (cluster rank << 24) + offset, and a CTA's own shared::cta addresses carry its own rank, so they
// may be handed to another CTA of the cluster.
inline constexpr int kWindowShift = 56;
inline constexpr u64 kSharedWindow = 1ull << kWindowShift;
inline constexpr u64 kLocalWindow = 2ull << kWindowShift;
inline constexpr int kRankShift = 24;
inline constexpr u32 kSharedOffsetMask = (1u << kRankShift) - 1;
// As on hardware the first KiB of shared memory is the system's: address 0 is never valid.
inline constexpr u32 kSharedReserved = 1024;
inline constexpr u64 kNullPage = 65536;

struct Dim3 {
  u32 x = 1, y = 1, z = 1;
  u64 count() const { return u64{x} * y * z; }
};

enum class Space : u8 { Generic, Global, Shared, SharedCluster, Local, Param, Const };

enum class Type : u8 {
  None,
  Pred,
  B8,
  U8,
  S8,
  B16,
  U16,
  S16,
  B32,
  U32,
  S32,
  B64,
  U64,
  S64,
  B128,
  F16,
  BF16,
  F32,
  F64,
  TF32,
  F16x2,
  BF16x2,
  E4M3,
  E5M2,
  E4M3x2,
  E5M2x2,
  E2M1x2,
  UE8M0x2,
};

// Bytes of one element; 0 for predicates and None. E4M3/E5M2 scalars count 1.
int type_size(Type t);
bool is_float(Type t);                   // any floating-point format, packed ones included
bool is_signed(Type t);                  // S8..S64
Type parse_type(std::string_view name);  // Type::None when `name` is not a PTX type
const char* type_name(Type t);

enum class Semantics : u8 { Weak, Volatile, Relaxed, Acquire, Release, AcqRel, Sc };
enum class Scope : u8 { None, Cta, Cluster, Gpu, Sys };

}  // namespace dsk::emu
