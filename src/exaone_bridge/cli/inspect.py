"""The command `inspect`: describes a checkpoint, its parameter mapping and its shards per rank.

It imports neither torch nor rich, whose import would take longer than inspecting 60,000 tensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from exaone_bridge.checkpoint import inspection
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["inspect"]


def inspect(folder: Path, layout: Layout, *, as_json: bool) -> None:
    """Print a description of a Hugging Face folder, as text or as one line of JSON.

    Raises:
        CheckpointError: the folder is missing, damaged or unsafe.
        UnsupportedConfig: its config.json is not supported.
        UnsupportedLayout: the model cannot be sharded by this layout.
        UnmappedTensors: keys are missing or unexpected; the description has been printed by then.
    """
    with inspection.without_garbage_collection():
        found = inspection.inspect(folder, layout)
        # Indentation would take a second for 60,000 tensors, and the search for cycles 10 ms.
        text = json.dumps(found.to_dict(), check_circular=False) if as_json else found.text()
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        found.checkpoint.check_coverage()
