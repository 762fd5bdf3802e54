"""Plant bugs in the reference, one at a time, and see the tests of its stem fail.

    python tests/mutation/mutate_ref.py [--only NAME-PART] [--list]

Each mutant replaces one piece of source in a temporary copy of the package and runs the tests that
must notice. Exit status 0 when every mutant is caught, 1 when one survives, 2 when a mutant no
longer applies (the source moved on: update the table). The V3 gate's mutants are those whose
effect on a model's logits is known; the 0-for-minus-infinity mask is invisible unless biases are
negative, which is why the tests shift them.
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
import torch
import torch.fx.experimental.symbolic_shapes  # gradcheck's slow import, like torch itself

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")
TIMEOUT_S = 120


class Mutant(NamedTuple):
    name: str
    stem: str  # dskernels/ref/<stem>.py, tests/test_ref_<tests or stem>.py
    old: str
    new: str
    tests: str = ""


MUTANTS = [
    # The router.
    Mutant("gate: group max for the sum of the top 2", "moe", ": 2 if by_sum else 1]", ":1]"),
    Mutant("gate: top-2 sum where V2 takes the max", "moe", ": 2 if by_sum else 1]", ":2]"),
    Mutant("gate: weights from biased scores", "moe", "= scores.gather(", "= biased.gather("),
    Mutant("gate: no renormalisation", "moe", 'None else score == "sigmoid",', "None else False,"),
    Mutant(
        "gate: renormalise softmax too", "moe", 'None else score == "sigmoid",', "None else True,"
    ),
    Mutant("gate: no scale", "moe", "topk_idx, weights * scale", "topk_idx, weights"),
    Mutant(
        "gate: mask with 0 for -inf",
        "moe",
        "masked_fill(~allowed.unsqueeze(-1), -torch.inf)",
        "masked_fill(~allowed.unsqueeze(-1), 0.0)",
    ),
    Mutant("gate: bias forgotten", "moe", "detach() + bias.detach().float()", "detach() + 0"),
    Mutant("gate: no group limit", "moe", "if n_group > 1:", "if n_group < 1:"),
    Mutant(
        "gate: ties to the highest index",
        "moe",
        "return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]",
        "return values.shape[-1] - 1 - values.flip(-1).sort(dim=-1, descending=True, "
        "stable=True).indices[..., :count]",
    ),
    Mutant("gate: NaN ranks first", "moe", "nan=lowest", "nan=-lowest"),
    Mutant("gate: NaN below unchosen groups", "moe", "nan=lowest", "nan=-torch.inf"),
    Mutant("gate: softmax for sigmoid", "moe", "torch.sigmoid(logits)", "torch.softmax(logits, 1)"),
    Mutant("bias update: wrong direction", "moe", "bias + gamma *", "bias - gamma *"),
    Mutant("bias update: mean in fp32", "moe", "counts.to(torch.int64)", "counts.float()"),
    Mutant("losses: affinity not normalised", "moe", "affinity.mean(dim=1)", "scores.mean(dim=1)"),
    Mutant(
        "losses: device sum for mean", "moe", "num_devices).mean(dim=-1)", "num_devices).sum(-1)"
    ),
    Mutant("losses: tokens counted per expert", "moe", "num_devices).amax(", "num_devices).sum("),
    # Permutation and experts.
    Mutant("permute: padding between experts lost", "moe", "// alignment * alignment", ""),
    Mutant(
        "permute: later tokens first",
        "moe",
        "order = flat.sort(stable=True).indices[int((flat < 0).sum()) :]",
        "order = (flat.numel() - 1 - flat.flip(0).sort(stable=True).indices)"
        "[int((flat < 0).sum()) :]",
    ),
    Mutant("permute: -1 kept", "moe", "[int((flat < 0).sum()) :]", ".clamp(0)"),
    Mutant(
        "unpermute: low-precision sum",
        "moe",
        "else torch.float32\n    total",
        "else y.dtype\n    total",
    ),
    Mutant(
        "unpermute: reads the last row for -1",
        "moe",
        "(row_map[:, slot] >= 0)",
        "(row_map[:, slot] >= -1)",
    ),
    Mutant(
        "unpermute: order of slots",
        "moe",
        "range(row_map.shape[1])",
        "range(row_map.shape[1])[::-1]",
    ),
    Mutant(
        "experts: SwiGLU rounded before quantising",
        "moe",
        'epilogue="swiglu_quant"\n',
        'epilogue="swiglu"\n',
    ),
    # Quantisation.
    Mutant("quantize: no amax floor", "rowwise", "clamp(min=AMAX_FLOOR)", "clamp(min=1e-30)"),
    Mutant("quantize: 440 for 448", "rowwise", "/ FORMAT_MAX[dtype]", "/ (FORMAT_MAX[dtype] - 8)"),
    Mutant(
        "quantize: multiply by the inverse",
        "rowwise",
        "tiles / scale[..., :, None, :, None]",
        "tiles * (1 / scale[..., :, None, :, None])",
    ),
    Mutant("quantize: max for amax", "rowwise", "tiles.abs().nan_to_num", "tiles.nan_to_num"),
    Mutant(
        "quantize: NaN poisons the block",
        "rowwise",
        "nan_to_num(nan=0.0, posinf=torch.inf)",
        "mul(1)",
    ),
    Mutant("quantize: infinity saturates", "rowwise", "posinf=torch.inf", "posinf=1.0"),
    Mutant(
        "quantize: row-major scales",
        "rowwise",
        "mn_major(scale) if block[0] == 1 else scale",
        "scale",
    ),
    Mutant("quantize: transpose ignored", "rowwise", "if transpose:", "if False:"),
    Mutant(
        "quantize: power-of-two scale not applied",
        "rowwise",
        'if scale_format != "fp32":',
        'if scale_format == "ue8m0":',
    ),
    Mutant(
        "quantize: fused norm rounded first",
        "rowwise",
        "rms_norm(x.float(), weight, eps)",
        "rms_norm(x, weight, eps)",
    ),
    Mutant(
        "ue8m0: powers of two rounded up",
        "fp8",
        "torch.where(mantissa == 0.5, exponent - 1, exponent)",
        "exponent",
    ),
    Mutant(
        "ue8m0: floor",
        "fp8",
        "mantissa == 0.5, exponent - 1, exponent",
        "mantissa >= 0.5, exponent - 1, exponent",
    ),
    Mutant(
        "e4m3: saturation at 416",
        "fp8",
        'x.clamp(-FORMAT_MAX["e4m3"], FORMAT_MAX["e4m3"])',
        "x.clamp(-416, 416)",
    ),
    Mutant(
        "e4m3: through float16", "fp8", "to(torch.float8_e4m3fn)", "half().to(torch.float8_e4m3fn)"
    ),
    Mutant("e5m6: truncation", "fp8", "torch.round(clamped / grid)", "torch.trunc(clamped / grid)"),
    Mutant(
        "e5m6: through float16",
        "fp8",
        "torch.round(clamped / grid)",
        "torch.round(clamped.half().float() / grid)",
    ),
    Mutant("e5m6: no subnormals", "fp8", "clamp(min=-13) - 7", "clamp(min=-14) - 7"),
    Mutant("e5m6: packed big-endian", "fp8", "low | (high << 12)", "high | (low << 12)"),
    # RMSNorm, RoPE, SwiGLU.
    Mutant("rms_norm: eps outside", "rowwise", "keepdim=True) + eps)", "keepdim=True)) + eps * 0"),
    Mutant(
        "rms_norm: residual not returned",
        "rowwise",
        "return y if residual is None else (y, x)\n\n\ndef rope",
        "return y if residual is None else (y, residual)\n\n\ndef rope",
    ),
    Mutant(
        "rope: half-split pairs",
        "rowwise",
        "if interleaved else wide.chunk(2, dim=-1)",
        "if False else wide.chunk(2, dim=-1)",
    ),
    Mutant("rope: rotates backwards", "rowwise", "if inverse:", "if not inverse:"),
    Mutant("swiglu: halves swapped", "rowwise", "gate, up = _wide", "up, gate = _wide"),
    # GEMM and the tensor core.
    Mutant("gemm: scale of the wrong block of b", "gemm", "b.scale[:, block]", "b.scale[:, 0]"),
    Mutant(
        "gemm: mul then add", "gemm", "tensorcore.fma(scale, acc, final)", "scale * acc + final"
    ),
    Mutant(
        "gemm: scales applied one by one",
        "gemm",
        "tensorcore.fma(scale, acc, final)",
        "tensorcore.fma(a.scale[:, block, None], acc * scale_b, final)",
    ),
    Mutant(
        "gemm: promotion every 64", "gemm", "PROMOTION_INTERVAL = 128", "PROMOTION_INTERVAL = 64"
    ),
    Mutant(
        "gemm: never promoted",
        "gemm",
        'accumulate == "hopper_no_promotion" else',
        'accumulate != "fp32" else',
    ),
    Mutant("gemm: bias forgotten", "gemm", "product = product + bias.to(product.dtype)", "pass"),
    Mutant(
        "gemm: bf16 before the epilogue",
        "gemm",
        "else swiglu(product)",
        "else swiglu(product.bfloat16()).float()",
    ),
    Mutant(
        "gemm: 1d1d in bf16",
        "gemm",
        "one_d = torch.float32 if scaled",
        "one_d = torch.bfloat16 if scaled",
    ),
    Mutant(
        "grouped: group sizes not cumulated",
        "gemm",
        "[sum(counts[:group]) for",
        "[counts[group] * group for",
    ),
    Mutant(
        "grouped: masked rows beyond the count",
        "gemm",
        "counts = torch.as_tensor(masked_m).tolist()",
        "counts = [max_m] * num_groups",
    ),
    Mutant(
        "grouped: padding rows computed",
        "gemm",
        "(m_indices == group).nonzero()",
        "(m_indices.clamp(0) == group).nonzero()",
    ),
    Mutant("grouped: bias of group 0", "gemm", "else bias[index]", "else bias[0]"),
    Mutant("k-grouped: start not advanced", "gemm", "start += size", "start += 0"),
    Mutant("wgmma: 12 fraction bits", "tensorcore", "(32, 13, 13, -6)", "(32, 12, 13, -6)"),
    Mutant("wgmma: 16 products a step", "tensorcore", "(32, 13, 13, -6)", "(16, 13, 13, -6)"),
    Mutant(
        "wgmma: nearest for zero",
        "tensorcore",
        "(torch.trunc(x / unit) * unit)",
        "(torch.round(x / unit) * unit)",
    ),
    Mutant(
        "wgmma: C not truncated",
        "tensorcore",
        "torch.trunc(c_wide * to_integer)",
        "c_wide * to_integer",
    ),
    Mutant(
        "wgmma: zeros raise the exponent",
        "tensorcore",
        "torch.where(products == 0, _ZERO_EXPONENT, exponents)",
        "exponents",
    ),
    Mutant(
        "wgmma: exponents of products normalised",
        "tensorcore",
        "exponents = exponent_a[:, None, ks] + exponent_b[None, :, ks]",
        "exponents = _exponent(products, -600)",
    ),
    Mutant(
        "wgmma: subnormals normalised", "tensorcore", "clamp(min=subnormal)", "clamp(min=-2000)"
    ),
    Mutant("fma: double rounding", "tensorcore", "torch.where(inexact, bits + step, bits)", "bits"),
    Mutant(
        "fma: odd in the wrong direction",
        "tensorcore",
        "== (total > 0), 1, -1)",
        "== (total > 0), -1, 1)",
    ),
    # Attention.
    Mutant(
        "decode: no causal mask among the queries",
        "mla",
        "limit[:, None] if causal else length",
        "length",
    ),
    Mutant("decode: mask off by one", "mla", "length - s + 1 + torch", "length - s + torch"),
    Mutant(
        "decode: lse in base 2",
        "mla",
        "torch.log(total) + peak",
        "(torch.log(total) + peak) / 0.6931471805599453",
    ),
    Mutant("decode: lse without the maximum", "mla", "torch.log(total) + peak", "torch.log(total)"),
    Mutant(
        "decode: maximum not subtracted",
        "mla",
        "torch.exp(scores - peak)",
        "torch.exp(scores - 0 * peak) * torch.exp(-peak)",
    ),
    Mutant(
        "decode: -inf where nothing is attended",
        "mla",
        "where(nothing, torch.inf",
        "where(nothing, -torch.inf",
    ),
    Mutant(
        "decode: pages in physical order",
        "mla",
        "kv_cache[pages[tokens // page]",
        "kv_cache[pages.sort().values[tokens // page]",
    ),
    Mutant(
        "decode: whole pages read",
        "mla",
        "tokens = torch.arange(length, device=kv_cache.device)",
        "tokens = torch.arange(len(pages) * page)",
    ),
    Mutant(
        "decode: whole table read", "mla", "block_table[request, :used]", "block_table[request]"
    ),
    Mutant("decode: scale of the value width", "mla", "width**-0.5 if", "head_dim_v**-0.5 if"),
    Mutant("append: -1 writes the last slot", "mla", "last & (ordered >= 0)", "last"),
    Mutant("append: the first token stays", "mla", "last[:-1] =", "last[1:] ="),
    Mutant(
        "append: slot by columns",
        "mla",
        "slot // page, slot % page]",
        "slot % len(kv_cache), slot // len(kv_cache)]",
    ),
    Mutant("append: RoPE in fp16", "mla", "k_rope.to(torch.bfloat16)", "k_rope.to(torch.float16)"),
    Mutant(
        "append: scales before data",
        "mla",
        "(scaled.data, scale, k_rope",
        "(scale, scaled.data, k_rope",
    ),
    Mutant("prefill: top-left causal mask", "mla", "triu(len_k - len_q + 1)", "triu(1)"),
    Mutant(
        "prefill: NaN gradient in empty rows",
        "mla",
        "peak = torch.where(peak == -torch.inf, 0.0, peak)",
        "pass",
    ),
    # Expert parallelism.
    Mutant("layout: one count per slot", "ep", "goes.any(dim=1)", "goes.sum(dim=1)"),
    Mutant("dispatch: global expert numbers", "ep", "idx - rank * local, -1)", "idx, -1)"),
    Mutant("dispatch: others' weights kept", "ep", "torch.where(mine, weights, 0.0)", "weights"),
    Mutant(
        "dispatch: alignment ignored",
        "ep",
        "// expert_alignment * expert_alignment",
        "* 0 + counts",
    ),
    Mutant(
        "combine: order of ranks",
        "ep",
        "for host in range(first, first + per_node):",
        "for host in reversed(range(first, first + per_node)):",
    ),
    Mutant(
        "combine: order of nodes",
        "ep",
        "for first in range(0, len(ys), per_node):",
        "for first in reversed(range(0, len(ys), per_node)):",
    ),
    Mutant("combine: own sum rounded", "ep", "part if own else part.to", "part.to"),
    Mutant("combine: sums of nodes not rounded", "ep", "part.to(between_nodes).float()", "part"),
    Mutant("combine: the dead are summed", "ep", "if alive[host]:", "if True:"),
    Mutant(
        "combine: bf16 sums",
        "ep",
        "[y.float() for y in ys]",
        "[y.bfloat16().float() * (1 + 2**-9) for y in ys]",
    ),
    Mutant("combine: bias forgotten", "ep", "start=x) for x, pair", "start=x * 0) for x, pair"),
    Mutant("low latency: unweighted", "ep", "weights[token, slot] * y.float()", "y.float()"),
    Mutant(
        "low latency: layout swapped",
        "ep",
        "begin << 32 | len(tokens)",
        "len(tokens) << 32 | begin",
    ),
    Mutant("low latency: slots by source", "ep", "begin = end", "begin = (src + 1) * max_tokens"),
    Mutant(
        "low latency: scales not powers of two",
        "ep",
        '"ue8m0" if round_scale',
        '"fp32" if round_scale',
    ),
    Mutant(
        "dead rank still sends", "ep", "up[idx // local] & bool(alive[rank])", "up[idx // local]"
    ),
    Mutant(
        "dead rank still receives",
        "ep",
        "up[idx // local] & bool(alive[rank])",
        "(idx >= 0) & bool(alive[rank])",
    ),
]


class FirstFailure:
    """A pytest plugin that remembers which test failed first."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid


