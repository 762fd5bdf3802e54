"""Checkpoints: round trips in every format, and what a bad one gets: a clear error, no effect."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from model_support import assert_close, random_ours, tokens

from dskernels import ScaledTensor
from model import DeepseekConfig, DeepseekV3
from model.checkpoint import CHUNK_ELEMENTS, Checkpoint, CheckpointWriter
from model.safetensors_file import CheckpointError, SafetensorsFile, SafetensorsWriter, TensorInfo
from model.weights import entries, save

FP8 = torch.float8_e4m3fn
# Ragged against the 128-blocks in every way: rows, columns, stacked gate and up, kv_a's 576.
RAGGED = dict(
    hidden_size=200,
    intermediate_size=300,
    moe_intermediate_size=150,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    q_lora_rank=136,
    n_routed_experts=8,
    num_experts_per_tok=2,
)


def same_state(a: DeepseekV3, b: DeepseekV3) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype
        and torch.equal(left[k].view(torch.uint8), right[k].view(torch.uint8))
        for k in left
    )


def saved(directory, model=None, **options):
    """A tiny checkpoint, and its tensors as the safetensors package reads them."""
    save(model or random_ours(), directory, **options)
    return directory


# ---- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", [5 << 30, 60_000])
def test_round_trip_is_exact(dtype, shard, tmp_path):
    model = random_ours().to(dtype)
    saved(tmp_path / "ckpt", model, max_shard_bytes=shard)
    shards = list((tmp_path / "ckpt").glob("*.safetensors"))
    assert (len(shards) > 3) == (shard == 60_000)
    assert same_state(model, DeepseekV3.from_pretrained(tmp_path / "ckpt"))
    assert json.loads((tmp_path / "ckpt/config.json").read_text())["torch_dtype"] in str(dtype)


def test_fp8_round_trip_with_ragged_blocks(tmp_path):
    model = random_ours(DeepseekConfig.tiny(**RAGGED))
    saved(tmp_path / "a", model, dtype=FP8)
    first = DeepseekV3.from_pretrained(tmp_path / "a")
    kv_a = first.layers[0].self_attn.kv_a_proj_with_mqa
    assert kv_a.is_fp8 and kv_a.weight.shape == (576, 200)
    assert kv_a.weight_scale_inv.shape == (5, 2)
    assert not first.mtp[0].eh_proj.is_fp8 and not first.lm_head.is_fp8
    saved(tmp_path / "b", first)
    second = DeepseekV3.from_pretrained(tmp_path / "b")
    assert same_state(first, second)
    # As dequantised by others: data times the scale of its block, within E4M3's half step.
    files = safetensors.torch.load_file(tmp_path / "a/model.safetensors")
    for entry in entries(model):
        expected = entry.target()[0]
        if entry.name + "_scale_inv" not in files:
            assert torch.equal(files[entry.name], expected)
            continue
        scale = files[entry.name + "_scale_inv"]
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        wide = wide[: expected.shape[0], : expected.shape[1]]
        error = (files[entry.name].float() * wide - expected).abs()
        assert bool((error <= expected.abs() / 16 + wide * 2.0**-10).all()), entry.name


def test_fp8_576_by_7168(tmp_path):
    """V3's own ragged shape, through the writer, the reader and the W8A8 product."""
    from model.linear import Linear
    from model.weights import fp8_infos, write_tensor

    weight = torch.randn(576, 7168, generator=torch.Generator().manual_seed(0)) * 0.02
    with CheckpointWriter(tmp_path / "c", fp8_infos("w", (576, 7168)), {}) as writer:
        write_tensor(writer, ["w"], FP8, (weight, None))
    with Checkpoint(tmp_path / "c") as checkpoint:
        assert checkpoint.tensors["w_scale_inv"].shape == (5, 56)
        data, scale = checkpoint.read("w"), checkpoint.read_scale("w")
        rows = torch.cat([chunk for _, chunk in checkpoint.chunks("w", torch.float32)])
    amax = weight[512:, :128].abs().max()
    assert torch.allclose(scale[4, 0], amax / 448)
    assert torch.equal(rows, ScaledTensor(data, scale, (128, 128)).dequantize())
    layer = Linear(576, 7168)
    layer.use_fp8()
    layer.weight.copy_(data)
    layer.weight_scale_inv.copy_(scale)
    x = torch.randn(3, 7168, generator=torch.Generator().manual_seed(1))
    error = (layer(x) - x @ weight.T).abs().mean() / (x @ weight.T).abs().mean()
    assert error < 0.05


