"""EXAONE MoE's config.json (K-EXAONE 236B and 2.0) <-> model config. No torch.

It reads config.json as Transformers 5 and the publisher write it, and `ExaoneMoeConfig.to_dict()`.
`is_moe_layer`, `sliding_windows`, `swiglu_limits` and the `mtp_*` keys are extra keys that
Transformers 5.12.1 stores and ignores; vLLM reads the last three (PR 50524).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.schema.hf_config import (
    boolean,
    check_types,
    non_negative_float,
    positive_float,
    positive_int,
    read_head_dim,
    read_int,
    read_rope,
    update_hf_config,
)
from exaone_bridge.schema.hf_field import hf_field
from exaone_bridge.schema.hf_spelling import write_rope
from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.schema.layer_schedule import (
    FULL,
    SLIDING,
    layer_types_of,
    window_pattern,
    windows_of,
)
from exaone_bridge.schema.model_config import ModelConfig, MoEConfig, MTPConfig

__all__ = [
    "ARCHITECTURES",
    "MODEL_TYPE",
    "ExaoneMoeMTPConfig",
    "ExaoneMoeModelConfig",
    "RoutedExpertsConfig",
    "read_hf_config",
    "write_hf_config",
]

# The second is how the first release of the 236B names it.
ARCHITECTURES, MODEL_TYPE = ("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"), "exaone_moe"

# What Transformers takes where config.json has no such key
# (transformers/models/exaone_moe/configuration_exaone_moe.py, 5.12.1).
_DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
}
_MTP_DEPTH, _MTP_STEPS = "num_nextn_predict_layers", "mtp_num_speculative_steps"
_SPARSE, _DENSE = "sparse", "dense"


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedExpertsConfig(MoEConfig):
    """EXAONE MoE's mixture of experts.

    Attributes:
        scaling_factor: multiplies the weights of a token's experts; shared experts are not scaled.
        norm_topk_prob: the weights of a token's experts are divided by their sum + 1e-20.
        num_groups, group_topk: a token's experts are chosen from its best `group_topk` of
            `num_groups` groups of experts.
        fp32_gate: the checkpoint stores the router's weight in fp32, whatever the model's dtype
            (Transformers 5.24 saves it so; the published checkpoints are bf16).
    """

    num_shared_experts: int = hf_field("num_shared_experts", read=positive_int)
    scaling_factor: float = hf_field(
        "routed_scaling_factor", read=positive_float, provider="moe_router_topk_scaling_factor"
    )
    norm_topk_prob: bool = hf_field("norm_topk_prob", read=boolean, provider="norm_topk_prob")
    num_groups: int = hf_field("n_group", read=positive_int, provider="router_groups")
    group_topk: int = hf_field("topk_group", read=positive_int, provider="router_group_topk")
    fp32_gate: bool = hf_field(provider="router_fp32_on_disk", default=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExaoneMoeMTPConfig(MTPConfig):
    """Multi-token prediction: one dense layer, which may predict several tokens in turn.

    Attributes:
        steps: tokens that the layer was trained to predict, one after another.
        window: keys that a query of the layer attends to, its own included; None: all before it.
    """

    steps: int = hf_field(_MTP_STEPS, provider="mtp_steps", default=1)
    window: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExaoneMoeModelConfig(ModelConfig):
    """An EXAONE MoE model.

    Attributes:
        swiglu_limits: for each layer the limit that gate and up are clamped to before SiLU, in its
            dense, routed and shared experts alike; 0: no clamp.
    """

    attention_dropout: float = hf_field(
        "attention_dropout", read=non_negative_float, provider="attention_dropout", training=True
    )
    windows: tuple[int | None, ...] = hf_field()
    swiglu_limits: tuple[float, ...] = hf_field()
    moe: RoutedExpertsConfig
    mtp: ExaoneMoeMTPConfig | None = None

    @property
    def rope(self) -> tuple[bool, ...]:
        """RoPE is applied on sliding-window layers only (ExaoneMoeAttention.forward, 5.12.1)."""
        return tuple(window is not None for window in self.windows)

    @property
    def transformers_differs(self) -> str | None:
        """What Transformers 5.12.1 ignores of this model, or None if it computes the same."""
        ignored = [
            name
            for name, used in (
                ("sliding_windows", len({*self.windows} - {None}) > 1),
                ("swiglu_limits", any(self.swiglu_limits)),
            )
            if used
        ]
        return f"Transformers ignores {' and '.join(ignored)}" if ignored else None


def read_hf_config(hf_config: JSONMapping) -> ExaoneMoeModelConfig:
    """Read an EXAONE MoE config.

    Args:
        hf_config: config.json as a mapping, or `ExaoneMoeConfig.to_dict()`.

    Raises:
        UnsupportedConfig: a field that is malformed or not supported, that disagrees with another,
            or that Transformers cannot run.
    """
    hf_config = {**_DEFAULTS, **hf_config}
    values = ExaoneMoeModelConfig.values_from_hf(hf_config)
    check_types(hf_config)
    layers = values["num_layers"]
    return ExaoneMoeModelConfig(
        **values,
        head_dim=read_head_dim(hf_config),
        rope_theta=read_rope(hf_config, known=("default",)).theta,
        windows=_windows(hf_config, layers),
        swiglu_limits=_limits(hf_config, layers),
        moe=_read_moe(hf_config, layers),
        mtp=_read_mtp(hf_config),
    )


def _check_kinds(key: str, kinds: object, known: tuple[str, str]) -> None:
    if not isinstance(kinds, list | tuple) or any(kind not in known for kind in kinds):
        raise UnsupportedConfig(key, got=kinds, wanted=f"a list of {known[0]!r} and {known[1]!r}")


def _check_sizes(key: str, sizes: object) -> None:
    if not isinstance(sizes, list | tuple) or any(
        not isinstance(size, int) or isinstance(size, bool) or size < 0 for size in sizes
    ):
        raise UnsupportedConfig(
            key, got=sizes, wanted="whole numbers of keys, 0 for full attention"
        )


def _list_of_layers(hf_config: JSONMapping, key: str, layers: int) -> list[Any]:
    value = hf_config[key]
    if not isinstance(value, list | tuple) or len(value) != layers:
        got = f"{len(value)} entries" if isinstance(value, list | tuple) else value
        raise UnsupportedConfig(
            key, got=got, wanted=f"a list with an entry for each of num_hidden_layers={layers}"
        )
    return list(value)


def _windows(hf_config: JSONMapping, layers: int) -> tuple[int | None, ...]:
    """Return each layer's window, from the lists of the config."""
    window = read_int(hf_config, "sliding_window", least=1)
    if hf_config.get("layer_types") is None:
        pattern = hf_config["sliding_window_pattern"]
        if not isinstance(pattern, int) or isinstance(pattern, bool) or pattern < 1:
            raise UnsupportedConfig(
                "sliding_window_pattern",
                got=pattern,
                wanted="a positive whole number where layer_types is missing, because Transformers "
                "reads nothing else",
                remedy="write layer_types, with one entry for each layer, instead",
            )
        kinds = [SLIDING if (layer + 1) % pattern else FULL for layer in range(layers)]
    else:
        kinds = _list_of_layers(hf_config, "layer_types", layers)
    _check_kinds("layer_types", kinds, (FULL, SLIDING))
    if hf_config.get("sliding_windows") is None:
        return windows_of(kinds, window)
    sizes = _list_of_layers(hf_config, "sliding_windows", layers)
    _check_sizes("sliding_windows", sizes)
    windows = tuple(size or None for size in sizes)
    if layer_types_of(windows) != kinds:
        layer = next(n for n, kind in enumerate(layer_types_of(windows)) if kind != kinds[n])
        raise UnsupportedConfig(
            "sliding_windows",
            got=f"{sizes[layer]} for layer {layer}",
            wanted=f"to agree with layer_types, which has {kinds[layer]!r} there",
        )
    if not any(windows):
        raise UnsupportedConfig(
            "sliding_windows",
            got="0 for every layer",
            wanted="a sliding-window layer, because vLLM applies RoPE to every layer of a model "
            "without one and Transformers to none",
        )
    # Transformers reads sliding_window alone, which cannot express windows of two sizes.
    if len(used := {size for size in sizes if size}) == 1 and used != {window}:
        raise UnsupportedConfig(
            "sliding_windows",
            got=next(iter(used)),
            wanted=f"to agree with sliding_window={window}",
        )
    return windows


