"""The examples with recipes, as far as they run without a GPU: data, model, config and exports."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.models import family_of
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.hf_config import language_config
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.workflow.workload import random_prompts
from tests.helpers.adapters import hf_logits
from tests.helpers.paths import ROOT

EXAMPLES = str(ROOT / "examples")


@pytest.fixture(scope="module")
def data(megatron_bridge: Any) -> Iterator[Any]:
    """The module `data` of the examples, whose directory is on the import path as for a script."""
    sys.path.insert(0, EXAMPLES)
    yield importlib.import_module("data")
    sys.path.remove(EXAMPLES)
    for name in ("common", "data", "pretrain", "sft", "lora", "sft_images"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def save(data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `data` and `model`, as sft.py and lora.py make them."""
    save = tmp_path_factory.mktemp("save")
    data.make_once(save / "data", data.write_text)
    name = "exaone4_tiny_sft_config"
    data.make_once(save / "model", lambda path: data.write_random_model(path, name))
    return save


def test_text_dataset_has_questions_and_answers(save: Path) -> None:
    splits = {
        name: [json.loads(line) for line in (save / "data" / f"{name}.jsonl").open()]
        for name in ("training", "validation")
    }
    assert len(splits["training"]) > 2000 and 100 < len(splits["validation"]) < 400
    questions = [{example["input"] for example in split} for split in splits.values()]
    assert not questions[0] & questions[1]
    (dedent,) = [
        example
        for example in splits["training"] + splits["validation"]
        if "function dedent of Python's module textwrap" in example["input"]
    ]
    assert dedent["output"].startswith("Remove any common leading whitespace")


