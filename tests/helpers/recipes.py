"""Validates a recipe's config as Megatron-Bridge's training loop does, without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

_PERMUTE = ("fused_permute", "fused_permute_with_probs", "fused_sort_chunks_by_index")
_PERMUTE += ("fused_sort_chunks_by_index_with_probs", "fused_unpermute")
_ROPE = ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd")


@contextlib.contextmanager
def transformer_engine_backend() -> Iterator[None]:
    """Let providers finalize as if Transformer Engine were installed; no model can be built."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import transformer_config
    from megatron.core.transformer.moe import moe_utils

    from exaone_bridge.modules import backend, moe_provider, provider

    stand_in = dataclasses.replace(
        backend.TORCH, name="transformer_engine", activation=torch.nn.Identity
    )
    with contextlib.ExitStack() as stack:
        for module in (provider, moe_provider):
            resolve = mock.Mock(return_value=stand_in)
            stack.enter_context(mock.patch.object(module, "resolve_backend", resolve))
        for module, names in ((moe_utils, _PERMUTE), (rope_utils, _ROPE)):
            stack.enter_context(mock.patch.multiple(module, **dict.fromkeys(names, object())))
        newest = {"is_te_min_version": lambda *_, **__: True}
        stack.enter_context(mock.patch.multiple(transformer_config, **newest))
        yield


def validate(config: Any, monkeypatch: pytest.MonkeyPatch, replicas: int = 1) -> None:
    """Validate a config as `pretrain` does before it uses a GPU, with a made-up world size.

    Args:
        config: a recipe's.
        monkeypatch: removes environment variables after the test.
        replicas: data-parallel ranks for each one that the layout needs.
    """
    from megatron.bridge.training.config import runtime_config_update

    model = config.model
    gpus = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    gpus *= model.context_parallel_size * (model.expert_model_parallel_size or 1)
    monkeypatch.setenv("WORLD_SIZE", str(replicas * gpus))
    monkeypatch.setenv("RANK", "0")
    for name, value in config.env_vars.items():
        monkeypatch.setenv(name, str(value))
    runtime_config_update(config)
