"""Saves the Megatron-Core model of a world as a Hugging Face folder; the ranks share the writing.

Each parameter is gathered on one of the ranks that share it, which writes the Hugging Face tensors
that it is made of to their places in files of the full size. Rows are written from where they lie.
The output gets its name when all of it is written.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from exaone_bridge.checkpoint.dtypes import SAFETENSORS_NAMES, byte_view
from exaone_bridge.checkpoint.hf.headers import TensorInfo, TensorSpec
from exaone_bridge.checkpoint.hf.reader import TensorReader
from exaone_bridge.checkpoint.hf.shards import (
    ShardWriter,
    assign_files,
    shard_layout,
    write_index,
)
from exaone_bridge.checkpoint.reshard.load import LocalModel, match_params, plan_local
from exaone_bridge.checkpoint.reshard.plan import LocalParam, ShardSpec, writer_of, writer_ordinal
from exaone_bridge.checkpoint.staging import (
    check_space,
    full_disk_as_output_error,
    resumable,
    target_of,
)
from exaone_bridge.errors import BridgeError, OutputError
from exaone_bridge.schema.model_family import ModelDescription

__all__ = [
    "ShardGroup",
    "as_on_disk",
    "gather_hf_tensors",
    "raise_on_all_ranks",
    "save_weights",
    "write_atomically",
]

_NUM_WRITERS = 2  # one fills the page cache while the other waits for it

TensorPieces = tuple[str, list[memoryview]]  # a tensor's name and its bytes, piece by piece


class ShardGroup(NamedTuple):
    """The ranks that share one copy of a parameter, and the number of such copies.

    Attributes:
        ranks: A process group, in the order of the shards.
        replica: The index of this group's copy.
        num_replicas: Copies of the parameter in the world.
    """

    ranks: dist.ProcessGroup
    replica: int
    num_replicas: int


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise on every rank what one rank raises in the body; with several, the first rank's error.

    The body must not call collectives, because a rank that fails would not take part in them.
    """
    error: BaseException | None = None
    try:
        yield
    except (BridgeError, OSError) as caught:
        error = caught
    errors: list[BaseException | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((other for other in errors if other is not None), None)
    if first is not None:
        raise error or first


def write_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Let all ranks write a folder that gets its name when all of them have finished.

    Parent folders are created. If the folder exists, as a link to one and a mount point do, it
    keeps its other files; each new file then gets its name at the end, index and config last.

    Args:
        target: The output, the same on every rank.
        write: Called on every rank with the folder to write into.
    """
    with contextlib.ExitStack() as stack:
        folder: list[Path | None] = [None]
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                with contextlib.suppress(FileExistsError, NotADirectoryError):
                    target.absolute().parent.mkdir(parents=True, exist_ok=True)
                folder = [stack.enter_context(resumable(target, merge=True))]
        dist.broadcast_object_list(folder, src=0)
        if folder[0] is not None:
            write(folder[0])
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                stack.close()


def save_weights(
    folder: Path,
    model: ModelDescription,
    local: LocalModel,
    *,
    dtype: torch.dtype,
    dense: ShardGroup,
    expert: ShardGroup,
    files: Mapping[str, str] | None,
    passthrough: Mapping[str, TensorInfo],
) -> int:
    """Write this rank's share of a model's tensors.

    Args:
        folder: The same on every rank; rank 0 creates the files.
        model: The model.
        local: This rank's part of it.
        dtype: Of the model's parameters, except those that are kept in fp32.
        dense: The ranks that share this rank's parameters.
        expert: The ranks that share this rank's expert weights.
        files: Tensor -> file name, used if it has exactly these tensors; None: files of 5 GB.
        passthrough: Passthrough tensors of the source, which rank 0 copies.

    Returns:
        The bytes that this rank wrote.

    Raises:
        UnmappedTensors: Keys are missing in the model, or it has unexpected ones.
        CheckpointError: A parameter has another shape than the config gives it.
        OutputError: The disk is full, or a parameter has another dtype.
    """
    specs: list[TensorSpec | TensorInfo] = [
        TensorSpec(
            name,
            "F32" if tensor.fp32 else SAFETENSORS_NAMES[dtype],
            tensor.shape(model.dims),
        )
        for name, tensor in model.hf_tensors.items()
    ]
    specs += passthrough.values()
    sizes = {spec.name: spec.nbytes for spec in specs}
    same_tensors = files is not None and files.keys() == sizes.keys()
    layout = shard_layout(specs, files if files and same_tensors else assign_files(sizes))
    resumed: list[frozenset[str]] = [frozenset()]
    with raise_on_all_ranks():
        plan = plan_local(model, local)
        params = match_params(plan, local)
        params = [(param, as_on_disk(param, tensor, dtype)) for param, tensor in params]
        if dist.get_rank() == 0:
            check_space(target_of(folder), layout.nbytes)
            resumed = [ShardWriter.create(folder, layout).resumed]
    dist.broadcast_object_list(resumed, src=0)
    orders = {id(param): order for order, param in enumerate(plan.params)}
    with (
        raise_on_all_ranks(),
        full_disk_as_output_error(target_of(folder)),
        ShardWriter(folder, layout, resumed[0]) as writer,
    ):
        with _WriterPool(writer) as pool:
            for param, tensor in params:
                if not param.is_tied_copy:
                    group = expert if param.param.is_expert else dense
                    pool.put(gather_hf_tensors(param, tensor, group, orders[id(param.param)]))
        if dist.get_rank() == 0:
            reader = TensorReader()
            for name, info in passthrough.items():
                writer.put(name, [byte_view(reader.read(info))])
            write_index(folder, layout)
    return writer.written_bytes


class _WriterPool:
    """Threads that write; the first failure is raised at the end of the body.

    A rank that cannot write still takes part in all gathers, because the others would wait for it.
    """

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        self._failure: BaseException | None = None
        self._pool = ThreadPoolExecutor(_NUM_WRITERS)
        self._slots = threading.Semaphore(2 * _NUM_WRITERS)  # bounds the gathered parameters

    def __enter__(self) -> _WriterPool:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._pool.shutdown()
        if error is None and self._failure is not None:
            raise self._failure

    def put(self, tensors: Iterable[TensorPieces]) -> None:
        """Have the tensors of one parameter written."""
        if tensors:
            self._slots.acquire()
            self._pool.submit(self._write, tensors)

    def _write(self, tensors: Iterable[TensorPieces]) -> None:
        try:
            for name, pieces in tensors if self._failure is None else ():
                self._writer.put(name, pieces)
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            self._slots.release()


def as_on_disk(local: LocalParam, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a parameter in the dtype that its Hugging Face tensor has.

    Args:
        local: The parameter.
        tensor: `[*local.shard.shape]`.
        dtype: The model's dtype.

    Returns:
        `[*local.shard.shape]`.

    Raises:
        OutputError: The parameter has a dtype that is not the expected one.
    """
    hf = local.param.mapping.hf[0]
    expected = torch.float32 if hf.fp32 else dtype
    if hf.fp32_param:
        return tensor.detach().to(expected)
    if tensor.dtype != expected:
        raise OutputError(
            local.name,
            f"has dtype {tensor.dtype}, and the model's is {expected}",
            remedy="cast it first",
        )
    return tensor


def gather_hf_tensors(
    local: LocalParam, tensor: torch.Tensor, group: ShardGroup, order: int
) -> Iterator[TensorPieces] | tuple[()]:
    """Gather a parameter on the rank that writes it.

    Args:
        local: The parameter.
        tensor: This rank's shard `[*local.shard.shape]`.
        group: The ranks that share it.
        order: The index of the parameter's mapping in the plan.

    Returns:
        The Hugging Face tensors `[*local.param.shapes[index]]` that it is made of, in pieces; none
        on the ranks that do not write it.
    """
    shards = local.param.shards
    ordinal = writer_ordinal(order, local.indices)
    chosen, replica = writer_of(ordinal, dist.get_world_size(group.ranks), group.num_replicas)
    if replica != group.replica:
        return ()
    writes = dist.get_rank(group.ranks) == chosen
    by_rank = [tensor.detach()]
    if len(shards) > 1:
        by_rank = _gather(by_rank[0], shards, group.ranks, chosen, writes)
    if not writes:
        return ()
    by_rank = [part.cpu().contiguous() for part in by_rank]
    return (
        (
            hf.numbered(*local.indices).name,
            _pieces(local.param.shapes[index], index, shards, by_rank),
        )
        for index, hf in enumerate(local.param.mapping.hf)
    )


def _gather(
    tensor: torch.Tensor,
    shards: tuple[ShardSpec, ...],
    group: dist.ProcessGroup,
    chosen: int,
    writes: bool,
) -> list[torch.Tensor]:
    """Gather the shards of all ranks on the chosen one; as bytes, which every backend can send."""
    own = tensor.contiguous().view(-1).view(torch.uint8)
    gathered = (
        [own if rank == chosen else torch.empty_like(own) for rank in range(len(shards))]
        if writes
        else None
    )
    dist.gather(own, gathered, group=group, group_dst=chosen)
    if gathered is None:
        return []
    return [
        part.view(tensor.dtype).view(shard.shape)
        for part, shard in zip(gathered, shards, strict=True)
    ]


def _pieces(
    shape: tuple[int, ...],
    index: int,
    shards: tuple[ShardSpec, ...],
    by_rank: list[torch.Tensor],
) -> list[memoryview]:
    """Return the bytes of one Hugging Face tensor: full rows from where they lie, else a copy.

    Args:
        shape: Of the tensor.
        index: Of the tensor in its mapping.
        shards: Of the parameter.
        by_rank: The shards' tensors.
    """
    copies = [
        (copy, part)
        for shard, part in zip(shards, by_rank, strict=True)
        for copy in shard.copies
        if copy.tensor == index
    ]
    copies.sort(key=lambda pair: pair[0].hf)
    slices = [
        (
            copy,
            part[tuple(slice(begin, end) for begin, end in copy.megatron)].reshape(
                [end - begin for begin, end in copy.hf]
            ),
        )
        for copy, part in copies
    ]
    if all(
        span == (0, length)
        for copy, _ in slices
        for span, length in zip(copy.hf[1:], shape[1:], strict=True)
    ):
        return [byte_view(source) for _, source in slices]
    tensor = torch.empty(shape, dtype=by_rank[0].dtype)
    for copy, source in slices:
        tensor[tuple(slice(begin, end) for begin, end in copy.hf)].copy_(source)
    return [byte_view(tensor)]
