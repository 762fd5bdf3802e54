"""The compiler's evidence for every shipped CUDA kernel: no spills, no stack, no local memory, each
role within its registers, a tensor-core instruction for every wgmma."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sass

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "dskernels" / "_kernels"
TABLES = sorted((ROOT / "csrc" / "cuda" / "instances").glob("*.def"))
TABLE = "".join(f.read_text() for f in TABLES)
INSTANCES = re.findall(r"^DSK_KERNEL\((\w+), \S+\.cuh, (\d+),", TABLE, re.M)

pytestmark = pytest.mark.skipif(
    not KERNELS.is_dir(), reason="built without nvcc: the CUDA kernels were left out"
)


def ptxas_report(text: str) -> dict[str, int]:
    """Figures of one ptxas -v report; a missing figure is an error, not a zero."""
    fields = {
        "stack": r"(\d+) bytes stack frame",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
        "registers": r"Used (\d+) registers",
    }
    return {name: int(re.search(pattern, text)[1]) for name, pattern in fields.items()}


def complaints(text: str, threads: int) -> list[str]:
    report = ptxas_report(text)
    found = [f"{k} = {report[k]}" for k in ("stack", "spill_stores", "spill_loads") if report[k]]
    if report["registers"] * threads > 65536:
        found.append(f"{report['registers']} registers x {threads} threads exceed one SM")
    # Either the loud warning, or waits and arrivals that ptxas adds because registers of a wgmma in
    # flight are touched: the same loss.
    if "serialized" in text or re.search(r"warpgroup\.\w+ is injected", text):
        found.append("ptxas serialised wgmma")
    return found


@pytest.mark.parametrize("name,threads", INSTANCES)
def test_no_spills_no_stack(name, threads):
    text = (KERNELS / f"{name}.ptxas.txt").read_text()
    assert complaints(text, int(threads)) == []


@pytest.mark.parametrize("name,threads", INSTANCES)
def test_cubin_and_ptx_are_shipped(name, threads):
    assert (KERNELS / f"{name}.cubin").read_bytes()[:4] == b"\x7fELF"
    assert f".entry {name}(" in (KERNELS / f"{name}.ptx").read_text()


def need_nvdisasm():
    if sass.find_nvdisasm() is None:
        if os.environ.get("CI"):
            pytest.fail("nvdisasm: CI needs the one in the Triton wheel")
        pytest.skip("nvdisasm is neither in the toolkit nor in the Triton wheel")


def machine_code_complaints(folder: Path, name: str, threads: int) -> list[str]:
    listing = sass.disassemble(folder / f"{name}.cubin")
    registers = ptxas_report((folder / f"{name}.ptxas.txt").read_text())["registers"]
    return sass.complaints(listing, (folder / f"{name}.ptx").read_text(), registers, threads)


def test_machine_code_of_every_shipped_kernel():
    """0 local-memory instructions, QGMMA and HGMMA for every wgmma, registers within budget."""
    need_nvdisasm()
    with ThreadPoolExecutor(2) as pool:  # the work is nvdisasm's
        found = pool.map(lambda i: machine_code_complaints(KERNELS, i[0], int(i[1])), INSTANCES)
        assert {i[0]: bad for i, bad in zip(INSTANCES, found) if bad} == {}


@pytest.mark.parametrize("kind,opcode", [("fp8", "QGMMA"), ("bf16", "HGMMA")])
def test_matrix_products_use_the_tensor_core(kind, opcode):
    """By name: a GEMM whose PTX has lost its wgmma would pass the gate above."""
    names = [name for name, _ in INSTANCES if name.startswith(f"gemm_{kind}_")]
    asked = {"QGMMA": "e4m3.e4m3", "HGMMA": "bf16.bf16"}[opcode]
    without = [n for n in names if f".{asked}" not in (KERNELS / f"{n}.ptx").read_text()]
    assert without == []


def test_the_shipped_summaries_agree_with_the_machine_code():
    from dskernels.cuda import machine_code

    summaries = machine_code()
    if not summaries:
        pytest.skip("built without nvdisasm: no summaries")
    assert set(summaries) >= {name for name, _ in INSTANCES}  # a build folder may keep old ones
    local = [n for n, _ in INSTANCES if any(summaries[n].get(op) for op in sass.LOCAL_MEMORY)]
    assert local == []
    for name, _ in INSTANCES[:2]:
        assert summaries[name] == sass.disassemble(KERNELS / f"{name}.cubin").count


PLANTED = {
    # 128 values that all live through a loop do not fit the 64 registers of 1024 threads.
    "spill": """
