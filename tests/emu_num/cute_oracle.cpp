// Prints what CuTe's layout algebra says about wgmma descriptors, MMA fragments and ldmatrix, for
// test_cute_oracle.py to compare with. Host code; needs the CuTe headers and the CUDA headers.
#include <cstdint>
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;
namespace G = SM90::GMMA;

// "D bytes major rows start descriptor", then the byte address of every element of the
// instruction's tile, row by row. The descriptor's start address is 0 on the host; `start` carries
// it.
template <class T, G::Major kMajor, class Atom, int kRows, int kCols, class Order>
void descriptor() {
  alignas(1024) static T buffer[kRows * kCols];
  constexpr int kStep = 32 / sizeof(T);
  auto layout = tile_to_shape(Atom{}, Shape<Int<kRows>, Int<kCols>>{}, Order{});
  auto tensor = make_tensor(make_smem_ptr(buffer), layout);
  for (int step = 0; step < kCols / kStep; ++step) {
    auto tile = local_tile(tensor, Shape<Int<kRows>, Int<kStep>>{}, make_coord(0, step));
    const G::DescriptorIterator it{G::make_gmma_desc<kMajor>(tile)};
    const uint64_t bits = it.desc_.desc_ & ~uint64_t{0x3fff};
    const auto start = reinterpret_cast<const char*>(raw_pointer_cast(tile.data())) -
                       reinterpret_cast<const char*>(buffer);
    printf("\nD %d %d %d %d %llx", int(sizeof(T)), kMajor == G::Major::MN, kRows, int(start),
           static_cast<unsigned long long>(bits));
    for (int r = 0; r < kRows; ++r) {
      for (int k = 0; k < kStep; ++k) {
        const auto at = reinterpret_cast<const char*>(&tile(r, k));
        printf(" %d", int(at - reinterpret_cast<const char*>(buffer)));
      }
    }
    printf("\n");
  }
}

template <class T, int kRows>
void k_major() {
  using Left = Step<_1, _2>;
  using Right = Step<_2, _1>;
  constexpr int kBytes = 1 << 7;
  constexpr int kCols = kBytes / sizeof(T);
  descriptor<T, G::Major::K, G::Layout_K_INTER_Atom<T>, kRows, kCols, Left>();
  descriptor<T, G::Major::K, G::Layout_K_SW32_Atom<T>, kRows, kCols, Left>();
  descriptor<T, G::Major::K, G::Layout_K_SW64_Atom<T>, kRows, kCols, Left>();
  descriptor<T, G::Major::K, G::Layout_K_SW128_Atom<T>, kRows, kCols, Left>();
  descriptor<T, G::Major::K, G::Layout_K_INTER_Atom<T>, kRows, kCols, Right>();
  descriptor<T, G::Major::K, G::Layout_K_SW64_Atom<T>, kRows, kCols, Right>();
}

template <int kRows>
void mn_major() {
  using T = half_t;
  using Left = Step<_1, _2>;
  using Right = Step<_2, _1>;
  descriptor<T, G::Major::MN, G::Layout_MN_INTER_Atom<T>, kRows, 32, Left>();
  descriptor<T, G::Major::MN, G::Layout_MN_SW32_Atom<T>, kRows, 32, Left>();
  descriptor<T, G::Major::MN, G::Layout_MN_SW64_Atom<T>, kRows, 32, Left>();
  descriptor<T, G::Major::MN, G::Layout_MN_SW128_Atom<T>, kRows, 32, Left>();
  descriptor<T, G::Major::MN, G::Layout_MN_INTER_Atom<T>, kRows, 32, Right>();
  descriptor<T, G::Major::MN, G::Layout_MN_SW32_Atom<T>, kRows, 32, Right>();
  descriptor<T, G::Major::MN, G::Layout_MN_SW64_Atom<T>, kRows, 32, Right>();
  descriptor<T, G::Major::MN, G::Layout_MN_SW128_Atom<T>, kRows, 32, Right>();
}

