"""`exaone_bridge.verify` on ranks that torchrun has started; here they are forked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.errors import BridgeError
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification import verify
from tests.helpers.reports import statuses


def _as_torchrun(*models: Path, **options: Any) -> dict[str, str]:
    """On a rank: as if torchrun had started it."""
    import torch.distributed as dist

    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    report = verify(*models, layout=Layout(tp=2), count=1, **options)
    assert report.passed, report.failures()
    return statuses(report)


def _streaming(*models: Path) -> dict[str, str]:
    return _as_torchrun(*models, stream=True)


@pytest.mark.parametrize("run", [_as_torchrun, _streaming])
def test_ranks_that_are_there_already_are_used(
    run: Callable[..., Any], megatron_bridge: Any, tiny: Any
) -> None:
    from exaone_bridge.runtime.fork import ForkLauncher

    first, second = ForkLauncher(2).all(run, tiny("exaone4"))
    assert first == second and first["logits"] == first["tensors"] == "passed"


@pytest.mark.slow
def test_a_megatron_checkpoint_in_torchruns_world(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    """Ranks cannot fork: a process that can exports it, and both ranks read what it wrote."""
    from exaone_bridge.convert.to_megatron import import_checkpoint
    from exaone_bridge.runtime.fork import ForkLauncher

    import_checkpoint(tiny("exaone4"), tmp_path / "megatron", Layout())
    first, second = ForkLauncher(2).all(_as_torchrun, tiny("exaone4"), tmp_path / "megatron")
    assert (
        first
        == second
        == dict.fromkeys(["tensors", "config", "files", "logits", "generation"], "passed")
    )


def _apart(folder: Path) -> list[str]:
    """On a rank: what a process of its own raises, and what its end looks like."""
    import torch.distributed as dist

    from exaone_bridge.convert.to_hf import export_checkpoint
    from exaone_bridge.runtime.launch import choose_launcher

    os.environ |= {
        "RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_PORT": "1",
    }
    messages, launcher = [], choose_launcher()
    for target, arguments in (
        (export_checkpoint, (folder / "nowhere", folder / "out")),
        (os._exit, (3,)),
    ):
        with pytest.raises(BridgeError) as raised:
            launcher.subprocess(target, *arguments)
        messages.append(f"{type(raised.value).__name__}: {raised.value}")
    assert (
        launcher.subprocess(os.getenv, "MASTER_PORT")
        is launcher.subprocess(os.getenv, "RANK")
        is None
    )
    assert launcher.subprocess(os.path.basename, "a/b") == "b"
    return messages


def test_a_process_of_its_own_answers_every_rank(megatron_bridge: Any, tmp_path: Path) -> None:
    from exaone_bridge.runtime.fork import ForkLauncher

    first, second = ForkLauncher(2).all(_apart, tmp_path)
    assert first == second
    assert first[0].startswith("CheckpointError") and str(tmp_path / "nowhere") in first[0]
    assert first[1].startswith("RankFailure: the process of _exit ended with 3; its output is in /")
