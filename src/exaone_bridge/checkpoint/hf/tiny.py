"""Random checkpoints: real files of any configuration, away from identity, so that no fault can hide.

Norm scales are not 1, biases not 0, and activations keep their size from layer to layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.checkpoint.hf.writer import plan_shards, write_config_json, write_weights
from exaone_bridge.checkpoint.staging import staged
from exaone_bridge.models import family_of
from exaone_bridge.schema.hf_config import language_config
from exaone_bridge.schema.model_family import ModelFamily
from exaone_bridge.schema.param_mapping import HFTensor, hf_tensors

__all__ = ["random_weights", "write_random"]


def random_weights(
    tensors: Iterable[HFTensor], dims: Mapping[str, int], dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) for each: norms are 1 + 0.3 n, matrices n / sqrt(inputs), others std n; n standard normal."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        shape = tensor.shape(dims)
        noise = torch.empty(shape, dtype=torch.float32).normal_(generator=generator)
        if tensor.std is not None:
            noise.mul_(tensor.std)
        elif len(shape) == 1:
            noise.mul_(0.3).add_(1)
        else:
            noise.mul_(shape[-1] ** -0.5)
        yield tensor.name, noise.to(torch.float32 if tensor.fp32 else dtype)


def write_random(
    target: Path, config: Mapping[str, Any], *, seed: int = 0, tokenizer: bool = True
) -> None:
    """Write a Hugging Face folder of this configuration with random weights.

    Args:
        target: must not exist.
        config: `config.json`.
        seed: of the weights.
        tokenizer: also write a byte-level tokenizer with the family's special tokens, its chat template and a
            generation config.

    Raises:
        UnsupportedConfig: the configuration is not modelled.
        CheckpointError: the target exists.
    """
    family = family_of(config.get("architectures"), where="configuration")
    model_config = family.read_hf_config(config)
    tensors = (
        *hf_tensors(family.mappings(model_config)).values(),
        *family.passthrough_tensors(model_config),
    )
    dtype: torch.dtype = getattr(torch, model_config.dtype)
    sizes = {
        each.name: math.prod(each.shape(model_config.dims)) * (4 if each.fp32 else dtype.itemsize)
        for each in tensors
    }
    with staged(target) as folder:
        write_weights(
            folder, random_weights(tensors, model_config.dims, dtype, seed), plan_shards(sizes)
        )
        write_config_json(folder, config)
        if tokenizer and model_config.vocab_size >= 256 + len(family.tiny_files.special_tokens):
            _write_tokenizer(
                folder, family, model_config.vocab_size, {**language_config(dict(config)), **config}
            )


def _byte_alphabet() -> list[str]:
    """The 256 characters by which byte-level tokenizers write bytes: printable ones for themselves, others shifted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _write_tokenizer(
    folder: Path, family: ModelFamily, vocab_size: int, config: Mapping[str, Any]
) -> None:
    special = {
        text: number
        for text, number in family.tiny_files.special_tokens.items()
        if number < vocab_size
    }
    free = (number for number in range(vocab_size) if number not in special.values())
    vocab = {character: next(free) for character in _byte_alphabet()}
    vocab |= {f"<unused{number}>": number for number in free}
    added = [
        {"id": number, "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for text, number in sorted(special.items(), key=lambda item: item[1])
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    files: dict[str, Any] = {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab | special, "merges": []},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.get("max_position_embeddings"),
            "clean_up_tokenization_spaces": False,
        }
        | _named_tokens(special, config),
        "generation_config.json": {
            "_from_model_config": True,
            **{
                key: config[key]
                for key in ("bos_token_id", "eos_token_id", "pad_token_id")
                if key in config
            },
        },
    }
    files |= family.tiny_files.processor_files
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    (folder / "chat_template.jinja").write_text(family.tiny_files.chat_template)


def _named_tokens(special: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, str]:
    by_number = {number: text for text, number in special.items()}
    named = {}
    for role in ("bos", "eos", "pad"):
        number = config.get(f"{role}_token_id")
        number = (
            number[0] if isinstance(number, list) and number else number
        )  # several ends of a text: the first
        if isinstance(number, int) and number in by_number:
            named[f"{role}_token"] = by_number[number]
    return named
