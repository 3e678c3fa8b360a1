"""`exaone-bridge train` from its data to its end, in Megatron-Bridge's training loop on a CPU."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exaone_bridge.cli import main
from tests.helpers.cli import Cli
from tests.helpers.cpu_loop import SETTINGS, cpu_training_loop
from tests.helpers.scripts import free_port

ANSWERS = {"Is the sea wet?": "Yes.", "Is the sun cold?": "No.", "Who are you?": "A model."}
COMMON = ("seq_length=128", "global_batch_size=2", "micro_batch_size=1", "optimizer.lr=1e-2")


def _rank(arguments: list[str], port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    tempfile.tempdir = None  # Megatron-Bridge opens a socket there: at most 107 characters
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=port
    )
    monkeypatch.setattr("sys.argv", ["exaone-bridge", "train", *arguments])
    with cpu_training_loop():
        main()


@pytest.fixture
def train(megatron_bridge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run `train` in a forked process, and return the losses in `tmp_path / "run"` by step."""

    def run(*arguments: object) -> dict[int, float]:
        settings = [*map(str, arguments), *COMMON, *SETTINGS, "--save", str(tmp_path / "run")]
        process = multiprocessing.get_context("fork").Process(
            target=_rank, args=(settings, str(free_port()), monkeypatch)
        )
        process.start()
        process.join(120)
        assert process.exitcode == 0
        lines = (tmp_path / "run" / "losses.jsonl").read_text().splitlines()
        assert "<svg" in (tmp_path / "run" / "loss.svg").read_text()
        return {line["step"]: line["loss"] for line in map(json.loads, lines)}

    return run


def test_adapter_on_conversations_resumes_and_is_merged(
    train: Any, tiny: Any, tmp_path: Path, cli: Cli
) -> None:
    """The optimizer's state is left out: without Transformer Engine, Megatron-Core loads none."""
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in ANSWERS.items()
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows * 4)
    (tmp_path / "training.jsonl").write_text(text)
    recipe = ("exaone4_tiny_chat_peft_config", f"hf_path={tiny('exaone4')}")
    recipe += (f"dataset_root={tmp_path}", "train.train_iters=6")
    assert sorted(train(*recipe, "train.exit_interval=3")) == [1, 2, 3]
    losses = train(*recipe, "checkpoint.load_optim=false")
    assert sorted(losses) == [1, 2, 3, 4, 5, 6] and losses[6] < 0.7 * losses[1]
    options = ("--adapter", tmp_path / "run" / "checkpoints")
    run = cli("export", tiny("exaone4"), tmp_path / "merged", *options)
    assert run.code == 0, run.err
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tiny("exaone4"), tmp_path / "merged")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if re.search(r"(self_attn|mlp)\..*_proj", name)}


def test_blend_is_trained_on_and_the_checkpoint_has_a_perplexity(
    train: Any, tiny: Any, tmp_path: Path, cli: Cli
) -> None:
    """A checkpoint with its optimizer's state has the loss of its export, and of Transformers."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for prefix, token in (("a", 97), ("b", 98)):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{prefix}.bin"))
        for _ in range(4):
            builder.add_document(torch.full((300,), token), [300])
        builder.finalize(str(tmp_path / f"{prefix}.idx"))
    data = f"dataset.data_path=[0.3,{tmp_path}/a,0.7,{tmp_path}/b]"
    recipe = ("exaone4_tiny_pretrain_config", f"hf_path={tiny('exaone4')}", data)
    losses = train(*recipe, "dataset.split='100,0,0'", "train.train_iters=5")
    assert sorted(losses) == [1, 2, 3, 4, 5] and losses[5] < losses[1]
    checkpoints, exported = tmp_path / "run" / "checkpoints", tmp_path / "exported"
    assert cli("export", checkpoints, exported).code == 0
    text = tmp_path / "text.txt"
    text.write_text("abba " * 60)
    found = []
    for source in (checkpoints, exported):
        run = cli("perplexity", source, "--text", text, "--length", 50, "--json", "-")
        assert run.code == 0, run.err
        found.append(json.loads(run.out))
    assert found[0].keys() == {"Megatron-Core", "difference"}
    assert found[0]["Megatron-Core"]["loss"] == found[1]["Megatron-Core"]["loss"]
    assert found[1]["difference"] < 1e-2  # bf16
