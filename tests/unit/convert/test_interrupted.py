"""Exports that are killed, whose rank dies, or whose disk is full: the next one continues.

`KILLS=50 pytest tests/unit/convert/test_interrupted.py` kills as often as docs/benchmarks.md says.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.checkpoint import staging
from exaone_bridge.checkpoint.hf import shards
from exaone_bridge.checkpoint.megatron import torch_dist_write
from exaone_bridge.checkpoint.reshard import save
from exaone_bridge.convert import to_hf
from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.errors import CheckpointError, OutputError
from exaone_bridge.runtime.fork import ForkLauncher, RankFailure
from exaone_bridge.schema.parallel_layout import Layout

KILLS = int(os.environ.get("KILLS", "6"))
# 30 MB in eight files: an export takes as long as it takes to be killed in
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "dtype": "bfloat16", "vocab_size": 1001}
PARTS = 4_000_000


@pytest.fixture(scope="module")
def source(megatron_bridge: Any, tiny: Any) -> Path:
    return tiny("exaone4", **WIDE)


@pytest.fixture(scope="module")
def megatron(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted") / "megatron"
    import_checkpoint(source, folder, Layout(), workers=2)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def _stream(began: Path, megatron: Path, target: Path, workers: int) -> None:
    began.touch()
    export_checkpoint(megatron, target, workers=workers, max_shard_bytes=PARTS)


def _save_rank(began: Path, source: Path, target: Path, layout: Layout) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    bridge = AutoBridge.from_hf_pretrained(source)
    model = build(bridge, layout)
    torch.distributed.barrier()
    began.touch()
    bridge.save_hf_pretrained(model, target, show_progress=False)


def _world(began: Path, source: Path, target: Path, ranks: int) -> None:
    layout = Layout(tp=ranks // 2 or 1, pp=min(ranks, 2))
    ForkLauncher(layout.ranks).all(_save_rank, began, source, target, layout)


def _alone(run: Callable[..., None], *args: Any) -> None:
    """The body of a process of its own, with a group of its own."""
    os.setsid()
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    run(*args)


def killed(run: Callable[..., None], began: Path, args: tuple[Any, ...], after: float) -> bool:
    """Run it in a process and kill that after a while; whether it was still running."""
    began.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(run, began, *args))
    process.start()
    while not began.exists() and process.is_alive():
        time.sleep(0.002)
    process.join(after)
    running = process.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return running


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("way", ["stream", "world"])
def test_killed_at_any_moment(
    way: str, ranks: int, source: Path, megatron: Path, tmp_path: Path
) -> None:
    run, origin = (_stream, megatron) if way == "stream" else (_world, source)
    began = tmp_path / "began"
    started = time.perf_counter()
    assert not killed(run, began, (origin, tmp_path / "complete", ranks), 300)
    lasted = time.perf_counter() - max(
        started, began.stat().st_mtime - time.time() + time.perf_counter()
    )
    wanted = digests(tmp_path / "complete")
    assert len(wanted) >= (12 if way == "stream" else 6)
    noise = random.Random(ranks)
    kills = KILLS if way == "stream" or KILLS > 10 else 2
    running = complete = 0
    target = tmp_path / "output"
    for _ in range(kills):
        running += killed(run, began, (origin, target, ranks), noise.uniform(0, 1.1 * lasted))
        if target.exists():  # it was faster: what is there is complete, and another begins
            assert digests(target) == wanted
            complete += 1
            target.rename(tmp_path / f"complete{complete}")
    print(
        f"{way}, {ranks} ranks: {kills} kills in {lasted:.2f} s, {running} while it ran, "
        f"{complete} complete before"
    )
    assert running
    assert not killed(run, began, (origin, target, ranks), 300)
    assert digests(target) == wanted
    assert sorted(tmp_path.glob(".*")) == []


def test_what_is_there_is_kept_and_what_is_wrong_is_written(
    megatron: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Complete files are kept, with their modification time; truncated and other files are not."""
    export_checkpoint(megatron, tmp_path / "complete", max_shard_bytes=PARTS)
    wanted = digests(tmp_path / "complete")
    target = tmp_path / "output"
    partial = staging.partial_folder(target)
    (tmp_path / "complete").rename(partial)
    files = sorted(partial.glob("*.safetensors"))
    data = bytearray(files[1].read_bytes())
    data[-5] ^= 1
    files[1].write_bytes(data)
    files[2].unlink()
    os.truncate(files[3], 1000)
    files[4].write_bytes(files[5].read_bytes())
    (partial / "model-00099-of-00099.safetensors").write_bytes(b"of another layout")
    (partial / "tokenizer.old").write_text("stale")
    (partial / "folder").mkdir()
    before = {file: file.stat().st_mtime_ns for file in files if file.exists()}
    done = export_checkpoint(megatron, target, max_shard_bytes=PARTS)
    assert digests(target) == wanted
    assert 0 < done.kept_bytes < done.nbytes
    unchanged = [
        file.name for file in before if (target / file.name).stat().st_mtime_ns == before[file]
    ]
    assert unchanged == [
        file.name for number, file in enumerate(files) if number not in (1, 2, 3, 4)
    ]


