"""Compile the Triton kernels for a GPU that is not here: `python -m dskernels.triton.compile`.

The PTX runs in the emulator, and the listing shows what the compiler makes of a kernel. Targets:
sm_80, sm_89, sm_90 (PTX), gfx942 (AMD, compiled only). Not possible while Triton's interpreter is
switched on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

ALIGNED_SIZES = ("k", "n", "d", "ld_a", "ld_b", "ld_x", "ld_sfa", "ld_sfb", "ld_scale", "ld_row")
ALIGNED_SIZES += ("page",)
TARGETS = ("sm_80", "sm_89", "sm_90", "gfx942")


class Variant(NamedTuple):
    """One kernel with its argument types and compile-time values."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] | None = None  # of the compiler, where the launch sets them


def gemm_variant(kind: int, native_fp8: bool, block_m: int, gather: bool = False) -> Variant:
    """The GEMM kernel. kind: 0 dense, 1 contiguous, 2 masked, bf16 out; 3 along k: both scales by
    row, fp32 out, C added. gather: contiguous groups whose rows are named one by one."""
    from . import gemm

    by_row = kind == gemm.ALONG_K
    pointers = {"a_ptr": "*u8", "sfa_ptr": "*fp32", "b_ptr": "*u8", "sfb_ptr": "*fp32"}
    pointers |= {"d_ptr": "*fp32" if by_row else "*bf16"}
    pointers |= {"counts_ptr": "*i32", "rows_ptr": "*i32"}
    pointers |= {"c_ptr": "*fp32" if by_row else "*bf16", "bias_ptr": "*bf16"}
    sizes = _integers("m", "n", "k", "num_groups", "ld_a", "ld_b", "ld_sfa", "ld_sfb", "plane_sfa")
    constants = {"KIND": kind, "BY_ROW": by_row, "GATHER": gather, "NATIVE_FP8": native_fp8}
    constants |= {"HAS_C": by_row, "HAS_BIAS": False, "BLOCK_M": block_m}
    constants |= {"BLOCK_N": gemm.BLOCK_N, "BLOCK_K": gemm.BLOCK_K}
    return Variant(gemm.gemm_kernel, pointers | sizes, constants)


def _integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def moe_variants() -> dict[str, Variant]:
    """V3's gate from bf16 hidden states, the three kernels of the permutation, the weighted sum."""
    from . import moe
    from . import moe_kernels as kernels

    gate = {"x_ptr": "*bf16", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "topk_idx_ptr": "*i64"}
    gate |= {"topk_weights_ptr": "*fp32", "scores_ptr": "*fp32"}
    gate |= _integers("tokens", "depth", "experts", "ld_x", "num_groups", "topk_group", "topk")
    gate_constants = {"SOFTMAX": False, "HAS_BIAS": True, "TOP2": True, "RENORMALIZE": True}
    gate_constants |= {"TOKENS": moe.GATE_TOKENS, "EXPERTS": 256, "GROUPS": 8, "TOPK": 8}
    gate_constants |= {"SLAB": moe.GATE_SLAB}
    slots = {"topk_idx_ptr": "*i64"}
    counts = {"expert_map_ptr": "*i64", "chosen_ptr": "*i64", "counts_ptr": "*i32"}
    counts |= _integers("slots", "topk", "shared", "replicas", "experts")
    places = {"first_row_ptr": "*i64", "row_map_ptr": "*i64"} | _integers("slots", "experts")
    copy = {"x_ptr": "*u8", "row_map_ptr": "*i64", "out_ptr": "*u8"}
    copy |= _integers("topk", "columns", "x_row", "x_column", "out_row", "out_column")
    rows = {"y_ptr": "*bf16", "row_map_ptr": "*i64", "weights_ptr": "*fp32", "out_ptr": "*bf16"}
    return {
        "moe_gate": Variant(
            kernels.gate_kernel, gate | {"scale": "fp32"}, gate_constants, moe.GATE_OPTIONS
        ),
        "moe_count": Variant(
            kernels.count_kernel, slots | counts,
            {"MAPPED": True, "CHUNK": moe.CHUNK, "BLOCK": moe.EXPERTS_BLOCK},
        ),
        "moe_place": Variant(kernels.place_kernel, slots | places, {"CHUNK": moe.CHUNK}),
        "moe_copy_rows": Variant(kernels.copy_rows_kernel, copy, {"BLOCK": moe.RUN}),
        "moe_unpermute": Variant(
            kernels.unpermute_kernel, rows | _integers("topk", "shared", "depth"),
            {"WEIGHTED": True, "BLOCK": moe.RUN}, moe.EXACT,
        ),
    }  # fmt: skip


