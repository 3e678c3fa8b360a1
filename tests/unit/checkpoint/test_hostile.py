"""Hostile checkpoints: a typed error or a correct load, and no crash, hang or stray write.

Every input is a mutation of a real checkpoint. `HOSTILE=20000 pytest -s` on this file tries as many
as docs/benchmarks.md says; the count is printed.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import INDEX
from exaone_bridge.checkpoint.megatron.tensors import MegatronCheckpoint
from exaone_bridge.checkpoint.reshard.plan import reshard_plan
from exaone_bridge.checkpoint.reshard.validate import validate_plan
from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.errors import BridgeError, CheckpointError
from exaone_bridge.schema.parallel_layout import Layout

TRIES = int(os.environ.get("HOSTILE", "2000"))
ONE_LAYER = {
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "vocab_size": 12,
    "hidden_size": 8,
}
MORE_MEMORY = 256 * 2**20  # bytes that all inputs together may add
SECONDS = 5.0  # that one input may take

DEEP = "<deep>"
NUMBERS = [
    0,
    -1,
    1,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    2**70,
    1.0,
    -0.0,
    1e400,
    True,
    None,
    "8",
    [8],
    {},
    "-0",
]
NAMES = [
    "", "..", ".", "/", "../model.safetensors", "/etc/passwd", "a/b", "a\\b", "\0", "\n",
    "x" * 5000,    "é", "\ud800", "%s", "model.safetensors", "__metadata__", "model.norm.weight",
    "C:\\x", "~", "con.safetensors", "-.safetensors",
]  # fmt: skip
DTYPES = ["F8_E8M0", "F4", "BF16", "F16", "F64", "C64", "f32", "", None, 32, ["F32"], "BOOL", "I8"]


@pytest.fixture(scope="module")
def sound(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small checkpoint in one file, and the same in two with an index."""
    from safetensors.torch import load_file, save_file

    single = tiny("exaone4-1.2b", **ONE_LAYER)
    sharded = tmp_path_factory.mktemp("hostile") / "sharded"
    shutil.copytree(single, sharded)
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {
        name: f"model-0000{1 + number % 2}-of-00002.safetensors"
        for number, name in enumerate(names)
    }
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, sharded / file)
    (sharded / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return single, sharded


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def written(value: Any) -> bytes:
    """JSON as safetensors writes it; DEEP is nested deeper than Python's own writer goes."""
    text = json.dumps(value, separators=(",", ":")).replace(
        json.dumps(DEEP), "[" * 5000 + "]" * 5000
    )
    return text.encode("utf-8", "surrogatepass")


def joined(header: Any, body: bytes) -> bytes:
    text = written(header)
    return len(text).to_bytes(8, "little") + text + body


def mutated_json(noise: random.Random, value: Any) -> Any:
    """One part of a JSON value changed: a number, a name, a type, a key, or the depth."""
    value = copy.deepcopy(value)
    at = value
    for _ in range(noise.randrange(1, 5)):
        inner = (
            [key for key in at if isinstance(at[key], dict) and at[key]]
            if isinstance(at, dict)
            else []
        )
        if not inner or noise.random() < 0.3:
            break
        at = at[noise.choice(inner)]
    key = noise.choice(list(at))
    match noise.randrange(8):
        case 0:
            del at[key]
        case 1:
            at[noise.choice(NAMES)] = at[key]
        case 2:
            at[noise.choice(NAMES)] = at.pop(key)
        case 3:
            at[key] = noise.choice([DEEP, [[]] * 100, {"a": DEEP}])
        case 4 if isinstance(at[key], list) and at[key]:
            at[key][noise.randrange(len(at[key]))] = noise.choice(NUMBERS)
        case 5 if isinstance(at[key], list):
            at[key] = at[key] + [noise.choice(NUMBERS)] if noise.random() < 0.5 else at[key][:-1]
        case 6:
            at[key] = noise.choice(DTYPES + NAMES)
        case _:
            at[key] = noise.choice(NUMBERS)
    return value


def mutated_bytes(noise: random.Random, data: bytes) -> bytes:
    """The header's length, bits of the header, or the size of the file changed."""
    changed = bytearray(data)
    match noise.randrange(7):
        case 0:
            changed[:8] = noise.choice(
                [0, 1, 7, len(data), 2**32, 2**63, 2**64 - 1, noise.randrange(2**20)]
            ).to_bytes(8, "little")
        case 1:
            for _ in range(noise.choice([1, 3, 30])):
                changed[noise.randrange(min(len(data), 3000))] ^= 1 << noise.randrange(8)
        case 2:
            del changed[noise.randrange(len(data)) :]
        case 3:
            changed += bytes(noise.choice([1, 8, 4096]))
        case 4:
            at = noise.randrange(8, 1500)
            changed[at:at] = noise.choice(
                [b"{", b"[" * 3000, b'"', b"\0", b"\xff", b'{"a":' * 500, b",", b"1e999", b"NaN"]
            )
        case 5:
            at = data.find(noise.choice([b"data_offsets", b"shape", b"dtype", b"model."]))
            changed[at : at + 5] = noise.choice([b"dtype", b"shape", b"....."])
        case _:
            changed = bytearray(noise.randbytes(noise.choice([0, 5, 8, 200])))
    return bytes(changed)


def mutate(noise: random.Random, folder: Path) -> str:
    """Change one file of the folder; what was done."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    kind = noise.choice(["json", "bytes", "overlap", "index", "link", "config", "double"])
    file = noise.choice(files)
    data = file.read_bytes()
    match kind:
        case "json":
            header, body = split(data)
            file.write_bytes(joined(mutated_json(noise, header), body))
        case "bytes":
            file.write_bytes(mutated_bytes(noise, data))
        case "overlap":
            header, body = split(data)
            one, other = noise.sample([name for name in header if name != "__metadata__"], 2)
            begin, end = header[one]["data_offsets"]
            shift = noise.choice([1, -1, 8, len(body), -begin])
            header[one]["data_offsets"] = noise.choice(
                [[begin + shift, end + shift], header[other]["data_offsets"], [end, begin]]
            )
            file.write_bytes(joined(header, body))
        case "index" if index.exists():
            index.write_bytes(written(mutated_json(noise, json.loads(index.read_text()))))
        case "link":
            target = noise.choice(
                [
                    "/etc/passwd",
                    "/dev/zero",
                    "..",
                    str(folder),
                    file.name,
                    "../outside",
                    "/dev/null",
                ]
            )
            file.unlink()
            file.symlink_to(target)
        case "config":
            path = folder / "config.json"
            path.write_bytes(written(mutated_json(noise, json.loads(path.read_text()))))
        case _:  # a key twice, which a JSON reader would drop silently
            header, body = split(data)
            name = noise.choice(list(header))
            text = (
                json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}" + "}"
            )
            file.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + body)
    return kind


def correct(folder: Path) -> None:
    """An accepted folder is what safetensors reads, bit for bit, and its plan is a bijection."""
    source = HFCheckpoint.open(folder)
    validate_plan(reshard_plan(source.model, Layout(tp=2)), source.shapes)
    for name, info in source.tensors.items():
        with safe_open(info.file, framework="pt") as file:
            expected = file.get_tensor(name)
        found = source.read(name)
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert bytes(found.reshape(-1).view(torch.uint8).numpy()) == bytes(
            expected.reshape(-1).view(torch.uint8).numpy()
        )


def surroundings(folder: Path) -> dict[str, Any]:
    return {str(path): path.is_dir() or path.lstat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("tries", [200, pytest.param(TRIES, marks=pytest.mark.slow)])
def test_a_hostile_folder_is_rejected_or_read_right(
    sound: tuple[Path, Path], tmp_path: Path, tries: int
) -> None:
    noise = random.Random(7)
    (tmp_path / "outside").write_bytes((sound[0] / "model.safetensors").read_bytes())
    parent = tmp_path / "parent"
    parent.mkdir()
    before, memory = surroundings(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[tuple[str, str]] = Counter()
    slowest = 0.0
    for _ in range(tries):
        folder = parent / "model"
        shutil.copytree(noise.choice(sound), folder)
        kind = mutate(noise, folder)
        started = time.perf_counter()
        try:
            correct(folder)
            outcomes[kind, "read right"] += 1
        except BridgeError as error:
            message = str(error)
            plain = len(message.splitlines()) == 1 and message.isprintable() and len(message) < 3000
            assert plain, message[:2000]
            outcomes[kind, "rejected"] += 1
        slowest = max(slowest, time.perf_counter() - started)
        shutil.rmtree(folder)
    assert surroundings(tmp_path) == before
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    print(
        f"{tries} hostile folders, slowest {slowest:.2f} s, "
        f"memory +{grown / 2**20:.0f} MiB: {dict(outcomes)}"
    )
    assert slowest < SECONDS and grown < MORE_MEMORY
    assert sum(count for (_, end), count in outcomes.items() if end == "rejected") > tries // 2
    assert len({kind for kind, _ in outcomes}) == 7


# --- Megatron checkpoints ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def megatron(
    megatron_bridge: Any, sound: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "megatron"
    import_checkpoint(sound[0], folder, Layout())
    return folder


class Bomb:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def damaged_metadata(noise: random.Random, data: bytes, trace: Path) -> bytes:
    if noise.random() < 0.1:
        return pickle.dumps(Bomb(str(trace)))
    changed = bytearray(data)
    for _ in range(noise.choice([1, 2, 8, 60])):
        changed[noise.randrange(len(changed))] = noise.randrange(256)
    if noise.random() < 0.2:
        del changed[noise.randrange(len(changed)) :]
    return bytes(changed)


def test_a_hostile_megatron_checkpoint_is_rejected_or_read_completely(
    megatron: Path, sound: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its metadata is a pickle: no code is run, and no file outside is opened."""
    noise = random.Random(8)
    config = json.loads((sound[0] / "config.json").read_text())
    tries, rejected, read = 200, 0, 0
    folder = tmp_path / "megatron"
    shutil.copytree(megatron, folder)
    metadata, data_file = (
        folder / "iter_0000000" / ".metadata",
        folder / "iter_0000000" / "__0_0.distcp",
    )
    sound_metadata, bits = metadata.read_bytes(), data_file.read_bytes()
    for _ in range(tries):
        if noise.random() < 0.7:
            metadata.write_bytes(damaged_metadata(noise, sound_metadata, tmp_path / "ran"))
        else:
            metadata.write_bytes(sound_metadata)
            damaged = bytearray(bits)
            for _ in range(noise.choice([1, 20])):
                damaged[noise.randrange(len(damaged))] ^= 1 << noise.randrange(8)
            data_file.write_bytes(
                damaged[: noise.choice([len(damaged), noise.randrange(len(damaged))])]
            )
        try:
            source = MegatronCheckpoint(folder, config)
            for name, spec in source.tensors.items():
                assert source.read(name).shape == spec.shape
            read += 1  # a flipped bit of a weight is a weight
        except BridgeError as error:
            assert len(str(error).splitlines()) == 1
            rejected += 1
        data_file.write_bytes(bits)
    assert not (tmp_path / "ran").exists()
    print(f"{tries} hostile Megatron checkpoints: {rejected} rejected, {read} read completely")
    assert rejected > tries // 4 and rejected + read == tries


ESCAPES: dict[str, Callable[[Any], None]] = {
    "a chunk in another folder": lambda info: setattr(info, "relative_path", "../../secret"),
    "a chunk of the root": lambda info: setattr(info, "relative_path", "/etc/passwd"),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_chunk_that_lies_elsewhere_is_rejected(name: str, megatron: Path, tmp_path: Path) -> None:
    folder = tmp_path / "megatron"
    shutil.copytree(megatron, folder)
    path = folder / "iter_0000000" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    index = next(
        key for key in metadata.storage_data if key.fqn == "embedding.word_embeddings.weight"
    )
    ESCAPES[name](metadata.storage_data[index])
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        export_checkpoint(folder, tmp_path / "output")
    assert not (tmp_path / "output").exists() and not (tmp_path / ".output.partial").exists()


def test_chunks_that_overlap_or_leave_gaps_are_rejected(
    megatron: Path, sound: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "megatron"
    shutil.copytree(megatron, folder)
    path = folder / "iter_0000000" / ".metadata"
    config = json.loads((sound[0] / "config.json").read_text())
    for change, message in (
        (lambda chunks: chunks.append(chunks[0]), "used twice"),
        (lambda chunks: chunks.pop(), "of which 0"),
    ):
        metadata = pickle.loads((megatron / "iter_0000000" / ".metadata").read_bytes())
        change(metadata.state_dict_metadata["embedding.word_embeddings.weight"].chunks)
        path.write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match=message):
            MegatronCheckpoint(folder, config).read("model.embed_tokens.weight")
