"""examples/adapters.py: train, resume, merge, export for PEFT and go on from PEFT, on the CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.verification.workflow.workload import random_prompts
from tests.helpers.adapters import hf_logits
from tests.helpers.paths import ROOT
from tests.helpers.scripts import fork_script


def test_adapters_example_goes_on_from_either_format(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    folder, tokens = tiny("exaone4"), random_prompts(387, 2, 40)

    def train(name: str, *arguments: object) -> list[float]:
        script, output = ROOT / "examples/adapters.py", tmp_path / name
        printed = fork_script(tmp_path, script, folder, output, "--steps", 3, *arguments)
        merged = ForkLauncher(1).first(hf_logits, output / "merged", tokens)
        in_peft = ForkLauncher(1).first(hf_logits, folder, tokens, output / "adapter")
        assert (merged - in_peft).abs().max() <= 1e-4
        base = ForkLauncher(1).first(hf_logits, folder, tokens)
        assert (merged - base).abs().max() > 1e-3
        return [float(text) for text in re.findall(r"loss ([\d.]+)", printed)]

    first = train("first")
    resumed = train("resumed", "--resume", tmp_path / "first" / "checkpoints")
    from_peft = train("from PEFT", "--from-peft", tmp_path / "first" / "adapter")
    assert first[0] > first[-1] > resumed[0] > resumed[-1]
    assert resumed == from_peft
