"""`exaone-bridge verify` passes on exact conversions, and names the check that a fault fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import Cli, Snapshot, read_config, read_tensors, table_rows


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
    assert [(row[0], row[3]) for row in table_rows(run.out)[1:]] == [
        ("tensors", "passed"),
        ("config", "passed"),
        ("files", "passed"),
        ("logits", "passed"),
    ]
    figures = {row[0]: row[1] for row in table_rows(run.out)}
    assert figures["tensors"] == f"{len(read_tensors(tiny(name)))} tensors bitwise equal"
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
    statuses = {row[0]: row[3] for row in table_rows(run.out)[1:]}
    assert statuses["tensors"] == statuses["files"] == "passed" and statuses["logits"] == "FAILED"
    assert (
        "exaone4: logits: max |difference| " in run.err
        and "hidden states diverge at layer 0" in run.err
    )


@pytest.mark.parametrize("layout", [[], ["--tp", 2, "--pp", 4]], ids=str)
@pytest.mark.usefixtures("layer_2_without_window")
def test_verify_names_the_layer_that_differs_first(
    layout: list[object], megatron_bridge: Any, tiny: Any, cli: Cli
) -> None:
    run = cli("verify", tiny("exaone4"), *layout, "--quick", "--backend", "torch")
    assert run.code == 1
    assert [row[3] for row in table_rows(run.out)[1:]] == ["passed", "passed", "passed", "FAILED"]
    assert (
        run.err.startswith("exaone4: logits: ")
        and "hidden states diverge at layer 2, attention" in run.err
    )
    assert len(run.err.splitlines()) == 2 and "usual causes: RoPE" in run.err


@pytest.mark.usefixtures("layer_2_without_window")
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
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {"rms_norm_eps": 1e-5}))


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
    from megatron.bridge import AutoBridge

    fault, says = ROUND_TRIP_FAULTS[check]
    save = AutoBridge.save_hf_pretrained

    def save_and_damage(bridge: Any, model: Any, path: Path, **options: Any) -> None:
        save(bridge, model, path, **options)
        fault(path)

    monkeypatch.setattr(AutoBridge, "save_hf_pretrained", save_and_damage)
    run = cli("verify", tiny("exaone4"), "--quick")
    assert run.code == 1 and run.err.startswith(f"exaone4: {check}: ") and says in run.err
    assert {row[0] for row in table_rows(run.out)[1:] if row[3] == "FAILED"} == {check}
