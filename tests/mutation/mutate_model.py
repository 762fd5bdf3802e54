"""Plant known bugs in the model and its reference ops, one at a time, and see the tests fail.

    python tests/mutation/mutate_model.py [--only TEXT] [--list]

Each mutant is one replacement in a private copy of the checkout; the tests named with it must then
fail (exit status 1). A mutant that survives, or whose text is no longer in the source, makes this
script fail. The first seven are the classic mistakes of V3 implementations.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch  # noqa: F401  imported here once, not in every child
import torch  # noqa: F401
import transformers.models.deepseek_v2.modeling_deepseek_v2
import transformers.models.deepseek_v3.modeling_deepseek_v3  # noqa: F401

FORK = multiprocessing.get_context("fork")
TIMEOUT_S = 300
ROOT = Path(__file__).resolve().parents[2]
HF, GEN, MTP = "test_model_hf.py", "test_model_generate.py", "test_model_mtp.py"
CKPT, CONFIG, CONVERT = "test_model_checkpoint.py", "test_model_config.py", "test_model_convert.py"
OPS = "test_ops_signatures.py"
GATE = "dskernels/ref/moe.py"


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant(
        "half-split RoPE",
        "model/mla.py",
        "q_nope, dsk.rope(q_rope, *rotation, interleaved=cfg.rope_interleave)",
        "q_nope, dsk.rope(q_rope, *rotation, interleaved=False)",
        HF,
    ),
    Mutant(
        "half-split RoPE for queries and keys alike",
        "model/mla.py",
        "interleaved=cfg.rope_interleave",
        "interleaved=False",
        HF,
    ),
    Mutant(
        "softmax scale without m^2",
        "model/config.py",
        "self.qk_head_dim**-0.5 * (self.yarn.softmax_scale if self.yarn else 1.0)",
        "self.qk_head_dim**-0.5",
        HF,
    ),
    Mutant("group scored by its best expert", GATE, ": 2 if by_sum else 1", ": 1", HF),
    Mutant(
        "weights from biased scores",
        GATE,
        "weights = scores.gather(1, topk_idx)",
        "weights = biased.gather(1, topk_idx)",
        HF,
    ),
    Mutant(
        "no renormalisation",
        GATE,
        "    if renormalize:",
        "    if False:",
        HF,
    ),
    Mutant(
        "no routed scale", GATE, "return topk_idx, weights * scale", "return topk_idx, weights", HF
    ),
    Mutant(
        "unchosen groups masked with 0.0 for -inf",
        GATE,
        "masked_fill(~allowed.unsqueeze(-1), -torch.inf)",
        "masked_fill(~allowed.unsqueeze(-1), 0.0)",
        HF,
    ),
    # Attention and cache.
    Mutant(
        "latent not normalised",
        "model/mla.py",
        "return self.kv_a_layernorm(latent), k_rope[:, 0]",
        "return latent, k_rope[:, 0]",
        HF,
    ),
    Mutant(
        "YaRN ramp the wrong way round",
        "model/rotary.py",
        "plain / config.yarn.factor * (1 - keep) + plain * keep",
        "plain / config.yarn.factor * keep + plain * (1 - keep)",
        HF,
    ),
    Mutant(
        "YaRN pairs over the whole width",
        "model/rotary.py",
        "(2 * math.log(theta))",
        "math.log(theta)",
        CONFIG,
    ),
    Mutant(
        "positions restart with every chunk",
        "model/cache.py",
        "return _ranges(self.starts, self.counts).to(self.device)",
        "return _ranges([0] * len(self.counts), self.counts).to(self.device)",
        GEN,
    ),
    Mutant(
        "slots ignore the block table",
        "model/cache.py",
        "page = self._host_table[owner, positions // self.cache.page_size].to(torch.int64)",
        "page = positions // self.cache.page_size",
        GEN,
    ),
    Mutant(
        "a later chunk forgets the past",
        "model/mla.py",
        "if any(batch.starts):",
        "if False:",
        GEN,
    ),
    Mutant(
        "released pages stay with their sequence",
        "model/cache.py",
        "        sequence.pages.clear()\n",
        "",
        GEN,
    ),
    Mutant(
        "sequences of one group mixed up",
        "model/mla.py",
        "batch.block_table[rows]",
        "batch.block_table[: len(rows)]",
        GEN,
    ),
    # Blocks.
    Mutant(
        "shared expert left out",
        "model/moe.py",
        "self._multiply(x, topk_idx, topk_weights, None, self.num_shared)",
        "self._multiply(x, topk_idx, topk_weights, None, 0)",
        HF,
    ),
    Mutant(
        "several shared experts left out",
        "model/moe.py",
        "return out if self.shared_experts is None else out + self.shared_experts(x)",
        "return out",
        HF,
    ),
    Mutant(
        "one dense layer too many",
        "model/config.py",
        "return layer_idx >= self.first_k_dense_replace",
        "return layer_idx > self.first_k_dense_replace",
        HF,
    ),
    Mutant(
        "final norm left out of the residual stream's end",
        "model/transformer.py",
        "        return self.norm(x)\n",
        "        return x\n",
        HF,
    ),
    Mutant(
        "bias rounded with the model's dtype",
        "model/moe.py",
        "if bias is not None and self.bias.dtype != bias.dtype:",
        "if False:",
        HF,
    ),
    # Multi-token prediction and speculation.
    Mutant(
        "MTP concatenates as the paper writes it",
        "model/mtp.py",
        "torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1)",
        "torch.cat([self.hnorm(hidden), self.enorm(embedding)], dim=-1)",
        MTP,
    ),
    Mutant(
        "MTP takes the hidden state before the final norm",
        "model/transformer.py",
        "        previous = hidden\n",
        "        previous = x.view(b, s, -1)\n",
        MTP,
    ),
    Mutant(
        "MTP sees the token of its own position",
        "model/transformer.py",
        "embedded[:, depth:].flatten(0, 1)",
        "embedded[:, :kept].flatten(0, 1)",
        MTP,
    ),
    Mutant(
        "MTP output without its norm",
        "model/mtp.py",
        "return self.norm(self.block(x, rotation, batch, pool, router))",
        "return self.block(x, rotation, batch, pool, router)",
        MTP,
    ),
    Mutant(
        "drafts kept unchecked",
        "model/generate.py",
        "s.drafts[kept] == choices[kept]",
        "True",
        GEN,
    ),
    Mutant(
        "rejected drafts stay in the cache",
        "model/generate.py",
        "            s.processed -= rejected\n",
        "",
        GEN,
    ),
    Mutant(
        "provisional MTP rows taken for settled",
        "model/generate.py",
        "settled = max(0, len(s.hidden) - (self.depth - 1))",
        "settled = len(s.hidden)",
        GEN,
    ),
    Mutant(
        "draws depend on the order of work",
        "model/generate.py",
        "keys = [(s, len(s.tokens) + j)",
        "keys = [(s, j)",
        GEN,
    ),
    Mutant(
        "top-p keeps everything", "model/sampling.py", "before >= self.top_p", "before > 1", GEN
    ),
    # Checkpoints.
    Mutant(
        "gate and up swapped",
        "model/weights.py",
        'yield Entry(f"{expert}gate_proj.weight", moe.experts.w13, lead=(j,), row_part=0)\n'
        '        yield Entry(f"{expert}up_proj.weight", moe.experts.w13, lead=(j,), row_part=1)',
        'yield Entry(f"{expert}up_proj.weight", moe.experts.w13, lead=(j,), row_part=0)\n'
        '        yield Entry(f"{expert}gate_proj.weight", moe.experts.w13, lead=(j,), row_part=1)',
        HF,
    ),
    Mutant(
        "scales of the up part read from the gate's",
        "model/linear.py",
        "row = first // FP8_BLOCK",
        "row = 0",
        CKPT,
    ),
    Mutant(
        "padding left unfilled",
        "model/linear.py",
        "        raw[..., self.k :].zero_()\n",
        "        raw[..., self.k :].fill_(0x7F)\n",
        CKPT,
    ),
    Mutant(
        "ragged scale blocks dropped",
        "model/checkpoint.py",
        "own = scale[first // FP8_BLOCK : -(-last // FP8_BLOCK)]",
        "own = scale[first // FP8_BLOCK : max(1, last // FP8_BLOCK)]",
        CKPT,
    ),
    Mutant(
        "NaN scales accepted",
        "model/checkpoint.py",
        "if not bool(torch.isfinite(scale).all()):",
        "if False:",
        CKPT,
    ),
    Mutant(
        "truncated files accepted",
        "model/safetensors_file.py",
        "if end != size:",
        "if False:",
        CKPT,
    ),
    Mutant(
        "gaps between tensors accepted",
        "model/safetensors_file.py",
        "if info.offset != end:",
        "if False:",
        CKPT,
    ),
    Mutant(
        "missing tensors accepted",
        "model/weights.py",
        '_refuse("missing", sorted(expected - found.keys()), checkpoint)',
        "wanted[:] = [entry for entry in wanted if entry.name in found]",
        CKPT,
    ),
    Mutant(
        "existing checkpoints overwritten",
        "model/checkpoint.py",
        "if any(self.directory.iterdir()) and not self.overwrite:",
        "if False:",
        CKPT,
    ),
    Mutant(
        "unfinished copies left behind",
        "model/checkpoint.py",
        "                shutil.rmtree(self._temporary)\n",
        "                pass\n",
        CKPT,
    ),
    Mutant(
        "conversion rounds the router's bias",
        "model/convert.py",
        'and not name.endswith("e_score_correction_bias")',
        "",
        CONVERT,
    ),
    Mutant(
        "a call is remembered before it is checked",
        "dskernels/ops/_registry.py",
        "                validate(*args)\n                if signatures is not None:\n"
        "                    signatures.remember(args)\n",
        "                if signatures is not None:\n"
        "                    signatures.remember(args)\n                validate(*args)\n",
        OPS,
    ),
    Mutant(
        "a remembered call forgets gradients",
        "dskernels/ops/_registry.py",
        "signatures.known(args, grad)",
        "signatures.known(args, False)",
        OPS,
    ),
    Mutant(
        "group sizes on any device",
        "dskernels/ops/grouped.py",
        '    check.readable(op, form, groups, "a", a)\n',
        "",
        "test_ops_errors.py",
    ),
    Mutant(
        "the compiled rule forgets the multiple",
        "dskernels/ops/_values.py",
        "_native.sizes_fit(sizes, total, total, multiple)",
        "_native.sizes_fit(sizes, total, total, 1)",
        OPS,
    ),
    Mutant(
        "the compiled rule takes one page too many",
        "dskernels/ops/_values.py",
        "_native.pages_fit(table, lens, page, count)",
        "_native.pages_fit(table, lens, page, count + 1)",
        OPS,
    ),
    Mutant(
        "the compiled rule forgets the size of a group",
        "dskernels/ops/_values.py",
        "_native.sizes_fit(sizes, each, _UNBOUNDED, 1)",
        "_native.sizes_fit(sizes, _UNBOUNDED, _UNBOUNDED, 1)",
        OPS,
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="run the mutants whose name contains this")
    parser.add_argument("--list", action="store_true", help="name the mutants and stop")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if args.only in mutant.name]
    if args.list:
        print("\n".join(mutant.name for mutant in chosen))
        return 0
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        copy = Path(directory) / "copy"
        for part in ("dskernels", "model", "tests"):
            ignored = shutil.ignore_patterns("__pycache__", "_kernels")
            shutil.copytree(ROOT / part, copy / part, ignore=ignored)
        for tests in sorted({mutant.tests for mutant in chosen}):
            status, seconds, failed = _run(copy, tests)
            if status != 0:
                print(f"{tests} fails without a mutant: {failed}", file=sys.stderr)
                return 2
            print(f"passes   {seconds:5.1f} s  {tests} (nothing planted)", flush=True)
        for mutant in chosen:
            if not _try(copy, mutant):
                survivors.append(mutant.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught")
    for name in survivors:
        print(f"SURVIVED: {name}", file=sys.stderr)
    return 1 if survivors else 0


def _try(copy: Path, mutant: Mutant) -> bool:
    path = copy / mutant.file
    source = path.read_text(encoding="utf-8")
    if mutant.old not in source:
        print(f"STALE    {mutant.name}: not in {mutant.file}: {mutant.old!r}", flush=True)
        return False
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        status, seconds, failed = _run(copy, mutant.tests)
    finally:
        path.write_text(source, encoding="utf-8")
    # Status 1 is "tests failed"; anything else (a crash, nothing collected) proves nothing.
    verdict = "caught" if status == 1 else f"status {status}"
    print(f"{verdict:8} {seconds:5.1f} s  {mutant.name}: {failed}", flush=True)
    return status == 1


class _FirstFailure:
    """A pytest plugin that remembers the first test that failed."""

    name = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.removeprefix("tests/")


def _run(copy: Path, tests: str) -> tuple[int, float, str]:
    """(pytest's exit status, seconds, first failure) of one test file in the copy.

    The child is forked after the imports of torch and transformers: they are most of what a test
    run costs. What is under test is imported in the child only."""
    start = time.monotonic()
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_run_in_child, args=(copy, tests, sender))
    child.start()
    try:
        status, failed = receiver.recv() if receiver.poll(TIMEOUT_S) else (-1, "no end in time")
    finally:
        child.kill()
        child.join()
    return status, time.monotonic() - start, failed[:110]


def _run_in_child(copy: Path, tests: str, pipe: Connection) -> None:
    # The gate's mutants are planted in the reference: no faster backend may stand in for it.
    os.environ.update(DSK_BACKEND="ref", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = True
    output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    plugin = _FirstFailure()
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", "not slow", "--rootdir", "."]
    # Options of plugins that are not loaded here stay out of the way.
    options += ["-c", os.devnull, "-W", "ignore::pytest.PytestUnknownMarkWarning"]
    pipe.send((int(pytest.main([*options, f"tests/{tests}"], plugins=[plugin])), plugin.name))


if __name__ == "__main__":
    sys.exit(main())
