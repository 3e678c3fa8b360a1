"""One training step's forward and backward on one GPU: ours beside Transformers' sdpa and beside a plain matmul.

    python benchmarks/train_step.py --model exaone4-1.2b --seq 8192 --variants ours,transformers

Prints, for each variant: milliseconds, tokens a second, the fraction of the bf16 8192^3 matmul rate that was measured
in the same run, and peak memory; then our ratios to Transformers. Floating-point operations are those that the model
needs: 2 a parameter and token in every linear, and for attention only the keys that causality and the window leave;
three times that for forward and backward.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch  # before transformer_engine: the two bring different versions of cuDNN

import exaone_bridge

S, F = "sliding_attention", "full_attention"
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, dict[str, Any]] = {
    "exaone4-1.2b": {
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "layer_types": [F] * 30,
        "max_position_embeddings": 65536,
    },
    "exaone4-32b-8-layers": {
        "vocab_size": 102400,
        "hidden_size": 5120,
        "intermediate_size": 27392,
        "num_hidden_layers": 8,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "layer_types": [S, S, S, F] * 2,
        "max_position_embeddings": 131072,
    },
}


def config_of(name: str) -> Any:
    from transformers import Exaone4Config

    config = Exaone4Config(**MODELS[name], rope_parameters=dict(ROPE), dtype="bfloat16")
    config.architectures = ["Exaone4ForCausalLM"]
    return config


def operations(config: Any, seq: int) -> float:
    """Floating-point operations of one forward and backward of one sequence."""
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden, ffn = config.hidden_size, config.intermediate_size
    linear = hidden * (2 * heads + 2 * kv) * dim + 3 * hidden * ffn
    per_token = 2 * (config.num_hidden_layers * linear + hidden * config.vocab_size)
    attention = 0.0
    for kind in config.layer_types:
        window = config.sliding_window if kind == S else seq
        window = min(window, seq)
        keys = window * (window + 1) / 2 + (seq - window) * window  # over all queries
        attention += 4 * keys * heads * dim
    return 3 * (per_token * seq + attention)


def median_ms(step: Callable[[], None], warmup: int = 3, repeats: int = 10) -> float:
    for _ in range(warmup):
        step()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def matmul_rate(size: int = 8192) -> float:
    """Operations a second of a bf16 product of random matrices."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (median_ms(lambda: torch.mm(left, right), 10, 30) / 1e3)


def ours(config: Any, tokens: torch.Tensor, overrides: dict[str, Any]) -> Callable[[], None]:
    from megatron.bridge import AutoBridge

    provider = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    provider.apply_overrides_and_finalize(torch.bfloat16, overrides)
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    model.train()
    positions = torch.arange(tokens.shape[1] - 1, device="cuda")[None]

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous()).float().mean().backward()

    return step


def transformers(config: Any, tokens: torch.Tensor, overrides: dict[str, Any]) -> Callable[[], None]:
    from transformers import AutoModelForCausalLM

    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens[:, :-1], labels=tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False).loss.backward()

    return step


VARIANTS: dict[str, tuple[Callable[..., Callable[[], None]], dict[str, Any]]] = {
    "ours": (ours, {}),
    "ours-rope-fusion": (ours, {"apply_rope_fusion": True}),
    "ours-te-cross-entropy": (ours, {"apply_rope_fusion": True, "cross_entropy_fusion_impl": "te"}),
    "transformers": (transformers, {}),
}


def measure(name: str, config: Any, seq: int, rate: float, profile: bool) -> dict[str, Any]:
    build, overrides = VARIANTS[name]
    tokens = torch.randint(config.vocab_size, (1, seq + 1), device="cuda")
    step = None
    try:
        step = build(config, tokens, overrides)
        step()
        torch.cuda.reset_peak_memory_stats()
        milliseconds = median_ms(step)
        if profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
                step()
            print(recorded.key_averages().table(sort_by="cuda_time_total", row_limit=18, max_name_column_width=60))
    except torch.OutOfMemoryError:
        return {"variant": name, "ms": None}
    finally:
        del step
        gc.collect()
        torch.cuda.empty_cache()
    return {
        "variant": name,
        "ms": round(milliseconds, 1),
        "tokens_per_s": round(seq / milliseconds * 1e3),
        "of_matmul_rate": round(operations(config, seq) / (milliseconds / 1e3) / rate, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="exaone4-1.2b")
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--variants", default="ours,transformers")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()

    exaone_bridge.supported()
    torch.cuda.set_device(0)
    os.environ.setdefault("RANK", "0")
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        rate = matmul_rate()
        print(f"{options.model}, seq {options.seq}: matmul {rate / 1e12:.0f} TFLOP/s, {torch.cuda.get_device_name()}")
        config = config_of(options.model)
        rows = [measure(name, config, options.seq, rate, options.profile) for name in options.variants.split(",")]
        for row in rows:
            print(json.dumps(row))
        theirs = next((row for row in rows if row["variant"] == "transformers"), None)
        for row in rows:
            if theirs and theirs["ms"] and row["ms"] and row is not theirs:
                ratio = theirs["ms"] / row["ms"]
                print(f"{row['variant']}: {ratio:.2f} x tokens/s, {row['peak_gib'] / theirs['peak_gib']:.2f} x memory")
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
