"""Compares Hugging Face folders: tensors bit by bit, config key by key, other files byte by byte.

No torch is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from exaone_bridge.schema.json_types import JSONMapping
from exaone_bridge.verification.checks.digests import Digest, digest_folder
from exaone_bridge.verification.report.report import Check

__all__ = ["compare_configs", "compare_digests", "compare_files", "compare_tensors"]

_MAX_NAMED = 5  # differences that a check names; it counts the others


def compare_tensors(first: Path, second: Path) -> Check:
    """Check that two folders have the same tensors: names, dtypes, shapes and every bit.

    Raises:
        CheckpointError: a folder that cannot be read.
    """
    return compare_digests(digest_folder(first), digest_folder(second))


def compare_digests(first: Mapping[str, Digest], second: Mapping[str, Digest]) -> Check:
    """Check that two models have the same tensors, whatever files they are in."""
    differences = [f"{name} is missing" for name in sorted(first.keys() - second.keys())]
    differences += [f"{name} was added" for name in sorted(second.keys() - first.keys())]
    for name in sorted(first.keys() & second.keys()):
        a, b = first[name], second[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            differences.append(
                f"{name} is {a.dtype} {list(a.shape)}, then {b.dtype} {list(b.shape)}"
            )
        elif a.sha256 != b.sha256:
            differences.append(f"{name} differs")
    summary = (
        f"{len(differences)} of {len(first.keys() | second.keys())} tensors differ"
        if differences
        else f"{len(first)} tensors bitwise equal"
    )
    names = [difference.split(" ")[0] for difference in differences]
    return _check("tensors", summary, differences, names, len(first))


def compare_configs(expected: JSONMapping, *others: JSONMapping) -> Check:
    """Check that configs are equal key by key, but for the Transformers version.

    1, 1.0 and true are three values, and an absent key is none of them.
    """
    keys = set(expected).union(*others) - {"transformers_version"}
    differences = {
        key: f"{key}: {expected.get(key, '(absent)')!r}, then {other.get(key, '(absent)')!r}"
        for key in sorted(keys)
        for other in others
        if _json(expected, key) != _json(other, key)
    }
    summary = (
        f"{len(differences)} of {len(keys)} keys differ"
        if differences
        else f"{len(keys)} keys equal"
    )
    return _check("config", summary, list(differences.values()), list(differences), len(keys))


def _json(config: JSONMapping, key: str) -> str | None:
    return json.dumps(config[key], sort_keys=True) if key in config else None


def compare_files(first: Path, second: Path) -> Check:
    """Check that two folders have the same files, byte for byte, but for weights and config.json.

    What counts is decided by content here, not by the names that a conversion copies.
    """
    names = _files(first) | _files(second)
    differences = [
        name
        for name in sorted(names)
        if not ((first / name).is_file() and (second / name).is_file())
        or (first / name).read_bytes() != (second / name).read_bytes()
    ]
    summary = (
        f"{len(differences)} of {len(names)} files differ"
        if differences
        else f"{len(names)} files equal"
    )
    return _check("files", summary, differences, differences, len(names))


def _files(folder: Path) -> set[str]:
    found = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts[:-1])
        if path.is_file() and not hidden and not _is_of_weights(path):
            found.add(name)
    models = {name.parent for name in found if name.name == "config.json"} - {Path()}
    return {
        str(name)
        for name in found
        if name != Path("config.json") and not models & {name.parent, *name.parents}
    }


def _is_of_weights(path: Path) -> bool:
    """Whether a file holds tensors, or is the index of such files; by its first bytes."""
    with path.open("rb") as file:
        begin = file.read(4096)
    if path.suffix == ".json":
        return b'"weight_map"' in begin
    is_safetensors = begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") < 10**9
    return is_safetensors or begin.startswith((b"PK\x03\x04", b"GGUF", b"\x89HDF", b"\x80\x02"))


def _check(
    name: str, summary: str, differences: Sequence[str], names: Sequence[str], total: int
) -> Check:
    noun = "keys" if name == "config" else name
    return Check(
        name,
        summary,
        not differences,
        "; ".join(differences[:_MAX_NAMED]),
        metrics={noun: total, "differing": len(differences), "names": list(names)},
    )
