"""The launchers: which rank reports an error, which ranks wait, and full fp32 precision."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge import cli
from exaone_bridge.errors import UnsupportedLayout
from exaone_bridge.runtime import torchrun
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.runtime.launch import choose_launcher, is_rank_zero
from exaone_bridge.runtime.precision import full_fp32
from exaone_bridge.runtime.torchrun import TorchrunLauncher, is_local_to_rank


def _as_rank(patch: pytest.MonkeyPatch, rank: int, ranks: int = 2) -> None:
    patch.setenv("RANK", str(rank))
    patch.setenv("WORLD_SIZE", str(ranks))
    patch.setenv("MASTER_ADDR", "localhost")
    patch.setenv("MASTER_PORT", "1")
    patch.setattr(cli, "_GRACE_SECONDS", 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_zero_reports_an_error_of_all_ranks(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _as_rank(monkeypatch, rank)
    monkeypatch.setattr(sys, "argv", ["exaone-bridge", "verify", "/nowhere", "--tp", "2"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert ("/nowhere" in printed.err) == (rank == 0)
    assert rank == 0 or printed.out + printed.err == ""


def test_another_number_of_ranks_is_rejected_before_anything_is_computed(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _as_rank(monkeypatch, 0)
    monkeypatch.setattr(TorchrunLauncher, "first", None)  # nothing gets as far
    monkeypatch.setattr(
        sys, "argv", ["exaone-bridge", "verify", str(tiny("exaone4")), "--pp", "4", "--quick"]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and "--nproc_per_node 4" in capsys.readouterr().err
    assert isinstance(choose_launcher(1), TorchrunLauncher)
    with pytest.raises(UnsupportedLayout, match="multiple of 4"):
        choose_launcher(4)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "4"}, "RANK=0 and WORLD_SIZE=4 without MASTER_ADDR and MASTE"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a"}, "WORLD_SIZE=1 without MASTER_PORT"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 and WORLD_SIZE=4, and must be numbers, the fi"),
        ({"RANK": "", "WORLD_SIZE": "four"}, "RANK= and WORLD_SIZE=four, and must be numbers"),
    ],
    ids=str,
)
def test_variables_of_torchrun_without_torchrun_are_rejected(
    variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnsupportedLayout, match=says) as caught:
        choose_launcher()
    assert "unset RANK and WORLD_SIZE to run without it" in str(caught.value)


def _wait_for_a_rank_that_never_comes(port: int) -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torchrun._SECONDS_UNTIL_NOTICE = 0.1
    torchrun._TIMEOUT = timedelta(seconds=1)
    TorchrunLauncher().first(os.getpid)


def test_a_rank_that_waits_says_for_what(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    process = multiprocessing.get_context("fork").Process(
        target=_wait_for_a_rank_that_never_comes, args=(port,)
    )
    process.start()
    process.join()
    assert process.exitcode == 1
    assert (
        f"exaone-bridge: rank 0 waits for the other ranks of 2 at localhost:{port}; if torchrun "
        "has not started them, unset RANK and WORLD_SIZE.\n"
    ) in capfd.readouterr().err


@pytest.fixture
def tf32() -> Iterator[None]:
    """A process that multiplies in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("set_before", [None, "1"])
def test_full_fp32_restores_the_settings(
    tf32: None, monkeypatch: pytest.MonkeyPatch, set_before: str | None
) -> None:
    if set_before is None:
        monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    else:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", set_before)
    with contextlib.suppress(KeyError), full_fp32():
        assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
        raise KeyError
    assert os.environ.get("NVIDIA_TF32_OVERRIDE") == set_before
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32


def _write_late(report: Path) -> tuple[bool, bool]:
    """On a rank: let rank 0 write a report after a second.

    Returns:
        Whether the report exists when the launcher lets the rank go on, and whether the process
        group is still initialised.
    """
    import torch.distributed as dist

    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    with choose_launcher():
        if is_rank_zero():
            time.sleep(1)
            report.write_text("complete")
    return report.is_file(), dist.is_initialized()


def test_no_rank_ends_before_the_report_is_written(megatron_bridge: Any, tmp_path: Path) -> None:
    """A process group that was initialised before stays."""
    assert ForkLauncher(2).all(_write_late, tmp_path / "report") == [(True, True)] * 2


def _fail_everywhere() -> None:
    raise ValueError("everywhere")


def _fail_on_rank_one() -> None:
    import torch.distributed as dist

    print("output of Megatron")
    if dist.get_rank() == 1:
        raise ValueError("only here")


def _fail_alone() -> tuple[list[bool], str]:
    """On a rank: raise an error of all ranks, and on rank 1 another.

    Returns:
        Of each error whether it is local to the rank, and what the command line prints.
    """
    import torch.distributed as dist

    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size())}
    launcher, errors = choose_launcher(2), []
    with pytest.raises(ValueError, match="everywhere") as raised:
        launcher.first(_fail_everywhere)
    errors.append(raised.value)
    if rank == 1:  # rank 0 would wait for the other's result
        with pytest.raises(ValueError, match="only here") as raised:
            launcher.all(_fail_on_rank_one)
        errors.append(raised.value)
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_GRACE_SECONDS", 0)
        for error in errors:
            cli._print_error(str(error), error)
    return [is_local_to_rank(error) for error in errors], printed.getvalue()


def test_a_rank_that_fails_alone_reports_its_error(megatron_bridge: Any) -> None:
    """Rank 0 reports an error that all ranks have met."""
    assert ForkLauncher(2).all(_fail_alone) == [
        ([False], "everywhere\n"),
        ([False, True], "only here\n"),
    ]
