"""Process groups inside `cpu_runtime`."""

from __future__ import annotations

import atexit
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.runtime.cpu import cpu_runtime

pytestmark = [
    pytest.mark.usefixtures("megatron_bridge"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU cpu_runtime changes nothing"),
]


@pytest.mark.parametrize(
    "options", [{}, {"backend": None}, {"backend": "nccl"}, {"backend": "gloo"}], ids=repr
)
def test_process_group_is_on_gloo(tmp_path: Path, options: dict[str, Any]) -> None:
    import torch.distributed as dist

    with cpu_runtime():
        dist.init_process_group(
            **options, init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        try:
            assert dist.get_backend() == "gloo"
            tensor = torch.ones(2, device="cuda")
            dist.all_reduce(tensor)
            assert tensor.tolist() == [1.0, 1.0]
        finally:
            dist.destroy_process_group()


def test_a_backend_is_also_taken_by_position(tmp_path: Path) -> None:
    import torch.distributed as dist

    with cpu_runtime():
        dist.init_process_group("nccl", f"file://{tmp_path}/store", world_size=1, rank=0)
        try:
            assert dist.get_backend() == "gloo"
        finally:
            dist.destroy_process_group()


def test_a_single_rank_needs_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Bridge sets these variables before it initialises; the port may be taken."""
    import torch.distributed as dist

    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with cpu_runtime():
            dist.init_process_group("nccl")
            try:
                tensor = torch.ones(2)
                dist.all_reduce(tensor, group=dist.new_group([0]))
                assert tensor.tolist() == [1.0, 1.0]
            finally:
                dist.destroy_process_group()


def test_process_groups_of_a_single_rank_end_before_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A program that leaves its groups alive was ended by SIGABRT now and then."""
    import torch.distributed as dist

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    at_exit: list[Any] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    before = threads()
    with cpu_runtime():
        dist.init_process_group("nccl")
        dist.new_group([0])
    assert threads() > before
    (leave,) = at_exit
    leave()
    assert not dist.is_initialized() and threads() == before
    leave()  # a program that has left its groups itself
