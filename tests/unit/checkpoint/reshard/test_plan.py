"""The plan of copies, carried out on numbered elements at random shapes and layouts; its proof, on planted faults."""

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
    elements,
    ordinal_of,
    reshard_plan,
    writer,
)
from exaone_bridge.checkpoint.reshard.validate import prove, prove_cover
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
    """A miniature of other sizes, and a layout that mostly fits it."""
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
    """Each element has a number of its own. Every rank's parameters are filled by the copies; what all ranks hold, put
    together as Megatron-Core puts it together, and copied back, is what there was."""
    name, layout, fields = case
    try:
        plan, shapes = planned(name, layout, **fields)
    except UnsupportedLayout:
        return
    proof = prove(plan, shapes)
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
        for held in plan.held(rank):
            assert (
                held.chunk,
                held.name,
            ) not in names  # one module has no two parameters of one name
            names.add((held.chunk, held.name))
            parameter = np.zeros(held.cut.shape, dtype=np.int64)
            tensors = [tensor.numbered(*held.numbers).name for tensor in held.part.mapping.hf]
            for copy in held.cut.copies:
                box = source[tensors[copy.tensor]][tuple(slice(*span) for span in copy.hf)]
                into = parameter[tuple(slice(*span) for span in copy.megatron)]
                assert (into == 0).all()  # nothing is filled twice
                into[...] = box.reshape(into.shape)
                read += box.size * held.part.itemsizes[copy.tensor]
                target = back[tensors[copy.tensor]][tuple(slice(*span) for span in copy.hf)]
                target[...] = into.reshape(target.shape)
            assert (parameter == 0).sum() == sum(map(elements, held.cut.padding))
            ours = seen.setdefault(f"{held.part.mapping.megatron}{held.numbers}", set())
            share = tuple(np.unique(parameter[parameter > 0])[:1])
            if share not in ours and not held.replica:
                ours.add(share)
                padding += sum(map(elements, held.cut.padding))
        assert read == plan.read_bytes(rank)
    assert all((back[tensor] == source[tensor]).all() for tensor in shapes)
    assert (
        len(seen) == proof.parameters == len(expected_megatron(part.mapping for part in plan.parts))
    )
    assert proof.elements == first - 1 and proof.padding == plan.padding >= padding
    assert sum(plan.written_bytes()) == sum(
        int(np.prod(shape)) * size
        for part in plan.parts
        for _ in part.mapping.numbers()
        for shape, size in zip(part.shapes, part.itemsizes, strict=True)
    )
    assert plan.written_bytes() == written_one_by_one(plan)


