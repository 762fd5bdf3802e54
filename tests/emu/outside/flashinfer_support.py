"""FlashInfer's Hopper MLA kernel as the emulator's arguments: an instance, its struct, its plan.

The headers are those of PyPI `flashinfer-python`, which brings the CUTLASS and CCCL headers that it
needs. The kernel takes one struct by value: a kernel of ours fills it field by field in the
emulator, so that no layout is written down here.
"""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from outside_support import package_folder, ptx_of

from dskernels import emu

FOLDER = package_folder("flashinfer")
NOPE, ROPE, TILE_Q = 512, 64, 64
THREADS = 256

_SOURCE = """
#include <flashinfer/attention/mla_hopper.cuh>

using namespace flashinfer;
using T = nv_bfloat16;
using Params = MLAParams<T, T, T, int32_t>;
using Traits = mla::hopper::HopperKernelTraits<CAUSAL, 2, 512, 64, 64, 64, T, T, T, int32_t>;
template __global__ void
mla::hopper::BatchMLAPageAttentionHopperKernel<Traits, Params>(const __grid_constant__ Params);

struct Divisor {
  cuda::fast_mod_div<uint32_t> impl;
  uint32_t value;
};
static_assert(sizeof(Divisor) == sizeof(uint_fastdiv));

extern "C" __global__ void make_params(Params* p, void** pointer, const uint32_t* number,
                                       float scale, uint32_t* sizes) {
  T** tensors[] = {&p->q_nope, &p->q_pe, &p->ckv, &p->kpe, &p->partial_o, &p->final_o};
  for (int i = 0; i < 6; ++i) *tensors[i] = static_cast<T*>(pointer[i]);
  p->partial_lse = static_cast<float*>(pointer[6]);
  p->final_lse = static_cast<float*>(pointer[7]);
  int32_t** lists[] = {&p->q_indptr, &p->kv_indptr, &p->partial_indptr,
                       &p->merge_packed_offset_start, &p->merge_packed_offset_end,
                       &p->merge_partial_packed_offset_start, &p->merge_partial_packed_offset_end,
                       &p->merge_partial_stride, &p->kv_indices, &p->q_len, &p->kv_len,
                       &p->q_start, &p->kv_start, &p->kv_end, &p->work_indptr};
  for (int i = 0; i < 15; ++i) *lists[i] = static_cast<int32_t*>(pointer[8 + i]);
  for (int i = 0; i < 2; ++i) {
    const Divisor d{cuda::fast_mod_div<uint32_t>(number[i]), number[i]};
    memcpy(i == 0 ? &p->num_heads : &p->block_size, &d, sizeof d);
  }
  uint32_t* strides[] = {&p->q_nope_stride_n, &p->q_nope_stride_h, &p->q_pe_stride_n,
                         &p->q_pe_stride_h, &p->ckv_stride_page, &p->ckv_stride_n,
                         &p->kpe_stride_page, &p->kpe_stride_n, &p->o_stride_n, &p->o_stride_h};
  for (int i = 0; i < 10; ++i) *strides[i] = number[2 + i];
  p->sm_scale = scale;
  p->ckv_scale = p->kpe_scale = 1;
  p->ckv_scale_arr = nullptr;
  p->return_lse_base_on_e = false;
  sizes[0] = sizeof(Params);
  sizes[1] = sizeof(Traits::SharedStorage);
}
"""


@functools.cache
def load(causal: bool) -> emu.Module:
    """The instance for bf16, 512 + 64 dimensions, and make_params."""
    data = FOLDER / "data"
    includes = [data / "cccl" / part for part in ("libcudacxx/include", "cub", "thrust")]
    includes += [data / "include", data / "cutlass/include", data / "cutlass/tools/util/include"]
    with tempfile.TemporaryDirectory() as folder:
        source = _SOURCE.replace("CAUSAL", "true" if causal else "false")
        return emu.Module(ptx_of(Path(folder), source, tuple(includes)))


