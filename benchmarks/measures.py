"""What all benchmarks of training measure with: configs, operations, times on the GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch  # before transformer_engine: the two bring different versions of cuDNN

from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.schema.hf_config import with_num_layers


def truncate(name: str, layers: int) -> dict[str, Any]:
    """Return a published config with its first layers only."""
    config = with_num_layers(CONFIGS[name], layers)
    if "moe_layer_end_index" in config:
        config["moe_layer_end_index"] = layers - 1
    return config


def config_of(fields: Mapping[str, Any]) -> Any:
    """Return Transformers' config of these fields."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
    config.architectures = list(fields["architectures"])
    return config


def operations(config: Any, seq: int) -> float:
    """Return the floating-point operations of one forward and backward of one sequence."""
    fields = config.to_dict()
    heads, kv = fields["num_attention_heads"], fields["num_key_value_heads"]
    hidden, dim, layers = fields["hidden_size"], fields["head_dim"], fields["num_hidden_layers"]
    per_token = layers * hidden * (2 * heads + 2 * kv) * dim + hidden * fields["vocab_size"]
    experts = fields.get("moe_num_experts") or fields.get("num_experts") or 0
    if experts and "moe_k" in fields:
        used = fields["moe_k"] + fields["moe_num_shared_experts"]
        moe_layers = range(fields["moe_layer_start_index"], layers)
    elif experts:
        used = fields["num_experts_per_tok"] + fields["num_shared_experts"]
        kinds = enumerate(fields["mlp_layer_types"])
        moe_layers = [layer for layer, kind in kinds if kind == "sparse"]
    for layer in range(layers):
        if experts and layer in moe_layers:
            per_token += 3 * hidden * fields["moe_intermediate_size"] * used + hidden * experts
        else:
            per_token += 3 * hidden * fields["intermediate_size"]
    attention = 0.0
    for kind in fields.get("layer_types") or ["full_attention"] * layers:
        window = min(fields["sliding_window"], seq) if kind == "sliding_attention" else seq
        keys = window * (window + 1) / 2 + (seq - window) * window  # over all queries
        attention += 4 * keys * heads * dim
    return 3 * (2 * per_token * seq + attention)


def milliseconds(step: Callable[[], None]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def median_ms(step: Callable[[], None], warmup: int = 3, repeats: int = 10) -> float:
    for _ in range(warmup):
        step()
    return statistics.median(milliseconds(step) for _ in range(repeats))


def matmul_rate() -> float:
    """Return the operations per second of bf16 8192 x 8192 x 8192 products of random data."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median_ms(lambda: torch.mm(left, right), 3, 5) * 1e3
