"""What each command does when its input is good, and that `verify` and `demo` can fail."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.cli.app import app
from exaone_bridge.models import FAMILIES
from exaone_bridge.models.exaone4 import EXAONE4

COMMANDS = ["demo", "tiny", "inspect", "import", "export", "verify"]
INDEX = "model.safetensors.index.json"
TEXT_FILES = [
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
Cli = Callable[..., Any]
Snapshot = Callable[[Path], dict[str, object]]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def files_of(folder: Path) -> dict[str, str]:
    """Tensor -> the file that holds it, by safetensors."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    return found


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(torch.uint8)

    return left.keys() == right.keys() and all(
        tensor.dtype == right[name].dtype
        and tensor.shape == right[name].shape
        and torch.equal(bits(tensor), bits(right[name]))
        for name, tensor in left.items()
    )


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def mappings_of(out: str) -> list[list[str]]:
    """The cells of the tables in `out`, heads first."""
    return [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        for line in out.splitlines()
        if line.startswith(("│", "┃"))
    ]


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_an_example_that_parses(command: str) -> None:
    program = Path(sys.executable).with_name("exaone-bridge")
    done = subprocess.run(
        [program, *command.split(), "--help"],
        env=os.environ | {"COLUMNS": "120"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    examples = re.findall(r"Example: (exaone-bridge .*?)\s*$", done.stdout, re.MULTILINE)
    assert examples
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for example in examples:
        _, name, *arguments = shlex.split(example)
        assert name == (command or name)
        commands[name].make_context(name, arguments)  # raises on what it cannot parse


def test_help_names_every_command(cli: Cli) -> None:
    run = cli("--help")
    assert run.code == 0
    assert [
        command for command in COMMANDS if re.search(rf"^│ {command}\b", run.out, re.MULTILINE)
    ] == COMMANDS


# --- tiny -----------------------------------------------------------------------------------------------------------


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


# --- inspect --------------------------------------------------------------------------------------------------------


def model_config_of(out: str) -> dict[str, str]:
    """What stands before the ranks: a name and a value each, in two columns."""
    _, *lines = out.partition("\nRanks\n")[0].splitlines()
    return dict(re.split(" {2,}", line.strip(), maxsplit=1) for line in lines)


def test_inspect_says_what_a_checkpoint_is(cli: Cli, tiny: Any) -> None:
    run = cli("inspect", tiny("exaone4"))
    assert (run.code, run.err) == (0, "")
    model_config = model_config_of(run.out)
    assert (
        model_config["family"] == "exaone4"
        and model_config["sliding window"] == "8"
        and model_config["heads"] == "4 / 2 x 24"
    )
    assert model_config["layers (L sliding-window, G full)"] == "LLLGLLLG"
    assert model_config["RoPE (R applied, - none)"] == "RRR-RRR-"
    assert (
        model_config["embeddings"] == "untied"
        and model_config["layout"] == "TP1 x PP1 fits: 1 ranks"
    )
    tensors = tensors_of(tiny("exaone4"))
    count = sum(tensor.numel() for tensor in tensors.values())
    assert model_config["parameters"].startswith(f"{count:,} in {len(tensors)} tensors, float32")
    arrows = [line.split()[0] for line in run.out.splitlines() if " -> " in line]
    named = {re.sub(r"\.\d+\.", ".*.", name) for name in tensors}
    assert len(arrows) == len(named) and set(arrows) == named


def test_inspect_of_the_global_miniature(cli: Cli, tiny: Any) -> None:
    model_config = model_config_of(cli("inspect", tiny("exaone4-1.2b")).out)
    assert (
        model_config["layers (L sliding-window, G full)"] == "GGGGGG"
        and model_config["RoPE (R applied, - none)"] == "RRRRRR"
    )
    assert model_config["sliding window"] == "-" and model_config["embeddings"] == "tied"


def test_inspect_says_that_a_layout_fits(cli: Cli, tiny: Any) -> None:
    run = cli("inspect", tiny("exaone4"), "--tp", 4, "--pp", 2, "--vpp", 4, "--sp")
    assert run.code == 0
    assert model_config_of(run.out)["layout"] == "TP4 x PP2 x VPP4 + SP fits: 8 ranks"


def test_inspect_shows_the_ranks(cli: Cli, tiny: Any) -> None:
    lines = (
        cli("inspect", tiny("exaone4"), "--tp", 2, "--pp", 2)
        .out.partition("\nRanks\n")[2]
        .splitlines()
    )
    head, *ranks = (re.split(" {2,}", line.strip()) for line in lines[:5])
    assert head == ["rank", "coordinates", "layers", "import reads", "parameters", "export writes"]
    assert [rank[:3] for rank in ranks] == [
        [str(tp + 2 * pp), f"tp{tp} pp{pp} ep0 etp{tp}", f"{4 * pp}-{4 * pp + 3}"]
        for pp in (0, 1)
        for tp in (0, 1)
    ]
    assert (
        all(re.fullmatch(r"0\.\d MB", size) for rank in ranks for size in rank[3:])
        and len({*map(len, lines[:5])}) == 1
    )
    many = cli("inspect", tiny("exaone4"), "--tp", 4, "--pp", 8).out
    assert (
        "\n  ... and 16 more (--json has all)\n" in many
        and len(re.findall(r"^ +\d+  tp", many, re.MULTILINE)) == 16
    )


def test_inspect_json_lists_every_tensor(cli: Cli, sharded: Path) -> None:
    run = cli("inspect", sharded, "--json", "--tp", 2)
    assert (run.code, run.err) == (0, "")
    summary = json.loads(run.out)
    tensors = tensors_of(sharded)
    listed = summary.pop("tensors")
    ranks = summary.pop("ranks")
    assert [(rank["tp"], rank["pp"], rank["layers"]) for rank in ranks] == [
        (tp, 0, [list(range(8))]) for tp in (0, 1)
    ]
    assert sum(rank["written_bytes"] for rank in ranks) == summary["bytes"]
    assert (
        sum(rank["parameter_bytes"] for rank in ranks) - sum(rank["read_bytes"] for rank in ranks)
        == 4 * 128
    )
    unsupported = summary.pop("unsupported_layouts")
    assert unsupported["TP8"].startswith("tp is 8, and must be a divisor of 4 attention heads")
    assert set(unsupported) == {"TP8", "TP16", "TP32", "PP16", "PP32", "EP2"}
    assert listed.keys() == tensors.keys()
    destinations = {name: entry.pop("megatron") for name, entry in listed.items()}
    assert listed == {
        name: {"shape": list(tensor.shape), "dtype": "F32", "file": files_of(sharded)[name]}
        for name, tensor in tensors.items()
    }
    assert summary == {
        "folder": str(sharded),
        "family": "exaone4",
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtype": "float32",
        "layers": "LLLGLLLG",
        "mlp": "DDDDDDDD",
        "rope": [True, True, True, False] * 2,
        "tied": False,
        "layout": "TP2 x PP1",
        "padding": 128,
        "passthrough": [],
        "unexpected": [],
        "missing": {},
    }
    layer = "decoder.layers.7"
    known = {
        "model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.norm.weight": "decoder.final_layernorm.weight",
        "lm_head.weight": "output_layer.weight",
        "model.layers.7.self_attn.q_proj.weight": f"{layer}.self_attention.linear_qkv.weight",
        "model.layers.7.self_attn.k_proj.weight": f"{layer}.self_attention.linear_qkv.weight",
        "model.layers.7.self_attn.v_proj.weight": f"{layer}.self_attention.linear_qkv.weight",
        "model.layers.7.self_attn.o_proj.weight": f"{layer}.self_attention.linear_proj.weight",
        "model.layers.7.self_attn.q_norm.weight": f"{layer}.self_attention.q_layernorm.weight",
        "model.layers.7.self_attn.k_norm.weight": f"{layer}.self_attention.k_layernorm.weight",
        "model.layers.7.mlp.gate_proj.weight": f"{layer}.mlp.linear_fc1.weight",
        "model.layers.7.mlp.up_proj.weight": f"{layer}.mlp.linear_fc1.weight",
        "model.layers.7.mlp.down_proj.weight": f"{layer}.mlp.linear_fc2.weight",
        "model.layers.7.post_attention_layernorm.weight": f"{layer}.self_attention.linear_proj.post_layernorm.weight",
        "model.layers.7.post_feedforward_layernorm.weight": f"{layer}.mlp.linear_fc2.post_layernorm.weight",
    }
    every_layer = {
        name.replace(".7.", f".{number}."): to.replace(".7.", f".{number}.")
        for number in range(8)
        for name, to in known.items()
    }
    assert destinations == every_layer


def add_tensors(folder: Path, **more: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})


def drop_tensor(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


STRANGE = {
    f"model.layers.{layer}.mlp.strange": torch.ones(3, layer + 1, dtype=torch.int64)
    for layer in range(9)
}


@pytest.mark.parametrize("passthrough", [False, True])
def test_inspect_lists_what_it_refuses(
    passthrough: bool, cli: Cli, tiny: Any, tmp_path: Path
) -> None:
    """Exit code 2, because an import would refuse it; but first the whole listing, where the sentence names five."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("ernie45" if passthrough else "exaone4"), folder)
    mtp = {name for name in tensors_of(folder) if name.startswith("model.mtp_")}
    assert bool(mtp) == passthrough
    add_tensors(folder, **STRANGE, **{"two\nlines": torch.ones(1)})
    run = cli("inspect", folder)
    assert (
        run.code == 2
        and "10 tensors that the model has no place for" in run.err
        and "and 5 more" in run.err
    )
    lines = run.out.splitlines()
    assert [line for line in lines if " -> unexpected" in line] == [
        f"  {what}, model.safetensors -> unexpected: no parameter mapping has this name"
        for what in [f"model.layers.{layer}.mlp.strange [3, {layer + 1}] I64" for layer in range(9)]
        + [r"'two\nlines' [1] F32"]
    ]
    assert {line.split()[0] for line in lines if " -> passthrough" in line} == mtp
    run = cli("inspect", folder, "--json", "--tp", 2)
    assert run.code == 2 and "10 tensors that the model has no place for" in run.err
    summary = json.loads(run.out)
    assert (
        summary["unexpected"] == sorted([*STRANGE, "two\nlines"])
        and set(summary["passthrough"]) == mtp
    )
    assert summary["missing"] == {} and summary["ranks"][1]["read_bytes"] > 0
    assert {name for name, entry in summary["tensors"].items() if entry["megatron"] is None} == {
        *STRANGE, *mtp, "two\nlines",
    }  # fmt: skip
    assert summary["parameters"] == sum(tensor.numel() for tensor in tensors_of(folder).values())


def test_inspect_lists_what_is_missing(cli: Cli, tiny: Any, tmp_path: Path) -> None:
    folder, name = tmp_path / "model", "model.layers.2.mlp.up_proj.weight"
    shutil.copytree(tiny("exaone4"), folder)
    shape = list(tensors_of(folder)[name].shape)
    drop_tensor(folder, name)
    run = cli("inspect", folder)
    assert run.code == 2 and f"1 tensors that the model needs are missing ({name})" in run.err
    assert f"  {name} {shape} -> missing: the model needs it" in run.out.splitlines()
    run = cli("inspect", folder, "--json")
    assert run.code == 2 and json.loads(run.out)["missing"] == {name: shape}


def test_inspect_of_a_passthrough_tensor_of_another_type(
    cli: Cli, tiny: Any, tmp_path: Path
) -> None:
    """What travels beside the model may be of any type."""
    folder, name = tmp_path / "model", "model.mtp_block.0.steps"
    shutil.copytree(tiny("ernie45"), folder)
    add_tensors(folder, **{name: torch.ones(2, 3, dtype=torch.int64)})
    run = cli("inspect", folder)
    assert (run.code, run.err) == (0, "")
    assert (
        f"  {name} [2, 3] I64, model.safetensors -> passthrough: exported unchanged"
        in run.out.splitlines()
    )


def test_inspect_imports_nothing_heavy(tiny: Any) -> None:
    """Neither torch and what comes with it, nor what reads arguments and draws tables, which takes longer than all."""
    code = "import sys; from exaone_bridge.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    heavy = {
        "torch",
        "transformers",
        "megatron",
        "safetensors",
        "numpy",
        "typer",
        "click",
        "rich",
        "pydantic",
    }
    for options in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "inspect", tiny("exaone4"), *options],
            text=True,
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0 and "LLLGLLLG" in done.stdout
        names = set(done.stderr.split())
        assert "exaone_bridge.checkpoint.reshard.validate" in names
        assert not {name.partition(".")[0] for name in names} & heavy
        # What each costs more than a hundredth of a second.
        assert not names & {
            "importlib.abc",
            "importlib.resources",
            "importlib.metadata",
            "tempfile",
            "asyncio",
            "logging",
        }


def test_inspect_ends_quietly_where_nobody_reads(tiny: Any) -> None:
    program = Path(sys.executable).with_name("exaone-bridge")
    for command in (
        [program, "inspect", tiny("exaone4"), "--json"],
        [program, "inspect", "--help"],
    ):
        reader, writer = os.pipe()
        os.close(reader)  # before it writes
        with os.fdopen(writer, "w") as nobody:
            done = subprocess.run(
                command, stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=120, check=False
            )
        assert (done.returncode, done.stderr) == (1, "")


# --- import and export ----------------------------------------------------------------------------------------------


def assert_equal_folders(exported: Path, source: Path) -> None:
    """Bits, configuration and files of an export are the source's, by other eyes than `verify`'s."""
    assert same_bits(tensors_of(exported), tensors_of(source))
    config, wanted = config_of(exported), config_of(source)
    assert config == wanted
    assert files_of(exported) == files_of(source)
    text = {
        path.name: path.read_bytes()
        for path in source.iterdir()
        if not path.name.startswith("model")
    }
    assert {
        path.name: path.read_bytes()
        for path in exported.iterdir()
        if not path.name.startswith("model")
    } == text


@pytest.mark.parametrize("options", [[], ["--workers", 3]], ids=str)
def test_a_sharded_checkpoint_comes_back(
    options: list[object],
    sharded: Path,
    megatron_folder: Path,
    cli: Cli,
    snapshot: Snapshot,
    tmp_path: Path,
) -> None:
    before = snapshot(megatron_folder)
    run = cli("export", megatron_folder, tmp_path / "exported", *options)
    assert (run.code, run.err) == (0, "") and "91 tensors" in " ".join(run.out.split())
    assert_equal_folders(tmp_path / "exported", sharded)
    assert (tmp_path / "exported" / "chat_template.jinja").is_file()
    index = json.loads((tmp_path / "exported" / INDEX).read_text())
    assert index == json.loads((sharded / INDEX).read_text())
    assert snapshot(megatron_folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "tmp"]
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "to_megatron", "back"),
    [
        ("exaone4-1.2b", ["--pp", 3], ["--workers", 2]),
        ("exaone4", ["--pp", 2, "--vpp", 4, "--workers", 2], []),
        ("ernie45-300b", ["--ep", 2], ["--max-shard-size", "1GB"]),
    ],
)
def test_a_single_file_comes_back(
    name: str,
    to_megatron: list[object],
    back: list[object],
    megatron_bridge: Any,
    tiny: Any,
    cli: Cli,
    snapshot: Snapshot,
    tmp_path: Path,
) -> None:
    source = tiny(name, seed=1)
    before = snapshot(source)
    imported = cli("import", source, tmp_path / "megatron", *to_megatron)
    assert (imported.code, imported.err) == (0, "")
    assert "megatron: " in imported.out and f"{len(tensors_of(source))} tensors" in imported.out
    assert snapshot(source) == before
    assert cli("export", tmp_path / "megatron", tmp_path / "exported", *back).code == 0
    assert_equal_folders(tmp_path / "exported", source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "megatron", "tmp"]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_checkpoint_without_a_tokenizer_comes_back(
    megatron_bridge: Any, cli: Cli, tmp_path: Path
) -> None:
    config = {**EXAONE4.tiny["exaone4"], "dtype": "bfloat16"}
    write_random(tmp_path / "model", config, tokenizer=False)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert cli("import", "model", tmp_path / "megatron", "--tp", 2).code == 0
    assert cli("export", tmp_path / "megatron", "exported").code == 0
    assert_equal_folders(tmp_path / "exported", tmp_path / "model")
    assert cli("verify", "model", "--quick").code == 0


def test_a_path_that_is_written_twice_has_its_second_model(
    megatron_bridge: Any, tiny: Any, cli: Cli, tmp_path: Path
) -> None:
    for name in EXAONE4.tiny:
        shutil.rmtree(tmp_path / "megatron", ignore_errors=True)
        assert cli("import", tiny(name), tmp_path / "megatron").code == 0
        assert cli("export", tmp_path / "megatron", tmp_path / name).code == 0
        assert_equal_folders(tmp_path / name, tiny(name))


def test_export_needs_the_checkpoint_alone(
    megatron_folder: Path, sharded: Path, cli: Cli, tmp_path: Path
) -> None:
    """Neither the source nor the folder `hf` is there: weights and configuration still are."""
    shutil.copytree(megatron_folder, tmp_path / "megatron")
    shutil.rmtree(tmp_path / "megatron" / "hf")
    sharded.rename(sharded.with_name("away"))
    try:
        assert cli("export", tmp_path / "megatron", "exported").code == 0
    finally:
        sharded.with_name("away").rename(sharded)
    assert same_bits(tensors_of(tmp_path / "exported"), tensors_of(sharded))
    assert config_of(tmp_path / "exported") == config_of(sharded)
    assert not any((tmp_path / "exported" / file).exists() for file in [*TEXT_FILES, INDEX])


def test_transformers_loads_an_export(
    megatron_folder: Path, sharded: Path, cli: Cli, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert cli("export", megatron_folder, "exported").code == 0
    tokens = torch.arange(40)[None]
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in ("exported", sharded)
    )
    assert torch.equal(ours, theirs)
    assert (
        AutoTokenizer.from_pretrained("exported").chat_template
        == (sharded / "chat_template.jinja").read_text()
    )


@pytest.mark.parametrize("name", ["exaone4", "ernie45"])
def test_what_the_host_wrote_is_exported(
    name: str, megatron_bridge: Any, tiny: Any, cli: Cli, tmp_path: Path
) -> None:
    """At other layouts than ours, with extra states; tensors beside the model come from the folder `hf`."""
    from exaone_bridge.runtime.ranks import run_ranks
    from exaone_bridge.schema.parallel_layout import Layout

    source = tiny(name, dtype="bfloat16")
    layout = Layout(tp=2, pp=2) if name == "exaone4" else Layout(tp=2, ep=2, etp=1)
    assert cli("import", source, tmp_path / "ours").code == 0
    run_ranks(save_by_host, layout.ranks, source, tmp_path / "megatron", layout)
    shutil.copytree(tmp_path / "ours" / "hf", tmp_path / "megatron" / "hf")
    assert cli("export", tmp_path / "megatron", tmp_path / "exported").code == 0
    assert same_bits(tensors_of(tmp_path / "exported"), tensors_of(source))


def save_by_host(source: Path, target: Path, layout: Any) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    tempfile.tempdir = None  # the host makes a socket there, whose path may have 107 characters
    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.save_megatron_model(build(bridge, layout), target)


def test_max_shard_size(megatron_folder: Path, sharded: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("export", megatron_folder, "exported", "--max-shard-size", "200KB").code == 0
    files = files_of(tmp_path / "exported")
    sizes = {file: (tmp_path / "exported" / file).stat().st_size for file in files.values()}
    assert len(sizes) == 8 and all(size < 210_000 for size in sizes.values())
    assert same_bits(tensors_of(tmp_path / "exported"), tensors_of(sharded))
    for text in ("0", "-1", "5 apples", "GB", "", "1e400GB", "nan"):
        run = cli("export", megatron_folder, "other", "--max-shard-size", text)
        assert run.code == 2 and "such as 5GB" in run.err and not (tmp_path / "other").exists()


@pytest.mark.parametrize("command", ["import", "export"])
def test_dry_run_writes_nothing(
    command: str, megatron_folder: Path, sharded: Path, cli: Cli, snapshot: Snapshot, tmp_path: Path
) -> None:
    before = snapshot(tmp_path)
    run = cli(
        command,
        sharded if command == "import" else megatron_folder,
        tmp_path / "output",
        "--dry-run",
    )
    assert run.code == 0 and "91 tensors, 0.00 GB would be written; nothing was" in " ".join(
        run.out.split()
    )
    assert snapshot(tmp_path) == before


def test_a_conversion_ends_with_its_figures(
    megatron_bridge: Any, sharded: Path, cli: Cli, tmp_path: Path
) -> None:
    run = cli("import", sharded, tmp_path / "megatron")
    (line,) = [line for line in run.out.splitlines() if line.startswith(str(tmp_path / "megatron"))]
    figures = r"91 tensors, 0\.00 GB, \d+\.\d s, \d\.\d\d GB/s, peak memory \d+\.\d\d GiB a process \(\d+ MiB of it"
    assert re.search(figures, line), line
    assert "import: writing the Megatron checkpoint" in run.out and "0.00 of 0.00 GB" in run.out


# --- verify ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("exaone4", []),
        ("exaone4", ["--tp", 2, "--pp", 2, "--vpp", 2, "--sp"]),
        ("exaone4-1.2b", []),
        ("exaone4-1.2b", ["--tp", 2, "--pp", 3]),
    ],
    ids=str,
)
def test_verify_holds(
    name: str,
    layout: list[object],
    megatron_bridge: Any,
    tiny: Any,
    cli: Cli,
    snapshot: Snapshot,
    tmp_path: Path,
) -> None:
    before = snapshot(tiny(name))
    run = cli("verify", tiny(name), "--quick", *layout)
    assert (run.code, run.err) == (0, "")
    assert [(row[0], row[3]) for row in mappings_of(run.out)[1:]] == [
        ("tensors", "holds"),
        ("config", "holds"),
        ("files", "holds"),
        ("logits", "holds"),
    ]
    figures = {row[0]: row[1] for row in mappings_of(run.out)}
    assert figures["tensors"] == f"{len(tensors_of(tiny(name)))} tensors bitwise equal"
    assert figures["files"] == "4 files equal" and "top-1 agreement 100.0%" in figures["logits"]
    assert 0 < float(figures["logits"].split()[2].rstrip(",")) < 2e-5
    assert snapshot(tiny(name)) == before and list((tmp_path / "tmp").iterdir()) == []


def test_verify_of_shards(megatron_bridge: Any, sharded: Path, cli: Cli) -> None:
    assert cli("verify", sharded, "--quick").code == 0


def test_verify_of_the_working_folder(
    megatron_bridge: Any, tiny: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny("exaone4"), tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    assert cli("verify", ".", "--quick").code == 0


def test_verify_sees_a_window_off_by_one(
    megatron_bridge: Any, tiny: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exaone_bridge.models.exaone4 import provider

    right = provider.megatron_window

    def one_more(windows: Any) -> Any:
        size, layers = right(windows)
        return (size[0] + 1, 0), layers

    monkeypatch.setattr(provider, "megatron_window", one_more)
    run = cli("verify", tiny("exaone4"), "--quick")
    assert run.code == 1
    verdicts = {row[0]: row[3] for row in mappings_of(run.out)[1:]}
    assert verdicts["tensors"] == verdicts["files"] == "holds" and verdicts["logits"] == "FAILED"
    assert (
        "exaone4: logits: max |difference| " in run.err
        and "hidden states part at layer 0" in run.err
    )


@pytest.fixture
def layer_2_sees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the arithmetic alone: the layer with 0-based number 2 forgets its window."""
    from exaone_bridge.modules import attention

    right = attention.is_layer_window_attention

    def forgetful(window: Any, skip: Any, layer_number: int) -> bool:
        return layer_number != 3 and right(window, skip, layer_number)

    monkeypatch.setattr(attention, "is_layer_window_attention", forgetful)


@pytest.mark.parametrize("layout", [[], ["--tp", 2, "--pp", 4]], ids=str)
@pytest.mark.usefixtures("layer_2_sees_everything")
def test_verify_names_the_layer_that_differs_first(
    layout: list[object], megatron_bridge: Any, tiny: Any, cli: Cli
) -> None:
    run = cli("verify", tiny("exaone4"), *layout, "--quick", "--backend", "torch")
    assert run.code == 1
    assert [row[3] for row in mappings_of(run.out)[1:]] == ["holds", "holds", "holds", "FAILED"]
    assert (
        run.err.startswith("exaone4: logits: ")
        and "hidden states part at layer 2, attention" in run.err
    )
    assert len(run.err.splitlines()) == 2 and "usual causes: RoPE" in run.err


@pytest.mark.usefixtures("layer_2_sees_everything")
def test_verify_meets_the_edge_of_the_window_only_past_it(
    megatron_bridge: Any, tiny: Any, cli: Cli
) -> None:
    """Up to the window's own length the fault cannot be seen: the default length is what finds it."""
    assert cli("verify", tiny("exaone4"), "--quick", "--backend", "torch", "--length", 8).code == 0
    assert cli("verify", tiny("exaone4"), "--quick", "--backend", "torch", "--length", 9).code == 1


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | {"rms_norm_eps": 1e-5}))


