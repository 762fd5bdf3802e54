"""Triton kernels in the manner of its tutorials, compiled for a GPU that is not here.

`python triton_kernels.py FOLDER NAME TARGET` writes FOLDER/NAME.TARGET.ptx and .json. A process of
its own, because Triton's interpreter, where it is switched on, would leave nothing to compile.
"""

import json
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def softmax(x_ptr, y_ptr, ld, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * ld + column, mask=column < n, other=-float("inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * ld + column, e / tl.sum(e, 0), mask=column < n)


@triton.jit
def matmul(a_ptr, b_ptr, d_ptr, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """D[m, n] = A[m, k] B[k, n], bf16."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, k, BK):
        inside = k0 + depth < k
        a = tl.load(
            a_ptr + row[:, None] * k + (k0 + depth)[None, :],
            mask=(row < m)[:, None] & inside[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + (k0 + depth)[:, None] * n + column[None, :],
            mask=inside[:, None] & (column < n)[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total)
    tl.store(
        d_ptr + row[:, None] * n + column[None, :],
        total.to(tl.bfloat16),
        mask=(row < m)[:, None] & (column < n)[None, :],
    )


@triton.jit
def attention(
    q_ptr, k_ptr, v_ptr, o_ptr, s, t, scale, BS: tl.constexpr, BT: tl.constexpr, D: tl.constexpr
):
    """One head a program: O[s, D] = softmax(scale Q K^T, causal, ends aligned) V; bf16."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BS + tl.arange(0, BS)
    d = tl.arange(0, D)
    q = tl.load(
        q_ptr + (head * s + row)[:, None] * D + d[None, :], mask=(row < s)[:, None], other=0.0
    )
    top = tl.full((BS,), -float("inf"), tl.float32)
    total = tl.zeros((BS,), tl.float32)
    out = tl.zeros((BS, D), tl.float32)
    for t0 in range(0, t, BT):
        key = t0 + tl.arange(0, BT)
        inside = (key < t)[:, None]
        k = tl.load(k_ptr + (head * t + key)[:, None] * D + d[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptr + (head * t + key)[:, None] * D + d[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * (scale * 1.44269504)
        seen = (key[None, :] <= row[:, None] + t - s) & (key < t)[None, :]
        scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(tl.bfloat16), v, out * shrink[:, None])
        top = new_top
    tl.store(
        o_ptr + (head * s + row)[:, None] * D + d[None, :],
        (out / total[:, None]).to(tl.bfloat16),
        mask=(row < s)[:, None],
    )


KERNELS = {
    "softmax": (softmax, {"x_ptr": "*fp32", "y_ptr": "*fp32", "ld": "i32", "n": "i32"}),
    "matmul": (
        matmul,
        {"a_ptr": "*bf16", "b_ptr": "*bf16", "d_ptr": "*bf16", "m": "i32", "n": "i32", "k": "i32"},
    ),
    "attention": (
        attention,
        dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), "*bf16")
        | {"s": "i32", "t": "i32", "scale": "fp32"},
    ),
}
CONSTANTS = {
    "softmax": {"BLOCK": 1024},
    "matmul": {"BM": 64, "BN": 64, "BK": 64},
    "attention": {"BS": 64, "BT": 64, "D": 64},
}
ALIGNED = ("ld", "n", "k")  # multiples of 16, as Triton finds out at a launch


def compile_kernel(name: str, target: str):
    kernel, signature = KERNELS[name]
    constants = CONSTANTS[name]
    signature = signature | dict.fromkeys(constants, "constexpr")
    divisible = [["tt.divisibility", 16]]
    attributes = {
        (kernel.arg_names.index(n),): divisible
        for n, kind in signature.items()
        if kind.startswith("*") or n in ALIGNED
    }
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, places, attributes)
    capability = int(target.removeprefix("sm_"))
    options = {"num_warps": 4, "num_stages": 3}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


if __name__ == "__main__":
    folder, name, target = sys.argv[1:]
    built = compile_kernel(name, target)
    stem = Path(folder) / f"{name}.{target}"
    stem.with_name(stem.name + ".ptx").write_text(built.asm["ptx"])
    facts = {
        "name": built.metadata.name,
        "num_warps": built.metadata.num_warps,
        "shared": built.metadata.shared,
        "global_scratch_size": built.metadata.global_scratch_size,
        "constants": CONSTANTS[name],
    }
    stem.with_name(stem.name + ".json").write_text(json.dumps(facts))
