"""The choice of backend, what is said about backends, and the registry of environment variables."""

import ast
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from ops_support import planted_modules

import dskernels as dsk
from dskernels import backend as dsk_backend
from dskernels import build, env

ROOT = Path(__file__).resolve().parent.parent
X = torch.arange(8.0).reshape(2, 4)


def marked(offset):
    """A swiglu that adds an offset, to tell who ran."""
    return {"rowwise": {"swiglu": lambda x: dsk.ref.rowwise.swiglu(x) + offset}}


@pytest.fixture
def cpu_kernel():
    with planted_modules("cpu", **marked(100.0)):
        yield 100.0


EXPECTED = dsk.ref.rowwise.swiglu(X)


# ---- the choice --------------------------------------------------------------------------------


def test_auto_prefers_the_cpu_kernel(cpu_kernel):
    assert dsk.current_backend() == "auto"
    assert torch.equal(dsk.swiglu(X), EXPECTED + cpu_kernel)
    assert torch.equal(dsk.swiglu(X, backend="auto"), EXPECTED + cpu_kernel)


def test_the_call_beats_the_context_and_contexts_nest(cpu_kernel):
    with dsk.use_backend("ref"):
        assert torch.equal(dsk.swiglu(X), EXPECTED)
        assert torch.equal(dsk.swiglu(X, backend="cpu"), EXPECTED + cpu_kernel)
        with dsk.use_backend("cpu"):
            assert dsk.current_backend() == "cpu"
            assert torch.equal(dsk.swiglu(X), EXPECTED + cpu_kernel)
            assert torch.equal(dsk.swiglu(X, backend="ref"), EXPECTED)
        assert dsk.current_backend() == "ref"
    assert dsk.current_backend() == "auto"


def test_context_is_left_on_an_exception_and_may_be_entered_again():
    context = dsk.use_backend("ref")
    with pytest.raises(RuntimeError, match="inside"), context:
        raise RuntimeError("inside")
    assert dsk.current_backend() == "auto"
    with context, context:
        assert dsk.current_backend() == "ref"
    assert dsk.current_backend() == "auto"


