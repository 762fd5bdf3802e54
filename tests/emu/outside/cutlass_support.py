"""CUTLASS example 67 (PyPI nvidia-cutlass) as the emulator's arguments.

The example's own file is included unmodified, its main renamed; a main of ours has CUTLASS compute
the kernel's parameters for given addresses and prints them. cuTensorMapEncodeTiled is ours too: it
prints what was asked for and leaves a number, which is replaced by a map of the emulator's.
"""

import functools
import subprocess
import tempfile
from pathlib import Path

import torch
from dskernels._C import emu as raw
from outside_support import package_folder

from dskernels import emu

_PACKAGE = package_folder("cutlass_library")
FOLDER = None if _PACKAGE is None else _PACKAGE / "source"
EXAMPLE = "67_hopper_fp8_warp_specialized_gemm_with_blockwise_scaling"
BETA = 0.5

_SOURCE = r"""
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL 1
#define main example_main
#include "EXAMPLE/EXAMPLE.cu"
#undef main
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
    const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
    const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  static int count = 0;
  std::memset(map, 0, sizeof *map);
  std::snprintf(reinterpret_cast<char*>(map), sizeof *map, "recorded map %d", count++);
  std::printf("map %llu %d %u", (unsigned long long)address, int(type), rank);
  for (unsigned i = 0; i < rank; ++i) std::printf(" %llu", (unsigned long long)dims[i]);
  for (unsigned i = 0; i + 1 < rank; ++i) std::printf(" %llu", (unsigned long long)strides[i]);
  for (unsigned i = 0; i < rank; ++i) std::printf(" %u", box[i]);
  for (unsigned i = 0; i < rank; ++i) std::printf(" %u", steps[i]);
  std::printf(" %d %d %d\n", int(interleave), int(swizzle), int(fill));
  return CUDA_SUCCESS;
}
// Named by code that does not run here.
extern "C" CUresult cuMemsetD32Async(CUdeviceptr, unsigned, size_t, CUstream) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
extern "C" CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "";
  return CUDA_SUCCESS;
}

template <class T>
T* pointer(const char* text) { return reinterpret_cast<T*>(std::strtoull(text, nullptr, 10)); }

template <class Layout>
void print_scales(const char* name, Layout layout, int rows, int k) {
  std::printf("%s", name);
  for (int r = 0; r < rows; r += 128)
    for (int c = 0; c < k; c += 128) std::printf(" %d", int(layout(r, c, 0)));
  std::printf("\n");
}

// m n k sms, then the addresses of A, B, SFA, SFB, C, D
int main(int, char** argv) {
  const int m = std::atoi(argv[1]), n = std::atoi(argv[2]), k = std::atoi(argv[3]);
  stride_A = cutlass::make_cute_packed_stride(StrideA{}, cute::make_shape(m, k, 1));
  stride_B = cutlass::make_cute_packed_stride(StrideB{}, cute::make_shape(n, k, 1));
  stride_C = cutlass::make_cute_packed_stride(StrideC{}, cute::make_shape(m, n, 1));
  stride_D = cutlass::make_cute_packed_stride(StrideD{}, cute::make_shape(m, n, 1));
  layout_SFA = ScaleConfig::tile_atom_to_shape_SFA(cute::make_shape(m, n, k, 1));
  layout_SFB = ScaleConfig::tile_atom_to_shape_SFB(cute::make_shape(m, n, k, 1));
  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {m, n, k, 1},
      {pointer<ElementA>(argv[5]), stride_A, pointer<ElementB>(argv[6]), stride_B,
       pointer<float>(argv[7]), layout_SFA, pointer<float>(argv[8]), layout_SFB},
      {{}, pointer<ElementC>(argv[9]), stride_C, pointer<ElementD>(argv[10]), stride_D}};
  arguments.epilogue.thread.alpha = 1;
  arguments.epilogue.thread.beta = BETA;
  arguments.hw_info.sm_count = std::atoi(argv[4]);
  if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess) return 1;
  const auto params = GemmKernel::to_underlying_arguments(arguments, nullptr);
  const dim3 grid = GemmKernel::get_grid_shape(params), block = GemmKernel::get_block_shape();
  std::printf("grid %u %u %u\nblock %u\n", grid.x, grid.y, grid.z, block.x);
  std::printf("cluster %d %d %d\n", int(cute::size<0>(ClusterShape{})),
              int(cute::size<1>(ClusterShape{})), int(cute::size<2>(ClusterShape{})));
  std::printf("shared %d\nworkspace %zu\n", GemmKernel::SharedStorageSize,
              Gemm::get_workspace_size(arguments));
  print_scales("sfa", layout_SFA, m, k);
  print_scales("sfb", layout_SFB, n, k);
  std::printf("params ");
  for (size_t i = 0; i < sizeof params; ++i)
    std::printf("%02x", reinterpret_cast<const unsigned char*>(&params)[i]);
  std::printf("\n");
}
"""


