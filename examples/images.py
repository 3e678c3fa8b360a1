"""Fine-tune EXAONE 4.5 on images that this script draws: a square at one side of a picture, and the word for the side.

    exaone-bridge tiny exaone45 /tmp/tiny && python examples/images.py /tmp/tiny /tmp/trained --steps 8     # a laptop
    torchrun --nproc-per-node 8 examples/images.py HF_FOLDER OUTPUT_FOLDER --tp 8                            # GPUs

The tower is frozen, its merger and the language model learn; what the folder's own processor and tokenizer make of a
picture and a question goes into the model as it is.
"""

# ruff: noqa: I001  (without Transformer Engine, exaone_bridge has to be imported before megatron.bridge)

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exaone_bridge  # registers EXAONE with Megatron-Bridge
import torch
from megatron.bridge import AutoBridge
from PIL import Image, ImageDraw
from train import device, start, train

SIDES = {"north": (12, 2), "east": (22, 12), "south": (12, 22), "west": (2, 12)}


def draw(side: str) -> Image.Image:
    """A picture of 32 x 32 with a white square at this side."""
    picture = Image.new("RGB", (32, 32), (20, 20, 120))
    x, y = SIDES[side]
    ImageDraw.Draw(picture).rectangle((x, y, x + 7, y + 7), fill=(255, 255, 255))
    return picture


def sample(processor: Any, tokenizer: Any, side: str) -> dict[str, torch.Tensor]:
    """Words [1, S], labels [1, S] with -100 where nothing is asked, and the picture's patches and grid."""
    seen = processor(images=[draw(side)], return_tensors="pt")
    places = int(seen["image_grid_thw"].prod()) // processor.merge_size**2
    question = f"[|user|]\n<vision>{'<|image_pad|>' * places}</vision>Where is it?[|endofturn|]\n[|assistant|]\n"
    asked = tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"]
    answer = tokenizer(side.ljust(5), add_special_tokens=False, return_tensors="pt")["input_ids"]
    whole = torch.cat((asked, answer), dim=1)
    labels = torch.cat((torch.full_like(asked, -100), answer), dim=1)
    return {"tokens": whole[:, :-1], "labels": labels[:, 1:], **seen}


def forward_step(
    batches: Iterator[dict[str, torch.Tensor]], model: Any
) -> tuple[torch.Tensor, Any]:
    batch = dict(next(batches))
    tokens, labels = batch.pop("tokens"), batch.pop("labels")
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    asked = labels >= 0

    def mean(loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        answer = (loss * asked).sum() / asked.sum()
        return answer, {"loss": answer.detach()}

    return model(tokens, positions, None, labels=labels.clamp(min=0), **batch), mean


def main(options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

    bridge = AutoBridge.from_hf_pretrained(options.hf_folder)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size, provider.pipeline_model_parallel_size = (
        options.tp,
        options.pp,
    )
    provider.freeze_vision_model = True  # the merger has a switch of its own
    provider.finalize()

    processor = Qwen2VLImageProcessorPil.from_pretrained(options.hf_folder)
    tokenizer = AutoTokenizer.from_pretrained(options.hf_folder)
    data = [sample(processor, tokenizer, side) for side in SIDES]
    data = [{name: value.to(device()) for name, value in each.items()} for each in data]
    length = data[0]["tokens"].shape[1]
    model = train(
        provider, forward_step, data, length, options.steps, lr=options.rate, weight_decay=0.0
    )
    bridge.save_hf_pretrained(model, options.output, show_progress=False)


if __name__ == "__main__":
    assert exaone_bridge.__version__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf_folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rate", type=float, default=1e-3)
    start(parser.parse_args(), main)
