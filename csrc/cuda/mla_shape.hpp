// Sizes of the MLA decode tile, known to the kernel (which asserts them) and to the launcher.
#pragma once

namespace dsk {

constexpr int kMlaWidth = 576;   // values of a cached token: 512 latent, 64 RoPE
constexpr int kMlaLatent = 512;  // of which these are also its value vector
constexpr int kMlaRows = 64;     // query rows of a CTA
constexpr int kMlaScaleBytes = kMlaLatent / 128 * 4;
// A token of an FP8 cache: e4m3 latents, fp32 scales, bf16 RoPE values.
constexpr int kMlaFp8Bytes = kMlaLatent + kMlaScaleBytes + (kMlaWidth - kMlaLatent) * 2;

// Requests whose rows a CTA of mla_combine may have.
constexpr int kMlaCombineRequests = 128;

// Shares that mla_schedule may need to try: an equal one, and up to what a part may leave of it
// more.
constexpr int mla_num_shares(int split_blocks, int piece_cost) {
  return piece_cost + (split_blocks > 0 ? split_blocks : 1);
}

// Bytes of MlaDecodeSmem: Q, two blocks of 64 tokens, stage, row statistics, barriers.
constexpr int mla_decode_shared_bytes() {
  const int tile = kMlaRows * kMlaWidth * 2;
  const int stage = 16 * kMlaLatent;
  const int columns = 2 * 4 * 32 * 4;
  return (3 * tile + stage + columns + 4 * kMlaRows * 4 + (4 + 1) * 2 * 8 + 1023) / 1024 * 1024;
}

}  // namespace dsk