def mla_variants() -> dict[str, Variant]:
    """Decode of up to 16 rows a request from either cache, the joining of its splits, prefill."""
    from . import mla, mla_prefill

    pointers = {"q_ptr": "*bf16", "kv_ptr": "*bf16", "rope_ptr": "*bf16", "scale_ptr": "*fp32"}
    pointers |= {"table_ptr": "*i32", "lens_ptr": "*i32", "out_ptr": "*fp32", "lse_ptr": "*fp32"}
    sizes = dict.fromkeys(("s", "h", "page", "ld_table", "ld_page", "ld_row"), "i32")
    widths = {"DL": mla.LATENT, "DR": mla.ROPE}
    constants = {"CAUSAL": True, "FIXED": 0, "BLOCK_R": 16, "BLOCK_T": mla.BLOCK_T, "WIDE": False}
    signature = pointers | sizes | {"scale_log2": "fp32"}
    join = dict.fromkeys(("partial_ptr", "partial_lse_ptr"), "*fp32")
    join |= {"out_ptr": "*bf16", "lse_ptr": "*fp32"} | dict.fromkeys(
        ("s", "h", "num_splits"), "i32"
    )
    found = {"mla_combine": Variant(mla.combine_kernel, join, {"DL": mla.LATENT})}
    for fp8, name in ((False, "mla_decode"), (True, "mla_decode_fp8")):
        cache = {"kv_ptr": "*u8" if fp8 else "*bf16"}
        found[name] = Variant(
            mla.decode_kernel, signature | cache, constants | widths | {"FP8": fp8}
        )
    prefill = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*bf16")
    prefill |= {"ends_q_ptr": "*i32", "ends_k_ptr": "*i32", "out_ptr": "*bf16", "lse_ptr": "*fp32"}
    prefill |= _integers("t", "h", "b") | {"scale_log2": "fp32"}
    sizes = {"DN": mla_prefill.NOPE, "DR": mla_prefill.ROPE, "DV": mla_prefill.VALUES}
    sizes |= {"BLOCK_Q": mla_prefill.BLOCK_Q, "BLOCK_K": mla_prefill.BLOCK_K}
    found["mla_prefill"] = Variant(
        mla_prefill.prefill_kernel,
        prefill,
        sizes | {"CAUSAL": True, "WIDE": False},
        mla_prefill.OPTIONS,
    )
    return found


def variants(target: str) -> dict[str, Variant]:
    """Every kernel, as it would be launched on `target`, by a name for files and reports."""
    from . import rowwise
    from . import rowwise_kernels as kernels

    native = target in ("sm_89", "sm_90")
    bf16, u8, fp32 = "*bf16", "*u8", "*fp32"
    quantize = {"x_ptr": bf16, "data_ptr": u8, "scale_ptr": fp32}
    strides = ("m", "k", "ld_x", "ld_scale", "plane_rows", "plane_scale")
    blocks = {"E5M6": False, "ROWS": rowwise.ROWS, "GROUP": rowwise.GROUP}
    norm = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "sum_ptr"), bf16)
    norm |= {"scale_ptr": fp32, "d": "i32", "eps": fp32.removeprefix("*")}
    norm |= _integers("plane_rows", "ld_scale", "plane_scale")
    norm_constants = {"HAS_RESIDUAL": True, "POWER_OF_TWO": False, "BLOCK": 8192, "GROUP": 128}
    transpose = {"x_ptr": bf16, "x_scale_ptr": fp32, "data_ptr": u8, "scale_ptr": fp32}
    transpose |= _integers("m", "k", "ld_scale", "block_rows", "block_columns")
    transpose |= _integers("x_scale_row", "x_scale_column")
    transpose_constants = {"POWER_OF_TWO": False, "COLUMNS": rowwise.TRANSPOSE_COLUMNS}
    transpose_constants |= {"GROUP": rowwise.GROUP}
    rope = {"x_ptr": bf16, "cos_ptr": fp32, "sin_ptr": fp32, "y_ptr": bf16}
    dequantize = {"data_ptr": u8, "scale_ptr": fp32, "y_ptr": bf16}
    dequantize |= _integers("m", "k", "block_rows", "block_columns", "scale_rows", "scale_columns")
    pack = _integers("num_words", "k", "words_per_row")
    found = {
        "quantize": Variant(
            kernels.quantize_kernel,
            quantize | _integers(*strides),
            {"SWIGLU": False, "POWER_OF_TWO": False} | blocks,
        ),
        "quantize_e5m6": Variant(
            kernels.quantize_kernel,
            quantize | {"data_ptr": "*i16"} | _integers(*strides),
            {"SWIGLU": False, "POWER_OF_TWO": True} | blocks | {"E5M6": True},
        ),
        "swiglu_quantize": Variant(
            kernels.quantize_kernel,
            quantize | _integers(*strides),
            {"SWIGLU": True, "POWER_OF_TWO": True} | blocks,
        ),
        "quantize_block": Variant(
            kernels.quantize_block_kernel,
            quantize | _integers("m", "k"),
            {"POWER_OF_TWO": False, "GROUP": rowwise.GROUP},
        ),
        "quantize_transpose": Variant(
            kernels.quantize_transpose_kernel, transpose, {"SCALED": False} | transpose_constants
        ),
        "requantize_transpose": Variant(
            kernels.quantize_transpose_kernel,
            transpose | {"x_ptr": u8},
            {"SCALED": True} | transpose_constants,
        ),
        "rms_norm": Variant(kernels.rms_norm_kernel, norm, {"QUANTIZE": False} | norm_constants),
        "rms_norm_quantize": Variant(
            kernels.rms_norm_kernel, norm | {"y_ptr": u8}, {"QUANTIZE": True} | norm_constants
        ),
        "swiglu": Variant(
            kernels.swiglu_kernel, {"x_ptr": bf16, "y_ptr": bf16, "k": "i32"}, {"BLOCK": 1024}
        ),
        "swiglu_backward": Variant(
            kernels.swiglu_backward_kernel,
            {"grad_ptr": bf16, "x_ptr": bf16, "dx_ptr": bf16, "k": "i32"},
            {"BLOCK": 1024},
        ),
        "rope": Variant(
            kernels.rope_kernel,
            rope | {"heads": "i32", "half": "i32"},
            {"INTERLEAVED": True, "INVERSE": False, "BLOCK": 32},
        ),
        "dequantize": Variant(kernels.dequantize_kernel, dequantize, {"E4M3": True, "BLOCK": 1024}),
        "pack_e5m6": Variant(
            kernels.pack_e5m6_kernel, {"wide_ptr": "*i16", "packed_ptr": u8} | pack, {"BLOCK": 1024}
        ),
        "unpack_e5m6": Variant(
            kernels.unpack_e5m6_kernel,
            {"packed_ptr": u8, "wide_ptr": "*i16"} | pack,
            {"BLOCK": 1024},
        ),
    }
    found |= mla_variants() | moe_variants()
    for kind, name in enumerate(("dense", "contiguous", "masked", "along_k")):
        found[f"gemm_{name}"] = gemm_variant(kind, native, 64 if name == "masked" else 128)
    found["gemm_rows"] = gemm_variant(1, native, 128, gather=True)
    return found


