"""Training and decoding speed of a small DeepSeek-V3 by backend, in turn in one process:

    python -m bench.model_speed [--backends ref,cpu] [--rounds 3] [--json]

Tokens per second by the clock and by processor time; the latter holds still on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

import dskernels as dsk
from model import DeepseekConfig, DeepseekV3

SIZES = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    moe_intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    n_routed_experts=32,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    kv_lora_rank=128,
    q_lora_rank=192,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    yarn=None,
    max_position_embeddings=2048,
    num_nextn_predict_layers=1,
    initializer_range=0.02,
)


def build(dtype: torch.dtype) -> DeepseekV3:
    torch.manual_seed(0)
    return DeepseekV3(DeepseekConfig(**SIZES)).to(dtype)


def training(dtype: torch.dtype, batch: int, length: int) -> tuple[Callable[[], object], int]:
    """Forward, cross entropy and backward of one step (the optimizer is the same everywhere)."""
    model = build(dtype).train()
    tokens = torch.randint(SIZES["vocab_size"], (batch, length))

    def step():
        out = model.forward_train(tokens)
        loss = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()
        )
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step, batch * length


def decoding(dtype: torch.dtype, batch: int, new: int) -> tuple[Callable[[], object], int]:
    model = build(dtype).eval()
    prompts = torch.randint(2, SIZES["vocab_size"], (batch, 64))
    return lambda: model.generate(prompts, max_new_tokens=new, eos_token_id=None), batch * new


def measure(cases: dict, backends: list[str], rounds: int) -> list[dict]:
    rows = []
    for name, (call, tokens) in cases.items():
        rates: dict[str, list[tuple[float, float]]] = {backend: [] for backend in backends}
        for done in range(rounds + 1):  # the first round warms up
            for backend in backends:
                with dsk.use_backend(backend):
                    begin, used = time.perf_counter(), time.process_time()
                    call()
                    took = time.perf_counter() - begin, time.process_time() - used
                if done:
                    rates[backend].append((tokens / took[0], tokens / took[1]))
        for backend, pairs in rates.items():
            clock, processor = (statistics.median(values) for values in zip(*pairs))
            rows.append(
                {
                    "case": name,
                    "backend": backend,
                    "tokens_per_second": clock,
                    "tokens_per_processor_second": processor,
                }
            )
    return rows


def main() -> None:
    parse = argparse.ArgumentParser(prog="python -m bench.model_speed", description=__doc__)
    parse.add_argument("--backends", default="ref,cpu")
    parse.add_argument("--rounds", type=int, default=3)
    parse.add_argument("--threads", type=int, default=torch.get_num_threads())
    parse.add_argument("--json", action="store_true")
    args = parse.parse_args()
    torch.set_num_threads(args.threads)
    cases = {
        "train bf16, 2 x 256 tokens": training(torch.bfloat16, 2, 256),
        "train fp32, 2 x 256 tokens": training(torch.float32, 2, 256),
        "decode bf16, 1 sequence": decoding(torch.bfloat16, 1, 16),
        "decode bf16, 8 sequences": decoding(torch.bfloat16, 8, 8),
    }
    rows = measure(cases, args.backends.split(","), args.rounds)
    if args.json:
        print(json.dumps({"threads": args.threads, "sizes": SIZES, "rows": rows}))
        return
    for row in rows:
        print(
            f"{row['case']:28s} {row['backend']:4s} {row['tokens_per_second']:9.1f} tokens/s, "
            f"{row['tokens_per_processor_second']:9.1f} per processor second"
        )


if __name__ == "__main__":
    main()