ROUND_TRIP_FAULTS = {
    "tensors": (flip_a_bit, "1 of 91 tensors differ"),
    "config": (change_config, "rms_norm_eps: 0.0003, then 1e-05"),
    "files": (
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        "1 of 4 files differ; tokenizer_config.json",
    ),
}


@pytest.mark.parametrize("check", ROUND_TRIP_FAULTS)
def test_verify_sees_a_fault_of_the_round_trip(
    check: str, megatron_bridge: Any, tiny: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exaone_bridge.verification.workflow import job

    fault, says = ROUND_TRIP_FAULTS[check]
    right = job.write_hf_folder

    def write(folder: Path, *args: Any) -> None:
        right(folder, *args)
        fault(folder)

    monkeypatch.setattr(job, "write_hf_folder", write)
    run = cli("verify", tiny("exaone4"), "--quick")
    assert run.code == 1 and run.err.startswith(f"exaone4: {check}: ") and says in run.err
    assert {row[0] for row in mappings_of(run.out)[1:] if row[3] == "FAILED"} == {check}


# --- demo -----------------------------------------------------------------------------------------------------------

COLUMNS = [
    "model",
    "parameters",
    "layout",
    "max |logit difference|",
    "first differing layer",
    "round trip",
    "seconds",
]


def test_demo_prints_one_table(megatron_bridge: Any, cli: Cli, tmp_path: Path) -> None:
    run = cli("demo")
    assert (run.code, run.err) == (0, "")
    head, *models = mappings_of(run.out)
    assert head == COLUMNS and run.out.count("┏") == 1
    assert [row[0] for row in models] == [name for family in FAMILIES for name in family.tiny]
    assert all(row[2].startswith("TP2 x PP2") for row in models)
    assert {("EP2" in row[2]) for row in models if row[0] in ("ernie45", "ernie45-300b")} == {True}
    assert {tuple(row[4:6]) for row in models} == {("-", "bitwise equal")}
    assert all(0 < float(row[3]) < 2e-5 and float(row[6]) > 0 for row in models)
    assert [int(row[1].replace(",", "")) for row in models][:2] == [345_920, 247_072]
    assert list((tmp_path / "tmp").iterdir()) == [] and sorted(
        path.name for path in tmp_path.iterdir()
    ) == ["tmp"]


@pytest.mark.usefixtures("layer_2_sees_everything")
def test_demo_ends_with_one_where_a_model_differs(
    megatron_bridge: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {name: (EXAONE4, config) for name, config in EXAONE4.tiny.items()}
    monkeypatch.setattr("exaone_bridge.cli.app.TINY_CONFIGS", two)
    run = cli("demo", "--tp", 1, "--pp", 1, "--backend", "torch")
    assert run.code == 1
    rows = {row[0]: row for row in mappings_of(run.out)}
    assert rows["exaone4"][4:6] == ["2", "bitwise equal"] and float(rows["exaone4"][3]) > 1e-3
    assert rows["exaone4-1.2b"][4:6] == ["-", "bitwise equal"]
    assert "exaone4: logits: " in run.err and "layer 2" in run.err and "exaone4-1.2b" not in run.err
    assert list((tmp_path / "tmp").iterdir()) == []


def test_demo_repeats_the_pattern_for_a_deeper_layout(megatron_bridge: Any, cli: Cli) -> None:
    run = cli("demo", "--tp", 1, "--pp", 3, "--vpp", 3, "--ep", 1)
    assert run.code == 0
    rows = {row[0]: row for row in mappings_of(run.out)}
    assert [rows[name][2] for name in EXAONE4.tiny] == ["TP1 x PP3 x VPP3"] * 2
    assert int(rows["exaone4"][1].replace(",", "")) > 345_920  # nine layers


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["import", "verify", "export"])
def test_a_command_leaves_no_process_behind(
    command: str, megatron_bridge: Any, tiny: Any, megatron_folder: Path, cli: Cli
) -> None:
    """Whoever was forked meanwhile has this pipe open; when all have ended, it is at its end."""
    reader, writer = os.pipe()
    try:
        output = [] if command == "verify" else ["output"]
        source = megatron_folder if command == "export" else tiny("exaone4")
        try:
            assert (
                cli(
                    command,
                    source,
                    *output,
                    *(["--tp", 2] if command == "verify" else ["--workers", 2]),
                ).code
                == 0
            )
        finally:
            os.close(writer)
        ready, _, _ = select.select([reader], [], [], 20)
        assert ready and os.read(reader, 1) == b""
    finally:
        os.close(reader)
