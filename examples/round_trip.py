"""Hugging Face -> Megatron-Core -> Hugging Face from Python, at any layout, on a laptop or a GPU machine.

    python examples/round_trip.py HF_FOLDER OUTPUT_FOLDER --tp 2 --pp 2

Without a GPU the ranks are processes on this machine. Under torchrun on GPUs, use AutoBridge itself as in train.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from exaone_bridge.checkpoint.convert import export_checkpoint, import_checkpoint
from exaone_bridge.parts.layout import Layout
from exaone_bridge.verify.folders import compare_tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    options = parser.parse_args()

    options.output.mkdir()
    megatron, exported = options.output / "megatron", options.output / "exported"
    import_checkpoint(options.hf_folder, megatron, Layout(tp=options.tp, pp=options.pp))
    export_checkpoint(megatron, exported, Layout())  # any other layout will do
    print(compare_tensors(options.hf_folder, exported).figure)


if __name__ == "__main__":
    main()
