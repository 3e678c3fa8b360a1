"""The command `inspect`: describes a checkpoint, its parameter mapping and its shards per rank.

It imports no rich, and torch for Megatron checkpoints only: each takes longer to import than 60,000
tensors to inspect.
"""

from __future__ import annotations

import sys
from pathlib import Path

from exaone_bridge.checkpoint.inspection import Inspection, without_garbage_collection
from exaone_bridge.cli.outputs import check_outputs, write_json
from exaone_bridge.convert import inspection
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["inspect"]


def inspect(folder: Path, layout: Layout, *, json: Path | None) -> None:
    """Print a description of a Hugging Face folder or a Megatron checkpoint.

    Args:
        folder: the folder.
        layout: whose ranks are described.
        json: the file for one line of JSON instead, `-` for standard output; None: text.

    Raises:
        OutputError: the file cannot be written.
        CheckpointError: the folder is missing, damaged or unsafe.
        UnsupportedConfig: its config.json is not supported.
        UnsupportedLayout: the model cannot be sharded by this layout.
        UnmappedTensors: keys are missing or unexpected; the description has been printed by then.
    """
    check_outputs([json])
    with without_garbage_collection():
        found = inspection.inspect(folder, layout)
        # Indentation would take a second for 60,000 tensors, and the search for cycles 10 ms.
        if json is not None:
            write_json(found.to_dict(), json, indent=None)
        else:
            sys.stdout.write(found.text() + "\n")
            sys.stdout.flush()
        if isinstance(found, Inspection):
            found.checkpoint.check_coverage()