def _limits(hf_config: JSONMapping, layers: int) -> tuple[float, ...]:
    if hf_config.get("swiglu_limits") is None:
        return (0.0,) * layers
    limits = _list_of_layers(hf_config, "swiglu_limits", layers)
    return tuple(
        0.0 if limit is None else non_negative_float({"swiglu_limits": limit}, "swiglu_limits")
        for limit in limits
    )


def _layer_mask(hf_config: JSONMapping, layers: int) -> tuple[bool, ...]:
    """Return which layers are MoE layers.

    `mlp_layer_types` takes precedence over `first_k_dense_replace`; `is_moe_layer` must agree.
    """
    if hf_config.get("mlp_layer_types") is None:
        dense = read_int(hf_config, "first_k_dense_replace", least=0)
        mask = tuple(layer >= dense for layer in range(layers))
    else:
        kinds = _list_of_layers(hf_config, "mlp_layer_types", layers)
        _check_kinds("mlp_layer_types", kinds, (_DENSE, _SPARSE))
        mask = tuple(kind == _SPARSE for kind in kinds)
    if hf_config.get("is_moe_layer") is not None:
        stated = _list_of_layers(hf_config, "is_moe_layer", layers)
        if tuple(map(bool, stated)) != mask:
            raise UnsupportedConfig(
                "is_moe_layer",
                got=stated,
                wanted="to agree with mlp_layer_types or first_k_dense_replace, which alone "
                "Transformers reads",
            )
    return mask


