"""The part of `benchmarks/train_loop.py` that runs on ranks, and a rank that is emulated."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import queue
import shlex
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from exaone_bridge.checkpoint.reshard.plan import Rank, reshard_plan
from exaone_bridge.cli.arguments import make_parser
from exaone_bridge.cli.train import train
from exaone_bridge.models import family_of
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.schema.hf_config import with_num_layers
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.cpu_loop import SETTINGS, cpu_training_loop
from tests.helpers.paths import ROOT
from tests.helpers.scripts import free_port
from tests.unit.test_docs import code_blocks

TP8 = Layout(tp=8, sp=True)
P32 = with_num_layers(CONFIGS["exaone4_32b"], 4)
KINDS = ("off: cuda_graphs=off", "layers: cuda_graphs=layers")
MINIATURE = P32 | {
    "hidden_size": 320, "head_dim": 8, "intermediate_size": 856, "vocab_size": 1024,
    "sliding_window": 16,
}  # fmt: skip


@pytest.fixture
def loop_rank(megatron_bridge: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("loop_rank")


def test_every_pretraining_row_has_a_config_that_fits_its_gpu(
    loop_rank: ModuleType, tmp_path: Path
) -> None:
    loop_rows = importlib.import_module("loop_rows")
    texts = [text for rows in loop_rows.TABLES.values() for text in rows if "pretrain" in text]
    texts = [text for text in texts if not text.startswith("1.2B, 4096:")]  # no room for graphs
    for row in [loop_rows.parse_row(text, kind) for text in texts for kind in KINDS]:
        config = loop_rank.build_config(row, tmp_path)
        assert config.checkpoint.pretrained_checkpoint is None
        assert config.checkpoint.save is None
        assert config.model.num_layers == (
            row.layers or config.model.hf_config["num_hidden_layers"]
        )
        assert (config.model.cuda_graph_impl == "none") == row.name.endswith("off")
        assert f"TP{row.arguments.get('tp', 1)} " in loop_rank.describe(config)
        kinds = {"fp8": "FP8 tensorwise", "fp8-blockwise": "FP8 blockwise", None: "bf16"}
        assert loop_rank.describe(config).endswith(f"; {kinds[row.arguments.get('precision')]}")
        assert not getattr(config.mixed_precision, "first_last_layers_bf16", False)


def test_every_row_of_the_tests_on_gpus_has_the_graphs_that_its_name_says(
    loop_rank: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.gpu import test_graphs

    monkeypatch.setattr(test_graphs, "GPUS", 2)
    rows = map(importlib.import_module("loop_rows").parse_row, test_graphs._rows(tmp_path))
    graphs = {"off": "none", "layers": "transformer_engine", "full-iteration": "full_iteration"}
    kinds = {"resume at pp=2, full-iteration": "layers", "save, async": "off", "save, sync": "off"}
    for row in rows:
        kind = kinds.get(row.name, row.name.rpartition(", ")[2])
        config = loop_rank.build_config(row, tmp_path)
        assert config.model.cuda_graph_impl == graphs[kind], row.name
        if row.name in ("save, layers", "save, full-iteration"):  # resumed at other layouts too
            assert config.checkpoint.dist_ckpt_optim_fully_reshardable


def test_commands_for_the_next_session_on_gpus_are_accepted_and_end_in_time(
    loop_rank: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command takes less than ten minutes, and a list less than thirty."""
    monkeypatch.setenv("WORLD_SIZE", "1")  # as torchrun sets it
    monkeypatch.setattr(loop_rank, "_fine_tuning_data", lambda *_: {})  # gigabytes
    train_loop = importlib.import_module("train_loop")
    page = (ROOT / "docs/dev/performance-log.md").read_text().split("\n## ")[1]
    blocks = code_blocks(page.replace("\\\n", " "), "bash")
    assert len(blocks) == 2 and page.startswith("Next on GPUs")
    for block in blocks:
        total = 0.0
        for command in map(shlex.split, block.splitlines()):
            limit = float(
                command[command.index("timeout" if "timeout" in command else "--limit-s") + 1]
            )
            assert limit < 600
            total += limit
            if "benchmarks/train_loop.py" in command:
                options = train_loop.arguments().parse_args(command[2:])
                rows = train_loop.rows_of(options.table, options.row, options.variant)
                for row in rows:
                    loop_rank.build_config(row, tmp_path)
            elif "torchrun" in command:
                words = command[command.index("train") :]
                train(make_parser().parse_args([*words, "--dry-run"]))
            else:
                assert all((ROOT / word).is_file() for word in command if word.endswith(".py"))
        assert total < 1800