def written_one_by_one(plan: ReshardPlan) -> list[int]:
    """By rank, as an export goes: each parameter that it holds, if it is the one to write it."""
    per_stage = plan.layout.ranks // plan.layout.pp
    orders = {id(part): order for order, part in enumerate(plan.parts)}
    written = []
    for number, rank in enumerate(plan.ranks()):
        written.append(0)
        for held in plan.held(rank):
            part = held.part
            cutters, dealt = (
                (plan.layout.expert_tp, plan.layout.ep) if part.per_expert else (plan.layout.tp, 1)
            )
            group = cutters * dealt
            here = (rank.etp if part.per_expert else rank.tp, number % per_stage // group)
            if (
                not held.replica
                and writer(ordinal_of(orders[id(part)], held.numbers), cutters, per_stage // group)
                == here
            ):
                written[-1] += sum(
                    int(np.prod(shape)) * size
                    for shape, size in zip(part.shapes, part.itemsizes, strict=True)
                )
    return written


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_a_rank_reads_its_share_of_what_is_cut(tp: int) -> None:
    fields = {"num_key_value_heads": 8, "num_attention_heads": 16, "vocab_size": 400}
    plan, _ = planned("exaone4-1.2b", Layout(tp=tp), **fields)
    for part in plan.parts:
        whole = sum(int(np.prod(shape)) for shape in part.shapes) * 4
        for rank in plan.ranks():
            assert (
                part.read_bytes(rank)
                * (
                    tp
                    if part.mapping.kind not in (MappingKind.REPLICATED, MappingKind.SQUEEZED)
                    else 1
                )
                == whole
            )


def test_more_ranks_than_key_value_heads_cut_a_group() -> None:
    """Megatron-Core cuts the stacked rows evenly, whatever they are (parallel linear), and gathers where it attends."""
    plan, _ = planned("exaone4", Layout(tp=4))
    (part,) = [part for part in plan.parts if part.mapping.kind is MappingKind.QKV]
    stacked = []  # (tensor, row) as Megatron-Core stacks q, k and v of two groups of two queries x 24
    for group in range(2):
        stacked += [(0, mapping) for mapping in range(group * 48, group * 48 + 48)]
        stacked += [(1, mapping) for mapping in range(group * 24, group * 24 + 24)]
        stacked += [(2, mapping) for mapping in range(group * 24, group * 24 + 24)]
    for number, cut in enumerate(part.cuts):
        mappings = [(copy.tensor, mapping) for copy in cut.copies for mapping in range(*copy.hf[0])]
        assert mappings == stacked[number * 48 : number * 48 + 48]


def test_an_axis_that_the_layout_does_not_cut_evenly() -> None:
    fields = {"moe_intermediate_size": 9, "moe_num_shared_experts": 1}
    with pytest.raises(UnsupportedLayout, match=r"tp is 2, .* a divisor of 9, .*shared_experts"):
        planned("ernie45", Layout(tp=2, etp=1), **fields)


# --- planted faults -------------------------------------------------------------------------------------------------


def cut_of(
    plan: ReshardPlan, kind: MappingKind, change: Callable[[ShardSpec], ShardSpec], which: int = 0
) -> ReshardPlan:
    """The plan with one cut of the first part of this kind changed."""
    part = next(part for part in plan.parts if part.mapping.kind is kind)
    cuts = [change(cut) if number == which else cut for number, cut in enumerate(part.cuts)]
    return with_part(plan, part, dataclasses.replace(part, cuts=tuple(cuts)))


def with_part(plan: ReshardPlan, part: ParamPlan, other: ParamPlan | None) -> ReshardPlan:
    parts = [other if each is part else each for each in plan.parts]
    return dataclasses.replace(plan, parts=tuple(each for each in parts if each is not None))


def copies(
    change: Callable[[list[SliceCopy]], list[SliceCopy]],
) -> Callable[[ShardSpec], ShardSpec]:
    return lambda cut: cut._replace(copies=tuple(change(list(cut.copies))))


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
        lambda p: cut_of(p, MappingKind.QKV, copies(lambda c: c[1:])),
        "elements, of which",
    ),
    "a copy is there twice": (
        lambda p: cut_of(p, MappingKind.QKV, copies(lambda c: [*c, c[0]])),
        "is used twice",
    ),
    "q for k": (
        lambda p: cut_of(
            p, MappingKind.QKV, copies(lambda c: [c[1]._replace(tensor=0), *c[1:], c[0]])
        ),
        "is used twice|outside",
    ),
    "of a tensor that is none": (
        lambda p: cut_of(p, MappingKind.GATED, copies(lambda c: [c[0]._replace(tensor=2), c[1]])),
        "from tensor 2 of 2",
    ),
    "one row further in the tensor": (
        lambda p: cut_of(p, MappingKind.GATED, copies(lambda c: [moved(c[0], 1, "hf"), c[1]])),
        "is used twice",
    ),
    "one row further in the parameter": (
        lambda p: cut_of(
            p, MappingKind.GATED, copies(lambda c: [moved(c[0], 1, "megatron"), c[1]])
        ),
        "is used twice",
    ),
    "past the end": (
        lambda p: cut_of(p, MappingKind.GATED, copies(lambda c: [moved(c[0], 48, "hf"), c[1]]), 1),
        "outside",
    ),
    "before the beginning": (
        lambda p: cut_of(p, MappingKind.GATED, copies(lambda c: [moved(c[0], -1, "hf"), c[1]])),
        "outside",
    ),
    "one row less": (
        lambda p: cut_of(p, MappingKind.ROW, copies(lambda c: [shorter(c[0])])),
        "elements, of which",
    ),
    "other lengths": (
        lambda p: cut_of(
            p, MappingKind.ROW, copies(lambda c: [c[0]._replace(hf=shorter(c[0]).hf)])
        ),
        "has other lengths",
    ),
    "both ranks hold the first cut": (
        lambda p: cut_of(
            p,
            MappingKind.ROW,
            lambda cut: next(q for q in p.parts if q.mapping.kind is MappingKind.ROW).cuts[0],
            1,
        ),
        "is used twice",
    ),
    "padding forgotten": (
        lambda p: cut_of(p, MappingKind.VOCAB, lambda cut: cut._replace(padding=()), 1),
        "of which",
    ),
    "padding elsewhere": (
        lambda p: cut_of(
            p,
            MappingKind.ROW,
            lambda cut: ShardSpec(cut.shape, (shorter(cut.copies[0]),), (((63, 64), (0, 48)),)),
        ),
        "which only a vocabulary may have",
    ),
    "a replicated parameter is cut": (
        lambda p: with_part(
            p,
            part := next(q for q in p.parts if q.mapping.kind is MappingKind.REPLICATED),
            dataclasses.replace(part, cuts=part.cuts * 2),
        ),
        "is used twice",
    ),
    "a part is missing": (lambda p: with_part(p, p.parts[3], None), "is used by no parameter"),
    "a part is there twice": (
        lambda p: dataclasses.replace(p, parts=(*p.parts, p.parts[3])),
        "is filled twice",
    ),
    "two parts use one tensor": (
        lambda p: dataclasses.replace(
            p,
            parts=(
                *p.parts,
                dataclasses.replace(
                    p.parts[3], mapping=dataclasses.replace(p.parts[3].mapping, megatron="a.*")
                ),
            ),
        ),
        "is used by",
    ),
    "a shape of another model": (
        lambda p: with_part(
            p,
            p.parts[1],
            dataclasses.replace(
                p.parts[1],
                shapes=((65,),),
                cuts=(ShardSpec((65,), (SliceCopy(0, ((0, 65),), ((0, 65),)),)),),
            ),
        ),
        "has shape",
    ),
    "a layer on two stages": (
        lambda p: dataclasses.replace(p, stages=(((0, 1),), ((1, 3),))),
        "layer 1 is held by two ranks",
    ),
    "a layer on no stage": (
        lambda p: dataclasses.replace(p, stages=(((0, 1),), ((2,),))),
        "layer 3, which no rank",
    ),
    "a layer forgotten in the middle": (
        lambda p: dataclasses.replace(p, stages=(((0, 1),), ((3,),))),
        "layer 2 is held by no rank",
    ),
    "a stage too few": (lambda p: dataclasses.replace(p, stages=(((0, 1, 2, 3),),)), "1 stages"),
    "an expert at two ranks": (first_expert, "expert 3 is held by two ranks"),
    "an expert too few": (
        lambda p: dataclasses.replace(p, experts=((0, 1, 2, 3), (4, 5, 6))),
        "8 experts, and 7 are dealt out",
    ),
    "cut for another layout": (
        lambda p: dataclasses.replace(p, layout=Layout(tp=4, pp=2, ep=2, etp=1)),
        "is cut in 2",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_plan_that_is_no_bijection_is_refused_and_the_place_named(name: str) -> None:
    plan, shapes = planned("ernie45", Layout(tp=2, pp=2, ep=2, etp=1))
    assert prove(plan, shapes).padding == 64
    fault, says = FAULTS[name]
    with pytest.raises(PlanError, match=says) as caught:
        prove(fault(plan), shapes)
    assert caught.value.place and len(str(caught.value).splitlines()) == 1


def test_a_tensor_that_nobody_uses_is_named() -> None:
    plan, shapes = planned("exaone4", Layout())
    with pytest.raises(PlanError, match=r"model\.extra is used by no parameter"):
        prove(plan, shapes | {"model.extra": (1,)})


BOXES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 4), st.integers(0, 4)).map(
        lambda n: ((min(n[:2]), max(n[:2])), (min(n[2:]), max(n[2:])))
    ),
    max_size=6,
)


