"""Convert Hugging Face -> Megatron-Core -> Hugging Face at any parallel layout, and compare.

    python examples/round_trip.py HF_PATH OUTPUT --tp 2 --pp 2                          # on a CPU
    torchrun --nproc-per-node 4 examples/round_trip.py HF_PATH OUTPUT --tp 2 --pp 2     # on GPUs

The first command converts on disk, with processes of this machine as ranks. The second one loads
the model into the GPUs, where a training loop would have it, and saves it from there.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch  # before transformer_engine: the two ship different versions of cuDNN
import torch.distributed as dist
from safetensors.torch import load_file

import exaone_bridge  # registers the models with Megatron-Bridge
from exaone_bridge import Layout


def convert_on_disk(hf_path: Path, output: Path, layout: Layout) -> None:
    """Hugging Face -> Megatron checkpoint -> Hugging Face."""
    exaone_bridge.import_checkpoint(hf_path, output / "megatron", layout)
    exaone_bridge.export_checkpoint(output / "megatron", output / "exported")


def convert_on_gpus(hf_path: Path, output: Path, layout: Layout) -> None:
    """Hugging Face -> model on the GPUs -> Megatron checkpoint and Hugging Face."""
    from megatron.bridge import AutoBridge

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    bridge = AutoBridge.from_hf_pretrained(hf_path)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = layout.tp
    provider.pipeline_model_parallel_size = layout.pp
    provider.expert_model_parallel_size = layout.ep
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge.save_megatron_model(model, output / "megatron")
    bridge.save_hf_pretrained(model, output / "exported", show_progress=False)
    dist.barrier()
    dist.destroy_process_group()


def load_tensors(hf_path: Path) -> dict[str, torch.Tensor]:
    """Load all tensors of a Hugging Face directory."""
    files = sorted(hf_path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf_path", type=Path)
    parser.add_argument("output", type=Path)
    for name in ("tp", "pp", "ep"):
        parser.add_argument(f"--{name}", type=int, default=1)
    options = parser.parse_args()

    under_torchrun = "LOCAL_RANK" in os.environ
    options.output.mkdir(exist_ok=under_torchrun)
    layout = Layout(tp=options.tp, pp=options.pp, ep=options.ep)
    convert = convert_on_gpus if under_torchrun else convert_on_disk
    convert(options.hf_path, options.output, layout)
    if os.environ.get("RANK", "0") == "0":
        source, exported = load_tensors(options.hf_path), load_tensors(options.output / "exported")
        assert source.keys() == exported.keys()
        different = [name for name in source if not torch.equal(source[name], exported[name])]
        print(f"{len(source) - len(different)} tensors bitwise equal, {len(different)} different")


if __name__ == "__main__":
    main()
