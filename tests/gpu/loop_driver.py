"""Under torchrun: an example's `main`, with its last model looked at. Not a test; `test_training_loop.py` starts it.

    loop_driver.py EXAMPLE PROBE ARGUMENTS...

PROBE is a file for the logits [N, S, V] of `prompts` that the model in memory gives when training has ended, or "-".
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

# Before CUDA starts: the same sums in the same order in every run.
os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

import torch  # before transformer_engine: the two bring different versions of cuDNN

import exaone_bridge  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def _same_every_time(config: Any) -> None:
    config.model.cross_entropy_loss_fusion = False  # Megatron-Core calls it not deterministic
    config.dataset.num_workers = 0


def main() -> None:
    example, probe, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
    module = importlib.import_module(example)

    def look(model: list[Any]) -> None:
        from exaone_bridge.runtime.model import forward_logits
        from exaone_bridge.verification.checks.logits import prompts

        logits, _ = forward_logits(model, prompts(2048, 4, 200))
        torch.save(logits, probe)

    extra = {} if probe == "-" else {"at_end": look}
    module.main(arguments, adjust=_same_every_time, **extra)


if __name__ == "__main__":
    main()
