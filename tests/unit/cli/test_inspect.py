"""`exaone-bridge inspect`: the model config, the ranks of a layout, and where each tensor goes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.cli import Cli, files_of, tensors_of


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
        and model_config["heads / KV heads x head width"] == "4 / 2 x 24"
    )
    assert model_config["layers (L sliding-window, G full)"] == "LLLGLLLG"
    assert model_config["RoPE (R applied, - none)"] == "RRR-RRR-"
    assert model_config["embeddings"] == "untied" and model_config["layout"] == "TP1 x PP1, 1 ranks"
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
    assert model_config_of(run.out)["layout"] == "TP4 x PP2 x VPP4 + SP, 8 ranks"


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
        "\n  ... and 16 more (--json lists all)\n" in many
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
    assert run.code == 2 and "10 unexpected keys" in run.err and "and 5 more" in run.err
    lines = run.out.splitlines()
    assert [line for line in lines if " -> unexpected" in line] == [
        f"  {what}, model.safetensors -> unexpected: no parameter mapping has this name"
        for what in [f"model.layers.{layer}.mlp.strange [3, {layer + 1}] I64" for layer in range(9)]
        + [r"'two\nlines' [1] F32"]
    ]
    assert {line.split()[0] for line in lines if " -> passthrough" in line} == mtp
    run = cli("inspect", folder, "--json", "--tp", 2)
    assert run.code == 2 and "10 unexpected keys" in run.err
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
    assert run.code == 2 and f"1 missing keys ({name})" in run.err
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