@pytest.mark.parametrize(
    "name", ["exaone4_tiny_sft_config", "ernie45_tiny_sft_config", "exaone45_vl_tiny_sft_config"]
)
def test_random_model_has_a_tokenizer_for_its_config(data: Any, tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    hf_path = tmp_path / "model"
    data.write_random_model(hf_path, name)
    hf_config = json.loads((hf_path / "config.json").read_text())
    config = language_config(hf_config)
    tokenizer = AutoTokenizer.from_pretrained(hf_path)
    text = "What does the function dedent of Python's module textwrap do? \u00e9\u4e2d \t\n x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    files = family_of(hf_config["architectures"], where=name).tiny_files
    for file, content in files.processor_files(hf_config).items():
        assert json.loads((hf_path / file).read_text()) == content
    for token, token_id in files.special_tokens.items():
        assert tokenizer.convert_tokens_to_ids(token) == token_id
    assert tokenizer.bos_token_id == config["bos_token_id"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert 256 < len(tokenizer) <= config["vocab_size"]
    assert max(tokenizer.get_vocab().values()) < config["vocab_size"]


def test_text_dataset_is_read_by_megatron_bridge(data: Any, save: Path) -> None:
    """A sample is a question and its answer, and only the answer is in the loss."""
    from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetBuilder
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    _, config = importlib.import_module("sft").configure(["--save", str(save)])
    tokenizer = build_tokenizer(config.tokenizer)
    sample = GPTSFTDatasetBuilder(config.dataset, tokenizer).build()[0][0]
    input_ids, answer_start = sample["input_ids"], sample["answer_start_idx"]
    assert tokenizer.detokenize(input_ids).startswith("What does the ")
    assert tokenizer.detokenize(input_ids[:answer_start]).rstrip().endswith("do?")
    assert input_ids[-1] == tokenizer.eod == 361 or len(input_ids) == 256


@pytest.mark.parametrize("script", ["pretrain", "sft", "lora", "sft_images"])
def test_arguments_reach_a_valid_config(
    data: Any,
    save: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
) -> None:
    from megatron.bridge.training.config import runtime_config_update

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    save = tmp_path if script == "sft_images" else save  # it makes another dataset and model
    arguments = "--tp=2 --pp=2 --iters=20 --lr=1e-3 --micro-batch-size=1 --global-batch-size=8"
    arguments += f" --save-interval=5 --save={save} --dry-run"
    module = importlib.import_module(script)
    options, config = module.configure(arguments.split())
    module.main(options, config)
    assert (
        "8 layers, hidden 256, vocabulary 2048; TP2 PP2 EP1 CP1, sequence 256, batch 1 / 8, "
        "20 steps" in capsys.readouterr().out
    )
    for name, value in config.env_vars.items():
        monkeypatch.setenv(name, str(value))
    runtime_config_update(config)
    assert config.data_parallel_size == 1 and config.model.sequence_parallel
    assert (config.optimizer.lr, config.optimizer.min_lr) == (1e-3, 1e-4)
    assert config.checkpoint.save_interval == 5
    assert config.checkpoint.save == str(save / "checkpoints")
    assert config.scheduler.lr_warmup_iters == 2 and config.scheduler.lr_decay_iters == 20
    if script != "pretrain":
        assert config.checkpoint.pretrained_checkpoint == str(save / "model")
    if script in ("sft", "lora"):
        assert config.dataset.dataset_root == str(save / "data")
    if script == "sft_images":
        assert config.dataset.hf_processor_path == str(save / "model")
        assert config.dataset.source.adapter_kwargs == {"root": str(save / "data")}
        assert config.dataset.pad_to_max_length  # pipeline stages exchange tensors of one shape


def _train_and_export_adapter(
    hf_path: Path, output: Path, tokens: torch.Tensor
) -> torch.Tensor | None:
    """On a rank: the export of lora.py, with adapters that are not zero; returns their logits."""
    import lora
    from megatron.bridge import AutoBridge

    from exaone_bridge.recipes import exaone4_tiny_peft_config
    from exaone_bridge.runtime.model import build, forward_logits

    bridge = AutoBridge.from_hf_pretrained(hf_path)
    peft = exaone4_tiny_peft_config("lora", hf_path=hf_path).peft
    model = peft(build(bridge, Layout(), dtype=torch.float32), training=True)
    parameters = dict(model[0].named_parameters())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    assert len(trained) == 8 * 4 * 2 and all(".adapter." in name for name in trained)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".adapter.linear_out" in name:
                parameter.normal_(std=0.02)
    lora.export(bridge, model, peft, hf_path, output)
    return forward_logits(model, tokens)


def test_lora_exports_have_the_logits_of_the_trained_model(
    data: Any, save: Path, tmp_path: Path
) -> None:
    """In PEFT the adapter is exact; merged into the weights it is rounded to bf16."""
    tokens, launcher = random_prompts(2048, 2, 100), ForkLauncher(1)
    adapted = launcher.first(_train_and_export_adapter, save / "model", tmp_path, tokens)
    base = launcher.first(hf_logits, save / "model", tokens, None)
    in_peft = launcher.first(hf_logits, save / "model", tokens, tmp_path / "adapter")
    merged = launcher.first(hf_logits, tmp_path / "merged", tokens, None)
    assert (adapted - base).abs().max() > 0.1
    assert (adapted - in_peft).abs().max() <= 1e-3
    assert (adapted - merged).abs().mean() <= 0.1 * (adapted - base).abs().mean()


def test_make_once_leaves_a_complete_directory_or_none(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        path.mkdir()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        data.make_once(tmp_path / "data", fail)
    assert not (tmp_path / "data").exists()
    data.make_once(tmp_path / "data", Path.mkdir)
    monkeypatch.setenv("RANK", "1")
    assert data.make_once(tmp_path / "data", fail) == tmp_path / "data"


@pytest.mark.parametrize("name", ["pretrain", "sft", "lora", "sft_images"])
def test_what_is_missing_is_said_before_anything_is_written(
    name: str,
    data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common, script = importlib.import_module("common"), importlib.import_module(name)
    monkeypatch.setattr(common.training_loop, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="pip install nvidia-resiliency-ext"):
        script.main(*script.configure(["--save", str(tmp_path / "save")]))
    with pytest.raises(SystemExit):
        script.configure(["--save", str(tmp_path / "save"), "--recipe", "exaone4_1p2b_sft"])
    printed = capsys.readouterr().err
    assert "recipe is 'exaone4_1p2b_sft', and must be one of 'exaone4_1p2b_sft_config'" in printed
    assert "ernie45_tiny_peft_config" not in printed and not any(tmp_path.iterdir())
