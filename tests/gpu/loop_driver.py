"""Run an example's `main` under torchrun, and save logits of its trained model.

`test_training_loop.py` starts it:

    loop_driver.py EXAMPLE LOGITS ARGUMENTS...

LOGITS is the file for the trained model's logits [N, S, V] of `prompts`, or "-".
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

# Set before CUDA starts: every run sums in the same order.
os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

import torch  # before transformer_engine: the two bring different versions of cuDNN

import exaone_bridge  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def _make_deterministic(config: Any) -> None:
    config.model.cross_entropy_loss_fusion = False  # not deterministic according to Megatron-Core
    config.dataset.num_workers = 0


def main() -> None:
    example, logits_file, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
    module = importlib.import_module(example)

    from common import OnTrainEnd

    def save_logits(model: list[Any]) -> None:
        from exaone_bridge.runtime.model import forward_logits
        from exaone_bridge.verification.workflow.workload import random_prompts

        logits = forward_logits(model, random_prompts(2048, 4, 200))
        torch.save(logits, logits_file)

    options, config = module.configure(arguments)
    _make_deterministic(config)
    callbacks = [] if logits_file == "-" else [OnTrainEnd(save_logits)]
    module.main(options, config, *callbacks)


if __name__ == "__main__":
    main()
