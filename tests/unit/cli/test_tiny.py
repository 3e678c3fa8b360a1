"""`exaone-bridge tiny`: weights, tokenizer and config.json of tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.models.exaone4 import EXAONE4
from tests.helpers.cli import Cli, Snapshot, config_of, tensors_of


@pytest.mark.parametrize("name", EXAONE4.tiny)
def test_transformers_loads_a_miniature(name: str, cli: Cli, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = tmp_path / "model"
    run = cli("tiny", name, folder)
    assert (run.code, run.err) == (0, "") and "model: " in run.out and "layers, float32" in run.out

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(model).__name__ == "Exaone4ForCausalLM" and model.dtype == torch.float32
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors_of(folder).items())
    assert state.keys() - tensors_of(folder).keys() == (
        {"lm_head.weight"} if name == "exaone4-1.2b" else set()
    )
    assert model(torch.arange(20)[None]).logits.isfinite().all()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Tensor 텐서 \n\t{é}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert max(tokenizer.get_vocab().values()) < config_of(folder)["vocab_size"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "[BOS]",
        "[|endofturn|]",
        "[PAD]",
    )
    ids = [config_of(folder)[f"{role}_token_id"] for role in ("bos", "eos", "pad")]
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == ids
    generation = GenerationConfig.from_pretrained(folder)
    assert [generation.bos_token_id, generation.eos_token_id, generation.pad_token_id] == ids


def test_the_chat_template_of_a_miniature(tiny: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("exaone4"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

    def rendered(**options: Any) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    body = "[|system|]\nBe brief.[|endofturn|]\n[|user|]\nHello[|endofturn|]\n"
    assert rendered() == body
    thinking, brief = (
        rendered(add_generation_prompt=True, enable_thinking=wish) for wish in (True, False)
    )
    assert thinking.startswith(f"{body}[|assistant|]") and thinking.rstrip().endswith("<think>")
    assert brief.startswith(f"{body}[|assistant|]") and brief.rstrip().endswith("</think>")
    with_tools = rendered(tools=[tool])
    assert with_tools.startswith("[|system|]\n# Available Tools") and '"weather"' in with_tools
    assert with_tools.endswith(body)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=True)[
        "input_ids"
    ]
    assert {357, 358, 359, 361} < set(ids)  # each special token is one token
    assert tokenizer.decode(ids) == thinking


@pytest.mark.parametrize("name", EXAONE4.tiny)
def test_a_miniature_is_away_from_identity(name: str, tiny: Any) -> None:
    for key, tensor in tensors_of(tiny(name)).items():
        if tensor.ndim == 1:
            assert "norm" in key and tensor.std() > 0.15 and abs(tensor.mean() - 1) < 0.2
            assert (tensor - 1).abs().max() > 0.3
        else:
            assert tensor.std() * tensor.shape[1] ** 0.5 == pytest.approx(1, abs=0.1)


def test_the_seed_makes_the_weights(cli: Cli, snapshot: Snapshot, tmp_path: Path) -> None:
    runs = [
        ("a", ["--seed", 5]),
        ("b", ["--seed", 5]),
        ("c", ["--seed", 6]),
        ("d", []),
        ("e", ["--seed", 0]),
    ]
    made = {}
    for folder, options in runs:
        assert cli("tiny", "exaone4-1.2b", tmp_path / folder, *options).code == 0
        made[folder] = snapshot(tmp_path / folder)
    assert made["a"] == made["b"] and made["d"] == made["e"] and made["a"] != made["d"]
    assert {file for file in made["a"] if made["a"][file] != made["c"][file]} == {
        "model.safetensors"
    }
    a, c = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "c")
    assert not any(torch.equal(tensor, c[name]) for name, tensor in a.items())


def test_settings_are_json_or_words(cli: Cli, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    settings = [
        "dtype=bfloat16",
        "tie_word_embeddings=true",
        "rms_norm_eps=1e-6",
        "my_field=a=b",
        "nothing=null",
    ]
    options = [
        part
        for setting in [*settings, f"rope_parameters={json.dumps(rope)}"]
        for part in ("--set", setting)
    ]
    run = cli("tiny", "exaone4", tmp_path / "model", *options)
    assert run.code == 0 and "8 layers, bfloat16" in run.out
    wanted = {
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "my_field": "a=b",
        "nothing": None,
    }
    wanted |= {"rope_parameters": rope}
    config, stock = config_of(tmp_path / "model"), EXAONE4.tiny["exaone4"]
    assert {field: config[field] for field in wanted} == wanted
    assert {
        key: value for key, value in config.items() if key not in {*wanted, "transformers_version"}
    } == {key: value for key, value in stock.items() if key not in wanted}
    tensors = tensors_of(tmp_path / "model")
    assert {tensor.dtype for tensor in tensors.values()} == {
        torch.bfloat16
    } and "lm_head.weight" not in tensors


@pytest.mark.parametrize(("layers", "letters"), [(3, "LLL"), (4, "LLLG"), (10, "LLLGLLLGLL")])
def test_more_or_fewer_layers_keep_the_pattern(
    layers: int, letters: str, cli: Cli, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    run = cli("tiny", "exaone4", folder, "--set", f"num_hidden_layers={layers}")
    assert run.code == 0 and f"{layers} layers" in run.out
    kinds = {"L": "sliding_attention", "G": "full_attention"}
    assert config_of(folder)["layer_types"] == [kinds[letter] for letter in letters]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert [layer.self_attn.is_sliding for layer in model.model.layers] == [
        letter == "L" for letter in letters
    ]
    assert letters in cli("inspect", folder).out.split()


def test_layer_types_that_were_given_stay(cli: Cli, tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    settings = ["--set", "num_hidden_layers=3", "--set", f"layer_types={json.dumps(kinds)}"]
    assert cli("tiny", "exaone4", tmp_path / "model", *settings).code == 0
    assert config_of(tmp_path / "model")["layer_types"] == kinds


def test_a_vocabulary_too_small_for_bytes_has_no_tokenizer(cli: Cli, tmp_path: Path) -> None:
    assert cli("tiny", "exaone4", tmp_path / "model", "--set", "vocab_size=200").code == 0
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_name_with_brackets_is_printed(cli: Cli, tmp_path: Path) -> None:
    run = cli("tiny", "exaone4", "a[bold]b")
    assert run.code == 0 and (tmp_path / "a[bold]b").is_dir() and "a[bold]b: 8 layers" in run.out
