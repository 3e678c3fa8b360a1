"""The reshard plan, carried out on numbered elements."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exaone_bridge.checkpoint.reshard.plan import (
    Rank,
    ReshardPlan,
    num_elements,
    reshard_plan,
    writer_of,
    writer_ordinal,
)
from exaone_bridge.checkpoint.reshard.validate import validate_plan
from exaone_bridge.errors import UnsupportedLayout
from exaone_bridge.models.ernie45 import ERNIE45
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.schema.param_mapping import MappingKind, expected_megatron
from tests.helpers.plans import TINY, planned


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Layout, dict[str, Any]]:
    """Sizes of a tiny model, and a layout that mostly fits them."""
    name = draw(st.sampled_from(sorted(TINY)))
    kv = draw(st.sampled_from([1, 2, 4]))
    fields: dict[str, Any] = {
        "num_key_value_heads": kv,
        "num_attention_heads": kv * draw(st.sampled_from([1, 2, 3, 4])),
        "head_dim": draw(st.sampled_from([2, 8, 10])),
        "hidden_size": draw(st.sampled_from([4, 12])),
        "intermediate_size": draw(st.sampled_from([8, 24])),
        "vocab_size": draw(st.integers(1, 40)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if TINY[name][0] is ERNIE45:
        fields["use_bias"] = draw(st.booleans())
    sizes = st.sampled_from([1, 1, 2, 4])
    pp = draw(sizes)
    experts = "moe_k" in TINY[name][1]
    layout = Layout(
        tp=draw(st.sampled_from([1, 2, 3, 4, 8])),
        pp=pp,
        vpp=draw(sizes) if pp > 1 else 1,
        ep=draw(sizes) if experts else 1,
        etp=draw(st.sampled_from([None, 1, 2])) if experts else None,
    )
    return name, layout, fields


@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_every_element_arrives_once_and_comes_back(
    case: tuple[str, Layout, dict[str, Any]],
) -> None:
    """Each element has a number of its own; all parameters copied back give the tensors again."""
    name, layout, fields = case
    try:
        plan, shapes = planned(name, layout, **fields)
    except UnsupportedLayout:
        return
    totals = validate_plan(plan, shapes)
    first, source = 1, {}
    for tensor, shape in shapes.items():
        size = int(np.prod(shape))
        source[tensor] = np.arange(first, first + size).reshape(shape)
        first += size
    back = {tensor: np.zeros(shape, dtype=np.int64) for tensor, shape in shapes.items()}
    seen: dict[str, set[tuple[int, ...]]] = {}
    padding = 0
    for rank in plan.ranks():
        read = 0
        names = set()
        for local in plan.local_params(rank):
            assert (local.chunk, local.name) not in names
            names.add((local.chunk, local.name))
            parameter = np.zeros(local.shard.shape, dtype=np.int64)
            tensors = [tensor.numbered(*local.indices).name for tensor in local.param.mapping.hf]
            for copy in local.shard.copies:
                bounds = source[tensors[copy.tensor]][tuple(slice(*span) for span in copy.hf)]
                into = parameter[tuple(slice(*span) for span in copy.megatron)]
                assert (into == 0).all()  # nothing is filled twice
                into[...] = bounds.reshape(into.shape)
                read += bounds.size * local.param.itemsizes[copy.tensor]
                target = back[tensors[copy.tensor]][tuple(slice(*span) for span in copy.hf)]
                target[...] = into.reshape(target.shape)
            assert (parameter == 0).sum() == sum(map(num_elements, local.shard.padding))
            shares = seen.setdefault(f"{local.param.mapping.megatron}{local.indices}", set())
            share = tuple(np.unique(parameter[parameter > 0])[:1])
            if share not in shares and not local.is_tied_copy:
                shares.add(share)
                padding += sum(map(num_elements, local.shard.padding))
        assert read == plan.read_bytes(rank)
    assert all((back[tensor] == source[tensor]).all() for tensor in shapes)
    names = expected_megatron(param.mapping for param in plan.params)
    assert len(seen) == totals.parameters == len(names)
    assert totals.elements == first - 1 and totals.padding == plan.padding >= padding
    assert sum(plan.written_bytes()) == sum(
        param.hf_nbytes for param in plan.params for _ in param.mapping.numbers()
    )
    assert plan.written_bytes() == written_one_by_one(plan)


def written_one_by_one(plan: ReshardPlan) -> list[int]:
    """Bytes by rank, counted as an export goes: parameter by parameter."""
    per_stage = plan.layout.ranks // plan.layout.pp
    orders = {id(param): order for order, param in enumerate(plan.params)}
    written = []
    for number, rank in enumerate(plan.ranks()):
        written.append(0)
        for local in plan.local_params(rank):
            param = local.param
            num_shards, ep = (
                (plan.layout.expert_tp, plan.layout.ep) if param.is_expert else (plan.layout.tp, 1)
            )
            group = num_shards * ep
            here = (rank.etp if param.is_expert else rank.tp, number % per_stage // group)
            ordinal = writer_ordinal(orders[id(param)], local.indices)
            if writer_of(ordinal, num_shards, per_stage // group) == here:
                written[-1] += 0 if local.is_tied_copy else param.hf_nbytes
    return written


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_rank_reads_its_share_of_sharded_tensors(tp: int) -> None:
    fields = {"num_key_value_heads": 8, "num_attention_heads": 16, "vocab_size": 400}
    plan, _ = planned("exaone4-1.2b", Layout(tp=tp), **fields)
    for param in plan.params:
        for rank in plan.ranks():
            replicated = param.mapping.kind in (MappingKind.REPLICATED, MappingKind.SQUEEZED)
            assert param.read_bytes(rank) * (1 if replicated else tp) == param.hf_nbytes


def test_more_tp_ranks_than_kv_heads_shard_a_group() -> None:
    """Megatron-Core shards the projection's rows evenly, and gathers them before attention."""
    plan, _ = planned("exaone4", Layout(tp=4))
    (param,) = [param for param in plan.params if param.mapping.kind is MappingKind.QKV]
    stacked = []  # (tensor, row) in Megatron-Core's order: two KV groups of two query heads x 24
    for group in range(2):
        stacked += [(0, row) for row in range(group * 48, group * 48 + 48)]
        stacked += [(1, row) for row in range(group * 24, group * 24 + 24)]
        stacked += [(2, row) for row in range(group * 24, group * 24 + 24)]
    for number, shard in enumerate(param.shards):
        rows = [(copy.tensor, row) for copy in shard.copies for row in range(*copy.hf[0])]
        assert rows == stacked[number * 48 : number * 48 + 48]


