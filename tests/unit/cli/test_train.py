"""`exaone-bridge train`: the plan of every recipe, its settings, and the log of a run."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.checkpoint.megatron.run_config import read_run_config
from exaone_bridge.recipes import RECIPES
from exaone_bridge.recipes.loss_curve import loss_curve
from tests.helpers.cli import Cli


@pytest.mark.parametrize("name", RECIPES)
def test_dry_run_shows_the_plan(name: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = ["gpu_memory_gb=141", *(["last_turn=true"] if "_chat_" in name else [])]
    run = cli("train", name, *settings, "--dry-run")
    assert run.code == 0, run.err
    assert "tokens a step" in run.out and "of 141 GB, estimated" in run.out


def test_settings_change_the_plan(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    run = cli("train", "exaone4_1p2b_pretrain_config", "tp=2", "seq_length=2048", "--dry-run")
    assert run.code == 0, run.err
    cells = [line.replace(" ", "").strip("│").split("│") for line in run.out.splitlines()]
    rows = {cell[0]: cell[1] for cell in cells if len(cell) == 2}
    assert (rows["GPUs"], rows["TP"], rows["SP"], rows["DP"]) == ("4", "2", "yes", "2")
    assert rows["tokensastep"] == f"{2048 * 256:,},{2048 * 64:,}perGPU"


def test_dry_run_says_why_less_is_captured(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run = cli("train", "exaone4_1p2b_sft_config", "cuda_graphs=full-iteration", "--dry-run")
    text = " ".join(run.out.replace("│", " ").split())
    assert "CUDA graphs layers (mlp): the lengths of packed sequences are read on the CPU" in text
    assert "graphs 4.2" in text  # GB
    run = cli("train", "exaone4_1p2b_sft_config", "--dry-run")
    assert run.code == 0 and "graphs" not in run.out.lower() and "overlap" not in run.out
    settings = ["cp=2", "cp_full_attention=a2a", "fuse_weight_gradients=true", "precision=fp8"]
    run = cli("train", "exaone4_1p2b_pretrain_config", *settings, "--dry-run")
    text = " ".join(run.out.replace("│", " ").split())
    assert "precision fp8 overlap and fusion fuse_weight_gradients, cp_full_attention=a2a" in text


@pytest.mark.parametrize("in_shell", [None, "8"])
def test_connections_are_set_before_cuda_starts(
    in_shell: str | None,
    megatron_bridge: Any,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With TP or CP, unless the shell has set them."""
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    seen = []
    monkeypatch.setattr(
        "exaone_bridge.recipes.training_loop.run_training",
        lambda *_, **__: seen.append(os.environ.get(name)),
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    for settings in ([], ["tp=2"], ["cp=2"]):
        monkeypatch.setenv(name, in_shell or "")
        if in_shell is None:
            monkeypatch.delenv(name)
        arguments = ["global_batch_size=8", *settings, "--save", tmp_path]
        assert cli("train", "exaone4_1p2b_pretrain_config", *arguments).code == 0
    assert seen == (["8"] * 3 if in_shell else [None, "1", "1"])


def test_plan_has_the_fields_of_megatron_bridge_too(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan that is shown, and the memory, are those that run; options may stand in between."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    fields = ["model.tensor_model_parallel_size=2", "train.global_batch_size=64"]
    layout = ["tp=2", "global_batch_size=64"]
    name = "exaone4_1p2b_pretrain_config"
    runs = [cli("train", name, first, "--dry-run", second) for first, second in (fields, layout)]
    assert runs[0].code == 0 and runs[0].out == runs[1].out and "4 / 64" in runs[0].out
    assert cli("train", name, "--dry-run", "--nope").code == 2


def test_number_of_gpus_is_that_of_the_processes(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run = cli("train", "exaone4_tiny_pretrain_config", "gpus=8", "--save", tmp_path / "run")
    assert run.code == 2 and "gpus is 8, and must be the number of processes, 1" in run.err
    run = cli("train", "exaone4_32b_sft_config", "--save", tmp_path / "run")
    assert run.code == 2 and "gpus is 1, and must be a multiple of" in run.err


def test_fine_tuning_needs_a_folder(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run = cli("train", "exaone4_tiny_chat_sft_config", "--save", "run")
    assert run.code == 2 and "hf_path is None, and must be a Hugging Face directory" in run.err


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["nope"], "recipe is 'nope'"),
        (["exaone4_1p2b_pretrain_config", "tp=3"], "tp"),
        (["exaone4_1p2b_pretrain_config", "tp=two"], "tp is 'two', and must be a whole number"),
        (["exaone4_1p2b_pretrain_config", "sp=maybe"], "sp is 'maybe', and must be one of 'true'"),
        (["exaone4_1p2b_pretrain_config", "nope=3"], "nope is '3', and must be an argument of exa"),
        (["exaone4_1p2b_pretrain_config", "dataset_root=/x"], "dataset_root is '/x', and must be"),
        (
            ["exaone4_1p2b_sft_config", "peft_scheme=lora"],
            "must be an argument of exaone4_1p2b_sft",
        ),
        (["exaone4_1p2b_sft_config", "dataset_root=/x"], "must be a directory with training.jsonl"),
        (["exaone4_1p2b_pretrain_config", "hf_path=/nowhere"], "config.json is missing"),
        (["exaone4_1p2b_pretrain_config", "=3"], "NAME=VALUE"),
        (["exaone4_1p2b_pretrain_config", "cuda_graphs=all"], "must be one of 'off', 'layers'"),
        (["exaone4_32b_sft_config", "tp=2", "pp=1"], "memory of a GPU"),
    ],
)
def test_bad_settings_are_rejected(arguments: list[str], fragment: str, cli: Cli) -> None:
    run = cli("train", *arguments, "--dry-run")
    assert run.code == 2 and fragment in run.err and run.out == ""


def test_overrides_have_the_syntax_of_megatron_bridge(megatron_bridge: Any, cli: Cli) -> None:
    recipe = "exaone4_tiny_pretrain_config"
    run = cli("train", recipe, "train.train_iters=7", "logger.wandb_project=x", "--dry-run")
    assert run.code == 0 and "are accepted; nothing was run" in run.out
    for override, fragment in (
        ("train.nope=7", "Could not override 'train.nope'"),
        ("+train.nope=7", "train.nope is '+train.nope=7', and must be a field of Megatron-Bridge"),
        ("~checkpoint.save", "a field cannot be deleted; write checkpoint.save=null"),
        ("train.train_iters=many", "train.train_iters is 'many', and must be a number"),
        ("optimizer.bf16=3", "optimizer.bf16 is 3, and must be true or false"),
        ("dataset.blend=/x", "dataset.blend is '/x', and must be [[PREFIX, ...], [WEIGHT, ...]]"),
        ("dataset.data_path=[0.3,/x]", "must be the prefix of a .bin and an .idx file"),
        ("validation.eval_global_batch_size=3", "ConfigContainer is 'not valid', and must be what"),
    ):
        run = cli("train", recipe, override, "--dry-run")
        assert run.code == 2 and fragment in run.err, run.err


def test_warm_up_ends_before_a_short_run(megatron_bridge: Any, cli: Cli) -> None:
    """Megatron-Bridge would warm up until the last step."""
    recipe = "exaone4_tiny_pretrain_config"
    run = cli("train", recipe, "train.train_iters=100", "--dry-run")
    assert "The learning rate warms up for 10 of 100 steps." in run.out
    run = cli("train", recipe, "train.train_iters=100", "scheduler.lr_warmup_iters=50", "--dry-run")
    assert run.code == 0 and "warms up" not in run.out


def test_resumption_at_another_layout_is_rejected(
    megatron_bridge: Any, cli: Cli, megatron_folder: Path, tmp_path: Path
) -> None:
    """Unless the optimizer's state is left out, or was saved in a format for any layout."""
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(megatron_folder, checkpoints)
    assert read_run_config(checkpoints).layout.tp == 2
    (file,) = checkpoints.rglob("run_config.yaml")
    text = file.read_text().replace("save_optim: false", "save_optim: true")
    reshardable = "dist_ckpt_optim_fully_reshardable: "
    file.write_text(text.replace(reshardable + "true", reshardable + "false"))
    command = ("train", "exaone4_tiny_pretrain_config", "--save", tmp_path / "run", "--dry-run")
    change = "train.train_iters=9"
    run = cli(*command, change)
    assert run.code == 2 and "saved the optimizer's state; resume at that layout" in run.err
    assert cli(*command, change, "checkpoint.load_optim=false").code == 0
    assert cli(*command, change, "gpus=4", "tp=2", "pp=2").code == 0
    file.write_text(text)
    assert cli(*command, change).code == 0


def test_weights_and_biases_that_is_not_installed_is_named(
    megatron_bridge: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exaone_bridge.cli import train

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    options = ("logger.wandb_project=x", "--save", tmp_path / "run")
    run = cli("train", "exaone4_tiny_pretrain_config", *options)
    assert run.code == 2 and "run `pip install wandb`" in run.err


def test_machine_that_cannot_train_is_named_before_anything_is_written(
    megatron_bridge: Any, cli: Cli, tmp_path: Path
) -> None:
    run = cli("train", "exaone4_tiny_pretrain_config", "--save", tmp_path / "run")
    assert run.code == 2 and not (tmp_path / "run").exists()
    assert "nvidia_resiliency_ext" in run.err or "GPU is None" in run.err
    assert cli("train", "exaone4_tiny_pretrain_config").code == 2  # without --save


def _fake_loop(steps: int, fails: bool) -> Callable[..., None]:
    def loop(config: Any, forward_step: Any, callbacks: list[Any]) -> None:
        from megatron.bridge.training.callbacks import normalize_callbacks

        os.write(1, b"a thousand lines of Megatron\n")  # pytest replaces sys.stdout
        logging.getLogger("megatron.bridge.rows").warning("a warning of Megatron")
        logging.getLogger("exaone_bridge.rows").warning("2 rows are left out")
        manager = normalize_callbacks(callbacks)
        copied = copy.deepcopy(config.model)  # as layers do with their config
        assert copied.pre_wrap_hook(["model"]) == ["model"]
        # Megatron-Bridge rejects callbacks for this event where epochs are given.
        assert manager.has_callbacks("on_data_init_start") == (config.train.num_epochs is None)
        manager.fire("on_data_init_start", None)
        manager.fire("on_train_start", None)
        for step in range(steps):
            state = types.SimpleNamespace(train_state=types.SimpleNamespace(step=step))
            loss = {"lm loss": torch.tensor([6.0 - step, 2.0])}
            context = types.SimpleNamespace(state=state, loss_dict=loss, grad_norm=1.5)
            manager.fire("on_train_step_end", context)
        if fails:
            raise RuntimeError("out of memory")

    return loop


@pytest.mark.parametrize(("fails", "epochs"), [(False, False), (True, False), (False, True)])
def test_log_is_short_and_the_curve_is_drawn(
    fails: bool,
    epochs: bool,
    megatron_bridge: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from exaone_bridge.recipes import exaone4_tiny_pretrain_config, training_loop

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)  # the tests turn it off
    monkeypatch.setattr(training_loop, "check_installed", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2_000_000_000)
    loop = _fake_loop(3, fails)
    for name in ("pretrain", "finetune"):  # which need nvidia_resiliency_ext
        module = types.SimpleNamespace(**{name: loop})
        monkeypatch.setitem(sys.modules, f"megatron.bridge.training.{name}", module)
    config = exaone4_tiny_pretrain_config()
    config.train.train_iters, config.train.num_epochs = 3, 1.0 if epochs else None
    capfd.readouterr()
    try:
        training_loop.run_training(config, tmp_path, quiet=True)
    except RuntimeError as error:
        assert fails and str(error) == "out of memory"
    else:
        assert not fails
    out, err = capfd.readouterr()
    warning, first, start, *rest = out.splitlines()
    assert warning == "2 rows are left out"
    parts = re.findall(r"([a-z ]+) (\d+\.\d)", start.partition(":")[2])
    assert [part.strip() for part, _ in parts] == (
        ["imports", "model built", *["weights loaded"][epochs:], "data ready", "first step"]
    )
    assert [float(seconds) for _, seconds in parts] == sorted(float(each[1]) for each in parts)
    lines = [first, *rest]
    assert [line.partition(",")[0] for line in lines] == [
        "step 1/3: loss 3.0000",
        "step 2/3: loss 2.5000",
        "step 3/3: loss 2.0000",
    ]
    assert all("tokens/s per GPU, 2.0 GB" in line for line in lines)
    log = tmp_path / "logs" / "rank0.log"
    assert "a thousand lines of Megatron" in log.read_text()
    assert (str(log) in err) == fails
    points = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [point["loss"] for point in points] == [3.0, 2.5, 2.0]
    assert "loss of 3 steps, the last 2.0000" in (tmp_path / "loss.svg").read_text()


@pytest.mark.parametrize(
    ("points", "count"),
    [([], 0), ([(1, float("nan"))], 0), ([(1, 2.0)], 1), ([(1, 3.0), (1, 2.5), (2, 2.0)], 2)],
)
def test_curve_of_few_points(points: list[tuple[int, float]], count: int) -> None:
    image = loss_curve(points)
    assert image.startswith("<svg") and "nan" not in image
    assert f"loss of {count} steps" in image if count else "no finite loss" in image
