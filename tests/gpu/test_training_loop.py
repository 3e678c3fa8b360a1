"""The examples on one GPU: Megatron-Bridge's training loop with the recipes of exaone_bridge.

Independent runs start together, because a process spends most of its time on imports.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.workflow.workload import random_prompts
from tests.helpers.bf16 import assert_bf16_close
from tests.helpers.gpu import hf_logits
from tests.helpers.paths import ROOT

TRAINING = ("pretrain", "--iters", 10, "--lr", 1e-3, "--global-batch-size", 16)


def _start(work: Path, name: str, example: object, *arguments: object) -> subprocess.Popen[bytes]:
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "1", str(ROOT / "tests/gpu/loop_driver.py")]
    is_tiny = example == "pretrain" and "--recipe" not in arguments
    logits = folder / "logits.pt" if is_tiny else "-"
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(
            [*command, *map(str, (example, logits, *arguments, "--save", folder))],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={key: value for key, value in os.environ.items() if key not in torchrun}
            | {"PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"},
        )


RUNS: dict[str, tuple[object, ...]] = {
    "uninterrupted": (*TRAINING, "--save-interval", 5),
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
        *("--global-batch-size", 2, "--lr", 1e-4, "--save-interval", -1),
    ),
    "sft": ("sft", "--iters", 8, "--lr", 1e-3),
    "packed": ("sft", "--iters", 4, "--lr", 1e-3, "--packed", "--micro-batch-size", 1),
    "lora": ("lora", "--iters", 8, "--lr", 1e-2),
    "dora": ("lora", "--scheme", "dora", "--iters", 8, "--lr", 1e-2),
    "images": ("sft_images", "--iters", 12, "--lr", 1e-3),
    "ernie": ("pretrain", "--recipe", "ernie45_tiny_pretrain_config", "--iters", 8, "--lr", 1e-3),
}


class Runs:
    """Processes that run the examples; each starts when a test needs it, or all start at once."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Start a run, unless it has been started."""
        if name in self.running:
            return
        arguments = RUNS.get(name, ())
        if name == "resumed":
            arguments = (*TRAINING, "--load", self.folder("uninterrupted"), "--ckpt-step", 5)
        self.running[name] = _start(self.work, name, *arguments)

    def folder(self, name: str) -> Path:
        """Wait for the end of a run, and return its folder."""
        self.start(name)
        folder = self.work / name
        code = self.running[name].wait(timeout=400)
        assert code == 0, (folder / "log.txt").read_text(errors="replace")[-6000:]
        return folder

    def lines(self, name: str) -> list[dict[str, float]]:
        """Return what the run logged after each step."""
        return [
            json.loads(line)
            for line in (self.folder(name) / "losses.jsonl").read_text().splitlines()
        ]

    def losses(self, name: str) -> dict[int, float]:
        """Return step -> loss."""
        return {int(line["step"]): line["loss"] for line in self.lines(name)}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("runs"))
    # With one or two selected tests, most runs would not be needed.
    if sum(item.path == request.path for item in request.session.items) > 2:
        for name in RUNS:
            runs.start(name)
    yield runs
    for process in runs.running.values():
        process.kill()
        process.wait()


def test_losses_of_a_resumed_run_equal_those_of_an_uninterrupted_run(runs: Runs) -> None:
    """Deterministic kernels make them equal within 1e-6."""
    complete, resumed = runs.losses("uninterrupted"), runs.losses("resumed")
    print("uninterrupted", complete, "resumed", resumed)
    assert sorted(complete) == list(range(1, 11))
    assert sorted(resumed) == list(range(6, 11))
    assert len(set(complete.values())) == 10  # the data are random: no two losses are equal
    assert max(abs(resumed[step] - complete[step]) for step in resumed) <= 1e-6


