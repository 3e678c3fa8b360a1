"""Commands that fail in the middle leave no output, or a partial one that the next run resumes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.checkpoint.hf.shards import ShardWriter
from exaone_bridge.convert import to_hf, to_megatron
from exaone_bridge.errors import CheckpointError
from exaone_bridge.runtime.progress import Progress
from tests.helpers.cli import Cli, Snapshot, names_in


def write_partial_output(*arguments: Any) -> None:
    """Write where a rank writes: `export` into its writer's folder, `import` into its iteration's.

    Args:
        arguments: those of the rank; source, target and, of `import`, the iteration's folder come
            first.
    """
    writers = [argument.folder for argument in arguments if isinstance(argument, ShardWriter)]
    target = writers[0] if writers else arguments[2]
    (target / "half.bin").write_bytes(b"half")
    (target / "deep").mkdir(exist_ok=True)
    (target / "deep" / "file").write_text("half")


def fail(*arguments: Any, progress: Progress) -> None:
    write_partial_output(*arguments)
    raise RuntimeError("a fault in the middle")


def die(*arguments: Any, progress: Progress) -> None:
    write_partial_output(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)


def reject(*arguments: Any, progress: Progress) -> None:
    write_partial_output(*arguments)
    raise CheckpointError("somewhere", "cannot be read", remedy="read something else")


@pytest.mark.parametrize(
    ("rank", "code", "fragments"),
    [
        (fail, 3, " raised RuntimeError: a fault in the middle; its traceback is in /"),
        (die, 3, " was ended by signal 9 (Killed)"),
        (reject, 2, "exaone-bridge: somewhere: cannot be read; read something else.\n"),
    ],
)
@pytest.mark.parametrize("command", ["import", "export"])
def test_conversion_that_fails_leaves_no_output(
    command: str,
    rank: Callable[..., None],
    code: int,
    fragments: str,
    tiny: Any,
    megatron_folder: Path,
    tmp_path: Path,
    cli: Cli,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = megatron_folder if command == "export" else tiny("exaone4")
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        # Ranks are forked, so they have the fault too.
        patch.setattr(to_hf if command == "export" else to_megatron, f"_{command}_rank", rank)
        run = cli(command, source, tmp_path / "output", "--workers", 2)
    assert run.code == code and fragments in run.err and run.err.startswith("exaone-bridge: ")
    for log in (tmp_path / "tmp").glob("exaone_bridge-*.log"):
        assert code == 3 and run.err.endswith(f" is in {log}.\n") and run.err.count("\n") == 1
        assert ("Traceback" in log.read_text()) == (rank is fail)
        log.unlink()
    if command == "import" or rank is reject:
        assert snapshot(tmp_path) == before
        return
    # The next export resumes the partial one.
    assert names_in(tmp_path) == [".output.partial", "tmp"]
    assert cli(command, source, tmp_path / "output").code == 0
    assert names_in(tmp_path) == ["output", "tmp"]
    assert not {"half.bin", "deep"} & set(names_in(tmp_path / "output"))


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "where",
    [
        "checkpoint.staging.tempfile.mkdtemp",
        "convert.to_megatron.write_config_json",
        "convert.to_megatron.copy_companion_files",
    ],
)
def test_full_disk_outside_the_ranks_exits_with_2_and_leaves_nothing(
    where: str,
    megatron_bridge: Any,
    tiny: Any,
    tmp_path: Path,
    cli: Cli,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, before = tiny("exaone4"), snapshot(tmp_path)
    monkeypatch.setattr(f"exaone_bridge.{where}", full)
    run = cli("import", source, tmp_path / "output")
    assert run.code == 2 and "No space left on device" in run.err
    assert snapshot(tmp_path) == before


def test_interrupt_leaves_nothing_and_is_not_a_failed_check(
    megatron_bridge: Any,
    tiny: Any,
    tmp_path: Path,
    cli: Cli,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(to_megatron, "copy_companion_files", interrupt)
    before = snapshot(tmp_path)
    run = cli("import", tiny("exaone4"), tmp_path / "output")
    assert run.code not in (0, 1, 2)
    assert snapshot(tmp_path) == before
