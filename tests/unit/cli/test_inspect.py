"""`exaone-bridge inspect`: the model config, the ranks of a layout, and where each tensor goes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.cli import Cli, file_of_each_tensor, read_tensors


def summary_lines(out: str) -> dict[str, str]:
    """Return name -> value of the two columns that `inspect` prints before the ranks."""
    _, *lines = out.partition("\nRanks\n")[0].splitlines()
    return dict(re.split(" {2,}", line.strip(), maxsplit=1) for line in lines)


def test_inspect_prints_the_model_config_and_the_parameter_mappings(cli: Cli, tiny: Any) -> None:
    run = cli("inspect", tiny("exaone4"))
    assert (run.code, run.err) == (0, "")
    summary = summary_lines(run.out)
    expected = {
        "family": "exaone4",
        "sliding window": "8",
        "heads / KV heads x head width": "4 / 2 x 24",
        "layers (L sliding-window, G full)": "LLLGLLLG",
        "RoPE (R applied, - none)": "RRR-RRR-",
        "embeddings": "untied",
        "layout": "TP1 x PP1, 1 rank",
    }
    assert {name: summary[name] for name in expected} == expected
    tensors = read_tensors(tiny("exaone4"))
    count = sum(tensor.numel() for tensor in tensors.values())
    assert summary["parameters"].startswith(f"{count:,} in {len(tensors)} tensors, float32")
    mapped = [line.split()[0] for line in run.out.splitlines() if " -> " in line]
    names = {re.sub(r"\.\d+\.", ".*.", name) for name in tensors}
    assert len(mapped) == len(names) and set(mapped) == names


def test_inspect_of_full_attention_with_tied_embeddings(cli: Cli, tiny: Any) -> None:
    summary = summary_lines(cli("inspect", tiny("exaone4-1.2b")).out)
    assert summary["layers (L sliding-window, G full)"] == "GGGGGG"
    assert summary["RoPE (R applied, - none)"] == "RRRRRR"
    assert summary["sliding window"] == "-" and summary["embeddings"] == "tied"


def test_inspect_prints_that_a_layout_fits(cli: Cli, tiny: Any) -> None:
    run = cli("inspect", tiny("exaone4"), "--tp", 4, "--pp", 2, "--vpp", 4, "--sp")
    assert run.code == 0
    assert summary_lines(run.out)["layout"] == "TP4 x PP2 x VPP4 + SP, 8 ranks"


def test_inspect_prints_at_most_sixteen_ranks(cli: Cli, tiny: Any) -> None:
    out = cli("inspect", tiny("exaone4"), "--tp", 2, "--pp", 2).out
    lines = out.partition("\nRanks\n")[2].splitlines()
    head, *ranks = (re.split(" {2,}", line.strip()) for line in lines[:5])
    assert head == ["rank", "coordinates", "layers", "import reads", "parameters", "export writes"]
    assert [rank[:3] for rank in ranks] == [
        [str(tp + 2 * pp), f"tp{tp} pp{pp} ep0 etp{tp}", f"{4 * pp}-{4 * pp + 3}"]
        for pp in (0, 1)
        for tp in (0, 1)
    ]
    assert all(re.fullmatch(r"0\.\d MB", size) for rank in ranks for size in rank[3:])
    assert len({*map(len, lines[:5])}) == 1
    many = cli("inspect", tiny("exaone4"), "--tp", 4, "--pp", 8).out
    assert "\n  ... and 16 more (--json lists all)\n" in many
    assert len(re.findall(r"^ +\d+  tp", many, re.MULTILINE)) == 16


def test_inspect_json_lists_every_tensor(cli: Cli, sharded: Path) -> None:
    run = cli("inspect", sharded, "--json", "--tp", 2)
    assert (run.code, run.err) == (0, "")
    summary = json.loads(run.out)
    tensors, files = read_tensors(sharded), file_of_each_tensor(sharded)
    listed, ranks = summary.pop("tensors"), summary.pop("ranks")
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
    for name, tensor in tensors.items():
        expected = {"shape": list(tensor.shape), "dtype": "F32", "file": files[name]}
        assert listed[name] == expected | {"megatron": listed[name]["megatron"]}
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
        "notes": [],
    }
    megatron_name = {
        "model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.norm.weight": "decoder.final_layernorm.weight",
        "lm_head.weight": "output_layer.weight",
    }
    of_one_layer = {
        "self_attn.q_proj": "self_attention.linear_qkv",
        "self_attn.k_proj": "self_attention.linear_qkv",
        "self_attn.v_proj": "self_attention.linear_qkv",
        "self_attn.o_proj": "self_attention.linear_proj",
        "self_attn.q_norm": "self_attention.q_layernorm",
        "self_attn.k_norm": "self_attention.k_layernorm",
        "mlp.gate_proj": "mlp.linear_fc1",
        "mlp.up_proj": "mlp.linear_fc1",
        "mlp.down_proj": "mlp.linear_fc2",
        "post_attention_layernorm": "self_attention.linear_proj.post_layernorm",
        "post_feedforward_layernorm": "mlp.linear_fc2.post_layernorm",
    }
    megatron_name |= {
        f"model.layers.{layer}.{hf}.weight": f"decoder.layers.{layer}.{megatron}.weight"
        for layer in range(8)
        for hf, megatron in of_one_layer.items()
    }
    assert {name: entry["megatron"] for name, entry in listed.items()} == megatron_name


def change_tensors(
    folder: Path, add: dict[str, torch.Tensor] | None = None, drop: Iterable[str] = ()
) -> None:
    tensors = load_file(folder / "model.safetensors") | (add or {})
    kept = {name: tensor for name, tensor in tensors.items() if name not in set(drop)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


UNEXPECTED = {
    f"model.layers.{layer}.mlp.unexpected": torch.ones(3, layer + 1, dtype=torch.int64)
    for layer in range(9)
}


@pytest.mark.parametrize("passthrough", [False, True])
def test_inspect_lists_all_unexpected_tensors_and_fails(
    passthrough: bool, cli: Cli, tiny: Any, tmp_path: Path
) -> None:
    """The exit code is 2, as of `import`; the listing is complete, the error names five."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("ernie45" if passthrough else "exaone4"), folder)
    mtp = {name for name in read_tensors(folder) if name.startswith("model.mtp_")}
    assert bool(mtp) == passthrough
    change_tensors(folder, add=UNEXPECTED | {"two\nlines": torch.ones(1)})
    run = cli("inspect", folder)
    assert run.code == 2 and "10 unexpected keys" in run.err and "and 5 more" in run.err
    lines = run.out.splitlines()
    tensors = [f"model.layers.{layer}.mlp.unexpected [3, {layer + 1}] I64" for layer in range(9)]
    assert [line for line in lines if " -> unexpected" in line] == [
        f"  {tensor}, model.safetensors -> unexpected: no parameter mapping has this name"
        for tensor in [*tensors, r"'two\nlines' [1] F32"]
    ]
    assert {line.split()[0] for line in lines if " -> passthrough" in line} == mtp
    run = cli("inspect", folder, "--json", "--tp", 2)
    assert run.code == 2 and "10 unexpected keys" in run.err
    summary = json.loads(run.out)
    assert summary["unexpected"] == sorted([*UNEXPECTED, "two\nlines"])
    assert set(summary["passthrough"]) == mtp
    assert summary["missing"] == {} and summary["ranks"][1]["read_bytes"] > 0
    assert {name for name, entry in summary["tensors"].items() if entry["megatron"] is None} == {
        *UNEXPECTED, *mtp, "two\nlines",
    }  # fmt: skip
    assert summary["parameters"] == sum(tensor.numel() for tensor in read_tensors(folder).values())


