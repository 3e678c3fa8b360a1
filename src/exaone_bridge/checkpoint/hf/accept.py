"""What a Hugging Face folder may have otherwise than its config says, because no value changes.

A tensor that follows from the others is left out if it equals what it follows from, and a tensor of
another dtype is cast if every value survives. torch is imported for the comparison of values only,
which few folders need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from exaone_bridge.checkpoint.hf.headers import TensorInfo
from exaone_bridge.checkpoint.hf.reader import TensorReader
from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.dtypes import CONFIG_DTYPES, SAFETENSORS_DTYPES
from exaone_bridge.schema.json_types import JSONMapping
from exaone_bridge.schema.model_family import OUTPUT_LAYER, ModelDescription

if TYPE_CHECKING:
    import torch

__all__ = ["check_redundant", "dtype_of_weights", "in_model_dtypes", "names_dtype"]

_WIDER = {("BF16", "F32"), ("F16", "F32")}  # (from, to): casts that change no value
_PIECE = 1 << 22  # elements that are compared at a time
# The relative rounding of a frequency, in the dtype that it was saved in; in fp32 some units more,
# because powers are computed in several ways.
_ROUNDING = {"F32": 2.0**-20, "BF16": 2.0**-8, "F16": 2.0**-10}
_VISION_THETA = 10000.0  # Exaone4_5_VisionRotaryEmbedding (Transformers 5.12.1)


def names_dtype(config: JSONMapping) -> bool:
    """Whether config.json names a dtype, for the model or for a part of it."""
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    return any(part.get(key) is not None for part in parts for key in ("dtype", "torch_dtype"))


def dtype_of_weights(
    model: ModelDescription, tensors: Mapping[str, TensorInfo]
) -> tuple[str, str] | None:
    """Find the dtype of a model whose config.json names none: one that holds all its weights.

    Returns:
        The dtype, named as in config.json, and a sentence about it; None if there are no weights.
    """
    names = model.hf_shapes.keys() - model.fp32_names
    found = {tensors[name].dtype for name in names & tensors.keys()}
    if not found:
        return None
    dtype = CONFIG_DTYPES.get(found.pop(), "float32") if len(found) == 1 else "float32"
    return dtype, f"config.json names no dtype: that of the weights, {dtype}, is taken"


def check_redundant(
    model: ModelDescription, tensors: Mapping[str, TensorInfo], redundant: Mapping[str, TensorInfo]
) -> list[str]:
    """Check that redundant tensors equal what they follow from.

    Args:
        tensors: All tensors of the folder.
        redundant: Those that `ModelDescription.is_redundant` names.

    Returns:
        Sentences about what is left out.

    Raises:
        CheckpointError: One differs, or has another shape.
    """
    notes, frequencies = [], []
    with TensorReader() as reader:
        for name, info in redundant.items():
            if name != OUTPUT_LAYER:
                frequencies.append(name)
                _check_frequencies(model, info, reader)
                continue
            embedding = model.embedding_name
            if (original := tensors.get(embedding)) is None:
                continue  # the embedding is a missing key
            _check_equal(
                info,
                reader.view(info),
                reader.view(original),
                f"{embedding}, to which config.json ties it",
                remedy="write tie_word_embeddings false if the model was trained so",
            )
            notes.append(f"{name} equals {embedding}, to which it is tied, and is left out")
    if frequencies:
        notes.append(f"{_some(frequencies)}: the frequencies are those of config.json; left out")
    return notes


def in_model_dtypes(
    model: ModelDescription, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Find the tensors that have another dtype than the model, and cast them if no value changes.

    Args:
        tensors: Has at least the tensors of the model.

    Returns:
        Those tensors, cast; and sentences about them.

    Raises:
        CheckpointError: A value would change, or a tensor is not of floating-point numbers.
    """
    cast: dict[str, TensorInfo] = {}
    groups: dict[tuple[str, str], list[str]] = {}
    with TensorReader() as reader:
        for name in model.hf_shapes:
            info = tensors[name]
            dtype = "F32" if name in model.fp32_names else SAFETENSORS_DTYPES[model.config.dtype]
            if info.dtype == dtype:
                continue
            _check_cast(info, dtype, reader, kept=name in model.fp32_names)
            cast[name] = info.cast_to(dtype)
            groups.setdefault((info.dtype, dtype), []).append(name)
    return cast, [
        f"{_some(names)}: cast from {before} to {after}, which changes no value"
        for (before, after), names in groups.items()
    ]


