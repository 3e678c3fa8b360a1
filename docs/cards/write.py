"""Writes the cards in this folder: random weights in each shape, then `verify --card`.

    python docs/cards/write.py WORK [NAME ...]

WORK is an empty folder with room for 15 GB, NAME a card; all are written if none is named. It takes
12 GiB of memory for the widths of the 32B, the 33B and K-EXAONE, 8 for those of the 21B, 4 for the
others, and an hour on two cores.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.cli import main
from exaone_bridge.cli.arguments import TINY_CONFIGS
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.schema.hf_config import with_num_layers

EXAONE45 = CONFIGS["exaone45_33b"]
SHAPES: dict[str, dict[str, Any]] = {
    "EXAONE-4.0-1.2B": CONFIGS["exaone4_1p2b"],
    "EXAONE-4.0-32B-4-layers": with_num_layers(CONFIGS["exaone4_32b"], 4),
    "EXAONE-4.5-33B-4-layers": EXAONE45
    | {
        "text_config": with_num_layers(EXAONE45["text_config"], 4)
        | {"num_nextn_predict_layers": 1, "mtp_share_layers": True, "mtp_loss_scaling_factor": 0.1},
        "vision_config": EXAONE45["vision_config"] | {"depth": 7, "fullatt_block_indexes": [6]},
    },
    "ERNIE-4.5-0.3B": CONFIGS["ernie45_0p3b"],
    "ERNIE-4.5-21B-A3B-3-layers": with_num_layers(CONFIGS["ernie45_21b_a3b"], 3)
    | {"moe_layer_end_index": 2, "num_nextn_predict_layers": 1},
    "K-EXAONE-236B-A23B-2-layers": with_num_layers(CONFIGS["k_exaone_236b_a23b"], 2)
    | {"layer_types": ["sliding_attention", "full_attention"], "sliding_windows": [128, 0]}
    | {"num_experts": 16},
    "K-EXAONE-2.0-750B-A37B-3-layers": with_num_layers(CONFIGS["k_exaone_2_750b_a37b"], 3)
    | {"swiglu_limits": [0.0, 0.0, 7.0], "num_experts": 16},
}

FULL = "Random weights in the full published shape."
WIDE = "Random weights in the published widths, with fewer layers."
TINY = "A tiny model of the published topology: it has every branch of the model, and other widths."
NO_REFERENCE = (
    "Transformers cannot run this model, so nothing is compared but what is on disk; "
    "`tests/parity/exaone_moe` compares logits with a reference in fp32."
)
# card -> (shape or tiny model, options, note)
RUNS: dict[str, list[tuple[str, str, str]]] = {
    "EXAONE-4.0-1.2B": [
        ("EXAONE-4.0-1.2B", "", FULL),
        ("EXAONE-4.0-1.2B", "--dtype bfloat16", FULL),
        ("EXAONE-4.0-1.2B", "--tp 2", FULL),
        ("exaone4-1.2b", "--gradients", TINY),
        ("exaone4-1.2b", "--tp 2 --pp 2 --sp --gradients", TINY),
    ],
    "EXAONE-4.0-32B": [
        ("EXAONE-4.0-32B-4-layers", "",
         f"{WIDE} 4 of 64 layers (LLLG); prompts do not reach the window of 4096."),
        ("exaone4", "--gradients", f"{TINY} Prompts are eight windows long."),
        ("exaone4", "--tp 2 --pp 2 --vpp 2 --sp --gradients", TINY),
        ("exaone4", "--tp 4 --pp 2", TINY),
        ("exaone4", "--dtype bfloat16", TINY),
    ],
    "EXAONE-4.5-33B": [
        ("EXAONE-4.5-33B-4-layers", "",
         f"{WIDE} 4 of 64 layers (LLLG), 7 of 28 blocks of the vision encoder (the last of them "
         "with full attention), one layer of multi-token prediction; prompts do not reach the "
         "window of 4096."),
        ("exaone45", "--gradients", f"{TINY} Prompts are eight windows long; "
         "images are larger than the vision encoder's window."),
        ("exaone45", "--tp 2 --pp 2 --vpp 2 --sp --gradients", TINY),
        ("exaone45", "--tp 2 --cp 2 --sp --gradients", TINY),
        ("exaone45", "--tp 2 --pp 2 --mtp",
         f"{TINY} Multi-token prediction is built into the model."),
        ("exaone45", "--dtype bfloat16", TINY),
    ],
    "ERNIE-4.5-0.3B": [
        ("ERNIE-4.5-0.3B", "", FULL),
        ("ERNIE-4.5-0.3B", "--dtype bfloat16 --quick", FULL),
        ("ERNIE-4.5-0.3B", "--tp 2 --quick", FULL),
        ("ernie45-dense", "--tp 2 --pp 2 --gradients", TINY),
    ],
    "ERNIE-4.5-21B-A3B": [
        ("ERNIE-4.5-21B-A3B-3-layers", "",
         f"{WIDE} One dense layer, and 2 of 27 MoE layers with all 64 experts."),
        ("ernie45", "--gradients", TINY),
        ("ernie45", "--tp 2 --ep 2 --sp", TINY),
        ("ernie45", "--pp 2 --ep 2 --gradients", TINY),
        ("ernie45", "--dtype bfloat16", TINY),
    ],
    "ERNIE-4.5-300B-A47B": [
        ("ernie45-300b", "--gradients",
         f"{TINY} The published widths (5.7e9 parameters per layer) were not run."),
        ("ernie45-300b", "--tp 2 --pp 2 --vpp 2", TINY),
        ("ernie45-300b", "--ep 4", TINY),
        ("ernie45-300b", "--tp 2 --ep 2 --etp 1 --sp --gradients", TINY),
        ("ernie45-300b", "--dtype bfloat16", TINY),
    ],
    "K-EXAONE-236B-A23B": [
        ("K-EXAONE-236B-A23B-2-layers", "--length 160",
         f"{WIDE} 2 of 48 layers (LG; a dense one, and an MoE layer with 16 of 128 experts), "
         "without multi-token prediction; the prompt is longer than the window of 128."),
        ("exaone-moe", "--gradients", f"{TINY} Prompts are longer than the windows."),
        ("exaone-moe", "--tp 2 --ep 2 --sp", TINY),
        ("exaone-moe", "--pp 2 --ep 2 --gradients", TINY),
        ("exaone-moe", "--tp 2 --pp 2 --mtp",
         f"{TINY} Multi-token prediction is built into the model."),
        ("exaone-moe", "--dtype bfloat16", TINY),
    ],
    "K-EXAONE-2.0-750B-A37B": [
        ("K-EXAONE-2.0-750B-A37B-3-layers", "",
         f"{WIDE} 3 of 78 layers (GLL; two dense ones, and an MoE layer with 16 of 256 experts and "
         f"a clamp), without multi-token prediction. {NO_REFERENCE}"),
        ("exaone-moe-2", "", f"{TINY} {NO_REFERENCE}"),
        ("exaone-moe-2", "--tp 2 --pp 2", TINY),
        ("exaone-moe-2", "--ep 4 --mtp", f"{TINY} Multi-token prediction is built into the model."),
        ("exaone-moe-2", "--dtype bfloat16", TINY),
    ],
}  # fmt: skip


def write(work: Path, card: str) -> bool:
    """Run the verifications of one card, and return whether all passed."""
    path, passed = Path(__file__).with_name(f"{card}.md"), True
    path.unlink(missing_ok=True)
    for name, options, note in RUNS[card]:
        folder = work / name
        if not folder.exists():
            write_random(folder, SHAPES.get(name) or TINY_CONFIGS[name])
        sys.argv = ["exaone-bridge", "verify", str(folder), *options.split()]
        sys.argv += ["--card", str(path), "--name", card, "--note", note]
        try:
            main()
        except SystemExit as ended:
            passed = passed and not ended.code
    for name in SHAPES.keys() & {run[0] for run in RUNS[card]}:
        shutil.rmtree(work / name)
    return passed


if __name__ == "__main__":
    cards = sys.argv[2:] or list(RUNS)
    work = Path(sys.argv[1])
    results = {card: write(work, card) for card in cards}
    sys.exit(not all(results.values()))