def test_inspect_lists_missing_tensors_and_fails(cli: Cli, tiny: Any, tmp_path: Path) -> None:
    folder, name = tmp_path / "model", "model.layers.2.mlp.up_proj.weight"
    shutil.copytree(tiny("exaone4"), folder)
    shape = list(read_tensors(folder)[name].shape)
    change_tensors(folder, drop=[name])
    run = cli("inspect", folder)
    assert run.code == 2 and f"1 missing keys ({name})" in run.err
    assert f"  {name} {shape} -> missing: the model needs it" in run.out.splitlines()
    run = cli("inspect", folder, "--json")
    assert run.code == 2 and json.loads(run.out)["missing"] == {name: shape}


def test_inspect_accepts_a_passthrough_tensor_of_any_dtype(
    cli: Cli, tiny: Any, tmp_path: Path
) -> None:
    folder, name = tmp_path / "model", "model.mtp_block.0.steps"
    shutil.copytree(tiny("ernie45"), folder)
    change_tensors(folder, add={name: torch.ones(2, 3, dtype=torch.int64)})
    run = cli("inspect", folder)
    assert (run.code, run.err) == (0, "")
    line = f"  {name} [2, 3] I64, model.safetensors -> passthrough: exported unchanged"
    assert line in run.out.splitlines()


