"""Which positions a rank holds, and which exchange each layer gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from exaone_bridge.errors import UnsupportedLayout
from exaone_bridge.modules.context_parallel import exchanges, gathered_in_order, positions_of
from exaone_bridge.runtime.fork import ForkLauncher


def test_positions_are_megatron_cores_two_chunks(megatron_bridge: Any) -> None:
    for rank, held in enumerate(ForkLauncher(4).all(_megatron_cores_cut, 32)):
        assert held == positions_of(rank, 4, 32).tolist()


def _megatron_cores_cut(length: int) -> list[int]:
    from megatron.core.utils import get_batch_on_this_cp_rank

    batch = {"tokens": torch.arange(length)[None]}
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=torch.distributed.group.WORLD
    )["tokens"][0].tolist()


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_gathering_undoes_the_cut(cp: int) -> None:
    whole = torch.randn(2, 6 * cp * 2, 3)
    parts = [whole[:, positions_of(rank, cp, whole.shape[1])] for rank in range(cp)]
    assert torch.equal(gathered_in_order(parts, dim=1), whole)


def test_a_length_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UnsupportedLayout, match="multiple of 2 x context_parallel_size = 4"):
        positions_of(0, 2, 30)


def test_windows_never_go_round_the_ring() -> None:
    assert exchanges([True, True, True, False], heads=8, kv_heads=2, cp=2) == ["all_gather"] * 3 + [
        "p2p"
    ]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("p2p", "'p2p' for layer 0.*because the layer has a window"),
        ("a2a+p2p", "'a2a\\+p2p' for layer 0"),
        (["all_gather", "ring"], "'ring' for layer 1"),
        (["a2a"], "1 entries"),
        ("a2a", "3 query and 1 key-value heads"),
    ],
)
def test_what_transformer_engine_cannot_do_is_refused(asked: Any, words: str) -> None:
    with pytest.raises(UnsupportedLayout, match=words):
        exchanges([True, False], heads=3, kv_heads=1, cp=2, asked=asked)


def test_what_the_user_asked_for_stands() -> None:
    assert exchanges([True, False], heads=4, kv_heads=2, cp=2, asked="a2a") == ["a2a", "a2a"]
    assert (
        exchanges([True, False], heads=4, kv_heads=2, cp=2, asked=["all_gather", "a2a+p2p"])[1]
        == "a2a+p2p"
    )


def test_the_provider_chooses_by_layer_and_remembers_the_wish(
    megatron_bridge: Any, tiny: Any
) -> None:
    from megatron.bridge import AutoBridge

    provider = AutoBridge.from_hf_pretrained(tiny("exaone4")).to_megatron_provider(
        load_weights=False
    )
    provider.context_parallel_size = 2
    provider.finalize()
    assert provider.cp_comm_type == (["all_gather"] * 3 + ["p2p"]) * 2
    assert provider.to_cfg_dict()["cp_comm_type"] is None
    provider.finalize()  # a second time, as Megatron-Bridge does
    assert provider.to_cfg_dict()["cp_comm_type"] is None

    asked = AutoBridge.from_hf_pretrained(tiny("exaone4")).to_megatron_provider(load_weights=False)
    asked.context_parallel_size, asked.cp_comm_type = 2, "p2p"
    with pytest.raises(UnsupportedLayout, match="window"):
        asked.finalize()
