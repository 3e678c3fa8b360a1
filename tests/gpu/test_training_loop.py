"""Megatron-Bridge's training loop with our recipes, through the examples, on one GPU.

The runs that do not need each other start together: a process spends most of its time on imports.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.logits import prompts
from tests.helpers.paths import ROOT

TRAINING = ("pretrain", "--iters", 10, "--rate", 1e-3, "--global-batch-size", 16)


def _started(work: Path, name: str, example: object, *arguments: object) -> subprocess.Popen[bytes]:
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
        ROOT / "tests/gpu/loop_driver.py",
    ]
    probe = folder / "logits.pt" if example == "pretrain" and "--recipe" not in arguments else "-"
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(
            [sys.executable, *map(str, (*command, example, probe, *arguments, "--save", folder))],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={
                key: value
                for key, value in os.environ.items()
                if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            },
        )


RUNS: dict[str, tuple[object, ...]] = {
    "whole": (*TRAINING, "--save-every", 5),
    "published": (
        *(
            "pretrain",
            "--recipe",
            "exaone4_1p2b_pretrain_config",
            "--iters",
            6,
            "--micro-batch-size",
            1,
        ),
        *("--global-batch-size", 2, "--rate", 1e-4, "--save-every", -1),
    ),
    "sft": ("sft", "--iters", 8, "--rate", 1e-3),
    "packed": ("sft", "--iters", 4, "--rate", 1e-3, "--packed", "--micro-batch-size", 1),
    "lora": ("lora", "--iters", 8, "--rate", 1e-2),
    "dora": ("lora", "--scheme", "dora", "--iters", 8, "--rate", 1e-2),
    "images": ("sft_images", "--iters", 12, "--rate", 1e-3),
    "ernie": ("pretrain", "--recipe", "ernie45_tiny_pretrain_config", "--iters", 8, "--rate", 1e-3),
}


class Runs:
    """Runs of the examples: started when a test first asks for them, or all at once."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Unless it has been started."""
        if name in self.running:
            return
        resumed = name == "resumed"
        arguments = (
            (*TRAINING, "--load", self.folder("whole"), "--load-step", 5) if resumed else RUNS[name]
        )
        self.running[name] = _started(self.work, name, *arguments)

    def folder(self, name: str) -> Path:
        """Of this run, once it has ended well."""
        self.start(name)
        folder = self.work / name
        code = self.running[name].wait(timeout=400)
        assert code == 0, (folder / "log.txt").read_text(errors="replace")[-6000:]
        return folder

    def lines(self, name: str) -> list[dict[str, float]]:
        """What the run wrote down after each step."""
        return [
            json.loads(line)
            for line in (self.folder(name) / "losses.jsonl").read_text().splitlines()
        ]

    def losses(self, name: str) -> dict[int, float]:
        """Step -> loss."""
        return {int(line["step"]): line["loss"] for line in self.lines(name)}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    found = Runs(tmp_path_factory.mktemp("runs"))
    if (
        sum(item.path == request.path for item in request.session.items) > 2
    ):  # else some would run for nobody
        for name in RUNS:
            found.start(name)
    yield found
    for process in found.running.values():
        process.kill()
        process.wait()


def _transformers(folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        .cuda()
        .eval()
    )
    with torch.no_grad():
        return torch.cat(
            [model(prompt[None].cuda(), use_cache=False).logits.float().cpu() for prompt in tokens]
        )


def test_losses_after_a_resume_are_those_of_an_uninterrupted_run(runs: Runs) -> None:
    """Within 1e-6, with Transformer Engine's deterministic kernels; on a CPU the numbers are the same."""
    whole, resumed = runs.losses("whole"), runs.losses("resumed")
    print("whole", whole, "resumed", resumed)
    assert sorted(whole) == list(range(1, 11))
    assert sorted(resumed) == list(range(6, 11))
    assert len(set(whole.values())) == 10  # its data are random, so that there is nothing to learn
    assert max(abs(resumed[step] - whole[step]) for step in resumed) <= 1e-6


def test_checkpoint_of_a_run_exports(nccl: None, runs: Runs, tmp_path: Path) -> None:
    """Transformers' logits of the export are the trained model's in memory, as near as bf16 is to fp32."""
    from megatron.bridge import AutoBridge
    from transformers import CONFIG_MAPPING

    from exaone_bridge.runtime.model import load_megatron, provider_of

    folder = runs.folder("whole")
    _, config = provider_of(folder / "checkpoints")
    bridge = AutoBridge.from_hf_config(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)))
    model = load_megatron(bridge, folder / "checkpoints", Layout())
    bridge.save_hf_pretrained(model, tmp_path / "exported", show_progress=False)
    tokens = prompts(2048, 4, 200)
    truth = _transformers(tmp_path / "exported", tokens, torch.float32)
    theirs = (_transformers(tmp_path / "exported", tokens, torch.bfloat16) - truth).abs()
    ours = (torch.load(folder / "logits.pt") - truth).abs()
    print(
        f"ours {ours.mean():.3e} / {ours.max():.3e}, theirs {theirs.mean():.3e} / {theirs.max():.3e}"
    )
    assert ours.mean() <= 1.1 * theirs.mean()
    assert ours.max() <= 1.1 * theirs.max()


