"""Random checkpoints: real files of any config, with values that hide no fault.

Norm scales are not 1, biases are not 0, and activations keep their size from layer to layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from exaone_bridge.checkpoint.hf.headers import TensorSpec
from exaone_bridge.checkpoint.hf.writer import write_model
from exaone_bridge.checkpoint.staging import staged
from exaone_bridge.models import family_of
from exaone_bridge.schema.dtypes import SAFETENSORS_DTYPES
from exaone_bridge.schema.hf_config import language_config
from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.schema.model_family import ModelFamily
from exaone_bridge.schema.param_mapping import HFTensor

__all__ = ["random_weights", "write_random"]

# Merges of the tokenizer, in order; \u0120 is a space. Some converters require that there are any.
_MERGES = (
    "h e",
    "t he",
    "\u0120 the",
    "i n",
    "e r",
    "a n",
    "an d",
    "\u0120 a",
    "r e",
    "o n",
    "in g",
)


def random_weights(
    tensors: Iterable[HFTensor], dims: Mapping[str, int], model_dtype: str, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Draw random tensors from a standard normal n.

    A tensor with a `std` is std n; else a vector, which is a norm's scale, is 1 + 0.3 n, and a
    matrix is n / sqrt(inputs).

    Args:
        tensors: The tensors, in the order of drawing.
        dims: Axis letter -> size.
        model_dtype: As in config.json; tensors that are kept in fp32 are fp32.
        seed: Of the generator.

    Yields:
        Name and tensor `[*HFTensor.shape(dims)]`.
    """
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
        yield tensor.name, noise.to(getattr(torch, tensor.dtype(model_dtype)))


def write_random(
    target: str | Path, config: JSONMapping, *, seed: int = 0, tokenizer: bool = True
) -> None:
    """Write a Hugging Face folder of a config with random weights.

    Args:
        target: Must not exist.
        config: `config.json`.
        seed: Of the weights.
        tokenizer: Also write a byte-level tokenizer with the family's special tokens, its chat
            template and a generation config.

    Raises:
        UnsupportedConfig: The config is not supported.
        CheckpointError: The target exists.
    """
    model = family_of(config.get("architectures"), where="config").describe(config)
    family, dtype = model.family, model.config.dtype
    tensors = (*model.hf_tensors.values(), *model.passthrough_tensors)
    specs = [
        TensorSpec(each.name, SAFETENSORS_DTYPES[each.dtype(dtype)], each.shape(model.dims))
        for each in tensors
    ]
    with staged(Path(target)) as folder:
        write_model(folder, config, specs, random_weights(tensors, model.dims, dtype, seed))
        vocab_size = model.config.vocab_size
        if tokenizer and vocab_size >= 256 + len(family.tiny_files.special_tokens):
            names = {**language_config(dict(config)), **config}
            _write_tokenizer(folder, family, vocab_size, names)


def _byte_alphabet() -> list[str]:
    """Return the 256 characters of byte-level tokenizers: printable bytes, the others shifted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _write_tokenizer(
    folder: Path, family: ModelFamily, vocab_size: int, config: JSONMapping
) -> None:
    special = {
        text: number
        for text, number in family.tiny_files.special_tokens.items()
        if number < vocab_size
    }
    free = (number for number in range(vocab_size) if number not in special.values())
    vocab = {character: next(free) for character in _byte_alphabet()}
    merges = []
    for merge, number in zip(_MERGES, free, strict=False):  # as many as the vocabulary takes
        merges.append(merge.split())
        vocab["".join(merge.split())] = number
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
    files: JSONObject = {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab | special, "merges": merges},
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
    files |= family.tiny_files.processor_files(config)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    (folder / "chat_template.jinja").write_text(family.tiny_files.chat_template)


def _named_tokens(special: Mapping[str, int], config: JSONMapping) -> dict[str, str]:
    by_number = {number: text for text, number in special.items()}
    named = {}
    for role in ("bos", "eos", "pad"):
        number = config.get(f"{role}_token_id")
        if isinstance(number, list) and number:  # of several EOS tokens the first
            number = number[0]
        if isinstance(number, int) and number in by_number:
            named[f"{role}_token"] = by_number[number]
    return named