def run_tests(workdir: Path, tests: str, pipe: Connection) -> None:
    """In a forked child: run the tests of the copy, send (pytest's exit status, first failure)."""
    torch.set_num_threads(1)  # the tensors are tiny, and a busy machine's threads wait
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # no test here needs a plugin
    os.chdir(workdir)
    sys.path.insert(0, str(workdir))
    output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    plugin = FirstFailure()
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--rootdir", str(workdir)]
    pipe.send((int(pytest.main([*options, tests], plugins=[plugin])), plugin.name))


def run_mutant(mutant: Mutant, workdir: Path) -> tuple[str, str]:
    """'caught', 'SURVIVED' or 'STALE', and the first failing test or the reason.

    The child is forked after the imports: they are most of what a test run costs.
    """
    target = workdir / "dskernels" / "ref" / f"{mutant.stem}.py"
    original = target.read_text()
    if mutant.old not in original:
        return "STALE", f"not found in ref/{mutant.stem}.py: {mutant.old!r}"
    tests = f"tests/test_ref_{mutant.tests or mutant.stem}.py"
    receiver, sender = FORK.Pipe(duplex=False)
    target.write_text(original.replace(mutant.old, mutant.new))
    child = FORK.Process(target=run_tests, args=(workdir, tests, sender))
    try:
        child.start()
        if not receiver.poll(TIMEOUT_S):
            return "caught", f"no end within {TIMEOUT_S} s"
        status, failed = receiver.recv()
    finally:
        child.kill()
        child.join()
        target.write_text(original)
    if status == pytest.ExitCode.TESTS_FAILED and failed:
        return "caught", failed
    if status == pytest.ExitCode.OK:
        return "SURVIVED", tests
    return "STALE", f"pytest ended with status {status} in {tests}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run mutants whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    if options.list:
        print("\n".join(f"{mutant.stem:10} {mutant.name}" for mutant in chosen))
        return 0
    outcomes: dict[str, int] = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        workdir = Path(name)
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_kernels", "mutation")
        for part in ("dskernels", "tests"):
            shutil.copytree(ROOT / part, workdir / part, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", workdir)
        for mutant in chosen:
            outcome, detail = run_mutant(mutant, workdir)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            print(f"{outcome:9} {mutant.name}  [{detail}]", flush=True)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"{len(chosen)} mutants: {summary}; {time.monotonic() - started:.0f} s")
    return 2 if "STALE" in outcomes else 1 if "SURVIVED" in outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