def test_current_backend_is_shared_by_threads_and_the_argument_is_not(cpu_kernel):
    seen = {}

    def work():
        seen["current"] = dsk.current_backend()
        seen["plain"] = dsk.swiglu(X)
        seen["named"] = dsk.swiglu(X, backend="cpu")

    with dsk.use_backend("ref"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen["current"] == "ref"
    assert torch.equal(seen["plain"], EXPECTED)
    assert torch.equal(seen["named"], EXPECTED + cpu_kernel)


def test_gradients_run_on_the_backend_of_the_forward():
    used = []

    def swiglu_backward(grad, x):
        used.append("cpu")
        return torch.zeros_like(x)

    functions = {"swiglu_backward": swiglu_backward, **marked(0.0)["rowwise"]}
    with planted_modules("cpu", rowwise=functions):
        x = X.clone().requires_grad_()
        y = dsk.swiglu(x, backend="cpu")
        with dsk.use_backend("ref"):
            y.sum().backward()
        assert used == ["cpu"]
        dsk.swiglu(x, backend="ref").sum().backward()
        assert used == ["cpu"]


@pytest.mark.parametrize("name", ["cuda", "triton", "emu"])
def test_absent_backend_is_refused_with_its_reason(name):
    support = dsk.backends()[name]
    if support:
        pytest.skip(f"{name} is available here: {support.reason}")
    with pytest.raises(dsk.BackendError) as raised:
        dsk.swiglu(X, backend=name)
    message = f"swiglu: backend {name!r} is not available: {support.reason}"
    assert str(raised.value) == message
    with dsk.use_backend(name), pytest.raises(dsk.BackendError, match=re.escape(message)):
        dsk.swiglu(X)


def test_backend_for_another_device_is_refused():
    with planted_modules("cuda", dsk.Support(True, "an H100"), **marked(0.0)):
        with pytest.raises(dsk.BackendError) as raised:
            dsk.swiglu(X, backend="cuda")
        expected = "swiglu: backend 'cuda' is not available: expected tensors on cuda, got cpu"
        assert str(raised.value) == expected
        assert torch.equal(dsk.swiglu(X), dsk.swiglu(X, backend="cpu"))


def test_op_without_implementation_is_refused():
    with planted_modules("emu", dsk.Support(True, "runs PTX"), **marked(7.0)):
        assert torch.equal(dsk.swiglu(X, backend="emu"), EXPECTED + 7.0)
        with pytest.raises(dsk.BackendError) as raised:
            dsk.rms_norm(X, torch.ones(4), backend="emu")
        reason = "it has no implementation of this op"
        assert str(raised.value) == f"rms_norm: backend 'emu' is not available: {reason}"
        # Never chosen unasked.
        assert torch.equal(dsk.swiglu(X), dsk.swiglu(X, backend="cpu"))


def _picky(reason):
    def swiglu(x):
        raise dsk.Unsupported(reason)

    return {"rowwise": {"swiglu": swiglu}}


def test_call_an_implementation_cannot_run():
    with planted_modules("cpu", **_picky("i must be a multiple of 128, got 2")):
        assert torch.equal(dsk.swiglu(X), EXPECTED)
        assert torch.equal(dsk.swiglu(X, backend="cpu"), EXPECTED)
    with planted_modules("emu", dsk.Support(True, ""), **_picky("i = 2")):
        with pytest.raises(dsk.BackendError) as raised:
            dsk.swiglu(X, backend="emu")
        assert str(raised.value) == "swiglu: backend 'emu' cannot run this call: i = 2"


def test_a_broken_backend_module_is_not_hidden(tmp_path, monkeypatch):
    """Only "there is no such module" means absent; an import that fails is an error."""
    (tmp_path / "rowwise.py").write_text("import surely_not_installed\n")
    monkeypatch.delitem(sys.modules, "dskernels.cpu.rowwise", raising=False)
    with planted_modules("cpu"):
        sys.modules["dskernels.cpu"].__path__ = [str(tmp_path)]
        with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
            dsk.swiglu(X)


def test_missing_library_leaves_the_reference(monkeypatch):
    import importlib

    real = importlib.import_module

    def without_core(name, *rest):
        if name == "dskernels._C":
            raise ModuleNotFoundError("No module named 'dskernels._C'", name="dskernels._C")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without_core)
    dsk_backend._forget()
    try:
        assert torch.equal(dsk.swiglu(X), EXPECTED)
        assert not dsk.backends()["cpu"]
        with pytest.raises(dsk.BackendError, match="the compiled library dskernels._C is missing"):
            dsk.swiglu(X, backend="cpu")
        assert "missing" in dsk.build_info()["compiler"]
    finally:
        monkeypatch.undo()
        dsk_backend._forget()


# ---- questions ---------------------------------------------------------------------------------


def test_supports_says_why(cpu_kernel):
    assert dsk.supports("swiglu", "ref") == (True, "plain PyTorch, the specification")
    assert dsk.supports("swiglu", "cpu") == (True, "native cpu kernel")
    reference_path = "PyTorch reference path (no native kernel)"
    assert dsk.supports("rope", backend="cpu") == (True, reference_path)
    assert dsk.supports("swiglu") == (True, "cpu: native cpu kernel")
    with dsk.use_backend("ref"):
        assert dsk.supports("swiglu").reason == "plain PyTorch, the specification"
    assert bool(dsk.supports("gemm", backend="ref", m=4, n=8, k=128, dtype="e4m3"))


def test_supports_asks_the_backend_about_shapes():
    def supports(op, **shapes):
        ok = shapes.get("i", 128) % 128 == 0
        return dsk.Support(ok, "fits" if ok else f"i must be a multiple of 128, got {shapes['i']}")

    functions = {"supports": supports, **marked(0.0)["rowwise"]}
    refusal = "i must be a multiple of 128, got 7"
    with planted_modules("emu", dsk.Support(True, "runs PTX"), rowwise=functions):
        assert dsk.supports("swiglu", "emu", i=256) == (True, "fits")
        assert dsk.supports("swiglu", "emu", i=7) == (False, refusal)
        assert dsk.supports("rope", "emu") == (
            False,
            "the emu backend has no implementation of rope",
        )
    with planted_modules("cpu", rowwise=functions):
        assert dsk.supports("swiglu", "cpu", i=7) == (True, f"PyTorch reference path ({refusal})")


def test_every_op_answers_for_every_backend():
    for op in dsk_backend.OPS:
        for name in dsk_backend.BACKENDS:
            support = dsk.supports(op, backend=name)
            assert isinstance(support, dsk.Support) and support.reason
        assert dsk.supports(op)
        assert dsk.supports(op, backend="ref") and dsk.supports(op, backend="cpu")


