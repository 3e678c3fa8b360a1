"""The reshard plan, carried out on numbered elements, and its validation, on injected faults."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exaone_bridge.checkpoint.reshard.plan import (
    ParamPlan,
    Rank,
    ReshardPlan,
    ShardSpec,
    SliceCopy,
    check_layout,
    num_elements,
    reshard_plan,
    writer_of,
    writer_ordinal,
)
from exaone_bridge.checkpoint.reshard.validate import validate_cover, validate_plan
from exaone_bridge.errors import PlanError, UnsupportedLayout
from exaone_bridge.models import FAMILIES
from exaone_bridge.models.ernie45 import ERNIE45
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.schema.param_mapping import MappingKind, expected_megatron

TINY = {name: (family, config) for family in FAMILIES for name, config in family.tiny.items()}


def planned(
    name: str, layout: Layout, **fields: Any
) -> tuple[ReshardPlan, dict[str, tuple[int, ...]]]:
    family, config = TINY[name]
    model = family.describe({**config, **fields})
    check_layout(model.config, layout)
    return reshard_plan(model, layout), model.hf_shapes


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
                box = source[tensors[copy.tensor]][tuple(slice(*span) for span in copy.hf)]
                into = parameter[tuple(slice(*span) for span in copy.megatron)]
                assert (into == 0).all()  # nothing is filled twice
                into[...] = box.reshape(into.shape)
                read += box.size * local.param.itemsizes[copy.tensor]
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


# --- injected faults --------------------------------------------------------------------------


def with_shard(
    plan: ReshardPlan, kind: MappingKind, change: Callable[[ShardSpec], ShardSpec], which: int = 0
) -> ReshardPlan:
    """The plan with one shard of the first parameter of this kind changed."""
    param = next(param for param in plan.params if param.mapping.kind is kind)
    shards = [
        change(shard) if number == which else shard for number, shard in enumerate(param.shards)
    ]
    return with_param(plan, param, dataclasses.replace(param, shards=tuple(shards)))


def with_param(plan: ReshardPlan, param: ParamPlan, other: ParamPlan | None) -> ReshardPlan:
    params = [other if each is param else each for each in plan.params]
    return dataclasses.replace(plan, params=tuple(each for each in params if each is not None))


def copies(
    change: Callable[[list[SliceCopy]], list[SliceCopy]],
) -> Callable[[ShardSpec], ShardSpec]:
    return lambda shard: shard._replace(copies=tuple(change(list(shard.copies))))


def moved(copy: SliceCopy, by: int, side: str) -> SliceCopy:
    box = getattr(copy, side)
    return copy._replace(**{side: ((box[0][0] + by, box[0][1] + by), *box[1:])})


def shorter(copy: SliceCopy) -> SliceCopy:
    return SliceCopy(
        copy.tensor, *(((box[0][0], box[0][1] - 1), *box[1:]) for box in (copy.hf, copy.megatron))
    )


def first_expert(plan: ReshardPlan) -> ReshardPlan:
    return dataclasses.replace(plan, experts=((0, 1, 2, 3), (3, 5, 6, 7)))


FAULTS: dict[str, tuple[Callable[[ReshardPlan], ReshardPlan], str]] = {
    "a copy is missing": (
        lambda p: with_shard(p, MappingKind.QKV, copies(lambda c: c[1:])),
        "elements, of which",
    ),
    "a copy is there twice": (
        lambda p: with_shard(p, MappingKind.QKV, copies(lambda c: [*c, c[0]])),
        "is used twice",
    ),
    "q for k": (
        lambda p: with_shard(
            p, MappingKind.QKV, copies(lambda c: [c[1]._replace(tensor=0), *c[1:], c[0]])
        ),
        "is used twice|outside",
    ),
    "an index out of range": (
        lambda p: with_shard(
            p, MappingKind.GATED, copies(lambda c: [c[0]._replace(tensor=2), c[1]])
        ),
        "from tensor 2 of 2",
    ),
    "one row further in the tensor": (
        lambda p: with_shard(p, MappingKind.GATED, copies(lambda c: [moved(c[0], 1, "hf"), c[1]])),
        "is used twice",
    ),
    "one row further in the parameter": (
        lambda p: with_shard(
            p, MappingKind.GATED, copies(lambda c: [moved(c[0], 1, "megatron"), c[1]])
        ),
        "is used twice",
    ),
    "past the end": (
        lambda p: with_shard(
            p, MappingKind.GATED, copies(lambda c: [moved(c[0], 48, "hf"), c[1]]), 1
        ),
        "outside",
    ),
    "before the beginning": (
        lambda p: with_shard(p, MappingKind.GATED, copies(lambda c: [moved(c[0], -1, "hf"), c[1]])),
        "outside",
    ),
    "one row less": (
        lambda p: with_shard(p, MappingKind.ROW, copies(lambda c: [shorter(c[0])])),
        "elements, of which",
    ),
    "other lengths": (
        lambda p: with_shard(
            p, MappingKind.ROW, copies(lambda c: [c[0]._replace(hf=shorter(c[0]).hf)])
        ),
        "has other lengths",
    ),
    "both ranks have the first shard": (
        lambda p: with_shard(
            p,
            MappingKind.ROW,
            lambda shard: next(q for q in p.params if q.mapping.kind is MappingKind.ROW).shards[0],
            1,
        ),
        "is used twice",
    ),
    "padding forgotten": (
        lambda p: with_shard(p, MappingKind.VOCAB, lambda shard: shard._replace(padding=()), 1),
        "of which",
    ),
    "padding elsewhere": (
        lambda p: with_shard(
            p,
            MappingKind.ROW,
            lambda shard: ShardSpec(
                shard.shape, (shorter(shard.copies[0]),), (((63, 64), (0, 48)),)
            ),
        ),
        "which only a vocabulary may have",
    ),
    "a replicated parameter is sharded": (
        lambda p: with_param(
            p,
            param := next(q for q in p.params if q.mapping.kind is MappingKind.REPLICATED),
            dataclasses.replace(param, shards=param.shards * 2),
        ),
        "is used twice",
    ),
    "a mapping is missing": (lambda p: with_param(p, p.params[3], None), "is used by no parameter"),
    "a mapping is there twice": (
        lambda p: dataclasses.replace(p, params=(*p.params, p.params[3])),
        "is filled twice",
    ),
    "two mappings use one tensor": (
        lambda p: dataclasses.replace(
            p,
            params=(
                *p.params,
                dataclasses.replace(
                    p.params[3], mapping=dataclasses.replace(p.params[3].mapping, megatron="a.*")
                ),
            ),
        ),
        "is used by",
    ),
    "a shape of another model": (
        lambda p: with_param(
            p,
            p.params[1],
            dataclasses.replace(
                p.params[1],
                shapes=((65,),),
                shards=(ShardSpec((65,), (SliceCopy(0, ((0, 65),), ((0, 65),)),)),),
            ),
        ),
        "has shape",
    ),
    "a layer on two stages": (
        lambda p: dataclasses.replace(p, stages=(((0, 1),), ((1, 3),))),
        "layer 1 is assigned to two ranks",
    ),
    "a layer on no stage": (
        lambda p: dataclasses.replace(p, stages=(((0, 1),), ((2,),))),
        "layer 3, which no rank has",
    ),
    "a layer forgotten in the middle": (
        lambda p: dataclasses.replace(p, stages=(((0, 1),), ((3,),))),
        "layer 2 is assigned to no rank",
    ),
    "a stage too few": (lambda p: dataclasses.replace(p, stages=(((0, 1, 2, 3),),)), "1 stages"),
    "an expert on two ranks": (first_expert, "expert 3 is assigned to two ranks"),
    "an expert too few": (
        lambda p: dataclasses.replace(p, experts=((0, 1, 2, 3), (4, 5, 6))),
        "8 experts, and the EP ranks have 7",
    ),
    "sharded for another layout": (
        lambda p: dataclasses.replace(p, layout=Layout(tp=4, pp=2, ep=2, etp=1)),
        "has 2 shards",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_plan_that_is_not_a_bijection_is_rejected_by_name(name: str) -> None:
    plan, shapes = planned("ernie45", Layout(tp=2, pp=2, ep=2, etp=1))
    assert validate_plan(plan, shapes).padding == 64
    fault, fragment = FAULTS[name]
    with pytest.raises(PlanError, match=fragment) as caught:
        validate_plan(fault(plan), shapes)
    assert caught.value.place and len(str(caught.value).splitlines()) == 1


def test_unused_tensor_is_named() -> None:
    plan, shapes = planned("exaone4", Layout())
    with pytest.raises(PlanError, match=r"model\.extra is used by no parameter"):
        validate_plan(plan, shapes | {"model.extra": (1,)})


SLICES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 4), st.integers(0, 4)).map(
        lambda n: ((min(n[:2]), max(n[:2])), (min(n[2:]), max(n[2:])))
    ),
    max_size=6,
)


@given(slices=SLICES)
@settings(max_examples=300)
def test_cover_agrees_with_counting(slices: list[Any]) -> None:
    counts = np.zeros((4, 3), dtype=int)
    good = all(b < e <= n for box in slices for (b, e), n in zip(box, counts.shape, strict=True))
    for box in slices if good else ():
        counts[slice(*box[0]), slice(*box[1])] += 1
    if good and (counts == 1).all():
        validate_cover((4, 3), slices, lambda box, fault: AssertionError(fault))
    else:
        with pytest.raises(LookupError):
            validate_cover((4, 3), slices, lambda box, fault: LookupError(fault))


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
