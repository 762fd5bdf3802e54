// The 64-bit shared-memory matrix descriptor of wgmma, and gathering the tile it describes.
//
// Layouts in 16-byte chunks, W = swizzle width in chunks (none 1, 32B 2, 64B 4, 128B 8):
//   K-major : none ((8,m),2):((1,SBO),LBO)        swizzled ((8,m),2):((W,SBO),1)
//   MN-major: none ((1,n),(8,k)):((-,SBO),(1,LBO)) swizzled ((W,n),(8,k)):((1,LBO),(W,SBO))
// then address bits [4..6] are XORed with bits [7..9] under the swizzle's mask. A non-zero base
// offset (a pattern that does not start at its natural alignment) is subtracted from bits [7..9]
// before the XOR: the documented meaning, which no outside oracle here confirms.
#pragma once

#include <cstdint>
#include <vector>

namespace dsk::emu::num {

enum class Swizzle : uint8_t { none = 0, b32 = 1, b64 = 2, b128 = 3 };  // width 16 << value bytes
enum class Major : uint8_t { k, mn };                                   // mn: 16-bit types only

struct SmemDesc {
  uint32_t start = 0;  // bytes, shared-window address
  uint32_t lbo = 0;    // leading byte offset
  uint32_t sbo = 0;    // stride byte offset
  uint8_t base_offset = 0;
  Swizzle swizzle = Swizzle::none;
  // Bits that must be zero but are not (14, 15, 30, 31, 46-48, 52-61): a sign of a corrupt
  // descriptor. The machine decides whether that is a hazard.
  bool reserved_bits = false;
};

SmemDesc decode_desc(uint64_t bits);
uint64_t encode_desc(
    const SmemDesc& desc);  // throws std::invalid_argument on unrepresentable fields

// TMA's and wgmma's swizzle: XOR address bits [4..] with bits [7..] under the width's mask.
// Works on absolute shared-window addresses.
constexpr uint32_t swizzle_address(uint32_t address, Swizzle mode) {
  const uint32_t mask = (1u << static_cast<uint32_t>(mode)) - 1;
  return address ^ (((address >> 7) & mask) << 4);
}

// Shared-window address of the 16-byte chunk that holds K-major (row mn, bytes 16c..16c+15), or
// MN-major (elements mn8*8..+7 of row k): the one definition of the layouts above.
uint32_t k_major_chunk(const SmemDesc& desc, uint32_t mn, uint32_t chunk);
uint32_t mn_major_chunk(const SmemDesc& desc, uint32_t mn8, uint32_t k);

struct ByteRange {
  uint32_t begin = 0;  // shared-window address
  uint32_t bytes = 0;
};

// Everything the machine needs about one operand read. Ranges are sorted, disjoint, merged.
struct TileRead {
  bool ok = true;
  uint32_t bad_address = 0;  // first address outside [window_base, window_base + window_size)
  const std::vector<ByteRange>* relative = nullptr;  // footprint, begins relative to `base`
  uint32_t base = 0;                                 // add to every relative begin
};

// Gathers `mn` rows of 32 bytes into dense[mn][32], K-major. mn: multiple of 8, 8..256 (64 for A).
// MN-major tiles are 16 k-rows of 16-bit elements and are transposed. smem holds the CTA's shared
// memory, smem[0] being window address `window_base`. On !ok dense is untouched. Plans are cached
// per thread by (start mod 1024, lbo, sbo, base offset, swizzle, major, mn), so the usual cost is
// 2*mn chunk copies. `relative` stays valid until the thread's next call, on !ok too (the footprint
// the instruction asked for).
// Throws std::invalid_argument for an mn that wgmma does not have.
TileRead gather_tile(const SmemDesc& desc, Major major, int mn, const uint8_t* smem,
                     uint32_t window_base, uint32_t window_size, uint8_t* dense);

// The same without the gather: where the operand lies, and whether all of it is in the window.
TileRead locate_tile(const SmemDesc& desc, Major major, int mn, uint32_t window_base,
                     uint32_t window_size);

}  // namespace dsk::emu::num
