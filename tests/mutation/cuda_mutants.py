"""Find every mutant of the CUDA kernels' sources: by pattern, never by choice.

Each rule names what it breaks (a fence, a wait, an arrival, a phase, expected bytes, the swizzle, a
tail bound, a scale's index) and rewrites one match of its pattern. Comments, strings, includes and
static assertions are not code to a rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Mutant(NamedTuple):
    file: str  # relative to csrc
    line: int  # 1-based
    kind: str
    old: str  # the source line, stripped
    new: str  # its first mutated line, stripped
    text: str  # the whole mutated file

    @property
    def label(self) -> str:
        return f"{self.file}:{self.line} {self.kind}: {self.old}  ->  {self.new}"


class Rule(NamedTuple):
    kind: str
    pattern: re.Pattern
    rewrite: Callable[[re.Match], list[str]]
    only: re.Pattern | None = None  # the rule looks only at lines (or files) that match


def _call(names: str) -> re.Pattern:
    """A whole statement that is a call of one of `names`, or a block `while (!call) {}`."""
    return re.compile(
        rf"(?<![\w>.:])(?:[\w:]+(?:<[^;{{}}]*?>)?(?:\.|->|::))*(?:{names})"
        rf"(?:<[^;{{}}()]*>)?\((?:[^;{{}}]|n32_t<\d+>{{}})*\);",
    )


def _nothing(_: re.Match) -> list[str]:
    return [";"]


FENCES = r"\w*fence\w*|__threadfence\w*"
WAITS = r"\w*wait\w*|await|acquire\w*|griddepcontrol_wait"
BARRIERS = r"__syncthreads|__syncwarp|named_barrier\w*|\w*barrier_sync\w*|cluster_sync\w*"
ARRIVALS = r"\w*arrive\w*|\w*consume\w*|\w*commit_group\w*|\w*commit_batch\w*|\w*release"
SCALES = re.compile(r"scale|sf[ab]|amax", re.I)
_FLIP = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
_SWAP = {"+": "-", "-": "+", "*": "+", "/": "*", "%": "/"}

RULES = (
    Rule("fence", _call(FENCES), _nothing),
    Rule("wait", _call(WAITS), _nothing),
    Rule("wait", re.compile(r"while \(![^;{}]*wait\w*\([^;{}]*\)\) \{\s*\}"), _nothing),
    Rule("wait", re.compile(r"(?<=wait_group)(_read)?(<0>|\(n32_t<0>)"),
         lambda m: [m[0].replace("0", "1")]),
    Rule("barrier", _call(BARRIERS), _nothing),
    Rule("arrive", _call(ARRIVALS), _nothing),
    Rule("arrive", re.compile(r"(?<=\.init\()[^;()]+(?=\))|(?<=[^_]mbarrier_init\()[^;()]+, [^;()]+(?=\))"),
         lambda m: [f"{m[0]} + 1", f"{m[0]} - 1"]),
    Rule("phase", re.compile(r"\b(?:phase|parity)\w* \^= 1;"), _nothing),
    Rule("phase", re.compile(r"(?:phase|parity)\w*(?:\[[^\]]*\])? \^ 1\b"),
         lambda m: [m[0].removesuffix(" ^ 1")]),
    Rule("phase", re.compile(r"\b(?:phase|parity)\w* = [01](?=;)"),
         lambda m: [m[0][:-1] + str(1 - int(m[0][-1]))]),
    Rule("phase", re.compile(r"(?<=, )[\w.]*(?:phase|parity)\w*(?=\)[;) ])"),
         lambda m: [f"{m[0]} ^ 1"]),
    Rule("phase", _call(r"advance")  , _nothing),
    Rule("expect_tx", re.compile(r"(?<=, )\w*(?:[bB]ytes)\w*(?=[,)])|(?<=, )\w+::k\w*Bytes(?=[,)])"),
         lambda m: [f"{m[0]} + 16", f"{m[0]} - 16"]),
    Rule("swizzle", re.compile(r"\bswizzle\w*\([^;{}()]*\)"), lambda m: [f"({m[0]} ^ 16)"]),
    Rule("swizzle", re.compile(r"(?<![\w.\[<])\d+(?![\w.\]>])"), lambda m: [str(int(m[0]) + 1)],
         re.compile(r"smem_layout\.cuh$")),
    Rule("swizzle", re.compile(r" \^ (?!1\b|=)"), lambda m: [" + "],
         re.compile(r"chunk|swizzle|row", re.I)),
    Rule("tail", re.compile(r" (<=|>=|<|>) "), lambda m: [f" {_FLIP[m[1]]} "]),
    Rule("tail", re.compile(r" \+ (?:[\w:]+ - 1|\d*[1-9]|\w+ - 1)\) / "), lambda m: [") / "]),
    Rule("tail", re.compile(r"\b(?:min|max|fminf|fmaxf)\(([^;{}(),]+), ([^;{}(),]+)\)"),
         lambda m: [f"({m[1]})", f"({m[2]})"]),
    Rule("scale", re.compile(r" ([-+*/%]) (?!=)"), lambda m: [f" {_SWAP[m[1]]} "], SCALES),
    Rule("scale", re.compile(r"(?<=[\w\]])\[([01])\]"), lambda m: [f"[{1 - int(m[1])}]"], SCALES),
    Rule("constant", re.compile(r"(?<![\w.])(?![01]\.0*f)\d+\.\d*(?:e[-+]?\d+)?f?(?![\w.])"),
         lambda m: [f"({m[0]} * 1.0625f)"]),
    Rule("descriptor", re.compile(r"(?<=, )\d+ \* \w+(?=\))"), lambda m: [f"{m[0]} / 2"],
         re.compile(r"\badvance_k")),
)  # fmt: skip


def code_of(text: str) -> str:
    """The text with everything that is no code blanked out, position by position."""
    dull = re.compile(
        r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|^[ \t]*#[^\n]*|static_assert\((?:[^;])*?\);",
        re.S | re.M,
    )
    return dull.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def _applies(rule: Rule, file: str, line: str) -> bool:
    return rule.only is None or bool(rule.only.search(line) or rule.only.search(file))


def mutants_of(root: Path, file: str) -> Iterator[Mutant]:
    """Every mutant of csrc/<file>, in source order; one match may be hit by several rules, but no
    text is produced twice."""
    text = (root / file).read_text()
    code = code_of(text)
    lines = text.splitlines()
    seen = set()
    found = []
    for rule in RULES:
        for match in rule.pattern.finditer(code):
            number = text.count("\n", 0, match.start()) + 1
            line = lines[number - 1]
            if not _applies(rule, file, line) or _is_exempt(code, match, line):
                continue
            for new in rule.rewrite(match):
                mutated = text[: match.start()] + new + text[match.end() :]
                if mutated in seen:
                    continue
                seen.add(mutated)
                line = mutated.splitlines()[number - 1].strip()
                found.append(
                    Mutant(file, number, rule.kind, lines[number - 1].strip(), line, mutated)
                )
    return iter(sorted(found, key=lambda m: m.line))


_FIXED_LOOP = re.compile(r"for \(int \w+ = [\w *]+; \w+ < (?:\w+::)?(?:k[A-Z]|\d)[\w: /*]*; ")


def _is_exempt(code: str, match: re.Match, line: str) -> bool:
    """Whether the match lies in a template's parameter list or a declaration, or is the bound of an
    unrolled loop over an array: that is no tail, and one more turn is undefined behaviour."""
    column = match.start() - (code.rfind("\n", 0, match.start()) + 1)
    fixed = any(m.start() <= column < m.end() for m in _FIXED_LOOP.finditer(line))
    declaration = ("template <", "using ", "namespace ", "struct ", "class ")
    return fixed or line.lstrip().startswith(declaration)


def includes_of(root: Path, file: str) -> set[str]:
    """csrc-relative files that csrc/<file> includes, directly or not, itself among them."""
    found, todo = set(), [file]
    while todo:
        name = todo.pop()
        if name in found or not (root / name).exists():
            continue
        found.add(name)
        todo += re.findall(r'#include "([^"]+)"', (root / name).read_text())
    return found


class Instance(NamedTuple):
    name: str
    header: str
    threads: int
    params: str
    body: str

    def source(self) -> str:
        """What the build wraps around a body; see csrc/cuda/CMakeLists.txt."""
        return (
            f'#include "cuda/kernels/{self.header}"\n'
            f'extern "C" __global__ void __launch_bounds__({self.threads}, 1)\n'
            f"{self.name}(const __grid_constant__ dsk::{self.params} params) {{\n"
            f"  using namespace dsk;\n  {self.body}(params);\n}}\n"
        )


def instances_of(root: Path, stem: str) -> list[Instance]:
    table = (root / "cuda" / "instances" / f"{stem}.def").read_text()
    pattern = r"^DSK_KERNEL\((\w+), (\w+\.cuh), (\d+), (\w+), \((.*)\)\)$"
    return [
        Instance(name, header, int(threads), params, body)
        for name, header, threads, params, body in re.findall(pattern, table, re.M)
    ]