def test_inspect_imports_no_slow_module(tiny: Any) -> None:
    """`inspect` imports no torch, typer or rich: each import takes longer than its work."""
    code = (
        "import sys; from exaone_bridge.cli import main\n"
        "try: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    slow = {"torch", "transformers", "megatron", "safetensors", "numpy"}
    slow |= {"typer", "click", "rich", "pydantic"}
    # Each of these modules of the standard library takes more than 10 ms.
    slow_submodules = {
        *("importlib.abc", "importlib.resources", "importlib.metadata"),
        *("tempfile", "asyncio", "logging"),
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
        assert not {name.partition(".")[0] for name in names} & slow
        assert not names & slow_submodules


def test_output_to_a_closed_pipe_ends_without_a_traceback(tiny: Any) -> None:
    program = Path(sys.executable).with_name("exaone-bridge")
    for arguments in ([tiny("exaone4"), "--json"], ["--help"]):
        command = [program, "inspect", *arguments]
        reader, writer = os.pipe()
        os.close(reader)  # before the command writes
        with os.fdopen(writer, "w") as closed:
            done = subprocess.run(
                command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120, check=False
            )
        assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("arguments", [["--json", "."], [".", "--json"], [".", "--json", "-"]])
def test_inspect_prints_json(
    arguments: list[str], tiny: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny("exaone4"))
    run = cli("inspect", *arguments)
    assert run.code == 0 and json.loads(run.out)["family"] == "exaone4"


def test_inspect_writes_json(tiny: Any, cli: Cli, tmp_path: Path) -> None:
    run = cli("inspect", tiny("exaone4"), "--json", "description.json")
    assert (run.code, run.out) == (0, "")
    assert json.loads((tmp_path / "description.json").read_text())["family"] == "exaone4"


def test_inspect_of_a_megatron_checkpoint(megatron_folder: Path, cli: Cli, tiny: Any) -> None:
    run = cli("inspect", megatron_folder)
    assert (run.code, run.err) == (0, "")
    summary = summary_lines(run.out)
    count = sum(tensor.numel() for tensor in read_tensors(tiny("exaone4")).values())
    expected = {
        "family": "exaone4",
        "parameters": f"{count:,}, float32",
        "layers (L sliding-window, G full)": "LLLGLLLG",
        "layout when written": "TP2 x PP2, 4 ranks",
        "backend": "auto",
        "optimizer state": "none",
    }
    assert {name: summary[name] for name in expected} == expected
    assert summary["iteration"].startswith("iteration 0")
    assert summary["export writes"].startswith("91 tensors, ")
    found = json.loads(cli("inspect", megatron_folder, "--json").out)
    assert found["exported"].keys() == read_tensors(tiny("exaone4")).keys()
    assert found["parameters"] == count and found["optimizer"] == {"tensors": 0, "bytes": 0}
    assert cli("inspect", megatron_folder, "--tp", 3).code == 2
