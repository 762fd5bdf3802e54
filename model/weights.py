"""A model's parameters under their Hugging Face names, loaded from and saved to checkpoints.

Loading checks every header first (missing, unexpected, wrong shape), then allocates the model once
and fills it tensor by tensor, rows at a time: memory stays within 100 MB or so of the model's own.
A load that fails leaves nothing behind; a save that fails leaves what was there.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import dskernels as dsk
from model.block import Block
from model.checkpoint import (
    QUANTIZATION_CONFIG,
    SCALE_SUFFIX,
    Checkpoint,
    CheckpointWriter,
    row_chunks,
)
from model.config import FP8_BLOCK, DeepseekConfig
from model.linear import Weight
from model.moe import MLP, MoE
from model.safetensors_file import CheckpointError, TensorInfo
from model.transformer import DeepseekV3

FP8 = torch.float8_e4m3fn
# The matrices that an FP8 checkpoint stores in FP8 (V3 report section 3.3.1 keeps the embedding,
# the head, the gate and the norms in high precision; the shipped weights eh_proj as well).
_FP8_NAMES = re.compile(
    r"\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj"
    r"|gate_proj|up_proj|down_proj)\.weight$"
)
# Old checkpoints carry these; they follow from the config.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


def stored_in_fp8(name: str) -> bool:
    """Whether an FP8 checkpoint quantises the tensor of this name."""
    return _FP8_NAMES.search(name) is not None


@dataclass(frozen=True)
class Entry:
    """One checkpoint tensor and where it lives in the model: a part of a Weight's storage, or a
    parameter or buffer `attribute` of another module."""

    name: str
    module: nn.Module
    attribute: str = "weight"
    lead: tuple[int, ...] = ()
    row_part: int = 0

    def target(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(data, scales or None): views that can be read and filled."""
        if isinstance(self.module, Weight):
            data, scale = self.module.part(self.lead, self.row_part)
            return data.detach(), scale
        return getattr(self.module, self.attribute).detach(), None

    @property
    def is_fp8(self) -> bool:
        return isinstance(self.module, Weight) and self.module.is_fp8


def entries(model: DeepseekV3) -> Iterator[Entry]:
    """Every tensor of the checkpoint that holds a state of its own, layer by layer."""
    yield Entry("model.embed_tokens.weight", model.embed_tokens)
    for i, layer in enumerate(model.layers):
        yield from _block_entries(f"model.layers.{i}.", layer)
    for i, module in enumerate(model.mtp, start=len(model.layers)):
        prefix = f"model.layers.{i}."
        yield Entry(prefix + "enorm.weight", module.enorm)
        yield Entry(prefix + "hnorm.weight", module.hnorm)
        yield Entry(prefix + "eh_proj.weight", module.eh_proj)
        yield Entry(prefix + "shared_head.norm.weight", module.norm)
        yield from _block_entries(prefix, module.block)
    yield Entry("model.norm.weight", model.norm)
    yield Entry("lm_head.weight", model.lm_head)


