"""Says what a path is that is not the checkpoint it was given for: the cause, and what helps.

It looks at the whole before a reader looks at one file: the kind of thing, the config, and which
names are missing and unexpected together. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from exaone_bridge.errors import CheckpointError, UnsupportedConfig
from exaone_bridge.schema.hf_snapshot import is_hub_id
from exaone_bridge.schema.iterations import is_megatron_checkpoint
from exaone_bridge.schema.json_types import JSONMapping

__all__ = ["check_config", "check_is_hf_folder", "check_is_megatron_folder", "explain"]

_ARCHIVES: Final = (".zip", ".tar", ".gz", ".tgz", ".xz", ".zst", ".7z")
_SHARD: Final = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_INDEX: Final = "model.safetensors.index.json"
_NO_MODEL: Final = "name a Hugging Face model folder"

# Prefix of every tensor -> what wrote it, and the remedy.
_PREFIXES: Final[Mapping[str, tuple[str, str]]] = {
    "_orig_mod.": (
        "the model was saved inside the wrapper of torch.compile",
        "save the module that was compiled (model._orig_mod.save_pretrained)",
    ),
    "module.": (
        "the model was saved inside the wrapper of data parallelism",
        "save the wrapped module (model.module.save_pretrained)",
    ),
    "base_model.model.": (
        "the model was saved inside the wrapper of PEFT",
        "merge the adapter and save the model (model.merge_and_unload().save_pretrained)",
    ),
}
_LANGUAGE: Final = "model.language_model."
_QUANTIZED: Final = re.compile(
    r".+\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_zero_point"
    r"|input_scale|absmax|quant_state\..+)"
)
_FP8_REMEDY: Final = (
    "save it in bf16 with Transformers first (from_pretrained(FOLDER, quantization_config="
    "FineGrainedFP8Config(dequantize=True)).save_pretrained(OUTPUT))"
)
_ORIGINAL_REMEDY: Final = "use the model that was quantized"


def check_is_hf_folder(path: Path, *, remedy: str = _NO_MODEL) -> None:
    """Raise if a path is not a Hugging Face folder with a model's weights, and say what it is.

    Args:
        path: The path.
        remedy: For a path that does not exist, or is a file of any kind.

    Raises:
        CheckpointError: It is something else, or does not exist.
    """
    _check_is_folder(path, remedy)
    names = {each.name for each in path.iterdir()}
    weights = {name for name in names if name.endswith(".safetensors")} - {
        "adapter_model.safetensors"
    }
    if "config.json" not in names and is_megatron_checkpoint(path):
        raise CheckpointError(
            path,
            "is a Megatron checkpoint, and a Hugging Face folder is wanted",
            remedy="`exaone-bridge export` converts it to one, and `verify` takes both",
        )
    if not weights and "adapter_config.json" in names:
        raise CheckpointError(
            path,
            "is an adapter without the model that it was trained on",
            remedy="merge it into that model with PEFT (merge_and_unload), save the result with "
            "save_pretrained, and name that folder",
        )
    if not weights and (gguf := sorted(name for name in names if name.endswith(".gguf"))):
        raise CheckpointError(
            path,
            f"its weights are a GGUF file of llama.cpp ({gguf[0]!r}), and safetensors are wanted",
            remedy="use the Hugging Face folder that it was made from",
        )
    if "config.json" not in names:
        inside = sorted(each.name for each in path.iterdir() if (each / "config.json").is_file())
        if inside:
            raise CheckpointError(
                path,
                f"has no config.json, and its folder {inside[0]!r} has one",
                remedy=f"name {path / inside[0]}",
            )
    _check_shards(path, names)


def check_is_megatron_folder(path: Path) -> None:
    """Raise if a path is not the folder of a Megatron checkpoint, and say what it is.

    Raises:
        CheckpointError: It is something else, or does not exist.
    """
    _check_is_folder(path, "name a Megatron checkpoint folder")
    if not is_megatron_checkpoint(path) and (path / "config.json").is_file():
        raise CheckpointError(
            path,
            "is a Hugging Face folder, and a Megatron checkpoint is wanted",
            remedy="`exaone-bridge import` converts it to one",
        )


def _check_is_folder(path: Path, remedy: str) -> None:
    if path.is_dir():
        return
    if not path.exists():
        if is_hub_id(path):
            raise CheckpointError(
                path,
                "is the name of a model on the Hugging Face hub, and a folder is wanted",
                remedy=f"download it (hf download {path} --local-dir {path.name}), "
                "and name that folder",
            )
        raise CheckpointError(path, "this folder does not exist", remedy=remedy)
    if path.suffix == ".gguf":
        what, remedy = "a GGUF file of llama.cpp", "use the folder that it was made from"
    elif path.suffix in _ARCHIVES:
        what, remedy = "an archive", "unpack it, and name the folder inside"
    elif path.suffix in (".safetensors", ".json"):
        what, remedy = "one file of a model", f"name its folder, {path.parent}"
    else:
        what = "a file"
    raise CheckpointError(path, f"is {what}, and a folder is wanted", remedy=remedy)


def _check_shards(folder: Path, names: set[str]) -> None:
    """Raise if there are shards, and no index that lists them."""
    found = sorted(match[0] for name in names if (match := _SHARD.fullmatch(name)))
    if not found or _INDEX in names or "model.safetensors" in names:
        return
    match = _SHARD.fullmatch(found[0])
    total = int(match[2]) if match else 0
    if total == 1:
        remedy = "rename it to model.safetensors, because it is the only one"
    elif len(found) < total:
        remedy = f"copy the index and the other {total - len(found)} files of the model too"
    else:
        remedy = "copy the index of the model too"
    raise CheckpointError(
        folder,
        f"has {len(found)} of {total} files of weights ({found[0]}), and no {_INDEX}",
        remedy=remedy,
    )


def check_config(config: JSONMapping, path: Path) -> None:
    """Raise if a config is of a model that no conversion reads, and say why.

    Raises:
        CheckpointError: The weights are quantized.
        UnsupportedConfig: EXAONE 3.0 or 3.5, whose architecture is another one.
    """
    if config.get("architectures") == ["ExaoneForCausalLM"]:
        raise UnsupportedConfig(
            "architectures",
            got=config["architectures"],
            wanted="that of EXAONE 4.0 or later",
            where=str(path),
            remedy="EXAONE 3.0 and 3.5 are other models, which exaone_bridge does not convert",
        )
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    raise CheckpointError(
        path,
        f"its weights are quantized (quantization_config: {str(method)[:40]!r}), and only weights "
        "in float32, bfloat16 and float16 are converted",
        remedy=_FP8_REMEDY if method == "fp8" else _ORIGINAL_REMEDY,
    )


def explain(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """Return the cause that missing and unexpected keys together show, and its remedy.

    Args:
        missing: Names of tensors that the model has and the folder lacks.
        unexpected: Names of tensors that the folder has and the model lacks.
    """
    missing, unexpected = set(missing), sorted(unexpected)
    cause = _cause(missing, unexpected)
    if not missing or not unexpected:
        return cause
    return f"{len(unexpected)} keys are unexpected ({unexpected[0]!r}, ...): {cause}"


def _cause(missing: set[str], unexpected: list[str]) -> str:
    if any(_QUANTIZED.fullmatch(name) for name in unexpected):
        fp8 = any(name.endswith("weight_scale_inv") for name in unexpected)
        return f"the weights are quantized; {_FP8_REMEDY if fp8 else _ORIGINAL_REMEDY}"
    if unexpected and all(name.startswith(_LANGUAGE) or name not in missing for name in unexpected):
        renamed = {name.replace(_LANGUAGE, "model.", 1) for name in unexpected}
        if renamed & missing:
            return (
                "the weights are those of a vision-language model's language part; name the folder "
                "of the whole model, with its own config.json"
            )
    for prefix, (cause, remedy) in _PREFIXES.items():
        if any(name.startswith(prefix) for name in unexpected) and missing & {
            name.replace(prefix, "") for name in unexpected
        }:
            return f"{cause}; {remedy}"
    return "check that config.json belongs to these weights, or download them again"
