"""Ids on the Hugging Face Hub in place of folders: cached snapshots, and the remedy without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import Cli, read_config
from tests.helpers.hub import MODEL, PINNED, hub

__all__ = ["hub"]


@pytest.mark.parametrize(("revision", "number"), [((), 1), (("--revision", PINNED), 0)])
def test_import_takes_the_snapshot_of_the_revision(
    revision: tuple[str, ...],
    number: int,
    megatron_bridge: Any,
    hub: Path,
    tmp_path: Path,
    cli: Cli,
) -> None:
    run = cli("import", MODEL, tmp_path / "megatron", *revision)
    assert run.code == 0, run.err
    assert read_config(tmp_path / "megatron" / "hf")["x_revision"] == number


def test_inspect_takes_an_id(hub: Path, cli: Cli) -> None:
    run = cli("inspect", MODEL)
    assert run.code == 0 and str(hub / "snapshots") in run.out


@pytest.mark.parametrize("command", ["inspect", "verify", "generate"])
def test_id_without_a_snapshot_names_the_download(command: str, hub: Path, cli: Cli) -> None:
    prompt = ("--prompt", "a") if command == "generate" else ()
    run = cli(command, "owner/other", "--revision", "v1", *prompt)
    assert run.code == 2
    assert "run `hf download owner/other --revision v1`" in run.err


def test_revision_of_a_folder_is_rejected(tiny: Any, cli: Cli) -> None:
    run = cli("inspect", tiny("exaone4"), "--revision", "main")
    assert run.code == 2 and "--revision: a folder has none" in run.err
