"""The proof of a plan: every element of both sides is used exactly once, padding excepted and counted.

It looks at the rectangles that the plan states and at the tensors that there are; how the plan came by its rectangles
it does not know. Whether a rectangle is the right one is what the tests' comparisons with the host's own loader say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from exaone_bridge.checkpoint.reshard.plan import ParamPlan, ReshardPlan, Slice, elements
from exaone_bridge.errors import PlanError
from exaone_bridge.schema.param_mapping import MappingKind

__all__ = ["Proof", "prove", "prove_cover"]


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proved: so many tensors and parameters, with so many elements, of which so many are padding."""

    tensors: int
    parameters: int
    elements: int
    padding: int


def prove(plan: ReshardPlan, shapes: Mapping[str, tuple[int, ...]]) -> Proof:
    """Check that a plan is a bijection between these tensors and the parameters of its layout.

    Args:
        plan: to be checked.
        shapes: name -> shape of every Hugging Face tensor of the model, as the files' headers have it.

    Raises:
        PlanError: it is none; the message names the tensor or parameter, and the place in it.
    """
    layers = _dealt("layer", [chunk for stage in plan.stages for chunk in stage])
    experts = _dealt("expert", plan.experts)
    used: list[str] = []
    parameters = 0
    total = padding = 0
    for part in plan.parts:
        _prove_part(part)
        columns = part.mapping.columns()
        count = len(columns[0])
        for names, shape in zip(columns[1:], part.shapes, strict=True):
            if (found := list(map(shapes.get, names))).count(shape) != count:
                name, other = next(
                    pair for pair in zip(names, found, strict=True) if pair[1] != shape
                )
                raise PlanError(name, f"has shape {other}, and the plan says {shape}")
            used += names
        if missing := set(part.mapping.layers) - layers:
            raise PlanError(
                part.mapping.megatron, f"is in layer {min(missing)}, which no rank holds"
            )
        if part.mapping.experts and len(experts) != part.mapping.experts:
            raise PlanError(
                part.mapping.megatron,
                f"has {part.mapping.experts} experts, and {len(experts)} are dealt out",
            )
        parameters += count
        total += count * sum(math.prod(shape) for shape in part.shapes)
        padding += count * sum(elements(box) for cut in part.cuts for box in cut.padding)
    table = [
        name for part in plan.parts for name in (part.mapping.megatron, part.mapping.alias) if name
    ]
    if twice := {name for name in table if table.count(name) > 1}:
        raise PlanError(min(twice), "is filled twice")
    once = set(used)
    if len(once) != len(used):
        raise PlanError(*_used_twice(plan))
    if len(once) < len(shapes):  # each that is used is one of these, by its shape
        raise PlanError(min(shapes.keys() - once), "is used by no parameter")
    _prove_places(plan)
    return Proof(len(once), parameters, total, padding)


def _used_twice(plan: ReshardPlan) -> tuple[str, str]:
    users: dict[str, str] = {}
    for part in plan.parts:
        for parameter, *names in part.mapping.names():
            for name in names:
                if name in users:
                    return name, f"is used by {users[name]} and by {parameter}"
                users[name] = parameter
    raise AssertionError("no tensor is used twice")


def _dealt(what: str, hands: Iterable[Sequence[int]]) -> set[int]:
    """The numbers dealt out, each to one holder only, from 0 up without a gap."""
    numbers = [number for hand in hands for number in hand]
    for number in numbers:
        if numbers.count(number) > 1:
            raise PlanError(f"{what} {number}", "is held by two ranks that do not share it")
    if gaps := set(range(len(numbers))) - set(numbers):
        raise PlanError(f"{what} {min(gaps)}", "is held by no rank")
    return set(numbers)