@functools.cache
def build() -> tuple[emu.Module, Path]:
    """The kernel, and the program that computes its parameters. A minute of nvcc."""
    folder = Path(tempfile.mkdtemp(prefix="cutlass67-"))
    source = _SOURCE.replace("EXAMPLE", EXAMPLE).replace("BETA", f"{BETA}f")
    (folder / "kernel.cu").write_text(source)
    command = ["nvcc", "-keep", "-keep-dir", str(folder), "-lineinfo", "-w", "-std=c++17"]
    command += ["-gencode=arch=compute_90a,code=compute_90a", "--expt-relaxed-constexpr"]
    parts = ("include", "tools/util/include", "examples/common", "examples")
    command += [*(f"-I{FOLDER / part}" for part in parts)]
    command += ["-o", str(folder / "program"), str(folder / "kernel.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, f"nvcc failed:\n{done.stderr[-4000:]}"
    return emu.Module(folder / "kernel.ptx"), folder / "program"


def _parameters(program: Path, *numbers: int) -> dict:
    """What the program says, tensor maps encoded and put in their places."""
    command = [str(program), *map(str, numbers)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    maps = []
    facts = {}
    for line in lines:
        name, *words = line.split()
        if name == "params":
            facts[name] = bytearray.fromhex(words[0])
        elif name == "map":
            values = [int(w) for w in words]
            address, kind, rank = values[:3]
            ends = [3, 3 + rank, 2 + 2 * rank, 2 + 3 * rank, 2 + 4 * rank]
            lists = [values[a:b] for a, b in zip(ends, ends[1:])]
            maps.append(raw.tensor_map(address, kind, *lists, *values[ends[-1] :]))
        else:
            facts[name] = [int(w) for w in words]
    for k, encoded in enumerate(maps):
        mark = b"recorded map %d\0" % k
        while (at := facts["params"].find(mark)) >= 0:
            facts["params"][at : at + 128] = encoded
    return facts


class Case:
    """D = relu(A B^T with one scale per 128 x 128 block of each, + beta C), column-major."""

    def __init__(self, m: int, n: int, k: int, seed: int):
        rng = torch.Generator().manual_seed(seed)
        self.shape = m, n, k

        def codes(rows):
            return torch.randn(rows, k, generator=rng).to(torch.float8_e4m3fn)

        blocks = [-(-m // 128), -(-n // 128), -(-k // 128)]
        self.a, self.b = codes(m), codes(n)
        self.sfa = torch.rand(blocks[0], blocks[2], generator=rng) + 0.5
        self.sfb = torch.rand(blocks[1], blocks[2], generator=rng) + 0.5
        self.c = torch.randn(n, m, generator=rng)
        self.d = torch.full((n, m), torch.nan)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """D in fp64, and the sum of the products' magnitudes: what errors are relative to."""
        m, n, k = self.shape

        def scaled(x, scale):
            full = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
            return x.double() * full[: x.shape[0], :k]

        a, b = scaled(self.a, self.sfa), scaled(self.b, self.sfb)
        return torch.relu(b @ a.T + BETA * self.c.double()), b.abs() @ a.abs().T

    def run(self, seed: int) -> emu.LaunchStats:
        module, program = build()
        m, n, k = self.shape
        sfa, sfb = torch.zeros(self.sfa.numel()), torch.zeros(self.sfb.numel())
        tensors = [self.a, self.b, sfa, sfb, self.c, self.d]
        with emu.lend(*tensors) as addresses:
            facts = _parameters(program, m, n, k, 4, *addresses)
            assert facts["workspace"] == [0]
            sfa[torch.tensor(facts["sfa"])] = self.sfa.reshape(-1)
            sfb[torch.tensor(facts["sfb"])] = self.sfb.reshape(-1)
            kernel = module.kernel("device_kernel")
            return kernel[facts["grid"], facts["block"]](
                bytes(facts["params"]),
                cluster=facts["cluster"],
                shared=facts["shared"][0],
                seed=seed,
            )
