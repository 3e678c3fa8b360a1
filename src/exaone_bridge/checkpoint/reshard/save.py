"""The planned export of a model in a world that is up: ranks share the writing; nothing is there until all of it is.

Each parameter is sent to one of the ranks that hold it, which writes the Hugging Face tensors it is made of at their
places in files that have their full size already. Rows are written from where they lie.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from exaone_bridge.checkpoint.dtypes import SAFETENSORS_NAMES
from exaone_bridge.checkpoint.hf.headers import TensorInfo, TensorSpec
from exaone_bridge.checkpoint.hf.reader import TensorReader
from exaone_bridge.checkpoint.hf.shards import ShardWriter, lay_out, write_index
from exaone_bridge.checkpoint.hf.writer import MAX_SHARD_BYTES, plan_shards
from exaone_bridge.checkpoint.reshard.load import LocalModel, matched, plan_here
from exaone_bridge.checkpoint.reshard.plan import LocalParam, ShardSpec, ordinal_of, writer
from exaone_bridge.checkpoint.staging import (
    FULL,
    as_usual,
    check_space,
    flush_one,
    partial_folder,
    resumable,
)
from exaone_bridge.errors import BridgeError, OutputError
from exaone_bridge.schema.model_family import ModelDescription

__all__ = ["Group", "hf_pieces", "into", "save", "together"]

_WRITERS = 2  # one fills the page cache while the other does


class Group(NamedTuple):
    """The ranks that cut a parameter among them, and this rank's number among the replicas of that group."""

    cutters: Any  # a process group, in the order of the cuts
    replica: int
    replicas: int


def agreed(error: BaseException | None) -> None:
    """Every rank says whether it failed; if one has, all of them raise what the first of them says."""
    errors: list[BaseException | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((other for other in errors if other is not None), None)
    if first is not None:
        raise error or first


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What one rank does inside may fail; all ranks learn of it at the end. Nobody waits for another inside."""
    error: BaseException | None = None
    try:
        yield
    except (BridgeError, OSError) as caught:
        error = caught
    agreed(error)


def into(target: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder on every rank; it takes its name when all have ended.

    A folder that is there already keeps its other files; each of ours then takes its name at the end, the index last.
    """
    with contextlib.ExitStack() as stack:
        there = target.is_dir() and not target.is_symlink()
        place = target.with_name(f"{target.name}.weights") if there else target
        with together():
            if dist.get_rank() == 0:
                folder = stack.enter_context(
                    _replaced(target, place) if there else resumable(place)
                )
        folder = partial_folder(place)
        write(folder)
        with together():
            if dist.get_rank() == 0:
                stack.close()


@contextlib.contextmanager
def _replaced(target: Path, place: Path) -> Iterator[Path]:
    with resumable(place) as folder:
        yield folder
        for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".json"):
            as_usual(path)
            flush_one(path)
            path.replace(target / path.name)
    place.rmdir()


def save(
    folder: Path,
    model: ModelDescription,
    placed: LocalModel,
    *,
    dtype: torch.dtype,
    dense: Group,
    expert: Group,
    files: Mapping[str, str] | None,
    passthrough: Mapping[str, TensorInfo],
) -> int:
    """Write this rank's share of a model's tensors; bytes written here.

    Args:
        folder: the same on every rank; rank 0 makes the files.
        dtype: of the model's parameters but those that are kept in fp32.
        files: tensor -> file, where it holds for these tensors; None: files of 5 GB.
        carried: tensors of the source's files that travel beside the model.

    Raises:
        UnmappedTensors, CheckpointError: the model is not what the rows say.
        OutputError: the disk is full.
    """
    specs: list[Any] = [
        TensorSpec(
            name,
            "F32" if tensor.fp32 else SAFETENSORS_NAMES[dtype],
            tensor.shape(model.dims),
        )
        for name, tensor in model.hf_tensors.items()
    ]
    specs += passthrough.values()
    sizes = {spec.name: spec.nbytes for spec in specs}
    shards = lay_out(
        specs,
        files if files and files.keys() == sizes.keys() else plan_shards(sizes, MAX_SHARD_BYTES),
    )
    made: list[Any] = [None]
    with together():
        plan = plan_here(model, placed)
        parameters = matched(plan, placed)
        for held, tensor in parameters:
            _check_dtype(held, tensor, dtype)
        if dist.get_rank() == 0:
            check_space_in(folder, shards.nbytes)
            made = [ShardWriter.create(folder, shards).resumed]
    dist.broadcast_object_list(made, src=0)
    out = ShardWriter(folder, shards, made[0])
    order = {id(part): number for number, part in enumerate(plan.parts)}
    with together(), contextlib.ExitStack() as stack:
        stack.callback(out.abandon)
        pool = stack.enter_context(_Writers(out))
        for held, tensor in parameters:
            if not held.replica:
                pool.put(
                    hf_pieces(
                        held,
                        tensor,
                        expert if held.part.per_expert else dense,
                        order[id(held.part)],
                    )
                )
        if (failure := pool.finish()) is not None:
            raise _said(folder, failure)
        if dist.get_rank() == 0:
            with TensorReader() as reader:
                for name, info in passthrough.items():
                    out.put(name, [_bytes(reader.read(info))])
            write_index(folder, shards)
        out.close()
    return out.written


