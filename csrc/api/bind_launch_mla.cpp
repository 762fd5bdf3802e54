// The launchers of csrc/cuda/launch/mla.hpp, for Python.
#include "cuda/launch/mla.hpp"

#include "api/bind_launch.hpp"

namespace py = pybind11;

namespace dsk::api {
namespace {

int mla_num_parts(const std::string& machine, int ordinal, int rows, int num_sms) {
  return launch::mla_num_parts(context_of(machine, ordinal), rows, num_sms);
}

void mla_schedule(const std::string& machine, int ordinal, uint64_t stream, uint64_t seq_lens,
                  uint64_t parts, uint64_t num_splits, int b, int num_parts, int split_blocks,
                  int rows) {
  launch::MlaScheduleArgs args;
  args.seq_lens = pointer<int32_t>(seq_lens);
  args.parts = pointer<int32_t>(parts);
  args.num_splits = pointer<int32_t>(num_splits);
  args.b = b;
  args.num_parts = num_parts;
  args.split_blocks = split_blocks;
  args.rows = rows;
  launch::mla_schedule(context_of(machine, ordinal), args, stream_of(stream));
}

void mla_decode(const std::string& machine, int ordinal, uint64_t stream, uint64_t q, uint64_t kv,
                uint64_t block_table, uint64_t seq_lens, uint64_t parts, uint64_t num_splits,
                uint64_t out, uint64_t lse, uint64_t out_partial, uint64_t lse_partial, int b,
                int s, int h, int pages, int page, int max_pages, int64_t ld_page, int64_t ld_token,
                int num_parts, int max_splits, int split_blocks, bool fp8, bool causal,
                float softmax_scale) {
  launch::MlaDecodeArgs args;
  args.q = pointer<void>(q);
  args.kv = pointer<void>(kv);
  args.block_table = pointer<int32_t>(block_table);
  args.seq_lens = pointer<int32_t>(seq_lens);
  args.parts = pointer<int32_t>(parts);
  args.num_splits = pointer<int32_t>(num_splits);
  args.out = pointer<void>(out);
  args.lse = pointer<float>(lse);
  args.out_partial = pointer<float>(out_partial);
  args.lse_partial = pointer<float>(lse_partial);
  args.b = b;
  args.s = s;
  args.h = h;
  args.pages = pages;
  args.page = page;
  args.max_pages = max_pages;
  args.ld_page = ld_page;
  args.ld_token = ld_token;
  args.num_parts = num_parts;
  args.max_splits = max_splits;
  args.split_blocks = split_blocks;
  args.fp8 = fp8;
  args.causal = causal;
  args.softmax_scale = softmax_scale;
  launch::mla_decode(context_of(machine, ordinal), args, stream_of(stream));
}

}  // namespace

void bind_launch_mla(py::module_& launch) {
  using namespace py::literals;
  const auto release = py::call_guard<py::gil_scoped_release>();
  launch.def("mla_num_parts", &mla_num_parts, "machine"_a, "ordinal"_a, "rows"_a, "num_sms"_a = 0,
             "Rows of an MLA schedule that fill the machine.");
  launch.def("mla_schedule", &mla_schedule, "machine"_a, "ordinal"_a, "stream"_a, "seq_lens"_a,
             "parts"_a, "num_splits"_a, "b"_a, "num_parts"_a, "split_blocks"_a, "rows"_a, release);
  launch.def("mla_decode", &mla_decode, "machine"_a, "ordinal"_a, "stream"_a, "q"_a, "kv"_a,
             "block_table"_a, "seq_lens"_a, "parts"_a, "num_splits"_a, "out"_a, "lse"_a,
             "out_partial"_a, "lse_partial"_a, "b"_a, "s"_a, "h"_a, "pages"_a, "page"_a,
             "max_pages"_a, "ld_page"_a, "ld_token"_a, "num_parts"_a, "max_splits"_a,
             "split_blocks"_a, "fp8"_a, "causal"_a, "softmax_scale"_a, release);
}

}  // namespace dsk::api
