"""The compiler's evidence for every shipped CUDA kernel: no spills, no stack, few registers."""

import re
from pathlib import Path

import pytest

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
    if "wgmma serialization" in text.lower() or "serialized" in text.lower():
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


def test_the_gate_sees_a_spill_and_a_serialisation():
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
    assert len(INSTANCES) <= 48
