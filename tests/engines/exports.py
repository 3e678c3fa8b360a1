"""Exports of tiny models, made as a user makes them: Hugging Face -> Megatron -> Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.schema.parallel_layout import Layout
from tests.conftest import TINY_CONFIGS
from tests.helpers.spelling import spell_as_published

CONTEXT = 512  # tokens
# Transformers 4 has no class for these, so no publisher spells them with its keys.
ONLY_TRANSFORMERS_5 = ("exaone45", "exaone-moe", "exaone-moe-2")


def write_export(work: Path, name: str, fields: Mapping[str, Any]) -> Path:
    """Write a tiny model, spelled as published, to `work/source` and its export to `exported`.

    Args:
        work: is created.
        name: of the tiny model.
        fields: of config.json that differ from the tiny model's.

    Returns:
        `work`.
    """
    source, exported = work / "source", work / "exported"
    config = {**TINY_CONFIGS[name], **fields}
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], "max_position_embeddings": CONTEXT}
    else:
        config["max_position_embeddings"] = CONTEXT
    work.mkdir(parents=True)
    write_random(source, config)
    if name not in ONLY_TRANSFORMERS_5:
        spell_as_published(source)
    if name.startswith("ernie45"):
        write_sentencepiece(source / "tokenizer.model", config["vocab_size"])
    import_checkpoint(source, work / "megatron", Layout())
    export_checkpoint(work / "megatron", exported)
    return work


def write_sentencepiece(path: Path, vocab_size: int) -> None:
    """Write what published ERNIE models have beside tokenizer.json: here bytes, and no words."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    kinds = type(model).SentencePiece
    model.trainer_spec.byte_fallback = True
    for number in range(vocab_size):
        if number < 3:
            piece = ("<unk>", "<s>", "</s>")[number]
            kind = kinds.CONTROL if number else kinds.UNKNOWN
        elif number < 3 + 256:
            piece, kind = f"<0x{number - 3:02X}>", kinds.BYTE
        else:
            piece, kind = f"word{number}", kinds.NORMAL
        model.pieces.add(piece=piece, score=-float(number), type=kind)
    path.write_bytes(model.SerializeToString())
