"""EXAONE 4.5: an EXAONE 4.0 language model with a vision encoder and multi-token prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from exaone_bridge.models.exaone45.config import ARCHITECTURE, read_hf_config, write_hf_config
from exaone_bridge.models.exaone45.from_provider import model_config_of
from exaone_bridge.models.exaone45.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, TINY, processor_files
from exaone_bridge.models.exaone45.weights import (
    PASSTHROUGH,
    exaone45_mappings,
    exaone45_mappings_with_mtp,
    passthrough_tensors,
    without_passthrough,
)
from exaone_bridge.schema.model_family import (
    ImageSupport,
    ModelFamily,
    PassthroughTensors,
    TinyFiles,
)

__all__ = ["EXAONE45", "EXAONE45_WITH_MTP"]


def _image_prompts(*args: Any) -> Any:
    from exaone_bridge.models.exaone45.prompts import image_prompts

    return image_prompts(*args)


def _collators() -> Mapping[str, Callable[..., Any]]:
    from exaone_bridge.models.exaone45.collate import exaone45_collate

    return {"Exaone4_5_Processor": exaone45_collate}


EXAONE45_WITH_MTP = ModelFamily(
    name="exaone45",
    architectures=(ARCHITECTURE,),
    read_hf_config=read_hf_config,
    write_hf_config=write_hf_config,
    provider_class="exaone_bridge.models.exaone45.provider.Exaone45ModelProvider",
    model_config_of=model_config_of,
    mappings=exaone45_mappings_with_mtp,
    tiny=TINY,
    tiny_files=TinyFiles(
        special_tokens=SPECIAL_TOKENS,
        chat_template=CHAT_TEMPLATE,
        processor_files=processor_files,
    ),
    images=ImageSupport(prompts=_image_prompts, collators=_collators),
)
# Where multi-token prediction is not built, its tensors pass through.
EXAONE45 = replace(
    EXAONE45_WITH_MTP,
    mappings=exaone45_mappings,
    passthrough=PassthroughTensors(
        pattern=PASSTHROUGH, tensors=passthrough_tensors, without=without_passthrough
    ),
    with_mtp=EXAONE45_WITH_MTP,
)
