"""Reads the `run_config.yaml` of a Megatron-Bridge checkpoint, without Megatron-Bridge or torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exaone_bridge.errors import CheckpointError, UnsupportedConfig
from exaone_bridge.models import FAMILIES
from exaone_bridge.patches.former_names import ADDED_FIELDS, with_present_names
from exaone_bridge.schema.iterations import iteration_folder
from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.schema.model_family import ModelFamily
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["RUN_CONFIG", "StoredProvider", "read_peft", "read_run_config", "read_section"]

RUN_CONFIG = "run_config.yaml"
_RESTORE = "restore the checkpoint"


class StoredProvider:
    """The model provider's fields in a run config, as attributes; nothing is instantiated.

    A function, class or dtype is the dotted name that the run config gives it.

    Attributes:
        family: the family of the model that the provider builds.
    """

    def __init__(self, fields: JSONObject, path: Path) -> None:
        """Find the provider's family.

        Raises:
            UnsupportedConfig: the provider is not one of exaone_bridge.
        """
        self._fields, self._path = fields, path
        self.family = _family_of(fields.get("_target_"), path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._fields:
            raise CheckpointError(
                self._path, f"the model's field {name} is missing", remedy=_RESTORE
            )
        value = self._fields[name]
        if isinstance(value, dict) and value.get("_call_") is False:
            return value.get("_target_")
        return value

    @property
    def layout(self) -> Layout:
        """The parallel layout that the checkpoint was written at."""
        tp, etp = self.tensor_model_parallel_size, self.expert_tensor_parallel_size
        return Layout(
            tp=tp,
            pp=self.pipeline_model_parallel_size,
            vpp=self.virtual_pipeline_model_parallel_size or 1,
            sp=self.sequence_parallel,
            ep=self.expert_model_parallel_size,
            etp=None if etp == tp else etp,
            cp=self.context_parallel_size,
        )

    def hf_config(self, source: JSONMapping | None = None) -> JSONObject:
        """Return config.json of the model that the provider builds.

        Args:
            source: the config.json whose spelling is kept; None: the one that the provider was
                made from.

        Raises:
            CheckpointError: a field is missing or malformed.
            UnsupportedConfig: the provider was changed to a model that the config cannot express.
        """
        try:
            model_config = self.family.model_config_of(self)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            text = f"{type(error).__name__}: {error}"
            raise CheckpointError(
                self._path, f"a field of the model is malformed ({text})", remedy=_RESTORE
            ) from error
        return self.family.write_hf_config(model_config, source or self._fields["hf_config"])


def read_run_config(path: Path, *, adapter: bool = False) -> StoredProvider:
    """Read the model provider in the run config of a Megatron checkpoint.

    Args:
        path: the checkpoint's folder, or that of one iteration.
        adapter: whether it may be the checkpoint of an adapter, without the model's weights.

    Raises:
        CheckpointError: the folder is damaged, not a Megatron-Bridge checkpoint, or an adapter's.
        UnsupportedConfig: the provider is not one of exaone_bridge.
    """
    file = iteration_folder(path) / RUN_CONFIG
    found = _read_yaml(file, path)
    if isinstance(found.get("peft"), dict) and not adapter:
        raise CheckpointError(
            path,
            "is the checkpoint of an adapter, without the model's weights",
            remedy=f"merge it into the model first: `exaone-bridge export MODEL MERGED --adapter "
            f"{path}`",
        )
    model = with_present_names(found["model"])
    if not isinstance(model, dict) or not isinstance(model.get("hf_config", {}), dict):
        raise CheckpointError(file, "it describes no model", remedy=_RESTORE)
    return StoredProvider({"hf_config": {}, **ADDED_FIELDS, **model}, file)


def read_peft(path: Path) -> JSONObject:
    """Read the fields of Megatron-Bridge's PEFT object in the run config of an adapter checkpoint.

    Args:
        path: the folder of one iteration.

    Raises:
        CheckpointError: the folder is damaged, or is that of a run without PEFT.
    """
    peft = read_section(path, "peft")
    if not isinstance(peft, dict):
        raise CheckpointError(
            path,
            f"this is not an adapter checkpoint ({RUN_CONFIG} has no peft)",
            remedy="name the checkpoint of a training run with LoRA or DoRA",
        )
    return peft


def read_section(path: Path, name: str) -> Any:
    """Read one config of a run config, such as `checkpoint`; None: the run had none.

    Args:
        path: the folder of one iteration.
        name: of a field of Megatron-Bridge's ConfigContainer.

    Raises:
        CheckpointError: the folder is damaged or not a Megatron-Bridge checkpoint.
    """
    return _read_yaml(path / RUN_CONFIG, path).get(name)


def _read_yaml(file: Path, path: Path) -> JSONObject:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        found: JSONObject = yaml.load(file.read_bytes(), Loader=loader)
        found["model"]
    except FileNotFoundError as error:
        raise CheckpointError(
            path,
            f"this is not a Megatron-Bridge checkpoint ({RUN_CONFIG} is missing)",
            remedy="name a folder that `import` wrote",
        ) from error
    except (yaml.YAMLError, OSError, ValueError, TypeError, KeyError) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(file, f"cannot be read ({text})", remedy=_RESTORE) from error
    return found


def _family_of(target: object, where: Path) -> ModelFamily:
    for family in FAMILIES:
        if target == family.provider_class:
            return family
    raise UnsupportedConfig(
        "model",
        got=str(target).rpartition(".")[2],
        known=tuple(family.provider_class.rpartition(".")[2] for family in FAMILIES),
        where=str(where),
    )
