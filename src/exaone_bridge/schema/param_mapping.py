"""Rows: which Hugging Face tensors make up which Megatron-Core parameter. Plain data, no torch.

One table of rows a family serves both directions and both users: it is bound to Megatron-Bridge's
mapping objects (`bridge/mapping_registry.py`), and it says, before any model is built or any tensor is read,
which names and shapes either side must have.

Axes are one letter each, and a family's facts give their sizes:
    V vocabulary   H hidden   F feed-forward   D head   Q query heads x head   K key-value heads x head
    E experts   M an expert's feed-forward   A all shared experts' feed-forward   1 one
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

__all__ = [
    "HFTensor",
    "MappingKind",
    "ParamMapping",
    "aliases",
    "embeddings",
    "expected_hf",
    "expected_megatron",
    "experts",
    "fp32_names",
    "gqa",
    "hf_renamed",
    "hf_tensors",
    "post_norm",
    "pre_norm",
    "qk_norm",
    "router",
    "shared_experts",
    "swiglu",
]


class MappingKind(StrEnum):
    """How the Hugging Face tensors lie in the Megatron parameter, and how tensor parallelism cuts it."""

    COLUMN = "column"  # one tensor, cut along its first axis
    ROW = "row"  # one tensor, cut along its last axis
    REPLICATED = "replicated"  # one tensor, whole on every rank
    VOCAB = (
        "vocab"  # one tensor, cut along its first axis after padding it to what the layout needs
    )
    QKV = "qkv"  # q, k, v interleaved by key-value group, cut by group
    GATED = "gated"  # gate over up; each rank holds its cut of both
    SQUEEZED = "squeezed"  # one tensor with a leading axis of one that Megatron has not, whole on every rank


@dataclass(frozen=True, slots=True)
class HFTensor:
    """A Hugging Face tensor: its name, with `*` for the layer (and a second for the expert), and its axes.

    Attributes:
        fp32: stored in fp32 whatever the model's type (Transformers' `_keep_in_fp32_modules_strict`).
        std: of a random checkpoint's values around zero; None: a vector is a norm's scale, a matrix keeps sizes.
    """

    name: str
    axes: str
    fp32: bool = False
    std: float | None = None

    def shape(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The tensor's shape, given the size of each axis."""
        return tuple(1 if axis == "1" else dims[axis] for axis in self.axes)

    def dtype(self, model_dtype: str) -> str:
        """Returns the tensor's dtype in a model of this dtype; both named as in config.json."""
        return "float32" if self.fp32 else model_dtype

    def numbered(self, *numbers: int) -> HFTensor:
        """The tensor of this layer (and expert)."""
        return HFTensor(_numbered(self.name, *numbers), self.axes, self.fp32, self.std)


def _numbered(name: str, *numbers: int) -> str:
    for number in numbers:
        name = name.replace("*", str(number), 1)
    return name


@dataclass(frozen=True, slots=True)
class ParamMapping:
    """One Megatron-Core parameter (or one a layer, where its name has `*`) and the tensors it is made of.

    Attributes:
        layers: the global 0-based layer numbers that the first `*` stands for; empty for a parameter outside them.
        experts: how many experts the second `*` counts; 0: the name has no second one.
        alias: what another module class calls the same parameter; a model has one name or the other.
    """

    kind: MappingKind
    megatron: str
    hf: tuple[HFTensor, ...]
    layers: tuple[int, ...] = ()
    experts: int = 0
    alias: str | None = None

    def expand(self) -> Iterator[tuple[str, tuple[HFTensor, ...]]]:
        """Each concrete Megatron-Core name with its concrete tensors, layer by layer, expert by expert."""
        for numbers in self.numbers():
            yield (
                _numbered(self.megatron, *numbers),
                tuple(tensor.numbered(*numbers) for tensor in self.hf),
            )

    def names(self) -> Iterator[tuple[str, ...]]:
        """The Megatron-Core name of each parameter and the names of its tensors, in the order of `expand`."""
        yield from zip(*self.columns(), strict=True)

    def columns(self) -> tuple[list[str], ...]:
        """The same, name by name: all parameters' names, then for each tensor of a parameter all of its names."""
        return _columns(self)

    def aliases(self) -> Iterator[tuple[str, str]]:
        """Each concrete name by which another module class calls a parameter of this row, and ours for it."""
        if self.alias is not None:
            for numbers in self.numbers():
                yield _numbered(self.alias, *numbers), _numbered(self.megatron, *numbers)

    def numbers(self) -> Iterator[tuple[int, ...]]:
        """(), (layer,) or (layer, expert) of each parameter, in the order of `expand`."""
        if "*" not in self.megatron:
            yield ()
        for layer in self.layers:
            if self.experts:
                yield from ((layer, expert) for expert in range(self.experts))
            else:
                yield (layer,)