def test_dry_run_names_the_rows_whose_config_is_rejected(
    loop_rank: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = "exaone4_tiny_pretrain_config"
    rows = ["--row", f"a: {recipe} tp=3 gpus=3", "--row", f"b: {recipe} seq_length=64"]
    monkeypatch.setattr(sys, "argv", ["train_loop.py", *rows, "--dry-run"])
    importlib.import_module("train_loop").main()
    rejected, accepted = sorted(capsys.readouterr().out.splitlines())
    assert rejected.startswith("a: rejected: parallel layout: tp is 3")
    assert accepted.startswith("b: 8 layers") and "; 64 tokens, batch 2 / 4;" in accepted


def test_fine_tuning_rows_make_their_model_and_data(loop_rank: ModuleType, tmp_path: Path) -> None:
    row = importlib.import_module("loop_rows").parse_row("SFT: exaone4_tiny_sft_config packed=true")
    config = loop_rank.build_config(row, tmp_path)
    assert (Path(config.checkpoint.pretrained_checkpoint) / "model.safetensors").is_file()
    assert (Path(config.dataset.dataset_root) / "training.jsonl").is_file()


def test_time_of_kernels_counts_overlaps_once(loop_rank: ModuleType) -> None:
    events = [("gemm", 0, 1000), ("gemm", 500, 1500), ("ncclAllReduce", 1000, 3000),
              ("norm", 5000, 6000)]  # fmt: skip
    step_timer = importlib.import_module("step_timer")
    times = step_timer.kernel_times(events)
    assert (times["kernel_ms"], times["exposed_nccl_ms"], times["kernels"]) == (4.0, 1.5, 4)
    assert times["longest_ms"] == {"gemm": 2.0, "ncclAllReduce": 2.0, "norm": 1.0}
    assert step_timer.busy_ms([]) == 0


def test_steps_are_measured_after_the_warm_up(
    loop_rank: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of step n is at n squared milliseconds, so step n takes 2 n - 1."""
    clock = iter(range(1, 100))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0

        def record(self) -> None:
            self.at = next(clock) ** 2

        def elapsed_time(self, end: Any) -> float:
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timer = loop_rank.StepTimer(warm_up=3, steps=2, profile=False)
    assert timer.train_iters == 5
    assert loop_rank.StepTimer(warm_up=3, steps=2, profile=True).train_iters == 7
    for step in range(5):
        timer.on_train_step_end(
            SimpleNamespace(loss_dict={"lm loss": torch.tensor([6.0, step + 1])})
        )
    assert timer.milliseconds() == [7.0, 9.0]
    assert timer.losses() == [6.0, 3.0, 2.0, 1.5, 1.2]
    assert timer.kernels() == {}


def _run_rows(folder: Path, rows: list[Any], port: str) -> None:
    import loop_rank

    torch.set_num_threads(1)
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=port
    )
    settings = {"warm_up": 1, "steps": 2, "profile": False, "deadline": time.time() + 120}

    def report(result: dict[str, Any]) -> None:
        with (folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")

    with cpu_training_loop(), mock.patch.object(loop_rank, "matmul_rate", return_value=1e9):
        loop_rank.run_rows(folder, dict(enumerate(rows)), settings, report)


def test_rows_run_one_after_the_other_in_the_same_process(
    loop_rank: ModuleType, tmp_path: Path
) -> None:
    """A row does not see those before it: its losses are the same the second time."""
    recipe = f"exaone4_tiny_pretrain_config seq_length=64 {' '.join(SETTINGS)}"
    parse_row = importlib.import_module("loop_rows").parse_row
    changes = {
        "one": "",
        "a rank of two": "gpus=2 tp=2 emulate=true",
        "ERNIE": "",
        "rejected": "tp=3",
        "again": "",
        "fails": "optimizer.optimizer=nothing",
    }
    texts = [f"{name}: {recipe} {settings}" for name, settings in changes.items()]
    texts[2] = texts[2].replace("exaone4", "ernie45")  # whose layers have copies of the config
    process = multiprocessing.get_context("fork").Process(
        target=_run_rows, args=(tmp_path, list(map(parse_row, texts)), free_port())
    )
    process.start()
    process.join()
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    one, rank, ernie, rejected, again, failed = map(json.loads, lines)
    assert rejected["failed"].startswith("UnsupportedLayout: parallel layout: tp is 3")
    assert process.exitcode == 3 and "nothing" in failed["failed"]
    assert len(set(one["losses"])) == 3 and one["losses"] == again["losses"]
    assert one["losses"] != rank["losses"]
    assert (rank["gpus"], rank["emulate"]) == (2, True) and "TP2" in rank["config"]
    for result in (one, rank, ernie, again):
        assert 0 < result["min_ms"] <= result["ms"] <= result["max_ms"] and result["peak_gib"] == 1
        tokens = 64 * 4 / result["ms"] * 1e3 / result["gpus"]
        assert abs(result["tokens_per_s_per_gpu"] - tokens) < 0.01 * tokens + 1
        assert result["of_matmul_rate"] > 0


def _shapes(hf_config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the parameters of TP rank 0, by the reshard plan."""
    family = family_of(hf_config["architectures"], where="test")
    plan = reshard_plan(family.describe(hf_config), TP8)
    return {local.name: local.shard.shape for local in plan.local_params(Rank())}


def test_rank_of_the_32b_at_tp8_has_five_heads_one_kv_head_and_an_eighth_of_the_mlp() -> None:
    shapes = _shapes(P32)
    layer = "decoder.layers.0."
    assert shapes[f"{layer}self_attention.linear_qkv.weight"] == ((5 + 2 * 1) * 128, 5120)
    assert shapes[f"{layer}mlp.linear_fc1.weight"] == (2 * 3424, 5120)
    assert shapes[f"{layer}mlp.linear_fc2.weight"] == (5120, 3424)


def _train_emulated(results: Any) -> None:
    from emulated_ranks import start_emulated_world
    from megatron.bridge import AutoBridge
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from transformers import CONFIG_MAPPING

    import exaone_bridge

    torch.set_num_threads(1)
    hf_config = CONFIG_MAPPING["exaone4"].from_dict(dict(MINIATURE))
    start_emulated_world(8)
    gathered = [None] * 8
    torch.distributed.all_gather_object(gathered, {"any": "object"})
    assert gathered == [{"any": "object"}] * 8
    with exaone_bridge.cpu_runtime():
        provider = AutoBridge.from_hf_config(hf_config).to_megatron_provider(load_weights=False)
        overrides = TP8.provider_overrides() | {"backend": "torch"}
        provider.apply_overrides_and_finalize(torch.float32, overrides)
        ddp = DistributedDataParallelConfig(
            overlap_grad_reduce=True, use_distributed_optimizer=True
        )
        (model,) = provider.provide_distributed_model(ddp_config=ddp, use_cpu_initialization=True)
        shapes = {name: tuple(each.shape) for name, each in model.module.named_parameters()}
        tokens = torch.arange(65)[None] % 1024
        positions = torch.arange(64)[None]
        losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
        losses.mean().backward()
        finalize_model_grads([model])
        grads = [float(each.main_grad.abs().sum()) for each in model.module.parameters()]
    results.put((shapes, tuple(losses.shape), bool(losses.isfinite().all()), min(grads)))


def test_emulated_rank_has_the_parameters_of_a_tp8_rank_and_trains(
    loop_rank: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    process = fork.Process(target=_train_emulated, args=(results,))
    process.start()
    try:
        shapes, losses, finite, smallest = results.get(timeout=120)
    except queue.Empty:
        pytest.fail(f"the emulated rank ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()
    assert {name.removeprefix("module."): shape for name, shape in shapes.items()} == _shapes(
        MINIATURE
    )
    assert losses == (1, 64) and finite and smallest > 0
