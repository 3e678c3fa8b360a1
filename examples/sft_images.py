"""Fine-tuning on conversations with images: Megatron-Bridge's loop, data sets, step and collation.

    torchrun --nproc-per-node 1 examples/sft_images.py --save /tmp/images --iters 50
    torchrun --nproc-per-node 8 examples/sft_images.py --recipe exaone45_vl_33b_sft_config --gpu-memory 141 \\
        --hf-path FOLDER --data FOLDER --save /tmp/images

Questions are about pictures that this script draws, and some about none, unless --data names a folder with
training.jsonl and validation.jsonl (docs/recipes.md says what they hold). Without --hf-path the recipe's model is made
with random weights, a tokenizer trained on the spot and a processor. The processor of videos needs torchvision.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import arguments, bridge_of, show, start, steps, to_fine_tune
from PIL import Image, ImageDraw

PLACES = {"north": (12, 2), "east": (22, 12), "south": (12, 22), "west": (2, 12)}
OPPOSITE = {"north": "south", "east": "west", "south": "north", "west": "east"}
COLOURS = {
    "white": (255, 255, 255),
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "yellow": (240, 220, 30),
}


def draw(side: str, colour: str) -> Image.Image:
    """A picture of 32 x 32 with a square of this colour at this side."""
    picture = Image.new("RGB", (32, 32), (20, 20, 120))
    x, y = PLACES[side]
    ImageDraw.Draw(picture).rectangle((x, y, x + 7, y + 7), fill=COLOURS[colour])
    return picture


def line(pictures: list[str], question: str, answer: str) -> str:
    """A conversation as a line of JSON."""
    asked = [
        *({"type": "image", "path": path} for path in pictures),
        {"type": "text", "text": question},
    ]
    turns = {"user": asked, "assistant": [{"type": "text", "text": answer}]}
    return (
        json.dumps(
            {"messages": [{"role": role, "content": content} for role, content in turns.items()]}
        )
        + "\n"
    )


def write_images(folder: Path, training: int = 200, validation: int = 40) -> None:
    """`training.jsonl`, `validation.jsonl` and their pictures: to every fifth question none, to every fifth two."""
    (folder / "pictures").mkdir(parents=True)
    chosen = random.Random(0)
    for name, count in (("training", training), ("validation", validation)):
        lines = []
        for number in range(count):
            sides, colour = chosen.choices(list(PLACES), k=2), chosen.choice(list(COLOURS))
            if number % 5 == 0:
                lines.append(line([], f"What is opposite to {sides[0]}?", OPPOSITE[sides[0]]))
                continue
            paths = [
                f"pictures/{name}{number}_{which}.png" for which in range(1 + (number % 5 == 1))
            ]
            for path, side in zip(paths, sides, strict=False):
                draw(side, colour).save(folder / path)
            answer = " and ".join(sides[: len(paths)])
            lines.append(line(paths, "Where, and which colour?", f"{answer}, {colour}"))
        (folder / f"{name}.jsonl").write_text("".join(lines))


def main(argv: list[str] | None = None, adjust: Callable[[Any], None] | None = None) -> None:
    """Run; tests adjust the configuration."""
    parser = arguments(__doc__, "exaone45_vl_tiny_sft_config")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--packed", action="store_true", help="a micro batch in one row")
    options = parser.parse_args(argv)
    config = to_fine_tune(options, write_images)
    if adjust is not None:
        adjust(config)
    show(config)
    if options.dry_run:
        return

    def export(model: list[Any]) -> None:
        bridge_of(config, options.hf_path).save_hf_pretrained(
            model, options.save / "exported", show_progress=False
        )

    start(config, steps(options, export), fine_tune=True, images=True)


if __name__ == "__main__":
    main()