@functools.lru_cache(
    maxsize=128
)  # a checkpoint may have 60,000 names, which are asked for several times
def _columns(mapping: ParamMapping) -> tuple[list[str], ...]:
    return tuple(
        _column(name, mapping)
        for name in (mapping.megatron, *(tensor.name for tensor in mapping.hf))
    )


def _column(name: str, mapping: ParamMapping) -> list[str]:
    """The name with all of the row's numbers, in the order of `ParamMapping.numbers`."""
    before, star, rest = name.partition("*")
    if not star:
        return [name]
    if not mapping.experts:
        return [f"{before}{layer}{rest}" for layer in mapping.layers]
    between, _, after = rest.partition("*")
    ends = [f"{expert}{after}" for expert in range(mapping.experts)]
    return [
        start + end
        for start in [f"{before}{layer}{between}" for layer in mapping.layers]
        for end in ends
    ]


def hf_renamed(mapping: ParamMapping, name_of: Callable[[str], str]) -> ParamMapping:
    """The row of a model that calls the Hugging Face tensors otherwise."""
    return replace(
        mapping, hf=tuple(replace(tensor, name=name_of(tensor.name)) for tensor in mapping.hf)
    )


def hf_tensors(mappings: Iterable[ParamMapping]) -> dict[str, HFTensor]:
    """Name -> every Hugging Face tensor that the rows claim."""
    return {
        tensor.name: tensor for mapping in mappings for _, hf in mapping.expand() for tensor in hf
    }


