"""What a planted fault is, and the ways to plant one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from exaone_bridge.schema.model_family import ModelFamily
from exaone_bridge.schema.param_mapping import ParamMapping

__all__ = ["Fault", "mappings_changed", "patched", "swap"]

Change = Callable[[Any], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault, planted in one of four ways, and what must be said about it.

    Attributes:
        name: what is wrong.
        model: the miniature it is planted in.
        caught: every check that must catch it; `refused`: the model is not loaded or not exported at all.
        begins: layer and sublayer where hidden states must be seen to part; None: the arithmetic is the same, or never
            runs.
        weights: changes a loaded Megatron-Core model in place.
        provider: fields of the provider.
        code: a context in which the model is built, exported and run.
        folder: changes a Hugging Face folder.
        generation: also compare greedy generation.
    """

    name: str
    model: str
    caught: tuple[str, ...]
    begins: tuple[int | None, str] | None = None
    weights: Change | None = None
    provider: Mapping[str, Any] = field(default_factory=dict)
    code: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
    folder: Callable[[Path], None] | None = None
    generation: bool = False


def swap(a: Any, b: Any) -> None:
    """Two tensors of one shape change places."""
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def patched(target: str, value: Any) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A context in which `package.module.Class.name` is something else."""
    return lambda: mock.patch(target, value)


def mappings_changed(
    family: ModelFamily, change: Callable[[ParamMapping], ParamMapping | None]
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A context in which the rows of this family are changed, or dropped where the change is None.

    The same table serves both ways, so the round trip stays whole and only the arithmetic can tell.
    """

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        from exaone_bridge.bridge.registration import supported

        found = supported()[family.architectures[0]]
        faulty = dataclasses.replace(
            family,
            mappings=lambda model_config: tuple(
                mapping
                for mapping in map(change, family.mappings(model_config))
                if mapping is not None
            ),
        )
        with mock.patch.object(found, "FAMILY", faulty):
            yield

    return context
