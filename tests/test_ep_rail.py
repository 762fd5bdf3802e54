"""The optional rail kernel (csrc/rail) compiles and links against NCCL's device API. It is not run
anywhere: there is no network card to run it on."""

import re
import subprocess
from pathlib import Path

import pytest

import dskernels as dsk
from dskernels.ep import rail

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_rail_compiles_links_and_loads(tmp_path, monkeypatch):
    ready = rail.can_build()
    if not ready:
        pytest.skip(ready.reason)
    library = rail.build(tmp_path / "libep_rail.so")
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True)
    for name in ("ep_rail_open", "ep_rail_exchange", "ep_rail_close"):
        assert re.search(rf" T {name}$", symbols.stdout, re.M)
    assert "U ncclDevCommCreate" in symbols.stdout
    rail.load(library)  # the same parameters and the same NCCL on both sides
    monkeypatch.setenv("DSK_EP_RAIL", str(library))
    assert "loads; compiled, never executed" in dsk.ep.doctor().transports["rdma"].reason
    with monkeypatch.context() as patch:
        patch.setattr(rail.ctypes, "sizeof", lambda _: 8)
        with pytest.raises(RuntimeError, match="expected parameters of 8 bytes, got"):
            rail.load(library)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("DSK_EP_RAIL", raising=False)
    with pytest.raises(RuntimeError, match="rail: expected the library that .*build makes"):
        rail.load()
    assert "no sources of the rail" in rail.can_build(tmp_path).reason
    include = tmp_path / "include"
    include.mkdir()
    (include / "nccl_device.h").touch()
    (include / "nccl.h").write_text(
        "#define NCCL_MAJOR 2\n#define NCCL_MINOR 29\n#define NCCL_PATCH 1\n"
    )
    monkeypatch.setenv("DSK_NCCL_HOME", str(tmp_path))
    assert rail.can_build().reason == "NCCL 2.29.1 found, 2.30.7 needed"
    with pytest.raises(RuntimeError, match="NCCL 2.29.1 found"):
        rail.build(tmp_path / "out.so")
    assert "2.29.1" in dsk.ep.doctor().transports["rdma"].reason
    monkeypatch.setenv("DSK_EP_RAIL", str(include / "nccl.h"))
    assert "DSK_EP_RAIL does not load" in dsk.ep.doctor().transports["rdma"].reason


def test_the_window_of_the_rail():
    at = rail.window_bytes(3, 10, 128)
    assert at == {"outbox": 0, "inbox": 3840, "totals": 11520, "bytes": 11568}
    with pytest.raises(ValueError, match="message_bytes: expected a multiple of 16, got 24"):
        rail.window_bytes(3, 10, 24)
    with pytest.raises(ValueError, match="nodes: expected a positive number, got 0"):
        rail.window_bytes(0, 10, 128)


def test_nothing_else_knows_nccl():
    files = subprocess.run(
        ["git", "ls-files", "csrc", "dskernels", "cmake", "CMakeLists.txt", "setup.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    nccl = re.compile(r"#\s*include\s*<nccl|find_package\(NCCL|libnccl")
    users = [f for f in files if nccl.search((ROOT / f).read_text(errors="ignore"))]
    assert users == ["csrc/rail/nccl_gin.cuh", "dskernels/ep/rail.py"]
