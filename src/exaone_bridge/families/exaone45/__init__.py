"""EXAONE 4.5: a vision tower before the EXAONE 4.0 language model, and multi-token prediction beside it. No torch."""

from __future__ import annotations

from dataclasses import replace

from exaone_bridge.families.exaone45.config import ARCHITECTURE, read_config, write_config
from exaone_bridge.families.exaone45.tiny import CHAT_TEMPLATE, PROCESSOR_FILES, SPECIAL_TOKENS, TINY
from exaone_bridge.families.exaone45.weights import (
    CARRIED,
    carried_tensors,
    exaone45_rows,
    exaone45_rows_with_mtp,
    without_carried,
)
from exaone_bridge.parts.family import Family

__all__ = ["EXAONE45", "EXAONE45_WITH_MTP"]

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
    bridge="exaone_bridge.families.exaone45.bridge:Exaone45Bridge",
    image_prompts="exaone_bridge.families.exaone45.prompts:image_prompts",
    collators={"Exaone4_5_Processor": "exaone_bridge.families.exaone45.collate:exaone45_collate"},
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
