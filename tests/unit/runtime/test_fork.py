"""What the forked launcher says when a rank fails: one sentence, and a file with the rest."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from exaone_bridge import cli
from exaone_bridge.runtime.fork import ForkLauncher, RankFailure


def _raise() -> None:
    os.write(1, b"output of Megatron\n")
    dist.barrier()
    if dist.get_rank() == 1:
        raise ValueError("two lines:\nthe second.")
    dist.barrier()


def _exit() -> None:
    os.write(1, b"output of Megatron\n")
    os._exit(7)


def _kill() -> None:
    os.write(1, b"output of Megatron\n")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("fail", "says", "ends"),
    [
        (_raise, "rank 1 raised ValueError: two lines: the second; its traceback", "second.\n"),
        (_exit, "rank 0 ended with exit code 7 without a result; its output", "of Megatron\n"),
        (
            _kill,
            "rank 0 was ended by signal 9 (Killed), as the system does when memory runs out; "
            "its output",
            "of Megatron\n",
        ),
    ],
)
def test_a_rank_that_fails_is_one_sentence_and_a_file(
    fail: Callable[[], None],
    says: str,
    ends: str,
    megatron_bridge: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RankFailure) as caught:
        ForkLauncher(2 if fail is _raise else 1).all(fail)
    found = re.fullmatch(re.escape(says) + r" is in (\S+)\.", str(caught.value))
    assert found
    text = Path(found[1]).read_text()
    assert "output of Megatron" in text and text.endswith(ends)
    assert ("Traceback" in text) == (fail is _raise)
    assert list(tmp_path.iterdir()) == [Path(found[1])]


def test_a_command_prints_the_sentence_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["exaone-bridge"])
    monkeypatch.setattr(cli, "_run", lambda _: ForkLauncher().all(_exit))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 3
    assert capsys.readouterr().err.startswith("exaone-bridge: rank 0 ended with exit code 7")
