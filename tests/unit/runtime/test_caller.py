"""A script that calls the Python API keeps its process groups, environment and settings."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import exaone_bridge
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.runtime.torchrun import TorchrunLauncher
from tests.helpers.scripts import free_port


def _state() -> dict[str, object]:
    """What a call must not change of its caller's process."""
    from megatron.core import parallel_state

    return {
        "environment": dict(os.environ),
        "process groups": list(dist.distributed_c10d._world.pg_map),
        "model parallel": parallel_state.is_initialized(),
        "process group": os.getpgid(0),
        "handlers": [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)],
        "warnings": [*warnings.filters],
        "logging": logging.root.manager.disable,
        "threads": torch.get_num_threads(),
        "folder": Path.cwd(),
    }


def _call(source: Path, folder: Path) -> bool:
    """On a rank: use the API as a script does that trains with Megatron-Core itself."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    before = _state()
    report = exaone_bridge.verify(source, tp=2, quick=True)
    exaone_bridge.import_checkpoint(source, folder / "megatron", workers=2)
    exaone_bridge.export_checkpoint(folder / "megatron", folder / "exported")
    assert _state() == before and dist.get_world_size() == 1
    return report.passed


def test_a_caller_with_process_groups_keeps_them(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    assert ForkLauncher(1).all(_call, tiny("exaone4-1.2b"), tmp_path) == [True]


def _fail() -> None:
    raise ValueError("on every rank")


def _call_under_torchrun(source: Path, rank: int, port: str) -> None:
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= variables | {"MASTER_PORT": port}
    torch.set_num_threads(1)
    before = _state()
    report = exaone_bridge.verify(source, tp=2, quick=True)
    assert report.passed and not dist.is_initialized()
    assert _state() == before
    with pytest.raises(ValueError, match="on every rank"), TorchrunLauncher() as launcher:
        launcher.first(_fail)
    assert _state() == before
    dist.init_process_group("gloo")  # the script's own
    assert TorchrunLauncher(2).all(os.getpid)[rank] == os.getpid()
    dist.barrier()


def test_torchruns_ranks_are_left_as_they_were(megatron_bridge: Any, tiny: Any) -> None:
    context, port = multiprocessing.get_context("fork"), free_port()
    ranks = [
        context.Process(target=_call_under_torchrun, args=(tiny("exaone4-1.2b"), rank, port))
        for rank in range(2)
    ]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(timeout=60)
        each.kill()
    assert [each.exitcode for each in ranks] == [0, 0]
