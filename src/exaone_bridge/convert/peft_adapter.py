"""Writes an adapter in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from exaone_bridge.checkpoint.hf.headers import TensorSpec
from exaone_bridge.checkpoint.hf.shards import ShardWriter, shard_layout
from exaone_bridge.checkpoint.staging import full_disk_as_output_error, staged
from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.schema.json_types import JSONObject
from exaone_bridge.schema.model_family import ModelDescription

if TYPE_CHECKING:
    from exaone_bridge.checkpoint.megatron.adapter import AdapterCheckpoint

__all__ = ["write_peft_adapter"]

_WEIGHTS = "adapter_model.safetensors"


def _check_peft_reads_it(adapter: AdapterCheckpoint, model: ModelDescription) -> None:
    """Reject adapters on the MLP of a model with experts; `bridge/dora_export.py` has the reason.

    Raises:
        UnsupportedConfig: There is one.
    """
    in_mlp = [name for name in adapter.names if ".mlp." in name]
    if in_mlp and any(mapping.experts for mapping in model.mappings):
        raise UnsupportedConfig(
            "adapter",
            got=in_mlp[0],
            wanted="on attention's linears, for PEFT's format of a model with experts",
            where=str(adapter.folder),
            remedy="export merged weights (without --peft)",
        )


def write_peft_adapter(
    adapter: AdapterCheckpoint,
    model: ModelDescription,
    base: Path,
    target: Path,
    *,
    dry_run: bool = False,
) -> tuple[int, int]:
    """Write an adapter for `peft.PeftModel.from_pretrained`.

    Args:
        adapter: The adapter.
        model: The model that it was trained on.
        base: The model's folder, which adapter_config.json names.
        target: The output, which must not exist.
        dry_run: Check everything, and write nothing.

    Returns:
        The number of tensors, and their bytes.

    Raises:
        UnsupportedConfig: PEFT would misread it.
        OutputError: The disk is full.
    """
    from exaone_bridge.checkpoint.dtypes import byte_view
    from exaone_bridge.schema.dtypes import SAFETENSORS_DTYPES

    _check_peft_reads_it(adapter, model)
    tensors, ranks = {}, {}
    for name, suffix, tensor in adapter.tensors():
        module = name.removesuffix(".weight")
        tensors[f"base_model.model.{module}.{suffix}"] = tensor.contiguous()
        if suffix == "lora_A.weight":
            ranks[module] = tensor.shape[0]
    for name in adapter.head:
        tensors[f"base_model.model.{name}"] = adapter.head_tensor(name)
    specs = [
        TensorSpec(
            name, SAFETENSORS_DTYPES[str(tensor.dtype).partition(".")[2]], tuple(tensor.shape)
        )
        for name, tensor in tensors.items()
    ]
    layout = shard_layout(specs, _WEIGHTS)
    if dry_run:
        return len(tensors), layout.nbytes
    with full_disk_as_output_error(target), staged(target) as folder:
        with ShardWriter.create(folder, layout) as writer:
            for name, tensor in tensors.items():
                writer.put(name, [byte_view(tensor)])
        config = _adapter_config(adapter, model, base, ranks)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(tensors), layout.nbytes


def _adapter_config(
    adapter: AdapterCheckpoint, model: ModelDescription, base: Path, ranks: dict[str, int]
) -> JSONObject:
    """Make adapter_config.json (`LoraConfig` of PEFT 0.21)."""
    rank = max(ranks.values())
    # A name without its layer stands for all modules of this name, of the vision encoder too.
    adapted = {_last(module) for module in ranks}
    others = {name.removesuffix(".weight") for name in model.hf_shapes} - ranks.keys()
    ambiguous = adapted & {_last(module) for module in others}
    return {
        "peft_type": "LORA",
        # With the type of a head, PEFT would want the head's weights in every adapter.
        "task_type": "CAUSAL_LM" if model.config.head is None else None,
        "modules_to_save": [model.config.head.hf_name]
        if model.config.head and adapter.head
        else None,
        "base_model_name_or_path": str(base.absolute()),
        "r": rank,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "lora_alpha": adapter.peft["alpha"],
        "lora_dropout": adapter.peft.get("dropout", 0.0),
        "use_dora": adapter.is_dora,
        "target_modules": sorted(ranks) if ambiguous else sorted(adapted),
        "bias": "none",
        "inference_mode": True,
    }


def _last(module: str) -> str:
    return module.rpartition(".")[2]