def _read_moe(hf_config: JSONMapping, layers: int) -> RoutedExpertsConfig:
    for key, known in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if (got := hf_config.get(key)) not in (None, known):
            raise UnsupportedConfig(key, got=got, known=(known,))
    moe = RoutedExpertsConfig(
        **RoutedExpertsConfig.values_from_hf(hf_config),
        layer_mask=_layer_mask(hf_config, layers),
    )
    if not any(moe.layer_mask):
        raise UnsupportedConfig(
            "mlp_layer_types", got="dense layers only", wanted="an MoE layer in an EXAONE MoE model"
        )
    if moe.topk > moe.num_experts:
        wanted = f"at most num_experts={moe.num_experts}"
        raise UnsupportedConfig("num_experts_per_tok", got=moe.topk, wanted=wanted)
    size, rest = divmod(moe.num_experts, moe.num_groups)
    if rest or size < 2 or moe.group_topk > moe.num_groups or moe.topk > moe.group_topk * size:
        raise UnsupportedConfig(
            "n_group",
            got=f"n_group={moe.num_groups}, topk_group={moe.group_topk}",
            wanted=f"groups of equal size, 2 or more, of {moe.num_experts} experts, of which the "
            f"chosen ones hold num_experts_per_tok={moe.topk}",
        )
    return moe


def _read_mtp(hf_config: JSONMapping) -> ExaoneMoeMTPConfig | None:
    depth = read_int({_MTP_DEPTH: hf_config.get(_MTP_DEPTH) or 0}, _MTP_DEPTH, least=0)
    if not depth:
        return None
    kinds = hf_config.get("mtp_layer_types") or [FULL]
    _check_kinds("mtp_layer_types", kinds, (FULL, SLIDING))
    sizes = hf_config.get("mtp_sliding_windows") or [0] * len(kinds)
    _check_sizes("mtp_sliding_windows", sizes)
    if [bool(size) for size in sizes] != [kind == SLIDING for kind in kinds]:
        raise UnsupportedConfig(
            "mtp_sliding_windows", got=sizes, wanted=f"to agree with mtp_layer_types={kinds}"
        )
    steps = read_int({_MTP_STEPS: hf_config.get(_MTP_STEPS) or 1}, _MTP_STEPS, least=1)
    # 0.05 is the loss weight of the technical report (arXiv 2601.01739); no config states it.
    return ExaoneMoeMTPConfig(
        depth=depth, shared=True, loss_scale=0.05, steps=steps, window=sizes[0] or None
    )


def write_hf_config(model_config: ExaoneMoeModelConfig, source: JSONMapping) -> JSONObject:
    """Write config.json: `source` with the fields that differ in this model config.

    Args:
        model_config: of the model to be exported.
        source: the config.json that the model came from; empty for a model made without one.

    Raises:
        UnsupportedConfig: see `read_hf_config`, of what would be written.
    """
    hf_config, before = update_hf_config(
        model_config,
        source,
        read_hf_config,
        identity={"architectures": [ARCHITECTURES[0]], "model_type": MODEL_TYPE},
    )
    changed = model_config.changed_from(before)
    hf_config |= model_config.moe.hf_values(None if before is None else before.moe)
    if before is None or before.moe.layer_mask != model_config.moe.layer_mask:
        mask = model_config.moe.layer_mask
        hf_config["mlp_layer_types"] = [_SPARSE if is_moe else _DENSE for is_moe in mask]
        hf_config.pop("first_k_dense_replace", None)
        if "is_moe_layer" in hf_config:
            hf_config["is_moe_layer"] = list(mask)
    if "windows" in changed:
        hf_config |= _write_windows(model_config.windows, hf_config)
        if before is None or "sliding_window_pattern" in hf_config:
            hf_config["sliding_window_pattern"] = window_pattern(model_config.windows)
    if "swiglu_limits" in changed:
        if any(model_config.swiglu_limits):
            hf_config["swiglu_limits"] = list(model_config.swiglu_limits)
        else:
            hf_config.pop("swiglu_limits", None)
    if (None if before is None else before.mtp) != model_config.mtp:
        hf_config |= _write_mtp(model_config.mtp, hf_config)
    if "rope_theta" in changed:
        write_rope(hf_config, kind="default", theta=model_config.rope_theta)
    read_hf_config(hf_config)  # what a Megatron-Core model can be and a config cannot express
    return hf_config


def _write_windows(windows: tuple[int | None, ...], hf_config: JSONMapping) -> JSONObject:
    sizes = {*windows} - {None}
    written: JSONObject = {"layer_types": layer_types_of(windows)}
    if len(sizes) == 1:
        written["sliding_window"] = next(iter(sizes))
    if len(sizes) > 1 or "sliding_windows" in hf_config:
        written["sliding_windows"] = [window or 0 for window in windows]
    return written


def _write_mtp(mtp: ExaoneMoeMTPConfig | None, hf_config: JSONMapping) -> JSONObject:
    if mtp is None:
        return {_MTP_DEPTH: 0}
    return {
        _MTP_DEPTH: mtp.depth,
        "mtp_layer_types": [FULL if mtp.window is None else SLIDING] * mtp.depth,
        "mtp_sliding_windows": [mtp.window or 0] * mtp.depth,
        **({_MTP_STEPS: mtp.steps} if mtp.steps > 1 or _MTP_STEPS in hf_config else {}),
    }