def _learns(losses: dict[int, float], steps: int) -> None:
    print(losses)
    values = [losses[step] for step in range(1, steps + 1)]
    assert all(math.isfinite(value) for value in values)
    assert min(values[1:]) < values[0]


def test_published_recipe_trains(runs: Runs) -> None:
    """EXAONE-4.0-1.2B from random weights, 4096 tokens: from about log(vocabulary) downward."""
    losses = runs.losses("published")
    assert abs(losses[1] - math.log(102400)) < 1.5
    _learns(losses, 6)


def test_memory_of_the_published_recipe_is_as_estimated(runs: Runs) -> None:
    """The peak that PyTorch allocated is at most the formula's sum with its reserve, and not far below it."""
    from exaone_bridge.models import family_of
    from exaone_bridge.recipes.memory import GB, estimate
    from exaone_bridge.recipes.published import CONFIGS
    from exaone_bridge.recipes.training_plans import training_plan

    config = CONFIGS["exaone4_1p2b"]
    family = family_of(config["architectures"], where="published")
    plan = training_plan("exaone4_1p2b", "pretrain", 80).with_overrides(
        gpus=1, micro_batch_size=1, global_batch_size=2
    )
    needed = estimate(family.describe(config), plan).total / GB
    peak = max(line["peak_gb"] for line in runs.lines("published"))
    print(f"peak {peak:.1f} GB, estimated {needed:.1f} GB")
    assert 0.6 * needed <= peak <= needed


def test_mixture_of_experts_recipe_trains(runs: Runs) -> None:
    """Random data: losses stay near log(vocabulary). The checkpoint at the end holds an optimizer of mixed types."""
    losses = runs.losses("ernie")
    print(losses)
    assert all(abs(loss - math.log(2048)) < 0.5 for loss in losses.values())
    assert len(set(losses.values())) == 8


@pytest.mark.parametrize(("name", "steps"), [("sft", 8), ("packed", 4)])
def test_sft_example(runs: Runs, name: str, steps: int) -> None:
    """Real text; the export loads in Transformers, and is not what training started from."""
    _learns(runs.losses(name), steps)
    folder = runs.folder(name)
    tokens = prompts(2048, 1, 64)
    first, last = (
        _transformers(folder / which, tokens, torch.float32) for which in ("model", "exported")
    )
    assert (first - last).abs().max() > 1e-2


def test_images_example(runs: Runs) -> None:
    """Pictures that it draws: the merger and the language model learn, the tower stays bit by bit."""
    from safetensors.torch import load_file

    _learns(runs.losses("images"), 12)
    folder = runs.folder("images")
    first, last = (
        load_file(folder / which / "model.safetensors") for which in ("model", "exported")
    )
    assert first.keys() == last.keys()
    same = {name for name, value in first.items() if torch.equal(value, last[name])}
    vision_encoder = {name for name in first if ".visual." in name and ".merger." not in name}
    assert vision_encoder <= same
    assert len(same - vision_encoder) < 0.1 * len(first)  # a norm near one may round to what it was


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_lora_example(runs: Runs, name: str) -> None:
    """Adapters alone in PEFT, and merged: the same logits, and not the base model's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _learns(runs.losses(name), 8)
    folder = runs.folder(name)
    tokens = prompts(2048, 2, 100)
    base = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        without = base.eval()(tokens, use_cache=False).logits
        adapted = (
            PeftModel.from_pretrained(base, folder / "adapter")
            .eval()(tokens, use_cache=False)
            .logits
        )
    merged = _transformers(folder / "merged", tokens, torch.float32)
    changed, apart = (adapted - without).abs(), (adapted - merged).abs()
    print(f"adapters change {changed.mean():.3e}, merged in bf16 is apart by {apart.mean():.3e}")
    assert changed.mean() > 1e-3
    assert apart.mean() < 0.1 * changed.mean() + 2e-2  # merged weights are rounded to bf16


def test_the_check_of_resuming_can_fail(runs: Runs) -> None:
    """A run that starts anew at step 5's data has other losses."""
    whole: dict[int, Any] = runs.losses("whole")
    assert max(abs(whole[step] - whole[step - 1]) for step in range(6, 11)) > 1e-4