def compile_for(variant: Variant, target: str) -> Any:
    """Triton's compiled kernel: `.asm["ptx"]` (or "amdgcn"), `.metadata` (name, shared, num_warps).

    Raises ValueError for an unknown target, RuntimeError while the interpreter is on.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import interpreting

    if target not in TARGETS:
        raise ValueError(f"target: expected one of {TARGETS}, got {target!r}")
    if interpreting():
        raise RuntimeError("Triton's interpreter is on (TRITON_INTERPRET=1): nothing to compile")
    gpu = (
        GPUTarget("hip", target, 64)
        if target.startswith("gfx")
        else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    )
    signature = variant.signature | dict.fromkeys(variant.constants, "constexpr")
    # At launch Triton specialises on arguments that are multiples of 16; here that is assumed of
    # addresses, row widths and row strides, as it holds for the model's shapes.
    names = variant.kernel.arg_names
    aligned = [n for n, t in variant.signature.items() if t.startswith("*") or n in ALIGNED_SIZES]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs=variant.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=gpu, options=variant.options)


def launch_facts(variant: Variant, compiled: Any) -> dict[str, Any]:
    """What a launch needs beside the listing: entry point, threads, memory, compile-time values."""
    metadata = compiled.metadata
    return {
        "name": metadata.name,
        "num_warps": metadata.num_warps,
        "shared": metadata.shared,
        "global_scratch_size": getattr(metadata, "global_scratch_size", 0),
        "constants": variant.constants,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dskernels.triton.compile", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--kernel", help="one kernel only (default: all)")
    parser.add_argument(
        "--out", type=Path, help="folder for the PTX or assembly and, beside it, launch facts"
    )
    options = parser.parse_args(arguments)
    chosen = variants(options.target)
    if options.kernel:
        if options.kernel not in chosen:
            parser.error(f"--kernel: expected one of {sorted(chosen)}, got {options.kernel}")
        chosen = {options.kernel: chosen[options.kernel]}
    for name, variant in chosen.items():
        compiled = compile_for(variant, options.target)
        kind = "amdgcn" if options.target.startswith("gfx") else "ptx"
        text = compiled.asm[kind]
        print(
            f"{name:16} {options.target:7} {kind:7} {len(text.splitlines()):5} lines, "
            f"{compiled.metadata.num_warps} warps, {compiled.metadata.shared} bytes shared"
        )
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            stem = options.out / f"{name}.{options.target}"
            stem.with_name(f"{stem.name}.{kind}").write_text(text)
            facts = json.dumps(launch_facts(variant, compiled), indent=1)
            stem.with_name(f"{stem.name}.json").write_text(facts + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
