"""The validation of a reshard plan, on injected faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exaone_bridge.checkpoint.reshard.plan import (
    ParamPlan,
    ReshardPlan,
    ShardSpec,
    SliceCopy,
)
from exaone_bridge.checkpoint.reshard.validate import validate_cover, validate_plan
from exaone_bridge.errors import PlanError
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.schema.param_mapping import MappingKind
from tests.helpers.plans import planned


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
    bounds = getattr(copy, side)
    return copy._replace(**{side: ((bounds[0][0] + by, bounds[0][1] + by), *bounds[1:])})


def shorter(copy: SliceCopy) -> SliceCopy:
    return SliceCopy(
        copy.tensor,
        *(((bounds[0][0], bounds[0][1] - 1), *bounds[1:]) for bounds in (copy.hf, copy.megatron)),
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
    good = all(
        b < e <= n for bounds in slices for (b, e), n in zip(bounds, counts.shape, strict=True)
    )
    for bounds in slices if good else ():
        counts[slice(*bounds[0]), slice(*bounds[1])] += 1
    if good and (counts == 1).all():
        validate_cover((4, 3), slices, lambda bounds, fault: AssertionError(fault))
    else:
        with pytest.raises(LookupError):
            validate_cover((4, 3), slices, lambda bounds, fault: LookupError(fault))