@pytest.mark.parametrize("width", [150, 128])
def test_fp8_forward_is_close_and_padding_invisible(width, tmp_path):
    config = DeepseekConfig.tiny(**{**RAGGED, "moe_intermediate_size": width})
    model = random_ours(config, seed=2)
    saved(tmp_path / "a", model, dtype=FP8)
    quantized = DeepseekV3.from_pretrained(tmp_path / "a")
    dense = DeepseekV3.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert not any(p.dtype == FP8 for p in dense.state_dict().values())
    moe = dense.layers[1].mlp, quantized.layers[1].mlp
    x = torch.randn(6, 200, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        topk_idx, weights, _ = moe[0].gate(x)
        for chosen in (topk_idx, torch.full_like(topk_idx, -1)):  # and the shared one by itself
            exact, ours = (m.experts(x, chosen, weights) for m in moe)
            assert 0 < (exact - ours).abs().mean() / exact.abs().mean() < 0.08
        # Decoding reads kv_b_proj dequantised, prefill multiplies by it in FP8: near each other.
        ids = tokens(1, 12)
        logits = quantized(ids)
        assert torch.isfinite(logits).all()
    text = quantized.generate(ids, max_new_tokens=3, eos_token_id=None, use_mtp=True)
    assert len(text.tokens[0]) == 3


def test_load_quantises_and_dequantises(tmp_path):
    model = random_ours(DeepseekConfig.tiny(**RAGGED))
    saved(tmp_path / "dense", model)
    saved(tmp_path / "fp8", model, dtype=FP8)
    quantized = DeepseekV3.from_pretrained(tmp_path / "dense", dtype=FP8)
    assert same_state(quantized, DeepseekV3.from_pretrained(tmp_path / "fp8"))
    saved(tmp_path / "from_fp8", quantized, dtype=torch.bfloat16)
    a = DeepseekV3.from_pretrained(tmp_path / "from_fp8")
    b = DeepseekV3.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)
    assert same_state(a, b)
    half = quantized.to(torch.bfloat16)  # moves activations' dtype, never the FP8 weights
    assert half.dtype == torch.bfloat16 and half.layers[0].self_attn.o_proj.weight.dtype == FP8
    assert half.layers[0].self_attn.o_proj.weight_scale_inv.dtype == torch.float32


def test_the_safetensors_package_reads_and_writes_the_same(tmp_path):
    model = random_ours()
    saved(tmp_path / "ours", model)
    theirs = safetensors.torch.load_file(tmp_path / "ours/model.safetensors")
    own = {entry.name: entry.target()[0] for entry in entries(model)}
    assert own.keys() < theirs.keys()
    assert all(torch.equal(theirs[name], value) for name, value in own.items())
    assert torch.equal(theirs["model.layers.3.embed_tokens.weight"], model.embed_tokens.weight)
    (tmp_path / "theirs").mkdir()
    shutil.copy(tmp_path / "ours/config.json", tmp_path / "theirs")
    safetensors.torch.save_file(theirs, tmp_path / "theirs/model.safetensors")
    assert same_state(model, DeepseekV3.from_pretrained(tmp_path / "theirs"))


def test_chunked_reading_crosses_chunks(tmp_path):
    rows = 2 * CHUNK_ELEMENTS // 1024 + 77
    value = torch.arange(rows * 1024, dtype=torch.float32).view(rows, 1024)
    with CheckpointWriter(tmp_path / "c", [TensorInfo("w", torch.float32, value.shape)], {}) as w:
        w.write("w", value[:100])
        w.write("w", value[100:], 100)
    with Checkpoint(tmp_path / "c") as checkpoint:
        pieces = list(checkpoint.chunks("w", torch.float64))
    assert len(pieces) == 3 and all(first % 128 == 0 for first, _ in pieces)
    assert torch.equal(torch.cat([rows for _, rows in pieces]), value.double())


# ---- bad checkpoints -----------------------------------------------------------------------------


