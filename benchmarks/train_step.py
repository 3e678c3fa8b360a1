"""Measures forward and backward of one training step on one GPU, and the same in Transformers.

    python benchmarks/train_step.py --model exaone4-1.2b --seq 8192 --variants megatron,transformers

Prints for each variant milliseconds, tokens per second, the fraction of the bf16 8192^3 matmul rate
measured in the same run, and peak memory; then the ratios to Transformers with SDPA attention.
Floating-point operations are those that the model needs: 2 per parameter and token in every linear
layer, and for attention only the keys that are visible under causality and the window; three times
that for forward and backward. Variants are interleaved.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch  # before transformer_engine: the two bring different versions of cuDNN
from measures import config_of, matmul_rate, milliseconds, operations, truncate

import exaone_bridge
from exaone_bridge.recipes.published import CONFIGS

WARM_UP, ROUNDS = 3, 8


MODELS: dict[str, dict[str, Any]] = {
    "exaone4-1.2b": CONFIGS["exaone4_1p2b"],
    "exaone4-32b-8-layers": truncate("exaone4_32b", 8),
    "ernie45-0.3b": CONFIGS["ernie45_0p3b"],
    "ernie45-21b-6-layers": truncate("ernie45_21b_a3b", 6),
    # A dense layer, then an MoE layer; 16 of 128 experts, and both kinds of attention.
    "k-exaone-2-layers": truncate("k_exaone_236b_a23b", 2)
    | {"num_experts": 16}
    | {"layer_types": ["sliding_attention", "full_attention"], "sliding_windows": [128, 0]},
}


def megatron(config: Any, tokens: torch.Tensor, overrides: dict[str, Any]) -> Callable[[], None]:
    from megatron.bridge import AutoBridge

    provider = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    provider.apply_overrides_and_finalize(torch.bfloat16, overrides)
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    model.train()
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            torch.nn.init.normal_(parameter, std=config.initializer_range)
    positions = torch.arange(tokens.shape[1] - 1, device="cuda")[None]
    parameters = list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        model(
            tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous()
        ).float().mean().backward()

    return step


def megatron_cuda_graph(
    config: Any, tokens: torch.Tensor, overrides: dict[str, Any]
) -> Callable[[], None]:
    """Return the same step as one CUDA graph, without the cost of launching kernels."""
    step = megatron(config, tokens, overrides)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def full_attention_everywhere(
    config: Any, tokens: torch.Tensor, overrides: dict[str, Any]
) -> Callable[[], None]:
    """Return the step of the same model with full attention in every layer."""
    return megatron(config_with_full_attention(config), tokens, overrides)


def transformers(
    config: Any, tokens: torch.Tensor, overrides: dict[str, Any]
) -> Callable[[], None]:
    from transformers import AutoModelForCausalLM

    has_experts = any(getattr(config, name, None) for name in ("moe_num_experts", "num_experts"))
    experts = {"experts_implementation": "grouped_mm"} if has_experts else {}
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", **experts
        ).train()
    for name, parameter in model.named_parameters():
        if name.endswith(
            "mlp.gate.weight"
        ):  # zeros, which would send every token to the same experts
            torch.nn.init.normal_(parameter, std=config.initializer_range)

    parameters = list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        model(
            tokens[:, :-1], labels=tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False
        ).loss.backward()

    return step


VARIANTS: dict[str, tuple[Callable[..., Callable[[], None]], dict[str, Any]]] = {
    "megatron": (megatron, {}),
    "megatron-graphed": (megatron_cuda_graph, {}),
    "megatron-full-attention": (full_attention_everywhere, {}),
    "megatron-compiled-add": (megatron, {"bias_dropout_fusion": True}),
    "megatron-no-permute-fusion": (megatron, {"moe_permute_fusion": False}),
    "megatron-allgather": (megatron, {"moe_token_dispatcher_type": "allgather"}),
    "megatron-te-cross-entropy": (megatron, {"cross_entropy_fusion_impl": "te"}),
    "transformers": (transformers, {}),
}


def measure(
    names: list[str],
    config: Any,
    seq: int,
    mbs: int,
    profile: bool,
    *,
    variants: Mapping[str, tuple[Callable[..., Callable[[], None]], dict[str, Any]]] = VARIANTS,
    batch: Any = None,
    needs: Callable[[Any, int], float] = operations,
) -> list[dict[str, Any]]:
    """Measure the steps of all variants, interleaved, so that other work affects all alike.

    Args:
        variants: name -> (what makes a step of configuration, batch and overrides; the overrides).
        batch: what steps are made of; None: random tokens.
        needs: floating-point operations of one sequence.
    """
    tokens = (
        torch.randint(config.vocab_size, (mbs, seq + 1), device="cuda") if batch is None else batch
    )
    steps: dict[str, Callable[[], None]] = {}
    rows = []
    for name in names:
        build, overrides = variants[name]
        row: dict[str, Any] = {"variant": name, "ms": None}
        rows.append(row)
        step: Callable[[], None] | None = None
        try:
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            step = build(config, tokens, overrides)
            step()
            torch.cuda.reset_peak_memory_stats()
            for _ in range(WARM_UP):
                step()
            row["peak_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 1)
            steps[name] = step
        except torch.OutOfMemoryError:
            row["out_of_memory"] = True
            step = None
    times: dict[str, list[float]] = {name: [] for name in steps}
    rates = []
    for _ in range(ROUNDS):
        rates.append(matmul_rate())
        for name, step in steps.items():
            step()
            times[name].append(milliseconds(step))
    rate = statistics.median(rates)
    print(f"matmul {rate / 1e12:.0f} TFLOP/s, {torch.cuda.get_device_name()}")
    for row in rows:
        if row["variant"] not in steps:
            continue
        taken = statistics.median(times[row["variant"]])
        measured = (
            config_with_full_attention(config)
            if row["variant"] == "megatron-full-attention"
            else config
        )
        needed = mbs * needs(measured, seq)
        row |= {
            "ms": round(taken, 1),
            "tokens_per_s": round(mbs * seq / taken * 1e3),
            "of_matmul_rate": round(needed / (taken / 1e3) / rate, 3),
        }
        if profile:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA]
            ) as recorded:
                steps[row["variant"]]()
            print(
                recorded.key_averages().table(
                    sort_by="cuda_time_total", row_limit=60, max_name_column_width=60
                )
            )
    for row in rows:  # printed before the ratios, so that an interrupted run keeps them
        print(json.dumps(row), flush=True)
    return rows


def config_with_full_attention(config: Any) -> Any:
    config = copy.deepcopy(config)
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    config.sliding_windows = None
    return config


def compare(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Print the ratios to Transformers; return variant -> its results, of those that ran."""
    by_name = {row["variant"]: row for row in rows if row["ms"]}
    reference = by_name.get("transformers")
    for row in by_name.values():
        if reference and row is not reference:
            ratio = reference["ms"] / row["ms"]
            print(
                f"{row['variant']}: {ratio:.2f} x tokens/s, "
                f"{row['peak_gib'] / reference['peak_gib']:.2f} x memory"
            )
    return by_name