// "F name operand threads values" and the linear index (first mode fastest) of each (thread,
// value).
template <class Layout>
void fragment(const char* name, char operand, int bits, Layout layout) {
  const int threads = size<0>(layout);
  const int values = size<1>(layout);
  printf("\nF %s %c %d %d %d", name, operand, bits, threads, values);
  for (int t = 0; t < threads; ++t) {
    for (int v = 0; v < values; ++v) printf(" %d", int(layout(t, v)));
  }
  printf("\n");
}

template <class Op>
void mma_op(const char* name, int bits) {
  using Traits = MMA_Traits<Op>;
  fragment(name, 'A', bits, typename Traits::ALayout{});
  fragment(name, 'B', bits, typename Traits::BLayout{});
  fragment(name, 'C', bits, typename Traits::CLayout{});
}

template <class Op>
void matrix_copy(const char* name) {
  using Traits = Copy_Traits<Op>;
  fragment(name, 'S', 1, typename Traits::SrcLayout{});
  fragment(name, 'D', 1, typename Traits::DstLayout{});
}

int main() {
  k_major<uint8_t, 8>();
  k_major<uint8_t, 64>();
  k_major<uint8_t, 136>();
  k_major<uint8_t, 256>();
  k_major<half_t, 64>();
  k_major<half_t, 248>();
  k_major<float, 64>();
  k_major<float, 96>();
  mn_major<64>();
  mn_major<128>();
  mn_major<256>();
  mma_op<SM80_16x8x8_F32F16F16F32_TN>("m16n8k8", 16);
  mma_op<SM80_16x8x16_F32F16F16F32_TN>("m16n8k16", 16);
  mma_op<SM80_16x8x16_F32BF16BF16F32_TN>("m16n8k16", 16);
  mma_op<SM80_16x8x4_F32TF32TF32F32_TN>("m16n8k4", 32);
  mma_op<SM80_16x8x8_F32TF32TF32F32_TN>("m16n8k8", 32);
  mma_op<SM80_16x8x16_S32S8S8S32_TN>("m16n8k16", 8);
  mma_op<SM80_16x8x32_S32S8S8S32_TN>("m16n8k32", 8);
  mma_op<SM80_16x8x32_S32S4S4S32_TN>("m16n8k32", 4);
  mma_op<SM80_16x8x64_S32S4S4S32_TN>("m16n8k64", 4);
  mma_op<SM80_8x8x4_F64F64F64F64_TN>("m8n8k4", 64);
  mma_op<SM90_16x8x4_F64F64F64F64_TN>("m16n8k4", 64);
  mma_op<SM90_16x8x8_F64F64F64F64_TN>("m16n8k8", 64);
  mma_op<SM90_16x8x16_F64F64F64F64_TN>("m16n8k16", 64);
  mma_op<SM80_8x8x16_S32S8S8S32_TN>("m8n8k16", 8);
  fragment("wgmma64", 'A', 32, G::ALayout_64x8{});
  fragment("wgmma64", 'A', 16, G::ALayout_64x16{});
  fragment("wgmma64", 'A', 8, G::ALayout_64x32{});
  fragment("wgmma64", 'C', 8, G::CLayout_64xN<8>{});
  fragment("wgmma64", 'C', 96, G::CLayout_64xN<96>{});
  fragment("wgmma64", 'C', 256, G::CLayout_64xN<256>{});
  matrix_copy<SM75_U32x1_LDSM_N>("ldsm1n");
  matrix_copy<SM75_U32x2_LDSM_N>("ldsm2n");
  matrix_copy<SM75_U32x4_LDSM_N>("ldsm4n");
  matrix_copy<SM75_U16x2_LDSM_T>("ldsm1t");
  matrix_copy<SM75_U16x4_LDSM_T>("ldsm2t");
  matrix_copy<SM75_U16x8_LDSM_T>("ldsm4t");
  matrix_copy<SM90_U32x1_STSM_N>("stsm1n");
  matrix_copy<SM90_U32x4_STSM_N>("stsm4n");
  matrix_copy<SM90_U16x8_STSM_T>("stsm4t");
  return 0;
}