def _prove_part(part: ParamPlan) -> None:
    """The rectangles of one row: they fill each rank's cut, and together, over the ranks, use each tensor up."""
    mapping = part.mapping
    used: list[list[Slice]] = [[] for _ in part.shapes]
    for rank, cut in enumerate(part.cuts):
        here = f"{mapping.megatron} on rank {rank} of {len(part.cuts)}"
        for copy in cut.copies:
            if not 0 <= copy.tensor < len(part.shapes):
                raise PlanError(here, f"is filled from tensor {copy.tensor} of {len(part.shapes)}")
            if _lengths(copy.hf) != _lengths(copy.megatron):
                raise PlanError(
                    here, f"{copy.megatron} is filled from {copy.hf}, which has other lengths"
                )
            used[copy.tensor].append(copy.hf)
        filled = [copy.megatron for copy in cut.copies]
        if cut.padding and mapping.kind is not MappingKind.VOCAB:
            raise PlanError(
                here, f"has padding at {cut.padding[0]}, which only a vocabulary may have"
            )
        prove_cover(cut.shape, [*filled, *cut.padding], _fault(here))
    for tensor, shape, boxes in zip(mapping.hf, part.shapes, used, strict=True):
        prove_cover(shape, boxes, _fault(tensor.name))


def _fault(place: str) -> Callable[[Slice, str], Exception]:
    return lambda box, fault: PlanError(place, f"{box} {fault}")


def _lengths(box: Slice) -> list[int]:
    """Along the axes that a tensor with a leading axis of one has too."""
    return [end - begin for begin, end in box if end - begin != 1]


def prove_cover(
    shape: tuple[int, ...], boxes: list[Slice], fault: Callable[[Slice, str], Exception]
) -> None:
    """Every element of `shape` lies in exactly one box: each is inside, no two meet, and their sizes add up.

    Raises:
        what `fault` makes of the box that is wrong, and of what is wrong with it.
    """
    for box in boxes:
        if len(box) != len(shape) or any(
            not 0 <= b < e <= n for (b, e), n in zip(box, shape, strict=True)
        ):
            raise fault(box, f"is empty or outside {list(shape)}")
    ordered = sorted(boxes)
    open_: list[
        Slice
    ] = []  # those that reach past the beginning of the box at hand along the first axis
    for box in ordered:
        open_ = [other for other in open_ if other[0][1] > box[0][0]]
        for other in open_:
            if all(
                b < other_e and other_b < e
                for (b, e), (other_b, other_e) in zip(box, other, strict=True)
            ):
                raise fault(box, f"is used twice, by {other} too")
        open_.append(box)
    covered = sum(map(elements, boxes))
    if covered != math.prod(shape):
        raise fault(
            tuple((0, n) for n in shape),
            f"has {math.prod(shape)} elements, of which {covered} are used",
        )


def _prove_places(plan: ReshardPlan) -> None:
    """Each rank's cuts are those that the layout gives it: nobody's share is left out, or held by the wrong rank."""
    layout = plan.layout
    ranks = plan.ranks()
    if (
        len(ranks) != layout.ranks
        or len(plan.stages) != layout.pp
        or len(plan.experts) != layout.ep
    ):
        here = f"{len(ranks)} ranks, {len(plan.stages)} stages and {len(plan.experts)} hands of experts"
        raise PlanError(str(layout), f"has {layout.ranks} ranks, and the plan has {here}")
    for part in plan.parts:
        wanted = layout.expert_tp if part.per_expert else layout.tp
        if len(part.cuts) not in (1, wanted) or (
            len(part.cuts) == 1 and part.mapping.kind not in _ALONE and wanted > 1
        ):
            raise PlanError(
                part.mapping.megatron, f"is cut in {len(part.cuts)}, and {wanted} ranks hold it"
            )
        for stage in range(layout.pp):
            group = [rank for rank in ranks if rank.pp == stage]
            holders = {(rank.ep, rank.etp) if part.per_expert else rank.tp for rank in group}
            if len(holders) != (layout.ep * layout.expert_tp if part.per_expert else layout.tp):
                raise PlanError(part.mapping.megatron, f"is not held whole by stage {stage}")


_ALONE = (MappingKind.REPLICATED, MappingKind.SQUEEZED)
