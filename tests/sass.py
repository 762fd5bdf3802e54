"""What the machine code of a kernel says: a reader of nvdisasm's listings.

Listing        instructions with their addresses, labels, and who can follow whom
roles          the code between setmaxnreg instructions, with its register budget
complaints     everything about a cubin that a shipped kernel may not have
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

LOCAL_MEMORY = ("LDL", "STL")
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+|\.text\.\S+|\$?[\w$]+):")
_TARGET = re.compile(r"`\(([^)]+)\)")
_REGISTER = re.compile(r"(?<![\w.])R(\d+)\b")


def find_nvdisasm() -> str | None:
    """nvdisasm of the toolkit, of NVIDIA's pip wheels, or the one inside the Triton wheel."""
    site = Path(sysconfig.get_paths()["purelib"])
    nvcc = shutil.which("nvcc")
    places = [shutil.which("nvdisasm")]
    places += [Path(nvcc).resolve().parent / "nvdisasm"] if nvcc else []
    places += [site / "nvidia/cu13/bin/nvdisasm", site / "triton/backends/nvidia/bin/nvdisasm"]
    return next((str(p) for p in places if p and Path(p).exists()), None)


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str  # with its modifiers
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]

    def highest_register(self) -> int:
        """The largest index among its registers, wide operands counted whole; -1 without any."""
        found = [int(r) for r in _REGISTER.findall(self.operands)]
        return max((r + self._width(i, r == found[0]) - 1 for i, r in enumerate(found)), default=-1)

    def _width(self, position: int, is_first: bool) -> int:
        """Registers of the operand: accumulators are N / 2, vectors as the modifier says."""
        shape = re.search(r"GMMA\.64x(\d+)x\d+\.(F32|F16)", self.opcode)
        if shape:  # the accumulator comes first and again as the addend; A may be 4 registers
            accumulators = int(shape[1]) // (2 if shape[2] == "F32" else 4)
            return accumulators if is_first else 4
        if self.name in ("LDG", "LDS", "LD", "LDC", "LDSM", "ULDC"):
            size = {".64": 2, ".128": 4}.get(self._modifier(), 1)
            return size if position == 0 else 1
        if self.name in ("STG", "STS", "ST"):
            size = {".64": 2, ".128": 4}.get(self._modifier(), 1)
            return size if position > 0 else 1
        return 2 if ".WIDE" in self.opcode and position == 0 else 1

    def _modifier(self) -> str:
        match = re.search(r"\.(64|128)(?=\.|$)", self.opcode)
        return match[0] if match else ""


@dataclass
class Role:
    """The code that runs under one register budget."""

    budget: int
    grows: bool
    instructions: list[Instruction] = field(default_factory=list)

    @property
    def highest(self) -> int:
        return max((i.highest_register() for i in self.instructions), default=-1)


class Listing:
    """A disassembled kernel."""

    def __init__(self, text: str) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}  # label -> index of the instruction behind it
        for line in text.splitlines():
            label = _LABEL.match(line.strip())
            if label:
                self.labels[label[1]] = len(self.instructions)
            match = _LINE.search(line)
            if match:
                address, predicate, opcode, operands = match.groups()
                self.instructions.append(
                    Instruction(int(address, 16), predicate or "", opcode, operands)
                )
        self.count = Counter(i.name for i in self.instructions)

    def successors(self, index: int) -> list[int]:
        """Instructions that may run next."""
        instruction = self.instructions[index]
        follow = [index + 1] if index + 1 < len(self.instructions) else []
        if instruction.name in ("BRA", "CALL", "JMP", "BRX", "JMX"):
            target = _TARGET.search(instruction.operands)
            jumps = [self.labels[target[1]]] if target and target[1] in self.labels else []
            if instruction.name in ("BRX", "JMX"):  # a jump table: anywhere
                jumps = sorted(self.labels.values())
            always = not instruction.predicate and instruction.name != "CALL"
            return jumps + ([] if always else follow)
        # A trap kills the kernel, whatever ptxas has put behind it.
        if instruction.name in ("EXIT", "RET", "BPT") and not instruction.predicate:
            return []
        return follow

    def _reach(self, starts: list[int]) -> set[int]:
        """What can run from there without passing a setmaxnreg."""
        seen, todo = set(), list(starts)
        while todo:
            index = todo.pop()
            if index in seen or index >= len(self.instructions):
                continue
            if self.instructions[index].name == "USETMAXREG":
                continue
            seen.add(index)
            todo += self.successors(index)
        return seen

    def roles(self) -> list[Role]:
        """One for each setmaxnreg; empty for a kernel without any."""
        found = []
        for index, instruction in enumerate(self.instructions):
            if instruction.name != "USETMAXREG":
                continue
            budget = re.search(r"0x([0-9a-f]+)", instruction.operands)
            role = Role(int(budget[1], 16), "TRY_ALLOC" in instruction.opcode)
            role.instructions = [self.instructions[i] for i in sorted(self._reach([index + 1]))]
            found.append(role)
        return found

    def before_roles(self) -> list[Instruction]:
        return [self.instructions[i] for i in sorted(self._reach([0]))]


def disassemble(cubin: Path, nvdisasm: str | None = None) -> Listing:
    """Raises RuntimeError, with nvdisasm's words, for what is no cubin."""
    tool = nvdisasm or find_nvdisasm()
    if tool is None:
        raise RuntimeError("nvdisasm: expected one in the toolkit or in the Triton wheel")
    done = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"nvdisasm {cubin.name}: {done.stderr.strip()}")
    return Listing(done.stdout)


def complaints(listing: Listing, ptx: str, registers: int, threads: int) -> list[str]:
    """What is wrong with a kernel's machine code; empty for one that may be shipped.

    ptx        its PTX, which says what tensor-core instructions must be there
    registers  what ptxas gave every thread at launch
    """
    found = [f"{listing.count[name]} {name}" for name in LOCAL_MEMORY if listing.count[name]]
    for kind, opcode in (("e4m3", "QGMMA"), ("bf16", "HGMMA")):
        asked = len(re.findall(rf"wgmma\.mma_async\S*\.{kind}\.{kind}", ptx))
        if listing.count[opcode] < asked:
            found.append(f"{asked} wgmma of {kind}, {listing.count[opcode]} {opcode}")
    start = max((i.highest_register() for i in listing.before_roles()), default=-1)
    if start >= registers:
        found.append(f"R{start} before any setmaxnreg, {registers} registers at launch")
    roles = listing.roles()
    found += [f"R{r.highest} under setmaxnreg {r.budget}" for r in roles if r.highest >= r.budget]
    if len(roles) == 2:  # one warpgroup gives, the others take: more than there is would hang
        asked = sum(r.budget * (threads - 128 if r.grows else 128) for r in roles)
        if asked > registers * threads:
            found.append(f"setmaxnreg asks for {asked} registers of {registers * threads}")
    return found