extern "C" __global__ void __launch_bounds__(1024, 1) planted(float* x, int turns) {
  float value[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) value[i] = x[i * 1024 + threadIdx.x];
  for (int turn = 0; turn < turns; ++turn) {
#pragma unroll
    for (int i = 0; i < 128; ++i) value[i] = value[i] * value[(i + 61) % 128] + 1.f;
  }
#pragma unroll
  for (int i = 0; i < 128; ++i) x[i * 1024 + threadIdx.x] = value[i];
}
""",
    # Accumulators that are touched between two wgmma of one group: ptxas must wait after each.
    "serialisation": """
#include "cuda/ptx/wgmma.cuh"
extern "C" __global__ void __launch_bounds__(128, 1) planted(float* x, uint64_t a, uint64_t b) {
  float d[64];
  for (float& v : d) v = x[threadIdx.x];
  dsk::ptx::wgmma_fence();
  dsk::ptx::WgmmaE4m3<128>::mma(d, a, b, 1);
  for (float& v : d) v *= 3.f;
  dsk::ptx::WgmmaE4m3<128>::mma(d, a, b, 1);
  dsk::ptx::wgmma_commit_group();
  dsk::ptx::wgmma_wait_group<0>();
  for (int i = 0; i < 64; ++i) x[i * 128 + threadIdx.x] = d[i];
}
""",
    # 2 x 128 x 240 + 128 x 40 registers, of the 384 x 168 that the launch gave.
    "budget": """
#include "cuda/ptx/control.cuh"
extern "C" __global__ void __launch_bounds__(384, 1) planted(float* x) {
  if (threadIdx.x < 256) {
    dsk::ptx::setmaxnreg_inc<240>();
    x[threadIdx.x] = 1.f;
  } else {
    dsk::ptx::setmaxnreg_dec<40>();
    x[threadIdx.x] = 2.f;
  }
}
""",
}


def build_planted(kind: str, folder: Path) -> list[str]:
    """The gates' verdict on a kernel with that fault, built as the shipped ones are."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    source = folder / "planted.cu"
    source.write_text("#include <cstdint>\n" + PLANTED[kind])
    script = ROOT / "cmake" / "compile_kernel.sh"
    command = [script, nvcc, ROOT / "csrc", source, "planted", folder / "work", folder / "out"]
    subprocess.run(["sh", *command], check=True)
    threads = int(re.search(r"launch_bounds__\((\d+)", PLANTED[kind])[1])
    report = complaints((folder / "out" / "planted.ptxas.txt").read_text(), threads)
    return report + machine_code_complaints(folder / "out", "planted", threads)


def test_a_planted_spill_fails_the_gates(tmp_path):
    need_nvdisasm()
    found = " ".join(build_planted("spill", tmp_path))
    assert "spill_stores" in found and "spill_loads" in found and "stack" in found
    assert re.search(r"\d+ LDL", found) and re.search(r"\d+ STL", found)


def test_a_planted_serialisation_fails_the_gates(tmp_path):
    need_nvdisasm()
    assert "ptxas serialised wgmma" in build_planted("serialisation", tmp_path)


def test_a_planted_register_budget_fails_the_gates(tmp_path):
    need_nvdisasm()
    assert any("setmaxnreg" in c for c in build_planted("budget", tmp_path))


def test_the_report_gate_reads_every_figure():
    clean = (
        "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 32 registers, used 0 barriers\n"
    )
    assert complaints(clean, 256) == []
    assert complaints(clean.replace("0 bytes spill stores", "8 bytes spill stores"), 256)
    assert complaints(clean.replace("32 registers", "168 registers"), 512)
    warning = "Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert complaints(clean + warning, 256)


def test_shipped_kernels_stay_small():
    total = sum(f.stat().st_size for f in KERNELS.iterdir())
    assert total < 25 * 2**20
    assert len(INSTANCES) <= 64