def test_backends_lists_all_with_reasons():
    answers = dsk.backends()
    assert tuple(answers) == dsk_backend.BACKENDS
    assert all(support.reason for support in answers.values())
    assert answers["ref"]


def test_build_info_names_versions_and_backends():
    info = dsk.build_info()
    assert info["version"] == dsk.__version__ and info["torch"] == torch.__version__
    assert set(info["backends"]) == set(dsk_backend.BACKENDS)
    for name, support in dsk.backends().items():
        assert info["backends"][name].startswith("no: ") is not support.ok
    assert info["cuda_driver"]  # a release, or why there is none


def test_build_info_tells_what_ptxas_said_of_every_kernel():
    kernels = dsk.build_info()["cuda_kernels"]
    assert sorted(kernels) == sorted(p.stem for p in build.KERNELS.glob("*.cubin"))
    for figures in kernels.values():
        assert 16 <= figures["registers"] <= 255 and figures["threads"] in range(32, 1025, 32)
        assert figures["registers"] * figures["threads"] <= 65536 and figures["bytes"] > 1000
        assert figures["spill_stores"] == figures["spill_loads"] == figures["stack"] == 0
    if kernels:
        info = dsk.build_info()
        assert info["cuda_toolkit"] >= "12.8" and info["cuda_driver_needed"] == "13.0"


def test_ptxas_figures():
    report = """ptxas info    : Compiling entry function 'f' for 'sm_90a'
    24 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1088 bytes smem
"""
    expected = dict(registers=168, stack=24, spill_stores=8, spill_loads=16, static_smem=1088)
    assert build.ptxas_figures(report) == expected
    assert build.ptxas_figures(report.replace(", 1088 bytes smem", ""))["static_smem"] == 0
    with pytest.raises(ValueError, match=r"report: expected '.*spill loads' in ptxas' report"):
        build.ptxas_figures(report.replace("16 bytes spill loads", ""))


# ---- environment -------------------------------------------------------------------------------


def in_new_process(code, **variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_dsk_backend_is_the_default():
    code = "import dskernels as d; print(d.current_backend())"
    assert in_new_process(code, DSK_BACKEND=" Ref ").stdout.strip() == "ref"
    assert in_new_process(code, DSK_BACKEND="").stdout.strip() == "auto"


def test_dsk_backend_is_validated():
    result = in_new_process("import dskernels", DSK_BACKEND="gpu")
    assert result.returncode != 0
    expected = "DSK_BACKEND: expected auto | cuda | triton | cpu | emu | ref, got 'gpu'"
    assert expected in result.stderr


def test_env_get(monkeypatch):
    monkeypatch.delenv("DSK_BACKEND", raising=False)
    assert env.get("DSK_BACKEND") == "auto"
    monkeypatch.setenv("DSK_BACKEND", "CPU")
    assert env.get("DSK_BACKEND") == "cpu"
    monkeypatch.setenv("DSK_BACKEND", "tpu")
    with pytest.raises(env.EnvError, match="DSK_BACKEND: expected auto .*, got 'tpu'"):
        env.get("DSK_BACKEND")
    with pytest.raises(KeyError):
        env.get("DSK_NO_SUCH_VARIABLE")


def test_every_variable_is_documented():
    table = env.describe()
    for name, variable in env.VARIABLES.items():
        assert name == variable.name and name in table
        assert variable.doc.endswith(".") and variable.expected
        assert variable.when in ("run", "build", "native")


def _environment_reads(path):
    """Line numbers where a Python file touches the process environment."""
    names = ("environ", "environb", "getenv", "putenv")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in names)


def test_only_env_py_reads_the_environment():
    reads = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("dskernels", "model")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != ROOT / "dskernels" / "env.py"
        for line in _environment_reads(path)
    ]
    assert not reads
    assert list(_environment_reads(ROOT / "dskernels" / "env.py"))


def test_variables_read_by_the_build_and_the_library_are_registered():
    used = set(re.findall(r"environ\.get\(\s*\"(\w+)\"", (ROOT / "setup.py").read_text()))
    assert used
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".hpp", ".cuh", ".h"):
            used |= set(re.findall(r"getenv\(\s*\"(\w+)\"", path.read_text(encoding="utf-8")))
    assert used <= set(env.VARIABLES)
