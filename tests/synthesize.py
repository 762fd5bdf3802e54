"""Write an FP8 checkpoint of random weights of any size, streamed: no more than a chunk in memory.

Run as a script it makes one layer at DeepSeek-V3's real dimensions (7168 wide, 256 experts, about
11.5 GB), loads it, runs a forward and decodes, and prints times and the peak of resident memory:

    python tests/synthesize.py DIRECTORY [--vocab 16384] [--keep]
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import shutil
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from model import DeepseekConfig, DeepseekV3  # noqa: E402
from model.checkpoint import (  # noqa: E402
    QUANTIZATION_CONFIG,
    SCALE_SUFFIX,
    CheckpointWriter,
    row_chunks,
)
from model.safetensors_file import TensorInfo  # noqa: E402
from model.weights import FP8, entries, fp8_infos, stored_in_fp8  # noqa: E402

# E4M3 bytes without the top exponent bit: at most 1.875, never NaN, root mean square 0.5.
_SMALL_E4M3 = 0b10111111
_WEIGHT_STD = 0.02


def synthesize(directory: Path, config: DeepseekConfig, *, seed: int = 0) -> int:
    """Write the checkpoint; returns its size in bytes. Shards of 2 GB."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = DeepseekV3(config)
    infos: list[TensorInfo] = []
    for entry in entries(model):
        shape = tuple(entry.target()[0].shape)
        if stored_in_fp8(entry.name):
            infos += fp8_infos(entry.name, shape)
        else:
            wide = torch.float32 if entry.attribute == "bias" else torch.bfloat16
            infos.append(TensorInfo(entry.name, wide, shape))
    hf = {**config.to_hf(), "quantization_config": QUANTIZATION_CONFIG}
    with CheckpointWriter(directory, infos, hf, max_shard_bytes=2 << 30) as writer:
        for info in infos:
            for first, last in row_chunks(info):
                shape = (last - first, *info.shape[1:])
                writer.write(info.name, _random(info, shape, generator), first)
    return sum(info.nbytes for info in infos)


def _random(info: TensorInfo, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if info.dtype == FP8:
        raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return raw.bitwise_and_(_SMALL_E4M3).view(FP8)
    if info.name.endswith(SCALE_SUFFIX):
        return torch.full(shape, _WEIGHT_STD / 0.5)
    if "norm" in info.name:
        return torch.ones(shape, dtype=info.dtype)
    return (torch.randn(shape, generator=generator) * _WEIGHT_STD).to(info.dtype)


def one_real_layer(vocab: int) -> DeepseekConfig:
    """One MoE layer of DeepSeek-V3 as published, with `vocab` tokens."""
    return dataclasses.replace(
        DeepseekConfig.v3(),
        vocab_size=vocab,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--vocab", type=int, default=16384, help="129280 adds 3.2 GB")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint in place")
    args = parser.parse_args()
    torch.set_num_threads(2)
    target = args.directory / "one-layer-v3"
    try:
        _report(target, one_real_layer(args.vocab))
    finally:
        if not args.keep and target.exists():
            shutil.rmtree(target)
    return 0


def _report(target: Path, config: DeepseekConfig) -> None:
    size = _timed("synthesize", lambda: synthesize(target, config))
    print(f"  {size / 1e9:.2f} GB in {len(list(target.glob('*.safetensors')))} shards")
    model = _timed("load", lambda: DeepseekV3.from_pretrained(target))
    ids = torch.arange(1, 6)[None]
    with torch.no_grad():
        logits = _timed("forward, 5 tokens", lambda: model(ids))
    assert torch.isfinite(logits).all() and logits.float().std() > 0
    text = _timed(
        "generate, 2 tokens", lambda: model.generate(ids, max_new_tokens=2, eos_token_id=None)
    )
    print(f"  tokens {text.tokens}, logits std {float(logits.float().std()):.3f}")


def _timed(what: str, run):
    start = time.perf_counter()
    out = run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {time.perf_counter() - start:.1f} s, peak RSS {peak:.2f} GiB", flush=True)
    return out


if __name__ == "__main__":
    sys.exit(main())