@given(boxes=BOXES)
@settings(max_examples=300)
def test_the_cover_is_what_counting_says(boxes: list[Any]) -> None:
    counted = np.zeros((4, 3), dtype=int)
    good = all(b < e <= n for box in boxes for (b, e), n in zip(box, counted.shape, strict=True))
    for box in boxes if good else ():
        counted[slice(*box[0]), slice(*box[1])] += 1
    if good and (counted == 1).all():
        prove_cover((4, 3), boxes, lambda box, fault: AssertionError(fault))
    else:
        with pytest.raises(LookupError):
            prove_cover((4, 3), boxes, lambda box, fault: LookupError(fault))


def test_ranks_are_numbered_as_megatron_does() -> None:
    plan, _ = planned("ernie45-300b", Layout(tp=2, pp=2, ep=2, etp=1))
    assert plan.ranks() == [Rank(pp, tp, tp, 0) for pp in (0, 1) for tp in (0, 1)]
    plan, _ = planned("ernie45-300b", Layout(tp=1, pp=1, ep=2, etp=2))
    assert plan.ranks() == [Rank(0, 0, 0, 0), Rank(0, 0, 0, 1), Rank(0, 0, 1, 0), Rank(0, 0, 1, 1)]


def test_the_plan_needs_no_torch() -> None:
    code = "import sys, exaone_bridge.checkpoint.reshard.plan, exaone_bridge.checkpoint.reshard.validate; print(*sys.modules)"
    modules = {
        name.partition(".")[0]
        for name in subprocess.check_output([sys.executable, "-c", code], text=True).split()
    }
    assert not modules & {"torch", "numpy", "megatron", "transformers", "safetensors"}


def test_a_plan_is_as_small_as_its_table() -> None:
    """Rectangles are stated once a row, however many layers and experts there are."""
    config = {
        **EXAONE4.tiny["exaone4-1.2b"],
        "num_hidden_layers": 4000,
        "layer_types": ["full_attention"] * 4000,
    }
    plan = reshard_plan(EXAONE4.describe(config), Layout(tp=2, pp=4))
    assert sum(len(cut.copies) for part in plan.parts for cut in part.cuts) < 50
