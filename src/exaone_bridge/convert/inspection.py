"""Describes a Hugging Face folder or a Megatron checkpoint; no tensor is read.

A Hugging Face folder is described without torch, which takes longer to import than 60,000 tensors
to inspect. The metadata of a Megatron checkpoint is a pickle of torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exaone_bridge.checkpoint.inspection import (
    Inspection,
    inspect_hf_folder,
    layout_text,
    model_summary,
)
from exaone_bridge.checkpoint.reshard.plan import check_layout
from exaone_bridge.schema.iterations import choose_iteration, is_megatron_checkpoint
from exaone_bridge.schema.json_types import JSONObject
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.schema.size_text import size_text

if TYPE_CHECKING:
    from exaone_bridge.checkpoint.megatron.run_config import StoredProvider
    from exaone_bridge.checkpoint.megatron.tensors import MegatronCheckpoint

__all__ = ["MegatronInspection", "inspect"]


@dataclass(frozen=True, slots=True, repr=False)
class MegatronInspection:
    """A Megatron checkpoint, and what an export of it would write.

    A checkpoint that lacks a parameter is not described but raises, so that `passed` is true.

    Attributes:
        folder: the checkpoint.
        iteration: the folder of the iteration that is read.
        reason: why it is that one; empty where there was nothing to choose from.
        provider: the model provider's fields in its run config.
        checkpoint: its tensors, by the names that they have in Hugging Face.
    """

    folder: Path
    iteration: Path
    reason: str
    provider: StoredProvider
    checkpoint: MegatronCheckpoint

    @property
    def passed(self) -> bool:
        """Whether no key is missing or unexpected."""
        return True

    @property
    def missing(self) -> Mapping[str, tuple[int, ...]]:
        """Return no tensor, as `Inspection.missing` of a folder that lacks none."""
        return {}

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Return no name, as `Inspection.unexpected` of a folder without such tensors."""
        return ()

    def __repr__(self) -> str:
        lines = [str(self.folder)]
        return "\n".join(lines + [f"  {name:<36}{value}" for name, value in self.summary().items()])

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(repr(self))}</pre>"

    def summary(self) -> dict[str, str]:
        """Return iteration, layout, model and what an export writes, for people."""
        metrics = self._metrics()
        tensors, nbytes = self.checkpoint.stored.optimizer
        model = self.checkpoint.model
        exported = f"{metrics['tensors']:,} tensors, {size_text(metrics['bytes'])}"
        if passthrough := len(model.passthrough_tensors):
            exported += f", and up to {passthrough:,} passthrough tensors"
        return {
            "iteration": self.reason or self.iteration.name,
            "family": model.family.name,
            "parameters": f"{metrics['parameters']:,}, {model.config.dtype}",
            **model_summary(model.config),
            "layout when written": layout_text(self.provider.layout),
            "backend": str(self.provider.backend),
            "optimizer state": f"{tensors:,} tensors, {size_text(nbytes)}" if tensors else "none",
            "export writes": exported,
        }

    def text(self) -> str:
        """Return the summary for people."""
        return repr(self)

    def to_dict(self) -> JSONObject:
        """Return plain data, as `exaone-bridge inspect --json` prints it."""
        tensors, nbytes = self.checkpoint.stored.optimizer
        return {
            "folder": str(self.folder),
            "iteration": self.iteration.name,
            "family": self.checkpoint.model.family.name,
            "dtype": self.checkpoint.model.config.dtype,
            "layout": str(self.provider.layout),
            "backend": self.provider.backend,
            **self._metrics(),
            "optimizer": {"tensors": tensors, "bytes": nbytes},
            "exported": {
                name: {"shape": spec.shape, "dtype": spec.dtype}
                for name, spec in self.checkpoint.tensors.items()
            },
        }

    def _metrics(self) -> JSONObject:
        specs = self.checkpoint.tensors.values()
        return {
            "parameters": sum(math.prod(spec.shape) for spec in specs),
            "tensors": len(specs),
            "bytes": sum(spec.nbytes for spec in specs),
        }


def inspect(
    folder: str | Path,
    layout: Layout | None = None,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    sp: bool = False,
    ep: int = 1,
    etp: int | None = None,
    cp: int = 1,
) -> Inspection | MegatronInspection:
    """Describe a Hugging Face folder or a Megatron checkpoint. It reads no tensor.

    Of a Hugging Face folder: its config, its parameter mappings, its shards per rank. Of a Megatron
    checkpoint: the iteration, the layout that it was written at, and what an export writes.
    Megatron is not imported.

    Args:
        folder: a Hugging Face folder, or a Megatron checkpoint.
        layout: the parallel layout to describe, or to check a Megatron checkpoint for; None: that
            of the sizes.
        tp, pp, vpp, sp, ep, etp, cp: the sizes of `Layout`, in place of a layout.

    Returns:
        The description. Missing and unexpected keys of a Hugging Face folder are in it, and raise
        nothing.

    Raises:
        CheckpointError: the folder is missing, damaged or unsafe.
        UnsupportedConfig: its config is not supported.
        UnsupportedLayout: the model cannot be sharded by this layout.
        UnmappedTensors: keys are missing in a Megatron checkpoint.

    Example:
        >>> import exaone_bridge
        >>> exaone_bridge.inspect("/models/EXAONE-4.0-1.2B", tp=2).missing
        {}
    """
    layout = Layout.of(layout, Layout(tp=tp, pp=pp, vpp=vpp, sp=sp, ep=ep, etp=etp, cp=cp))
    path = Path(folder)
    if not is_megatron_checkpoint(path):
        return inspect_hf_folder(path, layout)
    from exaone_bridge.checkpoint.megatron.run_config import read_run_config
    from exaone_bridge.checkpoint.megatron.tensors import MegatronCheckpoint
    from exaone_bridge.convert.source_files import assets_of, source_config

    iteration, reason = choose_iteration(path)
    provider = read_run_config(iteration)
    config = provider.hf_config(source_config(assets_of(path)))
    checkpoint = MegatronCheckpoint(iteration, config)
    check_layout(checkpoint.model.config, layout)
    return MegatronInspection(path, iteration, reason, provider, checkpoint)
