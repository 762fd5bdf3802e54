#include "cuda/launch/mla.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.hpp"
#include "cuda/mla_shape.hpp"

namespace dsk::launch {
namespace {

namespace cu = device::cu;

constexpr int kDecodeThreads = 384;  // as in instances/mla.def
constexpr int kCombineThreads = 128;
constexpr int kCombinePerSm = 4;   // CTAs of mla_combine that run at once
constexpr size_t kManyRows = 512;  // a warp for each keeps the machine busy
constexpr int kScheduleThreads = 1024;
constexpr int kSharedBytes = 227 * 1024;  // that a CTA can have
constexpr uint32_t kTileColumns = 64;     // one 128-byte swizzled row of bf16

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A bf16 tensor [planes, rows, columns] seen by TMA, one box of box_rows x 64; strides in elements.
TensorMapBytes encode(const Context& context, const void* address, uint64_t planes, uint64_t rows,
                      uint64_t columns, int64_t ld_plane, int64_t ld_row, uint32_t box_rows) {
  device::TensorMapSpec spec;
  spec.type = cu::kBfloat16;
  spec.rank = 3;
  spec.address = reinterpret_cast<cu::DevicePtr>(address);
  spec.dims[0] = columns;
  spec.dims[1] = rows;
  spec.dims[2] = planes;
  spec.strides[0] = uint64_t(ld_row) * 2;
  spec.strides[1] = uint64_t(ld_plane) * 2;
  spec.box[0] = kTileColumns;
  spec.box[1] = box_rows;
  spec.box[2] = 1;
  spec.swizzle = cu::kSwizzle128B;
  const cu::TensorMap map = context.device().encode(spec);
  TensorMapBytes bytes;
  static_assert(sizeof(bytes) == sizeof(map));
  std::memcpy(&bytes, &map, sizeof(map));
  return bytes;
}

MlaDecodeParams make_params(const Context& context, const MlaDecodeArgs& args) {
  const int rows = args.s * args.h;
  MlaDecodeParams params{};
  params.q = encode(context, args.q, args.b, rows, kMlaWidth, int64_t(rows) * kMlaWidth, kMlaWidth,
                    kMlaRows);
  if (args.fp8) {
    params.kv_rows = static_cast<const uint8_t*>(args.kv);
    params.ld_page = args.ld_page;
    params.ld_token = args.ld_token;
  } else {
    params.kv = encode(context, args.kv, args.pages, args.page, kMlaWidth, args.ld_page,
                       args.ld_token, std::min(args.page, 64));
  }
  params.out = encode(context, args.out, args.b, rows, kMlaLatent, int64_t(rows) * kMlaLatent,
                      kMlaLatent, kMlaRows);
  params.block_table = args.block_table;
  params.seq_lens = args.seq_lens;
  params.parts = reinterpret_cast<const MlaPart*>(args.parts);
  params.num_splits = args.num_splits;
  params.lse = args.lse;
  params.out_partial = args.out_partial;
  params.lse_partial = args.lse_partial;
  params.ld_table = args.max_pages;
  params.page = args.page;
  params.s = args.s;
  params.h = args.h;
  params.causal = args.causal;
  params.split_blocks = args.split_blocks;
  params.scale_log2 = float(double(args.softmax_scale) * M_LOG2E);
  return params;
}

struct DecodeKernel {
  const char* name;
  unsigned cluster;  // CTAs: neighbouring tiles of rows, which attend the same tokens
};

// The instance for so many query rows of a request.
DecodeKernel decode_kernel(bool fp8, int rows) {
  if (fp8) {
    if (rows <= 32) return {"mla_decode_fp8_32", 1};
    // An odd number of tiles stays alone: an idle tile would cost more than it saves.
    const bool pairs = ceil_div(rows, kMlaRows) % 2 == 0;
    return pairs ? DecodeKernel{"mla_decode_fp8_pair", 2} : DecodeKernel{"mla_decode_fp8", 1};
  }
  if (rows > 32) return {"mla_decode_bf16", 1};
  return {rows <= 16 ? "mla_decode_bf16_16" : "mla_decode_bf16_32", 1};
}

// What a piece of a request costs beside its blocks, in blocks: a modelled H800's times of the same
// tokens in one and in several requests, BF16.
int piece_cost(int rows) {
  if (rows <= 16) return 1;
  if (rows <= 32) return 2;
  return rows <= kMlaRows ? 3 : 4;
}

template <typename Params>
void launch(Context& context, const char* kernel, const device::LaunchShape& shape, Params params,
            cu::Stream stream) {
  void* arguments[] = {&params};
  context.device().launch(context.kernel(kernel), shape, arguments, stream);
}

device::LaunchShape shape_of(unsigned x, unsigned y, unsigned threads, unsigned shared_bytes) {
  device::LaunchShape shape;
  shape.grid.x = x;
  shape.grid.y = y;
  shape.block.x = threads;
  shape.shared_bytes = shared_bytes;
  return shape;
}

}  // namespace

int mla_num_parts(const Context& context, int rows, int num_sms) {
  const int sms = num_sms > 0 ? num_sms : context.device().num_sms();
  return std::max(sms / std::max(ceil_div(rows, kMlaRows), 1), 1);
}

void mla_schedule(Context& context, const MlaScheduleArgs& args, cu::Stream stream) {
  HostLoan lens(context, args.seq_lens, args.b * sizeof(int32_t), true);
  HostLoan parts(context, args.parts, args.num_parts * sizeof(MlaPart), false);
  HostLoan splits(context, args.num_splits, (args.b + 1) * sizeof(int32_t), false);
  const MlaScheduleParams params{args.seq_lens,        reinterpret_cast<MlaPart*>(args.parts),
                                 args.num_splits,      args.b,
                                 args.num_parts,       args.split_blocks,
                                 piece_cost(args.rows)};
  const int shares = mla_num_shares(args.split_blocks, params.piece_cost);  // a warp for each
  DSK_CHECK(shares <= kScheduleThreads / 32, "split_blocks: expected at most ",
            kScheduleThreads / 32 - params.piece_cost, ", got ", args.split_blocks);
  const int words = 2 * ((args.num_parts + 1) * shares + 1);  // and two a request
  const int most = (kSharedBytes / int(sizeof(int32_t)) - words) / 2;
  DSK_CHECK(args.b <= most, "seq_lens: expected at most ", most, " requests, got ", args.b);
  launch(context, "mla_schedule",
         shape_of(1, 1, kScheduleThreads, unsigned((words + 2 * args.b) * sizeof(int32_t))), params,
         stream);
  if (context.emulated()) context.device().synchronize(stream);
}

void mla_decode(Context& context, const MlaDecodeArgs& args, cu::Stream stream) {
  const int rows = args.s * args.h;
  if (args.b == 0 || rows == 0) return;
  const size_t all_rows = size_t(args.b) * rows;
  const size_t split_rows = size_t(args.max_splits) * rows;
  const size_t token_bytes = args.fp8 ? kMlaFp8Bytes : kMlaWidth * 2;
  const size_t last_token =
      size_t(args.pages - 1) * args.ld_page + size_t(args.page - 1) * args.ld_token;
  HostLoan q(context, args.q, all_rows * kMlaWidth * 2, true);
  HostLoan kv(context, args.kv, last_token * (args.fp8 ? 1 : 2) + token_bytes, true);
  HostLoan table(context, args.block_table, size_t(args.b) * args.max_pages * 4, true);
  HostLoan lens(context, args.seq_lens, size_t(args.b) * 4, true);
  HostLoan parts(context, args.parts, args.num_parts * sizeof(MlaPart), true);
  HostLoan splits(context, args.num_splits, size_t(args.b + 1) * 4, true);
  HostLoan out(context, args.out, all_rows * kMlaLatent * 2, false);
  HostLoan lse(context, args.lse, all_rows * 4, false);
  HostLoan out_partial(context, args.out_partial, split_rows * kMlaLatent * 4, false);
  HostLoan lse_partial(context, args.lse_partial, split_rows * 4, false);

  const DecodeKernel kernel = decode_kernel(args.fp8, rows);
  device::LaunchShape shape =
      shape_of(ceil_div(rows, kMlaRows), args.num_parts, kDecodeThreads, mla_decode_shared_bytes());
  shape.cluster.x = kernel.cluster;
  launch(context, kernel.name, shape, make_params(context, args), stream);
  const MlaCombineParams combine{args.num_splits, args.out_partial, args.lse_partial, args.out,
                                 args.lse,        args.b,           args.s,           args.h};
  if (all_rows < kManyRows) {
    launch(context, "mla_combine_quarters", shape_of(rows, args.b, kCombineThreads, 0), combine,
           stream);
  } else {
    const int sms = int(shape.grid.x * shape.grid.y);  // as many as attention had
    const int shares = ceil_div(args.b, kMlaCombineRequests);
    const int needed = ceil_div(std::min(args.b, kMlaCombineRequests) * rows, kCombineThreads / 32);
    const int ctas = std::min(needed, std::max(sms * kCombinePerSm / shares, 1));
    launch(context, "mla_combine", shape_of(ctas, shares, kCombineThreads, 0), combine, stream);
  }
  if (context.emulated()) context.device().synchronize(stream);
}

}  // namespace dsk::launch