def test_axis_that_the_layout_does_not_divide() -> None:
    fields = {"moe_intermediate_size": 9, "moe_num_shared_experts": 1}
    with pytest.raises(UnsupportedLayout, match=r"tp is 2, .* a divisor of 9, .*shared_experts"):
        planned("ernie45", Layout(tp=2, etp=1), **fields)


def test_ranks_are_numbered_as_in_megatron() -> None:
    plan, _ = planned("ernie45-300b", Layout(tp=2, pp=2, ep=2, etp=1))
    assert plan.ranks() == [Rank(pp, tp, tp, 0) for pp in (0, 1) for tp in (0, 1)]
    plan, _ = planned("ernie45-300b", Layout(tp=1, pp=1, ep=2, etp=2))
    assert plan.ranks() == [Rank(0, 0, 0, 0), Rank(0, 0, 0, 1), Rank(0, 0, 1, 0), Rank(0, 0, 1, 1)]


def test_plan_needs_no_torch() -> None:
    names = ("plan", "validate")
    code = f"import sys, {', '.join(f'exaone_bridge.checkpoint.reshard.{name}' for name in names)}"
    code += "; print(*sys.modules)"
    modules = {
        name.partition(".")[0]
        for name in subprocess.check_output([sys.executable, "-c", code], text=True).split()
    }
    assert not modules & {"torch", "numpy", "megatron", "transformers", "safetensors"}


def test_plan_size_does_not_depend_on_layers() -> None:
    config = {
        **EXAONE4.tiny["exaone4-1.2b"],
        "num_hidden_layers": 4000,
        "layer_types": ["full_attention"] * 4000,
    }
    plan = reshard_plan(EXAONE4.describe(config), Layout(tp=2, pp=4))
    assert sum(len(shard.copies) for param in plan.params for shard in param.shards) < 50
