"""What a DeepSeek-V2 or V3 model looks like: one dataclass, read from and written to Hugging Face's
config.json, with every impossible combination refused by name before a weight is allocated.

Field names are Hugging Face's, so that a config.json needs no translation table. Figures: V3 report
(arXiv 2412.19437) section 4.2, V2 paper (arXiv 2405.04434) section 3.1.2 and its appendix B.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FP8_BLOCK = 128  # side of the weight-scale blocks of an FP8 checkpoint

# Fixed by the architecture: a config that says otherwise describes another model.
_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "ep_size": 1,
}


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071): long wavelengths are interpolated by `factor`,
    short ones kept, and a ramp joins them between beta_fast and beta_slow rotations."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def magnitude(self, mscale: float) -> float:
        """0.1 * mscale * ln(factor) + 1: how much attention must sharpen over a longer context."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def rotation_scale(self) -> float:
        """Multiplies cos and sin. 1.0 for the shipped models, whose two mscales are equal."""
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    @property
    def softmax_scale(self) -> float:
        """m^2, multiplies the softmax scale (both q and k would carry one m each)."""
        return self.magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


@dataclass
class DeepseekConfig:
    """Architecture of one model; the defaults are DeepSeek-V3 671B. Lengths are in elements."""

    model_type: str = "deepseek_v3"
    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    first_k_dense_replace: int = 3
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    yarn: YarnConfig | None = field(default_factory=YarnConfig)
    max_position_embeddings: int = 163840
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    num_nextn_predict_layers: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    torch_dtype: str = "bfloat16"
    extra: dict[str, Any] = field(default_factory=dict)  # keys we do not read, kept for saving

    def __post_init__(self) -> None:
        if isinstance(self.yarn, dict):
            self.yarn = YarnConfig(**self.yarn)
        self._check_sizes()
        self._check_routing()

    # ---- derived ------------------------------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of one cached row: the normalised latent and the rotated shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return self.qk_head_dim**-0.5 * (self.yarn.softmax_scale if self.yarn else 1.0)

    @property
    def num_layers_with_mtp(self) -> int:
        """Blocks in the checkpoint, MTP modules included: they are numbered after the main ones."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def is_moe_layer(self, layer_idx: int) -> bool:
        return layer_idx >= self.first_k_dense_replace

    # ---- named models -------------------------------------------------------------------------

    @classmethod
    def v3(cls) -> DeepseekConfig:
        """DeepSeek-V3: 671B parameters, 36.7B active."""
        return cls()

    @classmethod
    def v2(cls) -> DeepseekConfig:
        """DeepSeek-V2: 236B parameters, 21B active."""
        return cls(
            model_type="deepseek_v2",
            vocab_size=102400,
            hidden_size=5120,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            num_hidden_layers=60,
            num_attention_heads=128,
            n_shared_experts=2,
            n_routed_experts=160,
            num_experts_per_tok=6,
            n_group=8,
            topk_group=3,
            routed_scaling_factor=16.0,
            norm_topk_prob=False,
            scoring_func="softmax",
            first_k_dense_replace=1,
            yarn=YarnConfig(mscale=0.707, mscale_all_dim=0.707),
            initializer_range=0.02,
            num_nextn_predict_layers=0,
            bos_token_id=100000,
            eos_token_id=100001,
        )

    @classmethod
    def v2_lite(cls) -> DeepseekConfig:
        """DeepSeek-V2-Lite: 16B parameters, 2.4B active; no query latent, no groups."""
        return dataclasses.replace(
            cls.v2(),
            hidden_size=2048,
            intermediate_size=10944,
            moe_intermediate_size=1408,
            num_hidden_layers=27,
            num_attention_heads=16,
            n_routed_experts=64,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            q_lora_rank=None,
        )

    @classmethod
    def small_bytes(cls) -> DeepseekConfig:
        """A structurally complete V3 over bytes for training on two CPU cores: 256 byte values plus
        BOS, EOS and padding; one dense and three MoE layers, MTP depth 1."""
        return cls(
            vocab_size=259,
            hidden_size=192,
            intermediate_size=512,
            moe_intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=6,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            kv_lora_rank=64,
            q_lora_rank=96,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            yarn=None,
            max_position_embeddings=4096,
            initializer_range=0.02,
            bos_token_id=256,
            eos_token_id=257,
            torch_dtype="float32",
        )

    @classmethod
    def tiny(cls, **changes: Any) -> DeepseekConfig:
        """The smallest V3 with every part in it, for tests; `changes` override fields."""
        fields = dict(
            vocab_size=131,
            hidden_size=64,
            intermediate_size=96,
            moe_intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            kv_lora_rank=32,
            q_lora_rank=40,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=24,
            yarn=None,
            max_position_embeddings=512,
            initializer_range=0.05,
            torch_dtype="float32",
        )
        return cls(**{**fields, **changes})

    # ---- Hugging Face config.json ---------------------------------------------------------------

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> DeepseekConfig:
        """Read the mapping of a Hugging Face config.json (DeepSeek's own or transformers' form).

        Raises ValueError for another model type and for options this model does not compute."""
        model_type = hf.get("model_type")
        if model_type not in ("deepseek_v3", "deepseek_v2"):
            raise ValueError(
                f"model_type: expected 'deepseek_v3' or 'deepseek_v2', got {model_type!r}"
            )
        hf = dict(hf)
        _refuse_unsupported(hf)
        base = cls.v3() if model_type == "deepseek_v3" else cls.v2()
        rope_theta, yarn = _read_rope(hf)
        hf["rope_theta"] = rope_theta
        _read_routing(hf, model_type)
        dtype = hf.pop("dtype", None) or hf.pop("torch_dtype", None) or "bfloat16"
        hf.pop("torch_dtype", None)
        hf["torch_dtype"] = str(dtype).removeprefix("torch.")
        hf.setdefault("num_nextn_predict_layers", 0)
        names = {f.name for f in dataclasses.fields(cls)} - {"yarn", "extra"}
        known = {name: hf.pop(name) for name in list(hf) if name in names}
        for name in ("n_group", "topk_group"):
            if known.get(name, 1) is None:
                known[name] = 1
        if isinstance(known.get("eos_token_id"), list):
            known["eos_token_id"] = known["eos_token_id"][0]
        ours = ("num_key_value_heads", "qk_head_dim", "head_dim", "topk_method", "architectures")
        for name in (*ours, "auto_map"):  # derived, written anew by to_hf, or others' code
            hf.pop(name, None)
        return dataclasses.replace(base, **known, yarn=yarn, extra=hf)

    def to_hf(self) -> dict[str, Any]:
        """The config.json mapping, in the form that DeepSeek publishes and others' loaders read."""
        hf = dict(self.extra)
        hf.pop("quantization_config", None)  # says how a checkpoint is stored: weights.py adds it
        for f in dataclasses.fields(self):
            if f.name not in ("yarn", "extra"):
                hf[f.name] = getattr(self, f.name)
        is_v3 = self.model_type == "deepseek_v3"
        hf["architectures"] = ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"]
        if is_v3:
            hf["topk_method"] = "noaux_tc"
        else:
            hf["topk_method"] = "greedy" if self.n_group == 1 else "group_limited_greedy"
        hf["num_key_value_heads"] = self.num_attention_heads
        hf["hidden_act"] = "silu"
        hf["tie_word_embeddings"] = False
        if self.yarn:
            hf["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(self.yarn)}
        else:
            hf["rope_scaling"] = None
        return hf

    @classmethod
    def load(cls, directory: str | Path) -> DeepseekConfig:
        """Read `directory`/config.json."""
        return cls.from_hf(read_config_json(directory))

    # ---- validation -----------------------------------------------------------------------------

    def _check_sizes(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"{f.name}: expected an integer, got {value!r}")
        at_least_zero = ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")
        for f in dataclasses.fields(self):
            if f.type == "int" and getattr(self, f.name) < (0 if f.name in at_least_zero else 1):
                raise ValueError(f"{f.name}: expected a positive size, got {getattr(self, f.name)}")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank: expected a positive size or None: {self.q_lora_rank}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim: expected an even size: {self.qk_rope_head_dim}")
        if self.torch_dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise ValueError(f"torch_dtype: expected a floating-point name: {self.torch_dtype!r}")

    def _check_routing(self) -> None:
        if self.scoring_func not in ("sigmoid", "softmax"):
            raise ValueError(f"scoring_func: expected sigmoid or softmax: {self.scoring_func!r}")
        if self.scoring_func == "softmax" and self.norm_topk_prob:
            raise ValueError("norm_topk_prob: expected False with scoring_func='softmax' (V2)")
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts: expected a multiple of n_group {self.n_group}, "
                f"got {self.n_routed_experts}"
            )
        if self.topk_group > self.n_group:
            raise ValueError(
                f"topk_group: expected at most n_group {self.n_group}: {self.topk_group}"
            )
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok: expected at most the {reachable} experts of "
                f"{self.topk_group} groups, got {self.num_experts_per_tok}"
            )
        if self.scoring_func == "sigmoid" and self.n_routed_experts // self.n_group < 2:
            raise ValueError("n_group: a group is scored by its best two experts; it has only one")