@dataclass
class Case:
    """Requests of a paged cache. q_len, kv_len: per request; page: tokens a page."""

    q_len: list[int]
    kv_len: list[int]
    heads: int
    page: int
    splits: int  # the LAST request's keys are cut into this many parts, merged at the end
    causal: bool
    seed: int

    def __post_init__(self):
        rng = torch.Generator().manual_seed(self.seed)
        pages = [-(-n // self.page) for n in self.kv_len]
        total = sum(pages) + 2
        self.table = torch.randperm(total, generator=rng, dtype=torch.int32)[: sum(pages)]
        self.first_page = [sum(pages[:i]) for i in range(len(pages))]

        def normal(*shape):
            return torch.randn(*shape, generator=rng).to(torch.bfloat16)

        rows = sum(self.q_len)
        self.q_nope, self.q_pe = normal(rows, self.heads, NOPE), normal(rows, self.heads, ROPE)
        self.ckv, self.kpe = normal(total, self.page, NOPE), normal(total, self.page, ROPE)
        self.scale = (128 + 64) ** -0.5
        self.out = torch.full((rows, self.heads, NOPE), torch.nan, dtype=torch.bfloat16)
        self.lse = torch.full((rows, self.heads), torch.nan)

    @property
    def tiles(self) -> int:
        """Neighbouring CTAs that share a request's keys, a tile of queries each."""
        return -(-max(self.q_len) * self.heads // TILE_Q)

    def plan(self) -> tuple[dict[str, torch.Tensor], int]:
        """The lists of the kernel's scheduler, and how many parts they are for."""
        assert self.splits == 1 or self.tiles == 1
        work, merge = [], None
        parts_rows = 0
        for r, (rows, keys) in enumerate(zip(self.q_len, self.kv_len, strict=True)):
            start = sum(self.q_len[:r])
            last = r == len(self.q_len) - 1
            parts = self.splits if last else 1
            step = -(-keys // parts // 64) * 64 if parts > 1 else keys
            for p in range(parts):
                partial = -1 if parts == 1 else p * TILE_Q
                begin, end = p * step, min(keys, (p + 1) * step)
                work.append((start, self.first_page[r], partial, rows, keys, 0, begin, end))
            if parts > 1:
                parts_rows = parts * TILE_Q
                merge = (start * self.heads, (start + rows) * self.heads, 0, parts_rows)
        ctas = len(work)
        names = "q_indptr kv_indptr partial_indptr q_len kv_len q_start kv_start kv_end".split()
        lists = {n: [w[i] for w in work] for i, n in enumerate(names)}
        lists["work_indptr"] = list(range(ctas + 1))
        every = ctas * self.tiles
        lists |= {f"merge_{i}": [0] * every for i in range(4)} | {"stride": [TILE_Q] * every}
        if merge is not None:
            for i in range(4):
                lists[f"merge_{i}"][0] = merge[i]
        self.partial_o = torch.full((max(parts_rows, 1), NOPE), torch.nan, dtype=torch.bfloat16)
        self.partial_lse = torch.full((max(parts_rows, 1),), torch.nan)
        return {n: torch.tensor(v, dtype=torch.int32) for n, v in lists.items()}, ctas

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and base-2 logarithm of the sum of exponentials, in fp64."""
        out = torch.empty(self.out.shape, dtype=torch.float64)
        lse = torch.empty(self.lse.shape, dtype=torch.float64)
        for r, (rows, keys) in enumerate(zip(self.q_len, self.kv_len, strict=True)):
            start = sum(self.q_len[:r])
            pages = self.table[self.first_page[r] :][: -(-keys // self.page)].long()
            ckv = self.ckv[pages].reshape(-1, NOPE)[:keys].double()
            kpe = self.kpe[pages].reshape(-1, ROPE)[:keys].double()
            for i in range(rows):
                seen = keys - rows + i + 1 if self.causal else keys
                scores = self.q_nope[start + i].double() @ ckv[:seen].T
                scores = (scores + self.q_pe[start + i].double() @ kpe[:seen].T) * self.scale
                out[start + i] = torch.softmax(scores, -1) @ ckv[:seen]
                lse[start + i] = torch.logsumexp(scores, -1) / torch.log(torch.tensor(2.0).double())
        return out, lse

    def run(self, seed: int, check: bool = True) -> emu.LaunchStats:
        """Launches the kernel; fills out and lse."""
        module = load(self.causal)
        lists, ctas = self.plan()
        order = ["q_indptr", "kv_indptr", "partial_indptr", "merge_0", "merge_1", "merge_2"]
        order += ["merge_3", "stride", "kv_indices", "q_len", "kv_len", "q_start", "kv_start"]
        order += ["kv_end", "work_indptr"]
        lists["kv_indices"] = self.table
        tensors = [self.q_nope, self.q_pe, self.ckv, self.kpe, self.partial_o, self.out]
        tensors += [self.partial_lse, self.lse, *(lists[n] for n in order)]
        strides = [
            t.stride(i) for t in (self.q_nope, self.q_pe, self.ckv, self.kpe) for i in (0, 1)
        ]
        numbers = [self.heads, self.page, *strides, self.out.stride(0), self.out.stride(1)]
        params, sizes = torch.zeros(1024, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)
        with emu.lend(*tensors) as addresses:
            module.kernel("make_params")[1, 1](
                params,
                torch.tensor(addresses),
                torch.tensor(numbers, dtype=torch.int32),
                self.scale,
                sizes,
            )
            used, shared = sizes.tolist()
            return module.kernel("BatchMLAPageAttentionHopperKernel")[(self.tiles, ctas), THREADS](
                bytes(params.numpy()[:used]), shared=shared, seed=seed, check=check
            )
