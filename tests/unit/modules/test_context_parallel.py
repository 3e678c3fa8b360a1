"""Positions of context-parallel ranks, and the `cp_comm_type` of each layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from exaone_bridge.errors import UnsupportedLayout
from exaone_bridge.modules.context_parallel import (
    choose_cp_comm_types,
    local_positions,
    restore_sequence_order,
)
from exaone_bridge.runtime.fork import ForkLauncher


def _megatron_core_positions(length: int) -> list[int]:
    """On a rank: the positions that Megatron-Core gives it."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    batch = {"tokens": torch.arange(length)[None]}
    group = torch.distributed.group.WORLD
    local = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return local["tokens"][0].tolist()


def test_local_positions_equal_megatron_cores(megatron_bridge: Any) -> None:
    for rank, positions in enumerate(ForkLauncher(4).all(_megatron_core_positions, 32)):
        assert positions == local_positions(rank, 4, 32).tolist()


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_restore_sequence_order_inverts_sharding(cp: int) -> None:
    full = torch.randn(2, 6 * cp * 2, 3)
    shards = [full[:, local_positions(rank, cp, full.shape[1])] for rank in range(cp)]
    assert torch.equal(restore_sequence_order(shards, dim=1), full)


def test_local_positions_of_indivisible_length_raises() -> None:
    with pytest.raises(UnsupportedLayout, match="multiple of 2 x context_parallel_size = 4"):
        local_positions(0, 2, 30)


def test_cp_comm_type_of_sliding_window_layers_is_all_gather() -> None:
    chosen = choose_cp_comm_types([True, True, True, False], heads=8, kv_heads=2, cp=2)
    assert chosen == ["all_gather", "all_gather", "all_gather", "p2p"]


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("p2p", "'p2p' for layer 0.*because the layer has a sliding window"),
        ("a2a+p2p", "'a2a\\+p2p' for layer 0"),
        (["all_gather", "ring"], "'ring' for layer 1"),
        (["a2a"], "1 entries"),
        ("a2a", "3 query and 1 KV heads"),
    ],
)
def test_cp_comm_type_unsupported_by_transformer_engine_raises(
    requested: Any, message: str
) -> None:
    with pytest.raises(UnsupportedLayout, match=message):
        choose_cp_comm_types([True, False], heads=3, kv_heads=1, cp=2, requested=requested)


@pytest.mark.parametrize(
    ("requested", "expected"),
    [("a2a", ["a2a", "a2a"]), (["all_gather", "a2a+p2p"], ["all_gather", "a2a+p2p"])],
)
def test_cp_comm_type_requested_by_user_is_kept(requested: Any, expected: list[str]) -> None:
    sizes = {"heads": 4, "kv_heads": 2, "cp": 2}
    assert choose_cp_comm_types([True, False], **sizes, requested=requested) == expected


def test_provider_chooses_cp_comm_type_per_layer_and_saves_the_request(
    megatron_bridge: Any, tiny: Any
) -> None:
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(tiny("exaone4"))
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.context_parallel_size = 2
    for _ in range(2):  # Megatron-Bridge finalizes twice
        provider.finalize()
        assert provider.cp_comm_type == (["all_gather"] * 3 + ["p2p"]) * 2
        assert provider.to_cfg_dict()["cp_comm_type"] is None

    provider = bridge.to_megatron_provider(load_weights=False)
    provider.context_parallel_size, provider.cp_comm_type = 2, "p2p"
    with pytest.raises(UnsupportedLayout, match="sliding window"):
        provider.finalize()
