"""The commands `import` and `export`: convert between folders, with progress and a summary."""

from __future__ import annotations

from pathlib import Path

from exaone_bridge.cli.progress import conversion, say_summary
from exaone_bridge.cli.read_size import read_size
from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["export", "import_"]


def import_(
    source: Path, target: Path, layout: Layout, *, backend: str, workers: int, dry_run: bool
) -> None:
    """Convert a Hugging Face folder to a Megatron checkpoint; see `import_checkpoint`."""
    with conversion("import") as progress:
        summary = import_checkpoint(
            source,
            target,
            layout,
            backend=backend,
            workers=workers,
            dry_run=dry_run,
            progress=progress,
        )
    say_summary(target, summary, dry_run=dry_run)


def export(
    source: Path,
    target: Path,
    *,
    iteration: int | None,
    hf_source: Path | None,
    adapter: Path | None,
    peft: bool,
    max_shard_size: str | None,
    drop_passthrough: bool,
    workers: int,
    dry_run: bool,
) -> None:
    """Convert a Megatron checkpoint to a Hugging Face folder; see `export_checkpoint`."""
    max_shard_bytes = None
    if max_shard_size is not None:
        max_shard_bytes = read_size(max_shard_size, "--max-shard-size")
    with conversion("export") as progress:
        summary = export_checkpoint(
            source,
            target,
            iteration=iteration,
            hf_source=hf_source,
            adapter=adapter,
            peft=peft,
            max_shard_bytes=max_shard_bytes,
            drop_passthrough=drop_passthrough,
            workers=workers,
            dry_run=dry_run,
            progress=progress,
        )
    say_summary(target, summary, dry_run=dry_run)