def arguments(
    description: str | None, models: Iterable[str], model: str
) -> argparse.ArgumentParser:
    """Return the parser of the arguments that all benchmarks of a training step take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=models, default=model)
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--mbs", type=int, default=1, help="sequences in the batch")
    parser.add_argument("--variants", default="megatron,transformers")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--apart", action="store_true", help="one variant after the other: no room for two"
    )
    return parser


@contextlib.contextmanager
def single_rank() -> Iterator[None]:
    """Initialise one rank on the first GPU, with our bridges registered."""
    exaone_bridge.supported()
    torch.cuda.set_device(0)
    os.environ.setdefault("RANK", "0")
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "nccl", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        yield
        torch.distributed.destroy_process_group()


def measure_options(
    options: argparse.Namespace, config: Any, **settings: Any
) -> dict[str, dict[str, Any]]:
    """Measure the variants that the arguments name, interleaved or one by one, and compare them."""
    names = options.variants.split(",")
    groups = [[name] for name in names] if options.apart else [names]
    sizes = options.seq, options.mbs, options.profile
    return compare([row for group in groups for row in measure(group, config, *sizes, **settings)])


def main() -> None:
    options = arguments(__doc__, MODELS, "exaone4-1.2b").parse_args()
    with single_rank():
        print(f"{options.model}, {options.mbs} x {options.seq} tokens")
        config = config_of(MODELS[options.model])
        by_name = measure_options(options, config)
        if "megatron" in by_name and "megatron-full-attention" in by_name:
            share = operations(config, options.seq) / operations(
                config_with_full_attention(config), options.seq
            )
            taken = by_name["megatron"]["ms"] / by_name["megatron-full-attention"]["ms"]
            print(
                f"hybrid: {taken:.3f} of the time with full attention only, "
                f"{share:.3f} of the operations"
            )


if __name__ == "__main__":
    main()
