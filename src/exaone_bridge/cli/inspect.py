"""The command `inspect`: describes a checkpoint, its parameter mapping and its shards per rank.

It imports neither torch nor rich, whose import would take longer than inspecting 60,000 tensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

from exaone_bridge.checkpoint import inspection
from exaone_bridge.cli.outputs import check_outputs, write_json
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["inspect"]


def inspect(folder: Path, layout: Layout, *, json: Path | None) -> None:
    """Print a description of a Hugging Face folder.

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
    with inspection.without_garbage_collection():
        found = inspection.inspect(folder, layout)
        # Indentation would take a second for 60,000 tensors, and the search for cycles 10 ms.
        if json is not None:
            write_json(found.to_dict(), json, indent=None)
        else:
            sys.stdout.write(found.text() + "\n")
            sys.stdout.flush()
        found.checkpoint.check_coverage()