def test_two_at_once(megatron: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(staging, "_LOCK_ATTEMPTS", 2)
    with (
        staging.resumable(tmp_path / "output"),
        pytest.raises(CheckpointError, match="another process is writing"),
    ):
        export_checkpoint(megatron, tmp_path / "output")
    assert (tmp_path / "output").is_dir()  # the first one's


# --- disk full --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_too_small_is_rejected_before_anything(
    megatron: Path, source: Path, small_disk: Path
) -> None:
    with pytest.raises(
        OutputError, match=r"0\.02 GB free, and 0\.04 GB are still to be written; free some space"
    ):
        export_checkpoint(megatron, small_disk / "output")
    with pytest.raises(OutputError, match="still to be written"):
        import_checkpoint(source, small_disk / "output", Layout())
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up(
    workers: int, megatron: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if another program had taken the space; with space again, the next run continues."""
    target = small_disk / "output"
    with monkeypatch.context() as patch:
        patch.setattr(to_hf, "check_space", lambda *_: None)
        with pytest.raises(
            OutputError,
            match=r"the disk takes no more data \(No space left on device\); free some space",
        ):
            export_checkpoint(megatron, target, workers=workers, max_shard_bytes=PARTS)
    assert [path.name for path in small_disk.iterdir()] == [".output.partial"]
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    done = export_checkpoint(megatron, target, workers=workers, max_shard_bytes=PARTS)
    assert done.kept_bytes > 5_000_000
    export_checkpoint(megatron, tmp_path / "complete", max_shard_bytes=PARTS)
    assert digests(target) == digests(tmp_path / "complete")


@pytest.mark.parametrize("writer", ["a rank", "the parent process"])
def test_an_import_whose_disk_fills_up_leaves_nothing(
    writer: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the output, and promises no continuation: an import begins anew."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    name = "write_parameters" if writer == "a rank" else "write_metadata"
    monkeypatch.setattr(torch_dist_write, name, full)
    with pytest.raises(OutputError) as caught:
        import_checkpoint(source, tmp_path / "output", Layout())
    assert str(caught.value) == (
        f"{tmp_path / 'output'}: the disk takes no more data (No space left on device); "
        "free some space and run this again."
    )
    assert list(tmp_path.iterdir()) == []


def _save_with_a_full_rank(source: Path, target: Path, layout: Layout, full: int) -> None:
    """One rank's writes fail (RLIMIT_FSIZE), in the middle."""
    if torch.distributed.get_rank() == full:
        right = shards._write

        def write(handle: int, at: int, pieces: Any) -> None:
            if at > 1_000_000:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
            right(handle, at, pieces)

        shards._write = write
    _save_rank(target.with_name("began"), source, target, layout)


@pytest.mark.parametrize("full", [0, 3])
def test_one_rank_that_cannot_write_ends_all_of_them(
    full: int, source: Path, tmp_path: Path
) -> None:
    """At once, with the same text; the others do not wait for what it would have sent."""
    started = time.perf_counter()
    with pytest.raises(
        OutputError, match=r"the disk takes no more data \(File too large\); free some space"
    ):
        ForkLauncher(4).all(
            _save_with_a_full_rank, source, tmp_path / "output", Layout(tp=2, pp=2), full
        )
    assert time.perf_counter() - started < 60
    assert not (tmp_path / "output").exists()
    ForkLauncher(4).all(
        _save_rank, tmp_path / "began", source, tmp_path / "output", Layout(tp=2, pp=2)
    )
    ForkLauncher(1).all(_save_rank, tmp_path / "began", source, tmp_path / "other", Layout())
    assert digests(tmp_path / "output") == digests(tmp_path / "other")


# --- one rank dying ---------------------------------------------------------------------------


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _save_and_one_dies(source: Path, target: Path, layout: Layout) -> None:
    if torch.distributed.get_rank() == 2:
        save.ShardWriter.put = _die  # type: ignore[method-assign]
    _save_rank(target.with_name("began"), source, target, layout)


def test_one_rank_dies(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RankFailure):
        ForkLauncher(4).all(_save_and_one_dies, source, tmp_path / "output", Layout(tp=2, pp=2))
    assert not (tmp_path / "output").exists()
    ForkLauncher(4).all(
        _save_rank, tmp_path / "began", source, tmp_path / "output", Layout(tp=2, pp=2)
    )
    ForkLauncher(1).all(_save_rank, tmp_path / "began", source, tmp_path / "other", Layout())
    assert digests(tmp_path / "output") == digests(tmp_path / "other")


def test_one_worker_dies(megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = to_hf._export_rank

    def one_dies(*args: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            _die()
        return right(*args)

    with monkeypatch.context() as patch:
        patch.setattr(to_hf, "_export_rank", one_dies)
        with pytest.raises(RankFailure):
            export_checkpoint(megatron, tmp_path / "output", workers=2)
    assert not (tmp_path / "output").exists()
    export_checkpoint(megatron, tmp_path / "output", workers=2)
    export_checkpoint(megatron, tmp_path / "other")
    assert digests(tmp_path / "output") == digests(tmp_path / "other")