def shared_copies(config: DeepseekConfig) -> dict[str, str]:
    """Names under which MTP modules repeat the shared embedding and head -> the original's name."""
    out = {}
    for i in range(config.num_hidden_layers, config.num_layers_with_mtp):
        out[f"model.layers.{i}.embed_tokens.weight"] = "model.embed_tokens.weight"
        out[f"model.layers.{i}.shared_head.head.weight"] = "lm_head.weight"
    return out


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> DeepseekV3:
    """A model with the weights of the checkpoint in `directory`, in eval mode.

    dtype   None: as stored, FP8 weights included. A floating-point dtype: all weights in it, FP8
            ones dequantised. torch.float8_e4m3fn: the matrices of the layers in FP8, quantised
            now if they are not; the rest as stored.
    device  where the weights end up

    Raises FileNotFoundError for an absent checkpoint, CheckpointError for one that is damaged,
    incomplete or of other shapes, that has NaN or Inf scales, or that is a pickle.
    """
    if dtype is not None and dtype != FP8 and not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype or None, got {dtype}")
    with Checkpoint(directory) as checkpoint:
        config = _without_absent_mtp(DeepseekConfig.from_hf(checkpoint.config), checkpoint)
        with torch.device("meta"):
            model = DeepseekV3(config)
        wanted = list(entries(model))
        _check_names(wanted, checkpoint, shared_copies(config))
        _choose_formats(wanted, checkpoint, dtype)
        model.to(_activation_dtype(checkpoint, dtype))
        model.to_empty(device=device)
        for module in model.modules():
            if isinstance(module, Weight):
                module.zero_padding()
        for gate in model.moe_gates():
            gate.counts.zero_()
        for entry in wanted:
            _fill(entry, checkpoint)
        for copy, original in shared_copies(config).items():
            _check_copy(checkpoint, copy, original)
    return model.eval()


def save(
    model: DeepseekV3,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 << 30,
    overwrite: bool = False,
) -> None:
    """Write `model` as a Hugging Face checkpoint that other implementations read.

    dtype  None: as held, FP8 weights with their scales. A floating-point dtype: everything in it.
           torch.float8_e4m3fn: the matrices of the layers quantised in 128x128 blocks.

    FileExistsError if `directory` is not empty, unless `overwrite`; then the old checkpoint is
    replaced only once the new one is complete."""
    plan = [(entry, _stored_dtype(entry, model, dtype)) for entry in entries(model)]
    infos = [info for entry, stored in plan for info in _infos(entry, stored)]
    originals = {info.name: info for info in infos}
    copies = shared_copies(model.config)
    infos += [dataclasses.replace(originals[old], name=new) for new, old in copies.items()]
    config = model.config.to_hf()
    high = model.dtype if dtype in (None, FP8) else dtype
    config["torch_dtype"] = str(high).removeprefix("torch.")
    if any(stored == FP8 for _, stored in plan):
        config["quantization_config"] = QUANTIZATION_CONFIG
    with CheckpointWriter(
        directory, infos, config, max_shard_bytes=max_shard_bytes, overwrite=overwrite
    ) as writer:
        for entry, stored in plan:
            names = [entry.name] + [new for new, old in copies.items() if old == entry.name]
            write_tensor(writer, names, stored, entry.target())


