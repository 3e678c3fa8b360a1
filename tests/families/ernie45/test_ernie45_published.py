"""The published ERNIE-4.5-0.3B shape with random bf16 weights, 0.7 GB: round trip, and logits of 64 positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from published import assert_published_holds, verify_published

PUBLISHED = {
    "architectures": ["Ernie4_5ForCausalLM"],
    "model_type": "ernie4_5",
    "vocab_size": 103424,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "use_bias": False,
    "use_cache": True,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def test_published_shape(tmp_path: Path, record_property: Any) -> None:
    from exaone_bridge.checkpoint.tiny import write_random

    folder = tmp_path / "ERNIE-4.5-0.3B"
    write_random(folder, PUBLISHED)
    found = verify_published(folder, tmp_path)
    record_property("figures", found)
    assert_published_holds(found)
    assert 0.5 < found["above_gib"] < 5
