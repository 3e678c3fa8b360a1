"""Fine-tune EXAONE 4.5 on images, in the training loop of train.py.

    exaone-bridge tiny exaone45 /tmp/tiny
    python examples/images.py /tmp/tiny /tmp/trained --steps 8                      # on a CPU
    torchrun --nproc-per-node 8 examples/images.py HF_PATH OUTPUT --tp 8            # on GPUs

The script draws a square at one side of each image, and asks for the side. The vision encoder is
frozen; its merger and the language model are trained. sft_images.py does the same with a recipe.
"""

# ruff: noqa: I001  (exaone_bridge before megatron.bridge, which needs it without Transformer Engine)

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exaone_bridge  # noqa: F401  registers the models with Megatron-Bridge
import torch
from megatron.bridge import AutoBridge
from PIL import Image, ImageDraw
from train import DEVICE, run, train

SIDES = {"north": (12, 2), "east": (22, 12), "south": (12, 22), "west": (2, 12)}


def main(options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

    bridge = AutoBridge.from_hf_pretrained(options.hf_path)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = options.tp
    provider.pipeline_model_parallel_size = options.pp
    provider.freeze_vision_model = True  # not its merger: that is freeze_vision_projection
    provider.finalize()

    processor = Qwen2VLImageProcessorPil.from_pretrained(options.hf_path)
    tokenizer = AutoTokenizer.from_pretrained(options.hf_path)
    batches = [make_batch(processor, tokenizer, side) for side in SIDES]
    seq_length = batches[0]["tokens"].shape[1]
    model = train(
        provider, forward_step, batches, seq_length, options.steps, lr=options.lr, weight_decay=0.0
    )
    bridge.save_hf_pretrained(model, options.output, show_progress=False)


def draw(side: str) -> Image.Image:
    """Draw a white square at this side of a 32 x 32 image."""
    image = Image.new("RGB", (32, 32), (20, 20, 120))
    x, y = SIDES[side]
    ImageDraw.Draw(image).rectangle((x, y, x + 7, y + 7), fill=(255, 255, 255))
    return image


def make_batch(processor: Any, tokenizer: Any, side: str) -> dict[str, torch.Tensor]:
    """Make tokens [1, S], labels [1, S] (-100 for the question), and the image's inputs."""
    images = processor(images=[draw(side)], return_tensors="pt")
    count = int(images["image_grid_thw"].prod()) // processor.merge_size**2
    placeholders = "<|image_pad|>" * count
    prompt = f"[|user|]\n<vision>{placeholders}</vision>Where is it?[|endofturn|]\n[|assistant|]\n"
    question = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    answer = tokenizer(side.ljust(5), add_special_tokens=False, return_tensors="pt")["input_ids"]
    tokens = torch.cat((question, answer), dim=1)
    labels = torch.cat((torch.full_like(question, -100), answer), dim=1)
    batch = {"tokens": tokens[:, :-1], "labels": labels[:, 1:], **images}
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def forward_step(
    batches: Iterator[dict[str, torch.Tensor]], model: Any
) -> tuple[torch.Tensor, Any]:
    """Run one microbatch of one image."""
    batch = dict(next(batches))
    tokens, labels = batch.pop("tokens"), batch.pop("labels")
    position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]
    loss_mask = labels >= 0

    def loss_function(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = (losses * loss_mask).sum() / loss_mask.sum()
        return loss, {"loss": loss.detach()}

    output = model(tokens, position_ids, None, labels=labels.clamp(min=0), **batch)
    return output, loss_function


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf_path", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    run(main, parser.parse_args())
