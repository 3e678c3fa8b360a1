"""The published EXAONE-4.0-1.2B shape with random bf16 weights, 2.6 GB: round trip, logits, and peak memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from published import assert_published_holds, verify_published

PUBLISHED = {
    "architectures": ["Exaone4ForCausalLM"],
    "model_type": "exaone4",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 65536,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "use_cache": True,
    "tie_word_embeddings": True,
    "sliding_window": None,
    "sliding_window_pattern": 0,
    "layer_types": ["full_attention"] * 30,
    "bos_token_id": 1,
    "eos_token_id": 361,
    "pad_token_id": 0,
    "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1e6,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from exaone_bridge.checkpoint.tiny import write_random

    folder = tmp_path_factory.mktemp("published") / "EXAONE-4.0-1.2B"
    write_random(folder, PUBLISHED)
    return folder


def test_published_shape(published: Path, tmp_path: Path, record_property: Any) -> None:
    found = verify_published(published, tmp_path)
    record_property("figures", found)
    assert_published_holds(found)
    assert (
        found["setup"]["streaming"] and 0.5 < found["above_gib"] < 4
    )  # the weights alone have 2.4 in bf16, 4.8 in fp32
