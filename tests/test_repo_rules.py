"""The house rules, as a test: layering, file sizes, and a README whose commands and paths exist."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 600

# C++: layer -> layers it may include (a layer may always include itself). "csrc" headers without a
# layer (params.hpp, check.hpp) may be included by all of them.
CPP_MAY_INCLUDE = {
    "api": {"cuda/launch", "cuda/params", "cpu", "comm", "device", "emu", "include"},
    "cuda/launch": {"device", "comm", "cuda/params", "cuda", "proto"},
    "cuda/kernels": {"cuda/tile", "cuda/ptx", "cuda/params", "cuda", "proto"},
    "cuda/tile": {"cuda/ptx", "cuda/params", "cuda"},
    "cuda/ptx": {"cuda"},
    "cuda/params": {"proto"},  # the exchange has one layout on every transport
    "cuda": set(),
    "comm": {"emu", "proto"},
    "rail": set(),  # compiled by its users, against the NCCL they have
    "device": {"emu"},
    "cpu": {"proto", "include"},
    "proto": set(),
    "emu": set(),
}

# Python: module prefix -> prefixes of the project it may import. Longest prefix wins.
PY_MAY_IMPORT = {
    "dskernels.env": set(),
    "dskernels.types": set(),
    "dskernels.ref": {"dskernels.types", "dskernels.ref"},
    "dskernels.triton": {"dskernels.types", "dskernels.triton"},
    "dskernels.pipeline": {"dskernels.pipeline", "dskernels.env"},
    "dskernels.emu": {
        "dskernels.emu",
        "dskernels.env",
        "dskernels.types",
        "dskernels.cuda",  # the launchers: a kernel runs on either machine
        "dskernels._C",
    },
    "dskernels": {"dskernels"},
    "model": {"model", "dskernels"},
    "bench": {"bench", "dskernels", "model"},
}


def tracked(*patterns: str) -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def cpp_layer(path: str) -> str:
    parts = path.split("/")
    if parts[0] == "cuda" and len(parts) > 2:
        return f"cuda/{parts[1]}"
    return parts[0] if len(parts) > 1 else ""


def cpp_violations() -> list[str]:
    found = []
    for file in tracked("csrc/*.cpp", "csrc/*.hpp", "csrc/*.h", "csrc/*.cu", "csrc/*.cuh"):
        relative = file.relative_to(ROOT / "csrc").as_posix()
        layer = cpp_layer(relative)
        if layer not in CPP_MAY_INCLUDE:
            continue
        for line in file.read_text().splitlines():
            match = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
            if not match or not (ROOT / "csrc" / match[1]).exists():
                continue
            other = cpp_layer(match[1])
            if other and other != layer and other not in CPP_MAY_INCLUDE[layer]:
                found.append(f"{relative} ({layer}) includes {match[1]} ({other})")
    return found


def imported_modules(file: Path) -> set[str]:
    package = file.relative_to(ROOT).parent.as_posix().replace("/", ".")
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            names.add(base)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def longest_prefix(module: str, prefixes) -> str | None:
    hits = [p for p in prefixes if module == p or module.startswith(p + ".")]
    return max(hits, key=len, default=None)


def test_cpp_layers():
    assert cpp_violations() == []


def test_python_layers():
    found = []
    project = ("dskernels", "model", "bench")
    for file in tracked("dskernels/*.py", "model/*.py", "bench/*.py"):
        module = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        rule = longest_prefix(module, PY_MAY_IMPORT)
        for name in imported_modules(file):
            if name.split(".")[0] not in project:
                continue
            if longest_prefix(name, PY_MAY_IMPORT[rule]) is None:
                # `from dskernels import ref`-style names of an allowed parent are judged by parent.
                found.append(f"{module} imports {name}")
    assert found == []


def test_files_stay_readable():
    patterns = ["*.py", "*.cpp", "*.hpp", "*.h", "*.cu", "*.cuh", "*.sh"]
    too_long = {
        str(f.relative_to(ROOT)): count
        for f in tracked(*patterns)
        if (count := len(f.read_text().splitlines())) > MAX_LINES
    }
    assert too_long == {}


def test_environment_is_read_in_one_place():
    readers = [
        str(f.relative_to(ROOT))
        for f in tracked("dskernels/*.py", "model/*.py")
        if f.name != "env.py" and re.search(r"os\.(environ|getenv)", f.read_text())
    ]
    assert readers == []


def markdown_files() -> list[Path]:
    return tracked("*.md")


@pytest.mark.parametrize("file", markdown_files(), ids=lambda f: f.relative_to(ROOT).as_posix())
def test_documented_paths_exist(file):
    """A back-quoted path in the documentation is a promise."""
    missing = []
    for path in re.findall(r"`((?:csrc|dskernels|model|bench|tests|docs|cmake|include)/[\w./-]+)`",
                           file.read_text()):  # fmt: skip
        if not (ROOT / path.rstrip("/")).exists():
            missing.append(path)
    assert missing == []


@pytest.mark.parametrize("file", markdown_files(), ids=lambda f: f.relative_to(ROOT).as_posix())
def test_documented_commands_exist(file):
    """Every `make target` and `python -m module` in the documentation can be run."""
    text = file.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    missing = [f"make {t}" for t in re.findall(r"\bmake ([a-z-]+)(?=[`\s])", text)
               if f"`make {t}" in text and t not in targets]  # fmt: skip
    for module in re.findall(r"python -m ((?:dskernels|model|bench)[\w.]*)", text):
        path = ROOT / module.rstrip(".").replace(".", "/")
        if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
            missing.append(f"python -m {module}")
    assert missing == []
