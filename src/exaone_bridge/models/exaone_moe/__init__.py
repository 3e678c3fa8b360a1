"""EXAONE MoE (K-EXAONE): pre-norm, QK norm, hybrid attention, a sigmoid router. No torch here."""

from __future__ import annotations

from dataclasses import replace

from exaone_bridge.models.exaone_moe.config import (
    ARCHITECTURES,
    read_hf_config,
    write_hf_config,
)
from exaone_bridge.models.exaone_moe.from_provider import model_config_of
from exaone_bridge.models.exaone_moe.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, TINY
from exaone_bridge.models.exaone_moe.weights import (
    PASSTHROUGH,
    exaone_moe_mappings,
    exaone_moe_mappings_with_mtp,
    passthrough_tensors,
    with_fp32_gate,
    without_passthrough,
)
from exaone_bridge.schema.model_family import (
    ModelFamily,
    OptionalFp32,
    PassthroughTensors,
    TinyFiles,
)

__all__ = ["EXAONE_MOE", "EXAONE_MOE_WITH_MTP"]

EXAONE_MOE_WITH_MTP = ModelFamily(
    name="exaone_moe",
    architectures=ARCHITECTURES,
    read_hf_config=read_hf_config,
    write_hf_config=write_hf_config,
    provider_class="exaone_bridge.models.exaone_moe.provider.ExaoneMoeModelProvider",
    model_config_of=model_config_of,
    mappings=exaone_moe_mappings_with_mtp,
    tiny=TINY,
    tiny_files=TinyFiles(special_tokens=SPECIAL_TOKENS, chat_template=CHAT_TEMPLATE),
    optional_fp32=OptionalFp32(
        pattern=r"model\.layers\.\d+\.mlp\.gate\.weight",
        provider_field="router_fp32_on_disk",
        in_fp32=with_fp32_gate,
    ),
)
# Where multi-token prediction is not built, its tensors pass through.
EXAONE_MOE = replace(
    EXAONE_MOE_WITH_MTP,
    mappings=exaone_moe_mappings,
    passthrough=PassthroughTensors(
        pattern=PASSTHROUGH, tensors=passthrough_tensors, without=without_passthrough
    ),
    with_mtp=EXAONE_MOE_WITH_MTP,
)
