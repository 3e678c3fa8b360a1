"""What of the training examples runs without a GPU: data, tokenizer, configuration, adapters and exports."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.hf_config import language_config
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.workflow.workload import random_prompts
from tests.helpers.adapters import hf_logits
from tests.helpers.paths import ROOT

EXAMPLES = str(ROOT / "examples")


@pytest.fixture(scope="module")
def examples(megatron_bridge: Any) -> Iterator[Any]:
    """The examples' folder on the import path, as for a script in it."""
    sys.path.insert(0, EXAMPLES)
    import common

    yield common
    sys.path.remove(EXAMPLES)
    for name in ("common", "pretrain", "sft", "lora", "sft_images"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def made(examples: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data` and `model`, as sft.py and lora.py make them."""
    folder = tmp_path_factory.mktemp("made")
    examples.once(folder / "data", examples.write_dataset)
    examples.once(
        folder / "model", lambda target: examples.write_model(target, "exaone4_tiny_sft_config")
    )
    return folder


def test_data_is_text(made: Path) -> None:
    parts = {
        name: [
            json.loads(line) for line in (made / "data" / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in ("training", "validation")
    }
    assert len(parts["training"]) > 2000 and 100 < len(parts["validation"]) < 400
    questions = [{example["input"] for example in part} for part in parts.values()]
    assert not questions[0] & questions[1]
    (known,) = [
        e
        for e in parts["training"] + parts["validation"]
        if "function dedent of Python's module textwrap" in e["input"]
    ]
    assert known["output"].startswith("Remove any common leading whitespace")


@pytest.mark.parametrize(
    "name", ["exaone4_tiny_sft_config", "ernie45_tiny_sft_config", "exaone45_vl_tiny_sft_config"]
)
def test_tokenizer_is_trained_on_it(examples: Any, made: Path, tmp_path: Path, name: str) -> None:
    """Every text comes back; words are longer than bytes; special tokens have the family's ids; no id is too high."""
    from transformers import AutoTokenizer

    folder = made / "model"
    if not name.startswith("exaone4_"):
        folder = tmp_path / "model"
        examples.write_model(folder, name)
    whole = json.loads((folder / "config.json").read_text())
    config = language_config(whole)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "What does the function dedent of Python's module textwrap do? \u00e9\u4e2d \t\n x"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < 0.6 * len(text.encode())
    family = examples.family_of(whole["architectures"], where=name)
    assert all(
        json.loads((folder / file).read_text()) == content
        for file, content in family.tiny_files.processor_files.items()
    )
    assert {
        word: tokenizer.convert_tokens_to_ids(word) for word in family.tiny_files.special_tokens
    } == family.tiny_files.special_tokens
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        config["bos_token_id"],
        config["eos_token_id"],
    )
    assert 1000 < len(tokenizer) <= config["vocab_size"]
    assert max(tokenizer.get_vocab().values()) < config["vocab_size"]


def _first_sample(config: Any) -> tuple[dict[str, Any], Any]:
    from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetBuilder
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(config.tokenizer)
    datasets = GPTSFTDatasetBuilder(config.dataset, tokenizer).build()
    return datasets[0][0], tokenizer


def test_host_reads_the_data(examples: Any, made: Path) -> None:
    """The host's dataset: a question and its answer, of which the answer alone is learned."""
    parser = examples.arguments("", "exaone4_tiny_sft_config")
    options = parser.parse_args(["--save", str(made), "--hf-path", str(made / "model")])
    config = examples.configured(options, dataset_root=made / "data", packed=False)
    sample, tokenizer = _first_sample(config)
    text = tokenizer.detokenize(sample["input_ids"])
    assert text.startswith("What does the ")
    assert (
        tokenizer.detokenize(sample["input_ids"][: sample["answer_start_idx"]])
        .rstrip()
        .endswith("do?")
    )
    assert sample["input_ids"][-1] == tokenizer.eod == 361 or len(sample["input_ids"]) == 256


@pytest.mark.parametrize("script", ["pretrain", "sft", "lora", "sft_images"])
def test_configured(
    examples: Any,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
) -> None:
    """Arguments reach the configuration, which the host finds valid for the ranks that torchrun has started."""
    import importlib

    from megatron.bridge.training.config import runtime_config_update

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    made = (
        tmp_path if script == "sft_images" else made
    )  # its data and its model are others: it makes them
    found: list[Any] = []
    sizes = {
        "tp": 2,
        "pp": 2,
        "iters": 20,
        "rate": 1e-3,
        "micro-batch-size": 1,
        "global-batch-size": 8,
        "save-every": 5,
    }
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    importlib.import_module(script).main(
        [*arguments, "--save", str(made), "--dry-run"], adjust=found.append
    )
    assert (
        "8 layers, hidden 256, vocabulary 2048; TP2 PP2 EP1 CP1, sequence 256, batch 1 / 8, 20 steps"
        in (capsys.readouterr().out)
    )
    (config,) = found
    for name, value in config.env_vars.items():
        monkeypatch.setenv(name, str(value))
    runtime_config_update(config)
    assert config.data_parallel_size == 1 and config.model.sequence_parallel
    assert (config.optimizer.lr, config.optimizer.min_lr) == (1e-3, 1e-4)
    assert (config.checkpoint.save_interval, config.checkpoint.save) == (
        5,
        str(made / "checkpoints"),
    )
    assert config.scheduler.lr_warmup_iters == 2 and config.scheduler.lr_decay_iters == 20
    if script == "sft_images":
        assert (
            config.dataset.hf_processor_path
            == config.checkpoint.pretrained_checkpoint
            == str(made / "model")
        )
        assert config.dataset.source.adapter_kwargs == {"root": str(made / "data")}
        assert config.dataset.pad_to_max_length  # stages of a pipeline exchange what has one size
    elif script != "pretrain":
        assert config.checkpoint.pretrained_checkpoint == str(made / "model")
        assert config.dataset.dataset_root == str(made / "data")


def _adapted(model_folder: Path, output: Path, tokens: torch.Tensor) -> torch.Tensor | None:
    """On a rank: what lora.py does in the end, on adapters that are away from zero; the logits with them."""
    import lora
    from megatron.bridge import AutoBridge

    from exaone_bridge.recipes import recipe
    from exaone_bridge.runtime.model import build, forward_logits

    bridge = AutoBridge.from_hf_pretrained(model_folder)
    peft = recipe("exaone4_tiny_peft_config")("lora", hf_path=model_folder).peft
    model = peft(build(bridge, Layout(), dtype=torch.float32), training=True)
    trained = [name for name, parameter in model[0].named_parameters() if parameter.requires_grad]
    assert len(trained) == 8 * 4 * 2 and all(".adapter." in name for name in trained)
    with torch.no_grad():
        for name, parameter in model[0].named_parameters():
            if ".adapter.linear_out" in name:
                parameter.normal_(std=0.02)
    lora.export(bridge, model, peft, model_folder, output)
    return forward_logits(model, tokens)[0]


def test_lora_exports(examples: Any, made: Path, tmp_path: Path) -> None:
    """The adapter in PEFT's format has the logits of the model in training; merged, they are rounded to bf16."""
    tokens = random_prompts(2048, 2, 100)
    (adapted,) = ForkLauncher(1).all(_adapted, made / "model", tmp_path, tokens)
    (base,) = ForkLauncher(1).all(hf_logits, made / "model", tokens, None)
    (in_peft,) = ForkLauncher(1).all(hf_logits, made / "model", tokens, tmp_path / "adapter")
    (merged,) = ForkLauncher(1).all(hf_logits, tmp_path / "merged", tokens, None)
    assert (adapted - base).abs().max() > 0.1
    assert (adapted - in_peft).abs().max() <= 1e-3
    assert (adapted - merged).abs().mean() <= 0.1 * (adapted - base).abs().mean()


def test_once_is_whole_or_not_there(
    examples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(folder: Path) -> None:
        folder.mkdir()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        examples.once(tmp_path / "data", fails)
    assert not (tmp_path / "data").exists()
    examples.once(tmp_path / "data", Path.mkdir)
    monkeypatch.setenv("RANK", "1")
    assert examples.once(tmp_path / "data", fails) == tmp_path / "data"
