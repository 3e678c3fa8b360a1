"""Supervised fine-tuning of EXAONE 4.5 on conversations with images, with a recipe.

    torchrun --nproc-per-node 1 examples/sft_images.py --save /tmp/images --iters 50
    torchrun --nproc-per-node 8 examples/sft_images.py --recipe exaone45_vl_33b_sft_config \\
        --gpu-memory 141 --hf-path HF_PATH --data DATA --save /tmp/images

The trained model is saved to --save/exported. Without --data, the script draws images and asks
about them; docs/recipes.md describes the files. Without --hf-path, it starts from the recipe's
model with random weights. Transformers' video processor needs torchvision.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from common import OnTrainEnd, build_config, make_parser, run
from data import prepare
from megatron.bridge import AutoBridge
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import ConfigContainer
from PIL import Image, ImageDraw

SIDES = {"north": (12, 2), "east": (22, 12), "south": (12, 22), "west": (2, 12)}
OPPOSITE = {"north": "south", "east": "west", "south": "north", "west": "east"}
COLORS = {
    "white": (255, 255, 255),
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "yellow": (240, 220, 30),
}


def draw(side: str, color: str) -> Image.Image:
    """Draw a square of this color at this side of a 32 x 32 image."""
    image = Image.new("RGB", (32, 32), (20, 20, 120))
    x, y = SIDES[side]
    ImageDraw.Draw(image).rectangle((x, y, x + 7, y + 7), fill=COLORS[color])
    return image


def conversation(images: list[str], question: str, answer: str) -> str:
    """Return a conversation as a line of JSON."""
    parts: list[dict[str, str]] = [{"type": "image", "path": path} for path in images]
    parts.append({"type": "text", "text": question})
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return json.dumps({"messages": messages}) + "\n"


def write_images(path: Path, training: int = 200, validation: int = 40) -> None:
    """Write `training.jsonl`, `validation.jsonl` and images.

    Of five conversations one has no image, one has two, and the others have one.
    """
    (path / "images").mkdir(parents=True)
    generator = random.Random(0)
    for split, count in (("training", training), ("validation", validation)):
        lines = []
        for number in range(count):
            sides = generator.choices(list(SIDES), k=2)
            color = generator.choice(list(COLORS))
            if number % 5 == 0:
                question = f"What is opposite to {sides[0]}?"
                lines.append(conversation([], question, OPPOSITE[sides[0]]))
                continue
            images = [f"images/{split}{number}_{i}.png" for i in range(1 + (number % 5 == 1))]
            for image, side in zip(images, sides, strict=False):
                draw(side, color).save(path / image)
            answer = f"{' and '.join(sides[: len(images)])}, {color}"
            lines.append(conversation(images, "Where, and which color?", answer))
        (path / f"{split}.jsonl").write_text("".join(lines))


def configure(argv: list[str] | None = None) -> tuple[argparse.Namespace, ConfigContainer]:
    parser = make_parser(__doc__, "exaone45_vl_tiny_sft_config")
    parser.add_argument("--data", type=Path, help="training.jsonl, validation.jsonl and images")
    parser.add_argument("--packed", action="store_true", help="a microbatch per sequence")
    options = parser.parse_args(argv)
    prepare(options, write_images)
    return options, build_config(options, dataset_root=options.data, packed=options.packed)


def main(options: argparse.Namespace, config: ConfigContainer, *callbacks: Callback) -> None:
    bridge = AutoBridge.from_hf_pretrained(options.hf_path)

    def export(model: list[Any]) -> None:
        bridge.save_hf_pretrained(model, options.save / "exported", show_progress=False)

    run(config, options, OnTrainEnd(export), *callbacks, images=True)


if __name__ == "__main__":
    main(*configure())
