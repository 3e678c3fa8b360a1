"""EXAONE 4.5: a vision tower before the EXAONE 4.0 language model, and multi-token prediction beside it. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from exaone_bridge.models.exaone45.config import ARCHITECTURE, read_hf_config, write_hf_config
from exaone_bridge.models.exaone45.tiny import CHAT_TEMPLATE, PROCESSOR_FILES, SPECIAL_TOKENS, TINY
from exaone_bridge.models.exaone45.weights import (
    PASSTHROUGH,
    exaone45_mappings,
    exaone45_mappings_with_mtp,
    passthrough_tensors,
    without_passthrough,
)
from exaone_bridge.schema.model_family import ModelFamily

__all__ = ["EXAONE45", "EXAONE45_WITH_MTP"]


def _image_prompts(*args: Any) -> Any:
    from exaone_bridge.models.exaone45.prompts import image_prompts

    return image_prompts(*args)


def _collators() -> Mapping[str, Callable[..., Any]]:
    from exaone_bridge.models.exaone45.collate import exaone45_collate

    return {"Exaone4_5_Processor": exaone45_collate}


_WITH_PASSTHROUGH = ModelFamily(
    name="exaone45",
    architectures=(ARCHITECTURE,),
    read_hf_config=read_hf_config,
    write_hf_config=write_hf_config,
    mappings=exaone45_mappings,
    tiny=TINY,
    special_tokens=SPECIAL_TOKENS,
    chat_template=CHAT_TEMPLATE,
    processor_files=PROCESSOR_FILES,
    image_prompts=_image_prompts,
    collators=_collators,
    passthrough=PASSTHROUGH,
    passthrough_tensors=passthrough_tensors,
    without_passthrough=without_passthrough,
)
# The same models, built with their multi-token prediction: nothing travels beside them.
EXAONE45_WITH_MTP = replace(
    _WITH_PASSTHROUGH,
    mappings=exaone45_mappings_with_mtp,
    passthrough=None,
    passthrough_tensors=lambda model_config: (),
    without_passthrough=lambda model_config: model_config,
)
EXAONE45 = replace(_WITH_PASSTHROUGH, built=EXAONE45_WITH_MTP, built_prefix="mtp.")
