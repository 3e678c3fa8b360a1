"""Parameter mappings of multi-token prediction as EXAONE models have it on disk (`mtp.*`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from exaone_bridge.schema.param_mapping import HFTensor, MappingKind, ParamMapping

__all__ = ["mtp_mappings"]


def mtp_mappings(layer: Iterable[ParamMapping], num_layers: int) -> Iterator[ParamMapping]:
    """Yield the mappings of `mtp.*`.

    Args:
        layer: the mappings of the decoder layer that predicts; those without a layer are left out.
        num_layers: layers on disk; their common inputs, which are there once, belong to the first.
    """
    layer = [mapping for mapping in layer if mapping.is_per_layer]
    for depth in range(num_layers):
        for mapping in layer:
            megatron = mapping.megatron.replace(
                "decoder.layers.*", f"mtp.layers.{depth}.mtp_model_layer"
            )
            renamed = mapping.with_hf_names(_in_layer(depth))
            yield replace(renamed, megatron=megatron, layers=())
    if num_layers:
        yield ParamMapping(
            MappingKind.COLUMN, "mtp.layers.0.eh_proj.weight", (HFTensor("mtp.fc.weight", "HJ"),)
        )
        for megatron, hf in (
            ("enorm", "pre_fc_norm_embedding"),
            ("hnorm", "pre_fc_norm_hidden"),
            ("final_layernorm", "norm"),
        ):
            yield ParamMapping(
                MappingKind.REPLICATED,
                f"mtp.layers.0.{megatron}.weight",
                (HFTensor(f"mtp.{hf}.weight", "H"),),
            )


def _in_layer(depth: int) -> Callable[[str], str]:
    return lambda name: name.replace("model.layers.*", f"mtp.layers.{depth}")
