"""The tensors that an export writes: of a Megatron checkpoint, or with an adapter merged in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.diagnose import check_is_megatron_folder
from exaone_bridge.checkpoint.hf.headers import INDEX, TensorInfo, TensorSpec
from exaone_bridge.checkpoint.hf.reader import TensorReader
from exaone_bridge.checkpoint.megatron.run_config import read_run_config
from exaone_bridge.convert.extra_tensors import read_passthrough
from exaone_bridge.convert.source_files import assets_of, files_of, source_config
from exaone_bridge.schema.iterations import choose_iteration
from exaone_bridge.schema.json_types import JSONMapping
from exaone_bridge.schema.model_family import ModelDescription

if TYPE_CHECKING:
    import torch

    from exaone_bridge.checkpoint.megatron.adapter import AdapterCheckpoint

__all__ = ["ExportSource", "open_hf", "open_megatron", "with_adapter"]


@dataclass(frozen=True)
class ExportSource:
    """The tensors of a model, read one at a time, and what lies beside them.

    Attributes:
        config: config.json of the model.
        model: Its description.
        tensors: Name -> name, dtype and shape of the model's tensors.
        passthrough: Those that travel to the export untouched.
        groups: The names of `tensors`; those of a group are read from the same place.
        read_tensor: Reads one of `tensors`.
        reader: Reads passthrough tensors.
        files_from: The folder of tokenizer and other files, if there is one.
        index: The index file of the Hugging Face source, which may be missing.
        notes: Sentences for the summary.
    """

    config: JSONMapping
    model: ModelDescription
    tensors: Mapping[str, TensorSpec | TensorInfo]
    passthrough: Mapping[str, TensorInfo]
    groups: list[list[str]]
    read_tensor: Callable[[str], torch.Tensor]
    reader: TensorReader
    files_from: Path | None
    index: Path
    notes: tuple[str, ...] = ()

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor [...] into memory of its own.

        Raises:
            CheckpointError: A file is missing or damaged.
        """
        if name in self.passthrough:
            return self.reader.read(self.passthrough[name])
        return self.read_tensor(name)

    def without_passthrough(self) -> ExportSource:
        """Return the source of an export that leaves out the passthrough tensors."""
        family = self.model.family
        config = family.write_hf_config(family.without_passthrough(self.model.config), self.config)
        return replace(self, config=config, passthrough={})


def open_megatron(
    folder: Path, iteration: int | None, files_folder: str | Path | None, *, passthrough: bool
) -> ExportSource:
    """Open a Megatron checkpoint.

    Args:
        folder: The checkpoint's folder, or that of one iteration.
        iteration: The one to read; None: the one that the tracker file names.
        files_folder: A Hugging Face folder to take files from; None: those of the checkpoint.
        passthrough: Whether passthrough tensors are read, and must be there.

    Raises:
        CheckpointError: It is damaged, or lacks passthrough tensors.
        UnsupportedConfig: The model is not one of exaone_bridge's.
    """
    check_is_megatron_folder(folder)
    from exaone_bridge.checkpoint.megatron.tensors import MegatronCheckpoint

    chosen, why = choose_iteration(folder, iteration)
    assets = assets_of(folder)
    files_from = files_of(assets, chosen, files_folder)
    provider = read_run_config(chosen)
    config = provider.hf_config(source_config(assets))
    source = MegatronCheckpoint(chosen, config, provider)
    # A model that was built with multi-token prediction has its tensors since the import.
    extra = read_passthrough(assets, source.model) if passthrough else {}
    return ExportSource(
        config=config,
        model=source.model,
        tensors=source.tensors,
        passthrough={name: info for name, info in extra.items() if name not in source.tensors},
        groups=source.groups(),
        read_tensor=source.read,
        reader=TensorReader(),
        files_from=files_from,
        index=assets / INDEX,
        notes=(f"{folder}: {why}",) if why else (),
    )


def open_hf(folder: Path, files_folder: str | Path | None) -> ExportSource:
    """Open a Hugging Face folder, on whose model an adapter was trained.

    Raises:
        BridgeError: See `HFCheckpoint.open`.
    """
    source = HFCheckpoint.open(folder)
    return ExportSource(
        config=source.config,
        model=source.model,
        tensors=source.model_tensors,
        passthrough=source.passthrough,
        groups=[[name] for name in source.model_tensors],
        read_tensor=source.read,
        reader=source.reader,
        files_from=folder if files_folder is None else files_of(folder, folder, files_folder),
        index=folder / INDEX,
        notes=tuple(f"{folder}: {note}" for note in source.notes),
    )


def with_adapter(source: ExportSource, adapter: AdapterCheckpoint) -> ExportSource:
    """Return the source with an adapter merged into its tensors as they are read."""

    def read(name: str) -> torch.Tensor:
        return adapter.merge(name, source.read_tensor(name))

    notes = (f"{adapter.folder.parent}: {adapter.note}",) if adapter.note else ()
    return replace(source, read_tensor=read, notes=source.notes + notes)