class _Writers:
    """A few threads that write what comes. One that fails ends nothing: a rank that cannot write takes part in the
    gathering to its end, because all others would wait for it."""

    def __init__(self, out: ShardWriter) -> None:
        self._out = out
        self._failure: BaseException | None = None
        self._pool = ThreadPoolExecutor(_WRITERS)
        self._slots = threading.Semaphore(2 * _WRITERS)  # so many parameters are held at most

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def put(self, pieces: Iterable[tuple[str, list[memoryview]]]) -> None:
        """Have one parameter's tensors written."""
        if pieces:
            self._slots.acquire()
            self._pool.submit(self._write, pieces)

    def _write(self, pieces: Iterable[tuple[str, list[memoryview]]]) -> None:
        try:
            for name, content in pieces if self._failure is None else ():
                self._out.put(name, content)
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            self._slots.release()

    def finish(self) -> BaseException | None:
        """Wait for all; the first failure."""
        self._pool.shutdown()
        return self._failure


def _said(folder: Path, error: BaseException) -> BaseException:
    if not isinstance(error, OSError) or error.errno not in FULL:
        return error
    problem = f"the disk refuses to take more ({error.strerror})"
    return OutputError(folder, problem, remedy="free some space and export again, which continues")


def check_space_in(folder: Path, nbytes: int) -> None:
    """As `check_space`, for a folder that is being written already."""
    check_space(folder.with_name(folder.name.removeprefix(".").removesuffix(".partial")), nbytes)


def _check_dtype(held: LocalParam, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    wanted = torch.float32 if held.part.mapping.hf[0].fp32 else dtype
    if tensor.dtype != wanted:
        raise OutputError(
            held.name,
            f"has type {tensor.dtype}, and the model's is {wanted}",
            remedy="cast it first",
        )


def hf_pieces(
    held: LocalParam, tensor: torch.Tensor, group: Group, order: int
) -> Iterator[tuple[str, list[memoryview]]] | tuple[()]:
    """The Hugging Face tensors of a parameter, if this rank is to write them, after all ranks that cut it have sent."""
    cuts = held.part.cuts
    cutters = dist.get_world_size(group.cutters)
    chosen, replica = writer(ordinal_of(order, held.numbers), cutters, group.replicas)
    if replica != group.replica:
        return ()
    here = dist.get_rank(group.cutters) == chosen
    by_rank = [tensor.detach()]
    if len(cuts) > 1:
        by_rank = _gathered(by_rank[0], cuts, group.cutters, chosen, here)
    if not here:
        return ()
    by_rank = [part.cpu().contiguous() for part in by_rank]
    return (
        (hf.numbered(*held.numbers).name, _pieces(held.part.shapes[number], number, cuts, by_rank))
        for number, hf in enumerate(held.part.mapping.hf)
    )


def _gathered(
    tensor: torch.Tensor, cuts: tuple[ShardSpec, ...], group: Any, chosen: int, here: bool
) -> list[torch.Tensor]:
    """All ranks' cuts on the chosen rank; as bytes, which every backend can send."""
    mine = tensor.contiguous().view(-1).view(torch.uint8)
    everyones = (
        [mine if rank == chosen else torch.empty_like(mine) for rank in range(len(cuts))]
        if here
        else None
    )
    dist.gather(mine, everyones, group=group, group_dst=chosen)
    if everyones is None:
        return []
    return [
        part.view(tensor.dtype).view(cut.shape) for part, cut in zip(everyones, cuts, strict=True)
    ]


def _pieces(
    shape: tuple[int, ...], number: int, cuts: tuple[ShardSpec, ...], held: list[torch.Tensor]
) -> list[memoryview]:
    """The bytes of one Hugging Face tensor: where whole rows lie in the cuts, those rows; else put together."""
    copies = [
        (copy, part)
        for cut, part in zip(cuts, held, strict=True)
        for copy in cut.copies
        if copy.tensor == number
    ]
    copies.sort(key=lambda pair: pair[0].hf)
    boxes = [
        (
            copy,
            part[tuple(slice(begin, end) for begin, end in copy.megatron)].reshape(
                [e - b for b, e in copy.hf]
            ),
        )
        for copy, part in copies
    ]
    if all(
        span == (0, length)
        for copy, _ in boxes
        for span, length in zip(copy.hf[1:], shape[1:], strict=True)
    ):
        return [_bytes(source) for _, source in boxes]
    whole = torch.empty(shape, dtype=held[0].dtype)
    for copy, source in boxes:
        whole[tuple(slice(begin, end) for begin, end in copy.hf)].copy_(source)
    return [_bytes(whole)]


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