def write_tensor(
    writer: CheckpointWriter,
    names: list[str],
    stored: torch.dtype,
    source: tuple[torch.Tensor, torch.Tensor | None],
) -> None:
    """Write (data, scales or None) as `stored` under each of `names`, a chunk of rows at a time."""
    data, scale = source
    info = TensorInfo(names[0], stored, tuple(data.shape))
    for first, last in row_chunks(info):
        rows, rows_scale = data[first:last], None
        own = slice(first // FP8_BLOCK, -(-last // FP8_BLOCK))
        if scale is not None:
            block = dsk.ScaledTensor(rows.contiguous(), scale[own].contiguous(), (FP8_BLOCK,) * 2)
            rows, rows_scale = (
                (rows, scale[own]) if stored == FP8 else (block.dequantize(stored), None)
            )
        elif stored == FP8:
            rows, rows_scale = quantize_weight(rows)
        for name in names:
            writer.write(name, rows.to(stored), first)
            if rows_scale is not None:
                writer.write(name + SCALE_SUFFIX, rows_scale, own.start)


def quantize_weight(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, k] in floating point -> E4M3 data and contiguous fp32 scales per 128x128 block."""
    scaled = dsk.quantize(rows.to(torch.float32), (FP8_BLOCK, FP8_BLOCK))
    return scaled.data, scaled.scale.contiguous()


def fp8_infos(name: str, shape: tuple[int, ...]) -> list[TensorInfo]:
    """The two tensors that an FP8 weight is stored as."""
    scales = tuple(-(-size // FP8_BLOCK) for size in shape)
    return [TensorInfo(name, FP8, shape), TensorInfo(name + SCALE_SUFFIX, torch.float32, scales)]


# ---- names ---------------------------------------------------------------------------------------


def _block_entries(prefix: str, block: Block) -> Iterator[Entry]:
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield Entry(f"{prefix}{norm}.weight", getattr(block, norm))
    for name, module in block.self_attn.named_children():
        yield Entry(f"{prefix}self_attn.{name}.weight", module)
    if isinstance(block.mlp, MLP):
        yield from _mlp_entries(f"{prefix}mlp.", block.mlp)
        return
    yield from _moe_entries(f"{prefix}mlp.", block.mlp)


def _moe_entries(prefix: str, moe: MoE) -> Iterator[Entry]:
    yield Entry(f"{prefix}gate.weight", moe.gate)
    if moe.gate.bias is not None:
        yield Entry(f"{prefix}gate.e_score_correction_bias", moe.gate, "bias")
    if moe.shared_experts is not None:
        yield from _mlp_entries(f"{prefix}shared_experts.", moe.shared_experts)
    routed = moe.gate.config.n_routed_experts
    for j in range(routed + moe.experts.num_shared):
        expert = f"{prefix}experts.{j}." if j < routed else f"{prefix}shared_experts."
        yield Entry(f"{expert}gate_proj.weight", moe.experts.w13, lead=(j,), row_part=0)
        yield Entry(f"{expert}up_proj.weight", moe.experts.w13, lead=(j,), row_part=1)
        yield Entry(f"{expert}down_proj.weight", moe.experts.w2, lead=(j,))


def _mlp_entries(prefix: str, mlp: MLP) -> Iterator[Entry]:
    yield Entry(f"{prefix}gate_proj.weight", mlp.gate_up_proj, row_part=0)
    yield Entry(f"{prefix}up_proj.weight", mlp.gate_up_proj, row_part=1)
    yield Entry(f"{prefix}down_proj.weight", mlp.down_proj)


# ---- loading -------------------------------------------------------------------------------------


def _without_absent_mtp(config: DeepseekConfig, checkpoint: Checkpoint) -> DeepseekConfig:
    """Others' savers keep `num_nextn_predict_layers` in the config and drop the modules."""
    first = f"model.layers.{config.num_hidden_layers}."
    if config.num_nextn_predict_layers and not any(n.startswith(first) for n in checkpoint.tensors):
        warnings.warn(
            f"{checkpoint.directory}: config.json announces {config.num_nextn_predict_layers} MTP "
            "module(s), the checkpoint has none: loaded without",
            stacklevel=4,
        )
        return dataclasses.replace(config, num_nextn_predict_layers=0)
    return config


def _check_names(wanted: list[Entry], checkpoint: Checkpoint, copies: dict[str, str]) -> None:
    found = checkpoint.tensors
    expected = {entry.name for entry in wanted}
    _refuse("missing", sorted(expected - found.keys()), checkpoint)
    scales = {name + SCALE_SUFFIX for name in found if checkpoint.is_fp8(name)}
    unexpected = found.keys() - expected - copies.keys() - scales
    _refuse("unexpected", sorted(n for n in unexpected if not _IGNORED.search(n)), checkpoint)
    shapes = {entry.name: tuple(entry.target()[0].shape) for entry in wanted}
    shapes |= {copy: shapes[original] for copy, original in copies.items() if copy in found}
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise CheckpointError(
                f"{name}: expected shape {shape} by config.json, got {found[name].shape}"
            )
        if not found[name].dtype.is_floating_point:
            raise CheckpointError(f"{name}: expected floating point, got {found[name].dtype}")


def _refuse(what: str, names: list[str], checkpoint: Checkpoint) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise CheckpointError(
            f"{checkpoint.directory}: {len(names)} {what} tensor(s): {', '.join(names[:5])}{more}"
        )


def _choose_formats(wanted: list[Entry], checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    """Give each Weight FP8 storage where the load calls for it."""
    if checkpoint.is_fp8("model.embed_tokens.weight"):
        raise CheckpointError("model.embed_tokens.weight: an embedding in FP8 is not supported")
    by_module: dict[Weight, list[str]] = {}
    for entry in wanted:
        if isinstance(entry.module, Weight):
            by_module.setdefault(entry.module, []).append(entry.name)
    for module, names in by_module.items():
        stored = [checkpoint.is_fp8(name) for name in names]
        if dtype is None and any(stored) and not all(stored):
            mixed = next(n for n, is_fp8 in zip(names, stored, strict=True) if not is_fp8)
            raise CheckpointError(f"{mixed}: expected FP8 like the weights it is stacked with")
        quantize_now = dtype == FP8 and all(stored_in_fp8(name) for name in names)
        if all(stored) and dtype in (None, FP8) or quantize_now:
            module.use_fp8()


def _activation_dtype(checkpoint: Checkpoint, dtype: torch.dtype | None) -> torch.dtype:
    return checkpoint.tensors["model.embed_tokens.weight"].dtype if dtype in (None, FP8) else dtype


def _fill(entry: Entry, checkpoint: Checkpoint) -> None:
    """Read one tensor into its place, converting on the way."""
    data, scale = entry.target()
    name = entry.name
    if scale is not None and checkpoint.is_fp8(name):
        scale.copy_(checkpoint.read_scale(name))
        _fill_as_stored(data.view(torch.uint8), name, checkpoint)
        return
    if data.dtype == checkpoint.tensors[name].dtype and not checkpoint.is_fp8(name):
        _fill_as_stored(data, name, checkpoint)
        return
    for first, rows in checkpoint.chunks(name, torch.float32 if scale is not None else data.dtype):
        last = first + len(rows)
        if scale is None:
            data[first:last].copy_(rows)
            continue
        quantized, scales = quantize_weight(rows)
        data[first:last].view(torch.uint8).copy_(quantized.view(torch.uint8))
        scale[first // FP8_BLOCK : -(-last // FP8_BLOCK)].copy_(scales)


def _fill_as_stored(data: torch.Tensor, name: str, checkpoint: Checkpoint) -> None:
    if data.is_contiguous() and data.device.type == "cpu":
        checkpoint.read_into(name, data)
        return
    for first, last in row_chunks(checkpoint.tensors[name]):
        data[first:last].copy_(checkpoint.read(name, first, last).view(data.dtype))


def _check_copy(checkpoint: Checkpoint, copy: str, original: str) -> None:
    """The MTP modules share embedding and head here: a checkpoint that unties them is refused."""
    if copy not in checkpoint.tensors:
        return
    for first, last in row_chunks(checkpoint.tensors[copy]):
        pair = (checkpoint.read(name, first, last) for name in (copy, original))
        if not torch.equal(*(rows.to(torch.float32) for rows in pair)):
            raise CheckpointError(f"{copy}: differs from {original}, which MTP modules share")


# ---- saving --------------------------------------------------------------------------------------


def _stored_dtype(entry: Entry, model: DeepseekV3, dtype: torch.dtype | None) -> torch.dtype:
    if entry.attribute == "bias":
        return torch.float32  # chooses experts: never rounded
    if entry.is_fp8:
        return FP8 if dtype in (None, FP8) else dtype
    if dtype == FP8:
        return FP8 if stored_in_fp8(entry.name) else entry.target()[0].dtype
    return entry.target()[0].dtype if dtype is None else dtype


def _infos(entry: Entry, stored: torch.dtype) -> Iterable[TensorInfo]:
    shape = tuple(entry.target()[0].shape)
    if stored == FP8:
        return fp8_infos(entry.name, shape)
    return [TensorInfo(entry.name, stored, shape)]