def test_export_of_a_run_has_the_logits_of_the_trained_model(
    nccl: None, runs: Runs, tmp_path: Path
) -> None:
    """The trained model in memory is as exact as Transformers' bf16 logits of the export."""
    from megatron.bridge import AutoBridge
    from transformers import CONFIG_MAPPING

    from exaone_bridge.checkpoint.megatron.run_config import read_run_config
    from exaone_bridge.runtime.model import load_megatron

    folder = runs.folder("uninterrupted")
    config = read_run_config(folder / "checkpoints").hf_config()
    bridge = AutoBridge.from_hf_config(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)))
    model = load_megatron(bridge, folder / "checkpoints", Layout())
    bridge.save_hf_pretrained(model, tmp_path / "exported", show_progress=False)
    all_prompts = [(random_prompts(2048, 4, 200), [])]
    assert_bf16_close(
        "trained model",
        torch.load(folder / "logits.pt").flatten(0, 1),
        hf_logits(tmp_path / "exported", all_prompts, torch.bfloat16),
        hf_logits(tmp_path / "exported", all_prompts, torch.float32),
    )


def _assert_falls(losses: dict[int, float], steps: int) -> None:
    print(losses)
    values = [losses[step] for step in range(1, steps + 1)]
    assert all(math.isfinite(value) for value in values)
    assert min(values[1:]) < values[0]


def test_published_recipe_starts_at_log_vocabulary_and_falls(runs: Runs) -> None:
    """EXAONE-4.0-1.2B trains from random weights on 4096 tokens."""
    losses = runs.losses("published")
    assert abs(losses[1] - math.log(102400)) < 1.5
    _assert_falls(losses, 6)


def test_published_recipe_needs_the_estimated_memory(runs: Runs) -> None:
    """PyTorch's peak is at most the estimate, and at least 60% of it."""
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


def test_mixture_of_experts_recipe_trains_and_saves(runs: Runs) -> None:
    """Losses of random data stay near log(vocabulary); the optimizer has two data types."""
    losses = runs.losses("ernie")
    print(losses)
    assert all(abs(loss - math.log(2048)) < 0.5 for loss in losses.values())
    assert len(set(losses.values())) == 8


@pytest.mark.parametrize(("name", "steps"), [("sft", 8), ("packed", 4)])
def test_sft_example_exports_a_trained_model(runs: Runs, name: str, steps: int) -> None:
    """Transformers loads the export, whose logits differ from those before training."""
    _assert_falls(runs.losses(name), steps)
    folder = runs.folder(name)
    all_prompts = [(random_prompts(2048, 1, 64), [])]
    before, after = (
        hf_logits(folder / which, all_prompts, torch.float32) for which in ("model", "exported")
    )
    assert (before - after).abs().max() > 1e-2


def test_images_example_trains_all_but_the_vision_encoder(runs: Runs) -> None:
    """The vision encoder is bitwise unchanged; merger and language model train on drawn images."""
    from safetensors.torch import load_file

    _assert_falls(runs.losses("images"), 12)
    folder = runs.folder("images")
    before, after = (
        load_file(folder / which / "model.safetensors") for which in ("model", "exported")
    )
    assert before.keys() == after.keys()
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    vision_encoder = {name for name in before if ".visual." in name and ".merger." not in name}
    assert vision_encoder <= same
    # The bf16 weight of a norm may round to its old value.
    assert len(same - vision_encoder) < 0.1 * len(before)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_lora_example_exports_adapters_that_equal_the_merged_model(runs: Runs, name: str) -> None:
    """PEFT loads the adapters; their logits differ from those of the base model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _assert_falls(runs.losses(name), 8)
    folder = runs.folder(name)
    tokens = random_prompts(2048, 2, 100)
    base = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        without = base.eval()(tokens, use_cache=False).logits
        peft = PeftModel.from_pretrained(base, folder / "adapter").eval()
        adapted = peft(tokens, use_cache=False).logits
    merged = hf_logits(folder / "merged", [(tokens, [])], torch.float32)
    change = (adapted - without).abs().mean()
    difference = (adapted.flatten(0, 1) - merged).abs().mean()
    print(f"adapters change {change:.3e}, the merged model in bf16 differs by {difference:.3e}")
    assert change > 1e-3
    assert difference < 0.1 * change + 2e-2  # merged weights are rounded to bf16


def test_losses_of_consecutive_steps_differ(runs: Runs) -> None:
    """Therefore a resumed run that repeats a step would fail the test above."""
    complete = runs.losses("uninterrupted")
    assert max(abs(complete[step] - complete[step - 1]) for step in range(6, 11)) > 1e-4
