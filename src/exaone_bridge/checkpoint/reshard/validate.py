"""Validates a reshard plan: every element of both sides is used exactly once, except padding.

It looks at the slices that the plan states and at the tensors that exist, and not at how the plan
was made. Whether a slice is the right one is checked by the tests, which compare with
Megatron-Bridge's own loader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from exaone_bridge.checkpoint.reshard.plan import ParamPlan, ReshardPlan, Slice, num_elements
from exaone_bridge.errors import PlanError
from exaone_bridge.schema.param_mapping import MappingKind

__all__ = ["PlanTotals", "validate_cover", "validate_plan"]

_REPLICATED = (MappingKind.REPLICATED, MappingKind.SQUEEZED)


@dataclass(frozen=True, slots=True)
class PlanTotals:
    """Numbers of tensors, parameters, elements and padding elements of a validated plan."""

    tensors: int
    parameters: int
    elements: int
    padding: int


def validate_plan(plan: ReshardPlan, shapes: Mapping[str, tuple[int, ...]]) -> PlanTotals:
    """Check that a plan is a bijection between these tensors and the parameters of its layout.

    Args:
        plan: The plan.
        shapes: Name -> shape of every Hugging Face tensor of the model, as the headers have them.

    Returns:
        What the plan covers.

    Raises:
        PlanError: It is not a bijection; the message names the tensor or parameter and the slice.
    """
    layers = _assigned("layer", [chunk for stage in plan.stages for chunk in stage])
    experts = _assigned("expert", plan.experts)
    used: list[str] = []
    parameters = 0
    elements = padding = 0
    for param in plan.params:
        _validate_param(param)
        mapping = param.mapping
        columns = mapping.columns()
        count = len(columns[0])
        for names, shape in zip(columns[1:], param.shapes, strict=True):
            if (found := list(map(shapes.get, names))).count(shape) != count:
                name, other = next(
                    pair for pair in zip(names, found, strict=True) if pair[1] != shape
                )
                raise PlanError(name, f"has shape {other}, and the plan says {shape}")
            used += names
        if missing := set(mapping.layers) - layers:
            raise PlanError(mapping.megatron, f"is in layer {min(missing)}, which no rank has")
        if mapping.experts and len(experts) != mapping.experts:
            raise PlanError(
                mapping.megatron,
                f"has {mapping.experts} experts, and the EP ranks have {len(experts)}",
            )
        parameters += count
        elements += count * sum(math.prod(shape) for shape in param.shapes)
        padding += count * sum(
            num_elements(bounds) for shard in param.shards for bounds in shard.padding
        )
    table = [
        name
        for param in plan.params
        for name in (param.mapping.megatron, param.mapping.alias)
        if name
    ]
    if repeated := {name for name in table if table.count(name) > 1}:
        raise PlanError(min(repeated), "is filled twice")
    once = set(used)
    if len(once) != len(used):
        raise PlanError(*_used_twice(plan))
    if len(once) < len(shapes):  # each that is used is one of these, by its shape
        raise PlanError(min(shapes.keys() - once), "is used by no parameter")
    _validate_ranks(plan)
    return PlanTotals(len(once), parameters, elements, padding)


def _used_twice(plan: ReshardPlan) -> tuple[str, str]:
    users: dict[str, str] = {}
    for param in plan.params:
        for parameter, *names in param.mapping.names():
            for name in names:
                if name in users:
                    return name, f"is used by {users[name]} and by {parameter}"
                users[name] = parameter
    raise AssertionError("no tensor is used twice")


def _assigned(what: str, by_rank: Iterable[Sequence[int]]) -> set[int]:
    """Return the numbers that ranks were assigned: each once, from 0 up without a gap."""
    numbers = [number for rank in by_rank for number in rank]
    for number in numbers:
        if numbers.count(number) > 1:
            raise PlanError(f"{what} {number}", "is assigned to two ranks that do not share it")
    if gaps := set(range(len(numbers))) - set(numbers):
        raise PlanError(f"{what} {min(gaps)}", "is assigned to no rank")
    return set(numbers)


def _validate_param(param: ParamPlan) -> None:
    """Check one mapping: slices fill each rank's shard, and over the ranks use up each tensor."""
    mapping = param.mapping
    used: list[list[Slice]] = [[] for _ in param.shapes]
    for rank, shard in enumerate(param.shards):
        here = f"{mapping.megatron} on rank {rank} of {len(param.shards)}"
        for copy in shard.copies:
            if not 0 <= copy.tensor < len(param.shapes):
                raise PlanError(here, f"is filled from tensor {copy.tensor} of {len(param.shapes)}")
            if _lengths(copy.hf) != _lengths(copy.megatron):
                raise PlanError(
                    here, f"{copy.megatron} is filled from {copy.hf}, which has other lengths"
                )
            used[copy.tensor].append(copy.hf)
        if shard.padding and mapping.kind is not MappingKind.VOCAB:
            raise PlanError(
                here, f"has padding at {shard.padding[0]}, which only a vocabulary may have"
            )
        filled = [copy.megatron for copy in shard.copies]
        validate_cover(shard.shape, [*filled, *shard.padding], _plan_error(here))
    for tensor, shape, slices in zip(mapping.hf, param.shapes, used, strict=True):
        validate_cover(shape, slices, _plan_error(tensor.name))