def read_config_json(directory: str | Path) -> dict[str, Any]:
    """The raw mapping of `directory`/config.json; ValueError if it is not a JSON object."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no config.json in the checkpoint directory")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(hf, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(hf).__name__}")
    return hf


def _refuse_unsupported(hf: dict[str, Any]) -> None:
    for name, expected in _REQUIRED.items():
        value = hf.pop(name, expected)
        if value not in (expected, None):
            raise ValueError(f"{name}: only {expected!r} is supported, got {value!r}")
    heads, kv_heads = hf.get("num_attention_heads"), hf.get("num_key_value_heads")
    if kv_heads is not None and heads is not None and kv_heads != heads:
        raise ValueError(
            f"num_key_value_heads: MLA has one key and value per head: "
            f"expected {heads}, got {kv_heads}"
        )


def _read_routing(hf: dict[str, Any], model_type: str) -> None:
    """Fold topk_method into the fields that this model routes by."""
    is_v3 = model_type == "deepseek_v3"
    method = hf.get("topk_method") or ("noaux_tc" if is_v3 else "greedy")
    allowed = ("noaux_tc",) if is_v3 else ("greedy", "group_limited_greedy")
    if method not in allowed:
        raise ValueError(f"topk_method: expected one of {allowed} for {model_type}: {method!r}")
    hf.setdefault("scoring_func", "sigmoid" if is_v3 else "softmax")
    if method == "greedy":
        hf["n_group"] = hf["topk_group"] = 1


def _read_rope(hf: dict[str, Any]) -> tuple[float, YarnConfig | None]:
    """(theta, YaRN or None) from `rope_scaling` (published form) or `rope_parameters`."""
    rope = dict(hf.pop("rope_parameters", None) or {})
    rope.update(hf.pop("rope_scaling", None) or {})
    theta = float(rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ValueError(f"rope_scaling.type: expected 'yarn' or 'default', got {kind!r}")
    if rope.get("factor") is None:
        raise ValueError("rope_scaling.factor: YaRN needs a factor, got none")
    if rope.get("attention_factor") is not None or not rope.get("truncate", True):
        raise ValueError("rope_scaling: attention_factor and truncate=False are not supported")
    names = {f.name for f in dataclasses.fields(YarnConfig)}
    values = {name: value for name, value in rope.items() if name in names and value is not None}
    # Absent mscales mean 0 in others' readers: no m^2, and the full magnitude on cos and sin.
    values.setdefault("mscale", 0.0)
    values.setdefault("mscale_all_dim", 0.0)
    if "original_max_position_embeddings" not in values and "max_position_embeddings" in hf:
        values["original_max_position_embeddings"] = hf["max_position_embeddings"]
    return theta, YarnConfig(**values)