def expected_hf(
    mappings: Iterable[ParamMapping], dims: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every Hugging Face tensor that the rows claim."""
    found: dict[str, tuple[int, ...]] = {}
    for mapping in mappings:
        for tensor, names in zip(mapping.hf, mapping.columns()[1:], strict=True):
            found.update(dict.fromkeys(names, tensor.shape(dims)))
    return found


def fp32_names(mappings: Iterable[ParamMapping]) -> set[str]:
    """The tensors that are fp32 on disk whatever the model's type."""
    return {
        name
        for mapping in mappings
        if any(tensor.fp32 for tensor in mapping.hf)
        for _, *names in mapping.names()
        for name, tensor in zip(names, mapping.hf, strict=True)
        if tensor.fp32
    }


def expected_megatron(mappings: Iterable[ParamMapping]) -> set[str]:
    """The name of every Megatron-Core parameter that the rows fill, over all pipeline stages and expert ranks."""
    return {name for mapping in mappings for name, _ in mapping.expand()}


def aliases(mappings: Iterable[ParamMapping]) -> dict[str, str]:
    """Another module class's name for a parameter -> the name in `expected_megatron`."""
    return {alias: name for mapping in mappings for alias, name in mapping.aliases()}


# The groups that recur. `layers`: the global 0-based layers that have them.


_BIAS_STD = 0.1


def _bias(name: str, axis: str) -> HFTensor:
    return HFTensor(name, axis, std=_BIAS_STD)


def embeddings(*, tied: bool, bias: bool = False) -> tuple[ParamMapping, ...]:
    """Word embeddings, the final norm and, unless it is tied to the embeddings, the output layer; `bias`: its own."""
    head = ParamMapping(
        MappingKind.VOCAB, "output_layer.weight", (HFTensor("lm_head.weight", "VH"),)
    )
    head_bias = ParamMapping(MappingKind.VOCAB, "output_layer.bias", (_bias("lm_head.bias", "V"),))
    return (
        ParamMapping(
            MappingKind.VOCAB,
            "embedding.word_embeddings.weight",
            (HFTensor("model.embed_tokens.weight", "VH"),),
        ),
        ParamMapping(
            MappingKind.REPLICATED,
            "decoder.final_layernorm.weight",
            (HFTensor("model.norm.weight", "H"),),
        ),
        *(() if tied else (head,)),
        *((head_bias,) if bias else ()),
    )


def gqa(layers: tuple[int, ...], *, bias: bool = False) -> tuple[ParamMapping, ...]:
    """Grouped-query attention's projections; `bias`: theirs."""
    ours, theirs = "decoder.layers.*.self_attention", "model.layers.*.self_attn"
    weights = (
        ParamMapping(
            MappingKind.QKV,
            f"{ours}.linear_qkv.weight",
            (
                HFTensor(f"{theirs}.q_proj.weight", "QH"),
                HFTensor(f"{theirs}.k_proj.weight", "KH"),
                HFTensor(f"{theirs}.v_proj.weight", "KH"),
            ),
            layers,
        ),
        ParamMapping(
            MappingKind.ROW,
            f"{ours}.linear_proj.weight",
            (HFTensor(f"{theirs}.o_proj.weight", "HQ"),),
            layers,
        ),
    )
    if not bias:
        return weights
    qkv = tuple(
        _bias(f"{theirs}.{which}_proj.bias", axis) for which, axis in zip("qkv", "QKK", strict=True)
    )
    return (
        *weights,
        ParamMapping(MappingKind.QKV, f"{ours}.linear_qkv.bias", qkv, layers),
        ParamMapping(
            MappingKind.REPLICATED,
            f"{ours}.linear_proj.bias",
            (_bias(f"{theirs}.o_proj.bias", "H"),),
            layers,
        ),
    )


def qk_norm(layers: tuple[int, ...]) -> tuple[ParamMapping, ...]:
    """Norms over the head axis of queries and keys."""
    return tuple(
        ParamMapping(
            MappingKind.REPLICATED,
            f"decoder.layers.*.self_attention.{which}_layernorm.weight",
            (HFTensor(f"model.layers.*.self_attn.{which}_norm.weight", "D"),),
            layers,
        )
        for which in "qk"
    )


def swiglu(
    layers: tuple[int, ...], *, bias: bool = False, inside: str = "mlp", width: str = "F"
) -> tuple[ParamMapping, ...]:
    """A gated feed-forward's projections; `bias`: theirs; `inside`: the module of both sides; `width`: its axis."""
    ours, theirs = f"decoder.layers.*.{inside}", f"model.layers.*.{inside}"
    down = (HFTensor(f"{theirs}.down_proj.weight", f"H{width}"),)
    weights = (
        ParamMapping(
            MappingKind.GATED, f"{ours}.linear_fc1.weight", _gate_and_up(theirs, width), layers
        ),
        ParamMapping(MappingKind.ROW, f"{ours}.linear_fc2.weight", down, layers),
    )
    if not bias:
        return weights
    gate_and_up = tuple(_bias(f"{theirs}.{which}_proj.bias", width) for which in ("gate", "up"))
    return (
        *weights,
        ParamMapping(MappingKind.GATED, f"{ours}.linear_fc1.bias", gate_and_up, layers),
        ParamMapping(
            MappingKind.REPLICATED,
            f"{ours}.linear_fc2.bias",
            (_bias(f"{theirs}.down_proj.bias", "H"),),
            layers,
        ),
    )


def _gate_and_up(module: str, width: str) -> tuple[HFTensor, ...]:
    return tuple(HFTensor(f"{module}.{which}_proj.weight", f"{width}H") for which in ("gate", "up"))


def shared_experts(layers: tuple[int, ...], *, bias: bool = False) -> tuple[ParamMapping, ...]:
    """The experts that every token visits, side by side in one feed-forward."""
    return swiglu(layers, bias=bias, inside="mlp.shared_experts", width="A")


def experts(layers: tuple[int, ...], count: int) -> tuple[ParamMapping, ...]:
    """The routed experts' projections, one tensor an expert, without biases.

    Transformer Engine's grouped GEMM numbers the weights of one module, the sequential layout has a module an expert.
    """
    ours, theirs = "decoder.layers.*.mlp.experts", "model.layers.*.mlp.experts.*"
    return (
        ParamMapping(
            MappingKind.GATED,
            f"{ours}.linear_fc1.weight*",
            _gate_and_up(theirs, "M"),
            layers,
            count,
            f"{ours}.local_experts.*.linear_fc1.weight",
        ),
        ParamMapping(
            MappingKind.ROW,
            f"{ours}.linear_fc2.weight*",
            (HFTensor(f"{theirs}.down_proj.weight", "HM"),),
            layers,
            count,
            f"{ours}.local_experts.*.linear_fc2.weight",
        ),
    )


def router(
    layers: tuple[int, ...], *, weight: str, selection_bias: str
) -> tuple[ParamMapping, ...]:
    """A router's weight and the bias that only selects; the names are the family's, inside `mlp`; both fp32."""
    ours, theirs = "decoder.layers.*.mlp.router", "model.layers.*.mlp"
    bias = HFTensor(f"{theirs}.{selection_bias}", "1E", fp32=True, std=0.02)
    return (
        ParamMapping(
            MappingKind.REPLICATED,
            f"{ours}.weight",
            (HFTensor(f"{theirs}.{weight}", "EH", fp32=True),),
            layers,
        ),
        ParamMapping(MappingKind.SQUEEZED, f"{ours}.expert_bias", (bias,), layers),
    )


def pre_norm(layers: tuple[int, ...], moe_layers: tuple[int, ...]) -> tuple[ParamMapping, ...]:
    """Norms before attention and feed-forward: fused into the linear that follows, but for a router that does."""
    attention = HFTensor("model.layers.*.input_layernorm.weight", "H")
    mlp = HFTensor("model.layers.*.post_attention_layernorm.weight", "H")
    dense = tuple(layer for layer in layers if layer not in moe_layers)
    return (
        ParamMapping(
            MappingKind.REPLICATED,
            "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight",
            (attention,),
            layers,
        ),
        ParamMapping(
            MappingKind.REPLICATED,
            "decoder.layers.*.mlp.linear_fc1.layer_norm_weight",
            (mlp,),
            dense,
        ),
        ParamMapping(
            MappingKind.REPLICATED, "decoder.layers.*.pre_mlp_layernorm.weight", (mlp,), moe_layers
        ),
    )


def post_norm(layers: tuple[int, ...], *, attention: str, mlp: str) -> tuple[ParamMapping, ...]:
    """Norms on the outputs of attention and feed-forward; `attention`, `mlp`: what the family calls them."""
    return (
        ParamMapping(
            MappingKind.REPLICATED,
            "decoder.layers.*.self_attention.linear_proj.post_layernorm.weight",
            (HFTensor(f"model.layers.*.{attention}.weight", "H"),),
            layers,
        ),
        ParamMapping(
            MappingKind.REPLICATED,
            "decoder.layers.*.mlp.linear_fc2.post_layernorm.weight",
            (HFTensor(f"model.layers.*.{mlp}.weight", "H"),),
            layers,
        ),
    )
