"""EXAONE 4.5: a vision tower before the EXAONE 4.0 language model, and multi-token prediction beside it. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from exaone_bridge.models.exaone45.config import ARCHITECTURE, read_config, write_config
from exaone_bridge.models.exaone45.tiny import CHAT_TEMPLATE, PROCESSOR_FILES, SPECIAL_TOKENS, TINY
from exaone_bridge.models.exaone45.weights import (
    CARRIED,
    carried_tensors,
    exaone45_rows,
    exaone45_rows_with_mtp,
    without_carried,
)
from exaone_bridge.schema.model_family import Family

__all__ = ["EXAONE45", "EXAONE45_WITH_MTP"]


def _image_prompts(*args: Any) -> Any:
    from exaone_bridge.models.exaone45.prompts import image_prompts

    return image_prompts(*args)


def _collators() -> Mapping[str, Callable[..., Any]]:
    from exaone_bridge.models.exaone45.collate import exaone45_collate

    return {"Exaone4_5_Processor": exaone45_collate}


_CARRYING = Family(
    name="exaone45",
    architectures=(ARCHITECTURE,),
    read_config=read_config,
    write_config=write_config,
    rows=exaone45_rows,
    tiny=TINY,
    special_tokens=SPECIAL_TOKENS,
    chat_template=CHAT_TEMPLATE,
    processor_files=PROCESSOR_FILES,
    image_prompts=_image_prompts,
    collators=_collators,
    carried=CARRIED,
    carried_tensors=carried_tensors,
    without_carried=without_carried,
)
# The same models, built with their multi-token prediction: nothing travels beside them.
EXAONE45_WITH_MTP = replace(
    _CARRYING,
    rows=exaone45_rows_with_mtp,
    carried=None,
    carried_tensors=lambda facts: (),
    without_carried=lambda facts: facts,
)
EXAONE45 = replace(_CARRYING, built=EXAONE45_WITH_MTP, built_prefix="mtp.")
