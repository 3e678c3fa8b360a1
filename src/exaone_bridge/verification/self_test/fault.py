"""Injected faults: their definition, and context managers that change running code.

An injected fault is one thing that a conversion or a model can get wrong, with the checks that must
fail because of it and the first activation that must differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import mock

from exaone_bridge.schema.model_config import ModelConfig
from exaone_bridge.schema.model_family import ModelFamily
from exaone_bridge.schema.param_mapping import ParamMapping

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.module import MegatronModule

    from exaone_bridge.modules.provider import ExactGPTModelProvider

__all__ = [
    "Chunks",
    "CodeFault",
    "Fault",
    "FaultSite",
    "FolderFault",
    "MappingChange",
    "MegatronFault",
    "ModelChange",
    "Patch",
    "ProviderFault",
    "WeightFault",
    "changed_mappings",
    "changed_model",
    "changed_provider",
    "swap",
]

type Chunks = "list[MegatronModule]"
"""The loaded Megatron-Core model chunks of one rank."""
type ModelChange = Callable[[Chunks], object]
"""Changes a loaded model in place."""
type MappingChange = Callable[[ParamMapping], ParamMapping | None]
"""Returns a parameter mapping to use instead, or None to drop it."""
type Patch = Callable[[], contextlib.AbstractContextManager[object]]
"""Makes a context in which code is changed; Megatron-Core may be imported in it, and not before."""


@dataclass(frozen=True, slots=True)
class FaultSite:
    """The first activation that a fault changes.

    Attributes:
        sublayer: the sublayer, as in `ActivationDiff`.
        layer: the decoder layer, global and 0-based; None outside the decoder layers.
        module: the Hugging Face module whose output differs; empty: any.
    """

    sublayer: str
    layer: int | None = None
    module: str = ""

    def cell(self) -> str:
        """Return the site as a table has it: the layer, if there is one, and the sublayer."""
        return self.sublayer if self.layer is None else f"{self.layer}, {self.sublayer}"

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer}, "
        return f"{layer}{self.sublayer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One injected fault, and what the verification must report for it.

    Attributes:
        name: a description; unique among the faults of one model.
        model: the tiny model into which it is injected.
        failing: the checks that must fail; no other check may. `rejected` is the check that the
            model is built, loaded and exported without an error of `exaone_bridge.errors`.
        site: where activations must be reported to differ first; None: none differ, or the model
            does not run.
    """

    kind: ClassVar[str]
    """How the fault is injected: weights, provider, code or folder."""

    name: str
    model: str
    failing: tuple[str, ...]
    site: FaultSite | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronFault(Fault):
    """A fault on the Megatron-Core side."""

    def injected(self) -> contextlib.AbstractContextManager[object]:
        """Make the context in which models are built, loaded, exported and run with the fault."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFault(MegatronFault):
    """A fault in the weights of a loaded Megatron-Core model.

    Attributes:
        change: changes parameters and buffers in place.
    """

    kind: ClassVar[str] = "weights"
    change: ModelChange

    def injected(self) -> contextlib.AbstractContextManager[object]:
        """Make a context in which every loaded model is changed."""
        return changed_model(self.change)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderFault(MegatronFault):
    """A fault in the fields of the Megatron-Bridge provider.

    Attributes:
        fields: provider fields to override.
    """

    kind: ClassVar[str] = "provider"
    fields: Mapping[str, object]

    def injected(self) -> contextlib.AbstractContextManager[object]:
        """Make a context in which every provider has these fields."""
        return changed_provider(self.fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeFault(MegatronFault):
    """A fault in code: in the parameter mappings, or in a module's arithmetic.

    Attributes:
        patch: makes the context in which the code is changed.
    """

    kind: ClassVar[str] = "code"
    patch: Patch

    def injected(self) -> contextlib.AbstractContextManager[object]:
        """Make the context in which the code is changed."""
        return self.patch()


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFault(Fault):
    """A fault in a copy of the Hugging Face folder, which is compared with the original.

    Attributes:
        change: changes the files of the copy.
        generation: whether greedy generation is compared too.
    """

    kind: ClassVar[str] = "folder"
    change: Callable[[Path], object]
    generation: bool = False


def swap(a: torch.Tensor, b: torch.Tensor) -> None:
    """Exchange the values of two tensors of one shape [...] in place."""
    saved = a.clone()
    a.copy_(b)
    b.copy_(saved)


@contextlib.contextmanager
def changed_mappings(family: ModelFamily, change: MappingChange) -> Iterator[None]:
    """Change or drop parameter mappings of a family inside this context.

    Import and export use the same mappings, so that the round trip stays bitwise equal and only
    the arithmetic shows a wrong mapping.
    """
    from exaone_bridge.bridge.registration import supported

    def mappings(model_config: ModelConfig) -> tuple[ParamMapping, ...]:
        changed = map(change, family.mappings(model_config))
        return tuple(mapping for mapping in changed if mapping is not None)

    bridge = supported()[family.architectures[0]]
    faulty = dataclasses.replace(family, mappings=mappings)
    with mock.patch.object(bridge, "FAMILY", faulty):
        yield


@contextlib.contextmanager
def changed_model(change: ModelChange) -> Iterator[None]:
    """Change every Megatron-Core model in place after its Hugging Face weights were loaded."""
    import torch

    from exaone_bridge.bridge.exact_bridge import ExactBridge

    load = ExactBridge.load_weights_hf_to_megatron

    def load_and_change(self: ExactBridge, *args: Any, **kwargs: Any) -> Chunks:
        model = load(self, *args, **kwargs)
        with torch.no_grad():
            change(model)
        return model

    with mock.patch.object(ExactBridge, "load_weights_hf_to_megatron", load_and_change):
        yield


@contextlib.contextmanager
def changed_provider(fields: Mapping[str, object]) -> Iterator[None]:
    """Override fields of every provider that a bridge makes of a Hugging Face config."""
    from exaone_bridge.bridge.exact_bridge import ExactBridge

    provider_bridge = ExactBridge.provider_bridge

    def provider_with_fields(self: ExactBridge, hf_pretrained: Any) -> ExactGPTModelProvider:
        provider = provider_bridge(self, hf_pretrained)
        for name, value in fields.items():
            setattr(provider, name, value)
        return provider

    with mock.patch.object(ExactBridge, "provider_bridge", provider_with_fields):
        yield
