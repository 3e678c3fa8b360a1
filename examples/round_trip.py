"""Hugging Face -> Megatron-Core -> Hugging Face from Python, at any layout, on a laptop or on GPUs.

    python examples/round_trip.py HF_FOLDER OUTPUT_FOLDER --tp 2 --pp 2                          # no GPU needed
    torchrun --nproc-per-node 4 examples/round_trip.py HF_FOLDER OUTPUT_FOLDER --tp 2 --pp 2     # one rank a GPU

The first converts on disk, with ranks that are processes on this machine. The second keeps the model on the GPUs, where
a training loop would have it, and writes it from there.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import compare_tensors


def on_disk(hf_folder: Path, output: Path, layout: Layout) -> None:
    """Hugging Face -> Megatron checkpoint, then back, whatever the layout."""
    import_checkpoint(hf_folder, output / "megatron", layout)
    export_checkpoint(output / "megatron", output / "exported")


def in_memory(hf_folder: Path, output: Path, layout: Layout) -> None:
    """On a rank of torchrun's: weights into the model at this layout, a Megatron checkpoint of it, and an export."""
    import torch  # before transformer_engine: the two bring different versions of cuDNN
    import torch.distributed as dist

    import exaone_bridge

    exaone_bridge.supported()
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    bridge = AutoBridge.from_hf_pretrained(hf_folder)
    model = build(bridge, layout)
    bridge.save_megatron_model(model, output / "megatron")
    bridge.save_hf_pretrained(model, output / "exported", show_progress=False)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf_folder", type=Path)
    parser.add_argument("output", type=Path)
    for name in ("tp", "pp", "ep"):
        parser.add_argument(f"--{name}", type=int, default=1)
    options = parser.parse_args()

    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    options.output.mkdir(exist_ok=under_torchrun)
    layout = Layout(tp=options.tp, pp=options.pp, ep=options.ep)
    (in_memory if under_torchrun else on_disk)(options.hf_folder, options.output, layout)
    if os.environ.get("RANK", "0") == "0":
        print(compare_tensors(options.hf_folder, options.output / "exported").summary)


if __name__ == "__main__":
    main()