def _check_cast(info: TensorInfo, dtype: str, reader: TensorReader, *, kept: bool) -> None:
    if (info.dtype, dtype) in _WIDER:
        return
    why = "Transformers keeps it in" if kept else "config.json's dtype makes it"
    if info.dtype not in (*CONFIG_DTYPES, "F64"):
        raise CheckpointError(
            info.file,
            f"tensor {info.name} has dtype {info.dtype}, and {why} {dtype}",
            remedy="convert it, or correct dtype in config.json",
        )
    _check_equal(
        info,
        reader.view(info),
        reader.view(info.cast_to(dtype)),
        f"itself in {dtype} ({why} {dtype})",
        remedy="write dtype float32 in config.json to keep every value, or convert the weights",
    )


def _check_frequencies(model: ModelDescription, info: TensorInfo, reader: TensorReader) -> None:
    import torch

    config = model.config
    in_vision = "rotary_pos_emb" in info.name and config.vision is not None
    width = config.vision.head_dim // 2 if in_vision and config.vision else config.head_dim
    theta = _VISION_THETA if in_vision else config.rope_theta
    expected = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if not in_vision and (llama3 := getattr(config, "llama3", None)) is not None:
        # transformers.modeling_rope_utils._compute_llama3_parameters (5.12.1)
        turns = llama3.original_max_positions * expected / (2 * torch.pi)
        low, high = llama3.low_freq_factor, llama3.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        expected = kept * expected + (1 - kept) * expected / llama3.factor
    _check_equal(
        info,
        reader.view(info),
        expected,
        "the frequencies that config.json gives",
        rounding=_ROUNDING.get(info.dtype, 0.0),
        remedy="correct rope_theta, rope_scaling or rope_parameters in config.json",
    )


def _check_equal(
    info: TensorInfo,
    found: torch.Tensor,
    expected: torch.Tensor,
    what: str,
    *,
    remedy: str,
    rounding: float = 0.0,
) -> None:
    """Raise if a tensor has other values than expected, and say where they differ most.

    Args:
        what: The name of what is expected.
        rounding: A relative difference that is accepted.
    """
    if found.shape != expected.shape:
        raise CheckpointError(
            info.file,
            f"tensor {info.name} has shape {list(found.shape)}, and config.json makes it "
            f"{list(expected.shape)}",
            remedy="check that config.json belongs to these weights",
        )
    if (worst := _worst(found, expected, rounding)) is not None:
        at, difference = worst
        raise CheckpointError(
            info.file,
            f"tensor {info.name} differs from {what}, most at {list(at)}, by {difference:.3g}",
            remedy=remedy,
        )


def _worst(
    found: torch.Tensor, expected: torch.Tensor, rounding: float
) -> tuple[tuple[int, ...], float] | None:
    """Find the index [rank of the tensors] and size of the largest difference, if there is one."""
    import torch

    at, largest = -1, 0.0
    for begin, a, b in _pieces(found, expected):
        difference = (a - b).abs()
        difference[(a == b) | (a.isnan() & b.isnan())] = 0.0
        difference[difference <= rounding * b.abs()] = 0.0
        difference.nan_to_num_(nan=torch.inf)
        if difference.numel() and (size := difference.max().item()) > largest:
            at, largest = begin + int(difference.argmax()), size
    if at < 0:
        return None
    return tuple(int(each) for each in torch.unravel_index(torch.tensor(at), found.shape)), largest


def _pieces(
    first: torch.Tensor, second: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    first, second = first.reshape(-1), second.reshape(-1)
    for begin in range(0, first.numel(), _PIECE):
        end = begin + _PIECE
        yield begin, first[begin:end].double(), second[begin:end].double()


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