def rewrite(directory, change):
    """Apply `change` to the dict of tensors of a one-file checkpoint."""
    path = directory / "model.safetensors"
    data = safetensors.torch.load_file(path)
    change(data)
    path.unlink()
    safetensors.torch.save_file(data, path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("model.norm.weight"), r"1 missing tensor\(s\): model.norm.weight"),
        (
            lambda d: [d.pop(n) for n in list(d) if ".experts.3." in n],
            r"missing tensor\(s\): model.layers.1.mlp.experts.3.down_proj.weight.* and 4 more",
        ),
        (
            lambda d: d.update({"model.layers.0.self_attn.bogus": torch.ones(1)}),
            "1 unexpected tensor",
        ),
        (
            lambda d: d.update({"lm_head.weight": torch.ones(131, 65)}),
            r"lm_head.weight: expected shape \(131, 64\) by config.json, got \(131, 65\)",
        ),
        (
            lambda d: d.update({"lm_head.weight": torch.ones(131, 64, dtype=torch.int64)}),
            "expected floating point",
        ),
        (
            lambda d: d.update({"model.layers.3.shared_head.head.weight": torch.ones(131, 64)}),
            "differs from lm_head.weight",
        ),
    ],
)
def test_wrong_tensors_are_refused(change, message, tmp_path):
    saved(tmp_path / "c")
    rewrite(tmp_path / "c", change)
    with pytest.raises(CheckpointError, match=message):
        DeepseekV3.from_pretrained(tmp_path / "c")


SCALE = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d[SCALE].fill_(float("nan")), f"{SCALE}: 1 of its scales are NaN or Inf"),
        (lambda d: d[SCALE].fill_(float("inf")), f"{SCALE}: 1 of its scales are NaN or Inf"),
        (lambda d: d[SCALE].neg_(), "negative scales"),
        (lambda d: d.pop(SCALE), "FP8 without its scales"),
        (lambda d: d.update({SCALE: torch.ones(2, 1)}), r"expected shape \(1, 1\)"),
        (
            lambda d: d.update({SCALE.removesuffix("_scale_inv"): torch.ones(48, 64)}),
            "unexpected tensor",
        ),
    ],
)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_wrong_scales_are_refused(change, message, dtype, tmp_path):
    saved(tmp_path / "c", dtype=FP8)
    rewrite(tmp_path / "c", change)
    with pytest.raises(CheckpointError, match=message):
        DeepseekV3.from_pretrained(tmp_path / "c", dtype=dtype)


def test_every_truncation_is_noticed(tmp_path):
    saved(tmp_path / "c")
    path = tmp_path / "c/model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            DeepseekV3.from_pretrained(tmp_path / "c")
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="corrupted"):
        DeepseekV3.from_pretrained(tmp_path / "c")


def header_file(path, header: bytes | dict, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def one(**changes) -> dict:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    "header, message",
    [
        (b"{not json", "corrupted header"),
        (b"\xff\xfe", "corrupted header"),
        (b"[1]", "not a JSON object"),
        (b'{"w":{}, "w":{}}', "appears twice"),
        (b"[" * 100_000, "corrupted header"),
        (one(dtype="F99"), "corrupted entry"),
        (one(shape=[-2]), "corrupted sizes"),
        (one(shape=[2.0]), "corrupted sizes"),
        (one(shape=[True, 2]), "corrupted sizes"),
        (one(shape=[3]), "takes 12 bytes, the header says 8"),
        (one(shape=[1 << 62, 1 << 62]), "the header says 8"),
        (one(data_offsets=[8, 16]), "overlaps or leaves a gap"),
        (one(data_offsets=[0]), "corrupted entry"),
        ({**one(), "v": one()["w"]}, "overlaps or leaves a gap"),
        ({"w": 3}, "corrupted entry"),
    ],
)
def test_hostile_headers_are_refused(header, message, tmp_path):
    header_file(tmp_path / "f", header, b"\0" * 8)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(tmp_path / "f")


