"""Compares Hugging Face folders: tensors bit by bit, configurations key by key, files byte for byte. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exaone_bridge.schema.hf_files import COMPANION_FILES
from exaone_bridge.verification.checks.digests import Digest, digest_folder
from exaone_bridge.verification.report.report import Check

__all__ = ["compare_configs", "compare_digests", "compare_files", "compare_tensors"]

_NAMED = 5  # faults that a line names; it counts the others


def compare_tensors(left: Path, right: Path) -> Check:
    """Names both ways, types, shapes and every bit of every tensor.

    Raises:
        CheckpointError: a folder that cannot be read.
    """
    return compare_digests(digest_folder(left), digest_folder(right))


def compare_digests(first: Mapping[str, Digest], second: Mapping[str, Digest]) -> Check:
    """The same of digests; how tensors are cut into files does not matter."""
    faults = [f"{name} is missing" for name in sorted(first.keys() - second.keys())]
    faults += [f"{name} was added" for name in sorted(second.keys() - first.keys())]
    for name in sorted(first.keys() & second.keys()):
        a, b = first[name], second[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            faults.append(f"{name} is {a.dtype} {list(a.shape)}, then {b.dtype} {list(b.shape)}")
        elif a.sha256 != b.sha256:
            faults.append(f"{name} differs")
    figure = (
        f"{len(first)} tensors bitwise equal"
        if not faults
        else f"{len(faults)} of {len(first)} tensors differ"
    )
    values = {
        "tensors": len(first),
        "differing": len(faults),
        "names": [fault.split(" ")[0] for fault in faults],
    }
    return _check("tensors", figure, faults, values)


def _check(name: str, figure: str, faults: list[str], values: Mapping[str, Any]) -> Check:
    return Check(name, figure, not faults, "; ".join(faults[:_NAMED]), metrics=values)


def compare_configs(left: Mapping[str, Any], right: Mapping[str, Any]) -> Check:
    """Key by key, both ways, less the version stamp."""
    keys = (left.keys() | right.keys()) - {"transformers_version"}
    faulty = [key for key in sorted(keys) if _text(left, key) != _text(right, key)]
    faults = [
        f"{key}: {left.get(key, '(absent)')!r}, then {right.get(key, '(absent)')!r}"
        for key in faulty
    ]
    figure = (
        f"{len(keys)} keys equal" if not faults else f"{len(faults)} of {len(keys)} keys differ"
    )
    return _check(
        "config", figure, faults, {"keys": len(keys), "differing": len(faults), "names": faulty}
    )


def _text(config: Mapping[str, Any], key: str) -> str | None:
    """As a file has it: 1, 1.0 and true are three values, and an absent key is none of them."""
    return json.dumps(config[key], sort_keys=True) if key in config else None


def compare_files(left: Path, right: Path) -> Check:
    """Tokenizer, chat template and generation config, byte for byte, both ways."""
    names = {
        path.name
        for folder in (left, right)
        for glob in COMPANION_FILES
        for path in folder.glob(glob)
        if path.is_file()
    }
    faults = [
        name
        for name in sorted(names)
        if not ((left / name).is_file() and (right / name).is_file())
        or (left / name).read_bytes() != (right / name).read_bytes()
    ]
    figure = (
        f"{len(names)} files equal" if not faults else f"{len(faults)} of {len(names)} files differ"
    )
    values = {"files": len(names), "differing": len(faults), "names": faults}
    return Check("files", figure, not faults, ", ".join(faults[:_NAMED]), metrics=values)
