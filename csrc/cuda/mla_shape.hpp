// Sizes of the MLA decode tile, known to the kernel (which asserts them) and to the launcher.
#pragma once

namespace dsk {

constexpr int kMlaWidth = 576;   // values of a cached token: 512 latent, 64 RoPE
constexpr int kMlaLatent = 512;  // of which these are also its value vector
constexpr int kMlaRows = 64;     // query rows of a CTA

// Bytes of MlaDecodeSmem: Q, two blocks of 64 tokens, row statistics, barriers.
constexpr int mla_decode_shared_bytes() {
  const int tile = kMlaRows * kMlaWidth * 2;
  return (3 * tile + 4 * kMlaRows * 4 + (4 + 1) * 2 * 8 + 1023) / 1024 * 1024;
}

}  // namespace dsk