def test_random_corruption_never_crashes(tmp_path):
    """Flipped header bytes give an error or another valid file, never anything else."""
    saved(tmp_path / "c")
    path = tmp_path / "c/model.safetensors"
    whole = bytearray(path.read_bytes())
    length = int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(60):
        bad = bytearray(whole)
        at = int(torch.randint(0, 8 + length, (1,), generator=generator))
        bad[at] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
        path.write_bytes(bad)
        try:
            DeepseekV3.from_pretrained(tmp_path / "c")
        except CheckpointError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_unopened(name, tmp_path):
    saved(tmp_path / "c")
    (tmp_path / "c/model.safetensors").unlink()
    torch.save({"w": torch.ones(2)}, tmp_path / "c" / name)
    with pytest.raises(CheckpointError, match="pickle.*refused"):
        DeepseekV3.from_pretrained(tmp_path / "c")
    (tmp_path / "c" / name).rename(tmp_path / "c/model.safetensors")
    with pytest.raises(CheckpointError, match="pickle.*refused"):
        DeepseekV3.from_pretrained(tmp_path / "c")
    (tmp_path / "c/model.safetensors").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match="pickle.*refused"):
        DeepseekV3.from_pretrained(tmp_path / "c")


def test_bad_indices_are_refused(tmp_path):
    saved(tmp_path / "c", max_shard_bytes=60_000)
    index = tmp_path / "c/model.safetensors.index.json"
    good = json.loads(index.read_text())

    def refuse(weight_map, message):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            DeepseekV3.from_pretrained(tmp_path / "c")

    names = good["weight_map"]
    first = next(iter(names))
    refuse({**names, first: "../x.safetensors"}, "not a plain file name")
    refuse({**names, first: "absent.safetensors"}, "absent.safetensors is missing")
    refuse({**names, first: "pytorch_model.bin"}, "pickle checkpoint: refused")
    refuse({**names, "nowhere": names[first]}, "'nowhere' is missing from shard")
    refuse([1], "corrupted index")
    index.write_text("{")
    with pytest.raises(CheckpointError, match="corrupted index"):
        DeepseekV3.from_pretrained(tmp_path / "c")


def test_absent_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint directory"):
        DeepseekV3.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        DeepseekV3.from_pretrained(tmp_path)
    saved(tmp_path / "c")
    (tmp_path / "c/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        DeepseekV3.from_pretrained(tmp_path / "c")
    with pytest.raises(TypeError, match="dtype: expected a floating-point dtype"):
        DeepseekV3.from_pretrained(tmp_path / "c", dtype=torch.int8)


# ---- nothing is overwritten ----------------------------------------------------------------------


@pytest.mark.parametrize("atomic", [True, False])
def test_saving_never_overwrites_unasked(atomic, tmp_path, monkeypatch):
    if not atomic:  # a system without renameat2
        monkeypatch.setattr("model.checkpoint.ctypes.CDLL", lambda *a, **k: object())
    saved(tmp_path / "c", random_ours(seed=1))
    before = (tmp_path / "c/model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="not empty"):
        saved(tmp_path / "c", random_ours(seed=2))
    assert (tmp_path / "c/model.safetensors").read_bytes() == before
    saved(tmp_path / "c", random_ours(seed=2), overwrite=True)
    assert same_state(random_ours(seed=2), DeepseekV3.from_pretrained(tmp_path / "c"))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path / "c", random_ours(seed=1))
    before = {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()}
    calls = []

    def failing(self, name, value, first=0):
        calls.append(name)
        if len(calls) == 20:
            raise OSError("No space left on device")
        write(self, name, value, first)

    write = SafetensorsWriter.write
    monkeypatch.setattr(SafetensorsWriter, "write", failing)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path / "c", random_ours(seed=2), overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    with pytest.raises(OSError, match="No space left"):
        calls.clear()
        saved(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unfinished_writer_does_not_take_the_name(tmp_path):
    infos = [TensorInfo("a", torch.float32, (2,)), TensorInfo("b", torch.float32, (2,))]
    with pytest.raises(RuntimeError, match=r"not fully written: \['b'\]"):
        with CheckpointWriter(tmp_path / "c", infos, {}) as writer:
            writer.write("a", torch.ones(2))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="a: expected torch.float32 rows"):
        with CheckpointWriter(tmp_path / "c", infos, {}) as writer:
            writer.write("a", torch.ones(2, dtype=torch.float64))
    assert list(tmp_path.iterdir()) == []


def test_logits_survive_all_formats(tmp_path):
    model = random_ours(seed=4)
    saved(tmp_path / "c", model, max_shard_bytes=40_000)
    ids = tokens(1, 9)
    with torch.no_grad():
        assert_close(DeepseekV3.from_pretrained(tmp_path / "c")(ids), model(ids), atol=0)
