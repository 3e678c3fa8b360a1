"""A process group of many ranks in one process: collectives are copies of the same size.

Megatron-Core, Transformer Engine and torch run as on rank 0 of that many GPUs, with the shapes of
its shards and the calls of each collective. What is gathered are copies of this rank's own shard,
and what is reduced is this rank's own share, so values mean nothing. What is missing is the time of
NVLink and the waiting for other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["BACKEND", "CopyingGroup", "start_emulated_world"]

BACKEND = "copies"


def _done() -> dist.Work:
    """Return finished work: the copies are in order on the current stream.

    Its future has no result, because one without devices may not have tensors of a GPU.
    """
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(None)
    return torch._C._distributed_c10d._create_work_from_future(future)


class CopyingGroup(dist.ProcessGroup):
    """The groups that torch asks of the backend "copies"."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)

    def getBackendName(self) -> str:
        """Return the name of the backend."""
        return BACKEND

    def allreduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> dist.Work:
        """Read and write each tensor once."""
        for tensor in tensors:
            if self.size() > 1:
                tensor.copy_(tensor.clone())
        return _done()

    allreduce_coalesced = allreduce

    def _allgather_base(
        self, output: torch.Tensor, shard: torch.Tensor, opts: Any = None
    ) -> dist.Work:
        if shard.untyped_storage().data_ptr() == output.untyped_storage().data_ptr():
            shard = shard.clone()  # a part of the output: the distributed optimizer's parameters
        output.view(self.size(), -1).copy_(shard.reshape(1, -1))
        return _done()

    def allgather(
        self,
        outputs: Sequence[Sequence[torch.Tensor]],
        shards: Sequence[torch.Tensor],
        opts: Any = None,
    ) -> dist.Work:
        """Copy the shard to each output."""
        for gathered, shard in zip(outputs, shards, strict=True):
            for output in gathered:
                output.copy_(shard)
        return _done()

    def allgather_into_tensor_coalesced(
        self, outputs: Sequence[torch.Tensor], shards: Sequence[torch.Tensor], opts: Any = None
    ) -> dist.Work:
        """Copy each shard to every part of its output."""
        for output, shard in zip(outputs, shards, strict=True):
            self._allgather_base(output, shard)
        return _done()

    def _reduce_scatter_base(
        self, output: torch.Tensor, whole: torch.Tensor, opts: Any = None
    ) -> dist.Work:
        output.view(-1).copy_(whole.reshape(self.size(), -1)[self.rank()])
        return _done()

    def reduce_scatter_tensor_coalesced(
        self, outputs: Sequence[torch.Tensor], wholes: Sequence[torch.Tensor], opts: Any = None
    ) -> dist.Work:
        """Copy this rank's part of each tensor."""
        for output, whole in zip(outputs, wholes, strict=True):
            self._reduce_scatter_base(output, whole)
        return _done()

    def alltoall_base(
        self,
        output: torch.Tensor,
        given: torch.Tensor,
        output_sizes: Sequence[int],
        input_sizes: Sequence[int],
        opts: Any = None,
    ) -> dist.Work:
        """Copy as much of the input as the output has room for."""
        size = min(output.numel(), given.numel())
        output.view(-1)[:size].copy_(given.reshape(-1)[:size])
        return _done()

    def broadcast(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> dist.Work:
        """Leave the tensors as they are: this rank is the source."""
        return _done()

    def barrier(self, opts: Any = None) -> dist.Work:
        """Return at once."""
        return _done()


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> CopyingGroup:
    return CopyingGroup(rank, size)


def start_emulated_world(size: int) -> None:
    """Start torch.distributed as rank 0 of `size` ranks that this process stands for."""
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=size)
