"""Our dispatcher sorts tokens as Megatron-Core's, and needs no copy to the CPU in a CUDA graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from exaone_bridge.runtime.fork import ForkLauncher

_TOKENS, _EXPERTS, _TOPK = 12, 4, 2


class _Forbidden:
    """A stream that nothing may use."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the stream of copies to the CPU: {name}")


def _dispatched(folder: Path, ours: bool, impl: str, forbid: bool) -> list[torch.Tensor]:
    """On a rank: the dispatched tokens and counts, and the tokens that come back doubled."""
    from megatron.bridge import AutoBridge
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from exaone_bridge.modules.grouped_experts import AlltoAllTokenDispatcher
    from exaone_bridge.runtime.model import build
    from exaone_bridge.schema.parallel_layout import Layout

    (model,) = build(AutoBridge.from_hf_pretrained(folder), Layout())
    config = model.config
    config.num_moe_experts, config.moe_router_topk = _EXPERTS, _TOPK
    config.cuda_graph_impl, config.cuda_graph_modules = impl, []
    make = AlltoAllTokenDispatcher if ours else MoEAlltoAllTokenDispatcher
    dispatcher = make(
        _EXPERTS,
        list(range(_EXPERTS)),
        config=config,
        pg_collection=get_default_pg_collection(),
    )
    if not ours:
        assert AlltoAllTokenDispatcher.can_replace(dispatcher) == (impl != "transformer_engine")
    stream = _Forbidden() if forbid else mock.MagicMock()
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(_TOKENS, 1, 8, generator=generator)
    scores = torch.rand(_TOKENS, _EXPERTS, generator=generator)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(_TOPK).indices, True)
    with mock.patch.object(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", stream):
        tokens, probs = dispatcher.dispatch_preprocess(hidden, chosen, scores * chosen)
        tokens, probs = dispatcher.token_dispatch(tokens, probs)
        tokens, counts, probs = dispatcher.dispatch_postprocess(tokens, probs)
        output = dispatcher.combine_preprocess(2 * tokens)
        output = dispatcher.combine_postprocess(dispatcher.token_combine(output))
    return [tokens, counts, probs, output]


@pytest.mark.parametrize("impl", ["none", "full_iteration"])
def test_dispatcher_equals_megatron_cores(impl: str, megatron_bridge: Any, tiny: Any) -> None:
    launcher, folder = ForkLauncher(), tiny("ernie45")
    expected = launcher.first(_dispatched, folder, False, impl, False)
    results = launcher.first(_dispatched, folder, True, impl, impl == "full_iteration")
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("fields", "copies"),
    [
        ({}, False),
        ({"impl": "none"}, True),
        ({"ep_size": 2}, True),
        ({"tp_size": 2}, True),
        ({"num_out_tokens": torch.tensor(24)}, True),
    ],
)
def test_what_is_on_the_gpu_alone_is_copied_in_a_full_iteration_too(
    fields: dict[str, Any], copies: bool, megatron_bridge: Any
) -> None:
    """A capture then fails, where a graph would replay the splits of one batch."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from exaone_bridge.modules.grouped_experts import AlltoAllTokenDispatcher

    values = {"ep_size": 1, "tp_size": 1, "num_out_tokens": 24, "impl": "full_iteration"} | fields
    dispatcher = AlltoAllTokenDispatcher.__new__(AlltoAllTokenDispatcher)
    dispatcher.__dict__.update(values, config=mock.Mock(cuda_graph_impl=values["impl"]))
    counts = torch.tensor([9, 15])
    with mock.patch.object(MoEAlltoAllTokenDispatcher, "_maybe_dtoh_and_synchronize") as copy:
        assert dispatcher._maybe_dtoh_and_synchronize("before_permutation_1", counts) is counts
    assert copy.call_args_list == ([mock.call("before_permutation_1")] if copies else [])


def test_layers_keep_megatron_cores_dispatcher(megatron_bridge: Any, tiny: Any) -> None:
    ForkLauncher().first(_dispatched, tiny("ernie45"), False, "transformer_engine", False)