def _plan_error(place: str) -> Callable[[Slice, str], Exception]:
    return lambda bounds, problem: PlanError(place, f"{bounds} {problem}")


def _lengths(bounds: Slice) -> list[int]:
    """Return lengths, without axes of size 1."""
    return [end - begin for begin, end in bounds if end - begin != 1]


def validate_cover(
    shape: tuple[int, ...], slices: list[Slice], error: Callable[[Slice, str], Exception]
) -> None:
    """Check that every element of a tensor lies in exactly one of the slices.

    Each slice is inside the tensor, no two overlap, and their sizes add up.

    Args:
        shape: Of the tensor.
        slices: In any order.
        error: Makes the exception that is raised, of the slice at fault and of the problem.
    """
    for bounds in slices:
        if len(bounds) != len(shape) or any(
            not 0 <= b < e <= n for (b, e), n in zip(bounds, shape, strict=True)
        ):
            raise error(bounds, f"is empty or outside {list(shape)}")
    # Sorted by their beginning along the first axis; `reaching` are those that end after it.
    reaching: list[Slice] = []
    for bounds in sorted(slices):
        reaching = [other for other in reaching if other[0][1] > bounds[0][0]]
        for other in reaching:
            if all(
                b < other_e and other_b < e
                for (b, e), (other_b, other_e) in zip(bounds, other, strict=True)
            ):
                raise error(bounds, f"is used twice, by {other} too")
        reaching.append(bounds)
    covered = sum(map(num_elements, slices))
    if covered != math.prod(shape):
        raise error(
            tuple((0, n) for n in shape),
            f"has {math.prod(shape)} elements, of which {covered} are used",
        )


def _validate_ranks(plan: ReshardPlan) -> None:
    """Check that each rank's shards are those of the layout: no shard is left out or misplaced."""
    layout = plan.layout
    ranks = plan.ranks()
    if (
        len(ranks) != layout.ranks
        or len(plan.stages) != layout.pp
        or len(plan.experts) != layout.ep
    ):
        found = f"{len(ranks)} ranks, {len(plan.stages)} stages and {len(plan.experts)} EP ranks"
        raise PlanError(str(layout), f"has {layout.ranks} ranks, and the plan has {found}")
    for param in plan.params:
        name = param.mapping.megatron
        wanted = layout.expert_tp if param.is_expert else layout.tp
        if len(param.shards) not in (1, wanted) or (
            len(param.shards) == 1 and param.mapping.kind not in _REPLICATED and wanted > 1
        ):
            raise PlanError(name, f"has {len(param.shards)} shards, and {wanted} ranks share it")
        for stage in range(layout.pp):
            group = [rank for rank in ranks if rank.pp == stage]
            owners = {(rank.ep, rank.etp) if param.is_expert else rank.tp for rank in group}
            if len(owners) != (layout.ep * layout.expert_tp if param.is_expert else layout.tp):
                raise PlanError(name, f"is not complete on stage {stage}")
