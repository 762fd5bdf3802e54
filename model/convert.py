"""Convert a checkpoint between FP8 (128x128 blocks) and BF16, on the CPU, a few rows at a time.

    python -m model.convert SOURCE TARGET --to bf16     # FP8 -> BF16
    python -m model.convert SOURCE TARGET --to fp8      # BF16 or FP32 -> FP8

Needs about 200 MB of memory whatever the model's size, and no GPU. Everything but the weights
(tokenizer, generation settings) is copied along.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from model.checkpoint import (
    INDEX_NAME,
    QUANTIZATION_CONFIG,
    SCALE_SUFFIX,
    Checkpoint,
    CheckpointWriter,
)
from model.config import FP8_BLOCK
from model.safetensors_file import CheckpointError, TensorInfo
from model.weights import FP8, fp8_infos, quantize_weight, stored_in_fp8

_HIGH_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    max_shard_bytes: int = 5 << 30,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write the checkpoint `source` to `target` in the format `to`: bf16, fp16, fp32 or fp8.

    With fp8 the matrices of the layers are quantised and all else is kept as it is. The gate's
    bias stays fp32 always. Errors as in `model.weights.load`; `target` appears when complete."""
    if to != "fp8" and to not in _HIGH_PRECISION:
        raise ValueError(f"to: expected one of {['fp8', *_HIGH_PRECISION]}, got {to!r}")
    with Checkpoint(source) as checkpoint:
        plan = _plan(checkpoint, to)
        infos = []
        for info in plan:
            is_fp8 = info.dtype == FP8
            infos += fp8_infos(info.name, info.shape) if is_fp8 else [info]
        config = dict(checkpoint.config)
        config.pop("quantization_config", None)
        if to == "fp8":
            config["quantization_config"] = QUANTIZATION_CONFIG
        else:
            config.pop("dtype", None)
            config["torch_dtype"] = str(_HIGH_PRECISION[to]).removeprefix("torch.")
        with CheckpointWriter(
            target, infos, config, max_shard_bytes=max_shard_bytes, overwrite=overwrite
        ) as writer:
            _write_all(checkpoint, writer, plan, progress)
            for path in sorted(checkpoint.directory.iterdir()):
                if path.is_file() and path.name not in ("config.json", INDEX_NAME):
                    if path.suffix in (".json", ".txt", ".model", ".md", ".jinja"):
                        writer.add_file(path)


def _plan(checkpoint: Checkpoint, to: str) -> list[TensorInfo]:
    """What each tensor becomes, scales aside."""
    out = []
    for name, info in checkpoint.tensors.items():
        if name.endswith(SCALE_SUFFIX):
            weight = name.removesuffix(SCALE_SUFFIX)
            if weight not in checkpoint.tensors or not checkpoint.is_fp8(weight):
                raise CheckpointError(f"{name}: scales without an FP8 weight {weight!r}")
            continue
        stored = info.dtype
        if to == "fp8":
            if stored_in_fp8(name) and stored.is_floating_point:
                stored = FP8
        elif stored.is_floating_point and not name.endswith("e_score_correction_bias"):
            stored = _HIGH_PRECISION[to]
        out.append(TensorInfo(name, stored, info.shape))
    return out


def _write_all(
    checkpoint: Checkpoint, writer: CheckpointWriter, plan: list[TensorInfo], progress: bool
) -> None:
    start, done = time.monotonic(), 0
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    for info in plan:
        _write_one(checkpoint, writer, info)
        done += checkpoint.tensors[info.name].nbytes
        if progress:
            rate = done / max(time.monotonic() - start, 1e-9)
            line = f"\r{100 * done / total:5.1f}%  {done / 1e9:.2f} GB read, {rate / 1e6:.0f} MB/s"
            print(line, end="", file=sys.stderr, flush=True)
    if progress:
        print(file=sys.stderr)


def _write_one(checkpoint: Checkpoint, writer: CheckpointWriter, info: TensorInfo) -> None:
    name = info.name
    if info.dtype != FP8:
        for first, rows in checkpoint.chunks(name, info.dtype):
            writer.write(name, rows, first)
        return
    if checkpoint.is_fp8(name):  # already as wanted: bit for bit
        writer.write(name, checkpoint.read(name))
        writer.write(name + SCALE_SUFFIX, checkpoint.read_scale(name))
        return
    for first, rows in checkpoint.chunks(name, torch.float32):
        data, scales = quantize_weight(rows)
        writer.write(name, data, first)
        writer.write(name + SCALE_SUFFIX, scales, first // FP8_BLOCK)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m model.convert", description="Convert a checkpoint between FP8 and BF16."
    )
    parser.add_argument("source", help="checkpoint directory (safetensors)")
    parser.add_argument("target", help="directory to write; must be empty or absent")
    parser.add_argument("--to", choices=["fp8", *_HIGH_PRECISION], required=True)
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="size of a shard in GB")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing target")
    args = parser.parse_args(argv)
    try:
        convert(
            args.source,
            args.target,
            args.to,
            max_shard_bytes=int(args.max_shard_gb * 1e9),
            overwrite=args.overwrite,
            progress=sys.stderr.isatty(),
        )
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
