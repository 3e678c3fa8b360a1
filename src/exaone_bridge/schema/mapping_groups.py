"""Parameter mappings of the modules that several families have. No torch.

`layers` are the global 0-based layers that have the module. A group without layers has no mappings.
"""

from __future__ import annotations

from exaone_bridge.schema.model_config import HeadConfig
from exaone_bridge.schema.param_mapping import HFTensor, MappingKind, ParamMapping

__all__ = [
    "attention_mappings",
    "embedding_mappings",
    "expert_mappings",
    "head_mappings",
    "post_norm_mappings",
    "pre_norm_mappings",
    "qk_norm_mappings",
    "router_mappings",
    "shared_expert_mappings",
    "swiglu_mappings",
]

Mappings = tuple[ParamMapping, ...]
_BIAS_STD = 0.1  # of a random checkpoint's biases


def _bias(name: str, axis: str) -> HFTensor:
    return HFTensor(name, axis, std=_BIAS_STD)


def embedding_mappings(*, tied: bool, bias: bool = False) -> Mappings:
    """Return the token embedding, the final norm and the output layer.

    Args:
        tied: the output layer uses the embedding's weight, and has none of its own.
        bias: the output layer has a bias.
    """
    embedding = HFTensor("model.embed_tokens.weight", "VH")
    norm, head = HFTensor("model.norm.weight", "H"), HFTensor("lm_head.weight", "VH")
    mappings = [
        ParamMapping(MappingKind.VOCAB, "embedding.word_embeddings.weight", (embedding,)),
        ParamMapping(MappingKind.REPLICATED, "decoder.final_layernorm.weight", (norm,)),
    ]
    if not tied:
        mappings.append(ParamMapping(MappingKind.VOCAB, "output_layer.weight", (head,)))
    if bias:
        head_bias = (_bias("lm_head.bias", "V"),)
        mappings.append(ParamMapping(MappingKind.VOCAB, "output_layer.bias", head_bias))
    return tuple(mappings)


def head_mappings(head: HeadConfig) -> Mappings:
    """Return a head, which takes the place of the output layer and is the same on every TP rank."""
    weight = (HFTensor(f"{head.hf_name}.weight", "LH"),)
    mappings = (ParamMapping(MappingKind.REPLICATED, "output_layer.weight", weight),)
    if not head.has_bias:
        return mappings
    bias = (_bias(f"{head.hf_name}.bias", "L"),)
    return (*mappings, ParamMapping(MappingKind.REPLICATED, "output_layer.bias", bias))


def attention_mappings(layers: tuple[int, ...], *, bias: bool = False) -> Mappings:
    """Return the projections of grouped-query attention, with biases or without."""
    if not layers:
        return ()
    megatron, hf = "decoder.layers.*.self_attention", "model.layers.*.self_attn"
    qkv = tuple(
        HFTensor(f"{hf}.{which}_proj.weight", axes)
        for which, axes in (("q", "QH"), ("k", "KH"), ("v", "KH"))
    )
    out = HFTensor(f"{hf}.o_proj.weight", "HQ")
    mappings = (
        ParamMapping(MappingKind.QKV, f"{megatron}.linear_qkv.weight", qkv, layers),
        ParamMapping(MappingKind.ROW, f"{megatron}.linear_proj.weight", (out,), layers),
    )
    if not bias:
        return mappings
    qkv_bias = tuple(
        _bias(f"{hf}.{which}_proj.bias", axis) for which, axis in zip("qkv", "QKK", strict=True)
    )
    out_bias = (_bias(f"{hf}.o_proj.bias", "H"),)
    return (
        *mappings,
        ParamMapping(MappingKind.QKV, f"{megatron}.linear_qkv.bias", qkv_bias, layers),
        ParamMapping(MappingKind.REPLICATED, f"{megatron}.linear_proj.bias", out_bias, layers),
    )


def qk_norm_mappings(layers: tuple[int, ...]) -> Mappings:
    """Return the norms of queries and keys over the head axis."""
    if not layers:
        return ()
    return tuple(
        ParamMapping(
            MappingKind.REPLICATED,
            f"decoder.layers.*.self_attention.{which}_layernorm.weight",
            (HFTensor(f"model.layers.*.self_attn.{which}_norm.weight", "D"),),
            layers,
        )
        for which in "qk"
    )


