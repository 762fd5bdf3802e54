// Tensor maps (tiled mode, 1-5 dimensions): our 128-byte encoding, the driver's legality rules, and
// the walk of one box into copy runs.
//
// Dimension 0 is innermost and contiguous. Enum values are the CUDA driver's, so a launcher passes
// its CUtensorMap enums through unchanged.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "emu/num/wgmma_desc.hpp"

namespace dsk::emu::num {

enum class TmaType : uint8_t {
  u8 = 0,
  u16,
  u32,
  s32,
  u64,
  s64,
  f16,
  f32,
  f64,
  bf16,
  f32_ftz,
  tf32,
  tf32_ftz
};
enum class TmaInterleave : uint8_t { none = 0, b16 = 1, b32 = 2 };
enum class TmaFill : uint8_t { zero = 0, nan = 1 };

int size_of(TmaType type);  // bytes of one element

struct TensorMapArgs {
  TmaType type = TmaType::u8;
  uint32_t rank = 0;
  uint64_t address = 0;
  std::array<uint64_t, 5> dims{};             // elements
  std::array<uint64_t, 4> strides{};          // bytes, of dimensions 1..rank-1
  std::array<uint32_t, 5> box{};              // elements (of the tensor, before element strides)
  std::array<uint32_t, 5> element_strides{};  // all 1 unless a dimension is to be skipped through
  TmaInterleave interleave = TmaInterleave::none;
  Swizzle swizzle = Swizzle::none;
  uint8_t l2_promotion = 0;  // 0..3, a hint
  TmaFill fill = TmaFill::zero;
};

// Opaque to kernels, 128 bytes, 64-byte aligned like the driver's. Every field lives at a fixed
// offset so that tensormap.replace and byte copies (ld/st, cp.async.bulk) of the object work.
struct alignas(64) TensorMap {
  std::array<uint8_t, 128> bytes{};
};
static_assert(sizeof(TensorMap) == 128);

// The driver's rules, each refusal naming argument, expected and actual; "" if legal.
std::string check_tensor_map(const TensorMapArgs& args);

// Throws std::invalid_argument with check_tensor_map's text.
TensorMap encode_tensor_map(const TensorMapArgs& args);

// Reads a map back from memory. Returns false (and says why) for bytes that are not one of ours,
// are an im2col map, or were edited (tensormap.replace) into something illegal.
bool decode_tensor_map(const uint8_t* bytes, TensorMapArgs& args, std::string& error);

// The driver refuses im2col maps here by name: the emulator has tiled mode only.
std::string refuse_im2col();

// --- tensormap.replace.tile: field setters on the 128 bytes. `ordinal` selects a dimension where
// the field has one. Return "" or a refusal (unknown field for the value, ordinal out of range).
// rank is stored as PTX passes it (rank - 1).
enum class MapField : uint8_t {
  global_address,
  rank,
  box_dim,
  global_dim,
  global_stride,
  element_stride,
  elemtype,
  interleave_layout,
  swizzle_mode,
  fill_mode
};
std::string replace_field(uint8_t* bytes, MapField field, uint32_t ordinal, uint64_t value);

// --- the walk
struct TmaRun {
  uint64_t global = 0;  // address of the run's first byte (meaningless for fill)
  uint32_t shared = 0;  // offset of the first byte from the box's shared address, swizzled
  uint32_t bytes = 0;   // contiguous in both spaces
  bool fill = false;    // outside the tensor: write the fill pattern on load, skip on store
};

// Bytes one box moves (what complete_tx counts): product of ceil(box/element_stride) * element
// size.
uint32_t box_bytes(const TensorMapArgs& args);

// Alignment the shared address must have: 128 bytes, 256 with interleave 32B. (A swizzled tile also
// wants its pattern's 256/512/1024 for a descriptor's base offset to be 0; TMA does not.)
uint32_t shared_alignment(const TensorMapArgs& args);

// Rows of the box are packed at box[0] * element size, also when that is less than the swizzle
// span. Interleaved maps are walked as plain ones. Neither is confirmed by an outside oracle.
//
// All runs of the box at `coords` (may be negative or beyond the end), in shared order. `shared` is
// the box's shared-window address: swizzling acts on absolute addresses. Appends nothing else;
// clears `runs` first. Runs never cross a 16-byte chunk boundary when swizzled.
void walk_box(const TensorMapArgs& args, const int32_t* coords, uint32_t shared,
              std::vector<TmaRun>& runs);

// The fill pattern of one element type, written over [dst, dst + bytes): zeros, or the type's NaN.
void write_fill(const TensorMapArgs& args, uint8_t* dst, uint32_t bytes);

}  // namespace dsk::emu::num
