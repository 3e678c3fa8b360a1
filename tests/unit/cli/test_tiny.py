"""`exaone-bridge tiny`: weights, tokenizer and config.json of tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.cli.arguments import TINY_CONFIGS
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.models.exaone_moe import EXAONE_MOE
from tests.helpers.cli import (
    Cli,
    Rejected,
    Snapshot,
    names_in,
    read_config,
    read_tensors,
    same_bits,
)


@pytest.mark.parametrize("name", EXAONE4.tiny)
def test_tiny_model_loads_in_transformers(name: str, cli: Cli, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = tmp_path / "model"
    run = cli("tiny", name, folder)
    assert (run.code, run.err) == (0, "") and "model: " in run.out and "layers, float32" in run.out

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(model).__name__ == "Exaone4ForCausalLM" and model.dtype == torch.float32
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in read_tensors(folder).items())
    assert state.keys() - read_tensors(folder).keys() == (
        {"lm_head.weight"} if name == "exaone4-1.2b" else set()
    )
    assert model(torch.arange(20)[None]).logits.isfinite().all()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Tensor 텐서 \n\t{é}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert max(tokenizer.get_vocab().values()) < read_config(folder)["vocab_size"]
    special = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token
    assert special == ("[BOS]", "[|endofturn|]", "[PAD]")
    config = read_config(folder)
    ids = [config[f"{role}_token_id"] for role in ("bos", "eos", "pad")]
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == ids
    generation = GenerationConfig.from_pretrained(folder)
    assert [generation.bos_token_id, generation.eos_token_id, generation.pad_token_id] == ids


def test_chat_template_renders_as_published(tiny: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("exaone4"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

    def rendered(**options: Any) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    body = "[|system|]\nBe brief.[|endofturn|]\n[|user|]\nHello[|endofturn|]\n"
    assert rendered() == body
    thinking, brief = (
        rendered(add_generation_prompt=True, enable_thinking=enabled) for enabled in (True, False)
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
def test_tiny_weights_are_away_from_identity(name: str, tiny: Any) -> None:
    for key, tensor in read_tensors(tiny(name)).items():
        if tensor.ndim == 1:
            assert "norm" in key and tensor.std() > 0.15 and abs(tensor.mean() - 1) < 0.2
            assert (tensor - 1).abs().max() > 0.3
        else:
            assert tensor.std() * tensor.shape[1] ** 0.5 == pytest.approx(1, abs=0.1)


def test_seed_decides_the_weights_and_nothing_else(
    cli: Cli, snapshot: Snapshot, tmp_path: Path
) -> None:
    snapshots = {}
    for folder, seed in {"a": 5, "b": 5, "c": 6, "d": None, "e": 0}.items():
        options = [] if seed is None else ["--seed", seed]
        assert cli("tiny", "exaone4-1.2b", tmp_path / folder, *options).code == 0
        snapshots[folder] = snapshot(tmp_path / folder)
    assert (
        snapshots["a"] == snapshots["b"]
        and snapshots["d"] == snapshots["e"]
        and snapshots["a"] != snapshots["d"]
    )
    changed = {file for file, data in snapshots["a"].items() if data != snapshots["c"][file]}
    assert changed == {"model.safetensors"}
    a, c = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "c")
    assert not any(torch.equal(tensor, c[name]) for name, tensor in a.items())


def test_set_option_takes_json_or_plain_text(cli: Cli, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    settings = ["dtype=bfloat16", "tie_word_embeddings=true", "rms_norm_eps=1e-6"]
    settings += ["hidden_act=silu", "pad_token_id=null", f"rope_parameters={json.dumps(rope)}"]
    options = [argument for setting in settings for argument in ("--set", setting)]
    run = cli("tiny", "exaone4", tmp_path / "model", *options)
    assert run.code == 0 and "8 layers, bfloat16" in run.out
    wanted = {"dtype": "bfloat16", "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
    wanted |= {"hidden_act": "silu", "pad_token_id": None, "rope_parameters": rope}
    config, stock = read_config(tmp_path / "model"), EXAONE4.tiny["exaone4"]
    assert {field: config[field] for field in wanted} == wanted
    assert {
        key: value for key, value in config.items() if key not in {*wanted, "transformers_version"}
    } == {key: value for key, value in stock.items() if key not in wanted}
    tensors = read_tensors(tmp_path / "model")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors


@pytest.mark.parametrize(("layers", "letters"), [(3, "LLL"), (4, "LLLG"), (10, "LLLGLLLGLL")])
def test_set_num_hidden_layers_repeats_or_shortens_the_layer_pattern(
    layers: int, letters: str, cli: Cli, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    run = cli("tiny", "exaone4", folder, "--set", f"num_hidden_layers={layers}")
    assert run.code == 0 and f"{layers} layers" in run.out
    kinds = {"L": "sliding_attention", "G": "full_attention"}
    assert read_config(folder)["layer_types"] == [kinds[letter] for letter in letters]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert [layer.self_attn.is_sliding for layer in model.model.layers] == [
        letter == "L" for letter in letters
    ]
    assert letters in cli("inspect", folder).out.split()


def test_set_layer_types_are_kept(cli: Cli, tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    settings = ["--set", "num_hidden_layers=3", "--set", f"layer_types={json.dumps(kinds)}"]
    assert cli("tiny", "exaone4", tmp_path / "model", *settings).code == 0
    assert read_config(tmp_path / "model")["layer_types"] == kinds


def test_vocabulary_smaller_than_the_bytes_has_no_tokenizer(cli: Cli, tmp_path: Path) -> None:
    assert cli("tiny", "exaone4", tmp_path / "model", "--set", "vocab_size=200").code == 0
    assert names_in(tmp_path / "model") == ["config.json", "model.safetensors"]


def test_folder_name_with_brackets_is_printed(cli: Cli, tmp_path: Path) -> None:
    run = cli("tiny", "exaone4", "a[bold]b")
    assert run.code == 0 and (tmp_path / "a[bold]b").is_dir() and "a[bold]b: 8 layers" in run.out


def test_every_list_of_layers_follows_the_number_of_layers(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert cli("tiny", "exaone-moe-2", folder, "--set", "num_hidden_layers=8").code == 0
    config = read_config(folder)
    lists = ("layer_types", "sliding_windows", "mlp_layer_types", "swiglu_limits")
    for name in lists:
        assert config[name] == (EXAONE_MOE.tiny["exaone-moe-2"][name] * 2)[:8]
    assert config["mtp_sliding_windows"] == [0]


SETTINGS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no equals": (["num_hidden_layers"], ("--set is 'num_hidden_layers'", "field=value")),
    "unknown field": (
        ["num_hidden_layer=3"],
        ("--set is 'num_hidden_layer=3'", "the nearest is num_hidden_layers"),
    ),
    "no field": (["=3"], ("--set is '=3'", "field=value")),
    "rope": (['rope_parameters={"rope_type": "yarn"}'], ("rope_type is 'yarn'", "'llama3'")),
    "rope of text": (
        ["rope_parameters=yarn"],
        ("rope_parameters is 'yarn'", "must be an object"),
    ),
    "layer_types": (
        ['layer_types=["full_attention"]'],
        ("layer_types is '1 entries'", "num_hidden_layers=8"),
    ),
    "layer_types of a number": (
        ["layer_types=5", "num_hidden_layers=3"],
        ("layer_types is 5", "must be a list of"),
    ),
    "pattern": (["layer_types=null"], ("sliding_window_pattern is 'LLLG'", 'write "layer_types":')),
    "layers": (["num_hidden_layers=0"], ("num_hidden_layers is 0", "a positive whole number")),
    "negative layers": (
        ["num_hidden_layers=-2"],
        ("num_hidden_layers is -2", "a positive whole number"),
    ),
    "layers of text": (
        ["num_hidden_layers=many"],
        ("num_hidden_layers is 'many'", "a positive whole number"),
    ),
    "layers of true": (
        ["num_hidden_layers=true"],
        ("num_hidden_layers is True", "a positive whole number"),
    ),
    "heads": (
        ["num_key_value_heads=3"],
        ("num_key_value_heads is 3", "a divisor of num_attention_heads=4"),
    ),
    "head_dim": (["head_dim=7"], ("head_dim is 7", "even")),
    "epsilon": (["rms_norm_eps=NaN"], ("rms_norm_eps is nan", "a finite number")),
    "dtype": (["dtype=int8"], ("dtype is 'int8'", "'bfloat16'")),
    "architecture": (
        ['architectures=["LlamaForCausalLM"]'],
        ("['LlamaForCausalLM']", "'Exaone4ForCausalLM'"),
    ),
    "architecture of a number": (
        ["architectures=5"],
        ("architectures is 5", "'Exaone4ForCausalLM'"),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_set_option_that_makes_no_model_is_rejected(
    name: str, tmp_path: Path, rejected: Rejected
) -> None:
    settings, fragments = SETTINGS[name]
    options = [part for setting in settings for part in ("--set", setting)]
    rejected(["tiny", "exaone4", tmp_path / "output", *options], *fragments)


@pytest.mark.parametrize("family", ["nonsense", "", "exaone", "EXAONE4"])
def test_unknown_tiny_model_is_rejected(family: str, tmp_path: Path, rejected: Rejected) -> None:
    rejected(
        ["tiny", family, tmp_path / "output"],
        f"family is '{family}'",
        "one of 'exaone4', 'exaone4-1.2b'",
    )


@pytest.mark.parametrize(
    ("options", "fragments"),
    [(["--set", "eos_token_id={}"], "eos_token_id"), (["--seed", str(2**70)], "seed")],
    ids=["eos_token_id", "seed"],
)
def test_value_that_cannot_be_written_is_rejected(
    options: list[str], fragments: str, tmp_path: Path, rejected: Rejected
) -> None:
    rejected(["tiny", "exaone4", tmp_path / "output", *options], fragments)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_tiny_of_a_real_model_has_its_first_layers(
    name: str, tiny: Any, cli: Cli, tmp_path: Path
) -> None:
    source = tiny(name)
    run = cli("tiny", "--from", source, "--layers", 4, "small")
    assert run.code == 0, run.err
    before, after = read_tensors(source), read_tensors(tmp_path / "small")
    assert {key: before[key] for key in after}.keys() == after.keys()
    assert same_bits(after, {key: before[key] for key in after})
    layers = {int(found[1]) for key in after if (found := re.search(r"layers\.(\d+)\.", key))}
    assert layers >= {0, 1, 2, 3} and cli("inspect", "small").code == 0
    assert (tmp_path / "small" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--layers", 99), "from 1 to the model's"),
        (("--layers", 1), "the first layer with experts"),
        (("--set", "dtype=bfloat16"), "left out with --from"),
        (("--seed", "0"), "--seed is 0, and must be left out with --from"),
    ],
)
def test_tiny_of_a_real_model_rejects(
    arguments: tuple[object, ...], fragment: str, tiny: Any, cli: Cli
) -> None:
    run = cli("tiny", "--from", tiny("exaone-moe"), *arguments, "small")
    assert run.code == 2 and fragment in run.err


def test_layers_without_a_real_model_are_rejected(cli: Cli, tmp_path: Path) -> None:
    """They would have no effect on a random model."""
    run = cli("tiny", "exaone4", tmp_path / "tiny", "--layers", 2)
    assert run.code == 2 and "--set num_hidden_layers=2 changes a random model" in run.err