def swiglu_mappings(
    layers: tuple[int, ...], *, bias: bool = False, module: str = "mlp", axis: str = "F"
) -> Mappings:
    """Return the projections of a gated MLP, with biases or without.

    Args:
        module: the MLP's name in a layer, on both sides.
        axis: of its feed-forward size.
    """
    if not layers:
        return ()
    megatron, hf = f"decoder.layers.*.{module}", f"model.layers.*.{module}"
    down = HFTensor(f"{hf}.down_proj.weight", f"H{axis}")
    mappings = (
        ParamMapping(
            MappingKind.GATED, f"{megatron}.linear_fc1.weight", _gate_and_up(hf, axis), layers
        ),
        ParamMapping(MappingKind.ROW, f"{megatron}.linear_fc2.weight", (down,), layers),
    )
    if not bias:
        return mappings
    gate_and_up = tuple(_bias(f"{hf}.{which}_proj.bias", axis) for which in ("gate", "up"))
    down_bias = (_bias(f"{hf}.down_proj.bias", "H"),)
    return (
        *mappings,
        ParamMapping(MappingKind.GATED, f"{megatron}.linear_fc1.bias", gate_and_up, layers),
        ParamMapping(MappingKind.REPLICATED, f"{megatron}.linear_fc2.bias", down_bias, layers),
    )


def _gate_and_up(module: str, axis: str) -> tuple[HFTensor, ...]:
    return tuple(HFTensor(f"{module}.{which}_proj.weight", f"{axis}H") for which in ("gate", "up"))


def shared_expert_mappings(layers: tuple[int, ...], *, bias: bool = False) -> Mappings:
    """Return the shared experts, which every token visits: one MLP of their joint size."""
    return swiglu_mappings(layers, bias=bias, module="mlp.shared_experts", axis="A")


def expert_mappings(layers: tuple[int, ...], count: int) -> Mappings:
    """Return the projections of the routed experts, one tensor for each expert, without biases.

    Transformer Engine's grouped GEMM numbers the weights of one module; the sequential layout has
    one module for each expert, and its names are the aliases.
    """
    if not layers:
        return ()
    megatron, hf = "decoder.layers.*.mlp.experts", "model.layers.*.mlp.experts.*"
    down = (HFTensor(f"{hf}.down_proj.weight", "HM"),)
    return tuple(
        ParamMapping(
            kind,
            f"{megatron}.{linear}.weight*",
            tensors,
            layers,
            count,
            f"{megatron}.local_experts.*.{linear}.weight",
        )
        for kind, linear, tensors in (
            (MappingKind.GATED, "linear_fc1", _gate_and_up(hf, "M")),
            (MappingKind.ROW, "linear_fc2", down),
        )
    )


def router_mappings(
    layers: tuple[int, ...],
    *,
    weight: str,
    selection_bias: str,
    squeezed: bool = False,
    fp32_weight: bool = True,
) -> Mappings:
    """Return a router's weight, and the bias that is added to select experts only, which is fp32.

    Args:
        weight, selection_bias: the Hugging Face names in a layer's `mlp`.
        squeezed: the bias has a leading axis of size one on disk.
        fp32_weight: the weight is fp32 on disk whatever the model's dtype.
    """
    if not layers:
        return ()
    megatron, hf = "decoder.layers.*.mlp.router", "model.layers.*.mlp"
    axes = "1E" if squeezed else "E"
    bias = HFTensor(f"{hf}.{selection_bias}", axes, fp32=True, std=0.02)
    gate = HFTensor(f"{hf}.{weight}", "EH", fp32=fp32_weight, fp32_param=True)
    kind = MappingKind.SQUEEZED if squeezed else MappingKind.REPLICATED
    return (
        ParamMapping(MappingKind.REPLICATED, f"{megatron}.weight", (gate,), layers),
        ParamMapping(kind, f"{megatron}.expert_bias", (bias,), layers),
    )


def pre_norm_mappings(layers: tuple[int, ...], moe_layers: tuple[int, ...] = ()) -> Mappings:
    """Return the norms before attention and MLP.

    Megatron-Core fuses a norm into the linear that follows, except before a router.
    """
    attention = (HFTensor("model.layers.*.input_layernorm.weight", "H"),)
    mlp = (HFTensor("model.layers.*.post_attention_layernorm.weight", "H"),)
    dense_layers = tuple(layer for layer in layers if layer not in moe_layers)
    return tuple(
        ParamMapping(
            MappingKind.REPLICATED, f"decoder.layers.*.{name}", tensors, layers_with_the_norm
        )
        for name, tensors, layers_with_the_norm in (
            ("self_attention.linear_qkv.layer_norm_weight", attention, layers),
            ("mlp.linear_fc1.layer_norm_weight", mlp, dense_layers),
            ("pre_mlp_layernorm.weight", mlp, moe_layers),
        )
        if layers_with_the_norm
    )


def post_norm_mappings(layers: tuple[int, ...], *, attention: str, mlp: str) -> Mappings:
    """Return the norms on the outputs of attention and MLP.

    Args:
        attention, mlp: their Hugging Face names in a layer.
    """
    if not layers:
        return ()
    return tuple(
        ParamMapping(
            MappingKind.REPLICATED,
            f"decoder.layers.*.{linear}.post_layernorm.weight",
            (HFTensor(f"model.layers.*.{name}.weight", "H"),),
            layers,
        )
        for linear, name in (("self_attention.linear_proj", attention), ("mlp.linear_fc2", mlp))
    )
