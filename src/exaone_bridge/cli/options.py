"""Arguments that several commands share, and what their values become. No torch."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from exaone_bridge.cli.outputs import STANDARD_OUTPUT
from exaone_bridge.cli.parser import UsageError
from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.schema.dtypes import DTYPE_ALIASES, MODEL_DTYPES
from exaone_bridge.schema.hf_snapshot import is_hub_id, snapshot_folder
from exaone_bridge.schema.parallel_layout import Layout

__all__ = [
    "add_backend",
    "add_conversion",
    "add_dtype",
    "add_follow_links",
    "add_json",
    "add_layout",
    "add_models",
    "add_path",
    "dtype",
    "find_models",
    "layout_of",
    "not_negative",
    "positive",
]

_SIZES = {
    "tp": "tensor-parallel size",
    "pp": "pipeline-parallel size",
    "vpp": "virtual pipeline stages per rank",
    "ep": "expert-parallel size",
    "etp": "expert tensor-parallel size",
    "cp": "context-parallel size",
}
_MAX_WORKERS = 256
_BACKENDS = ("auto", "torch", "transformer_engine")


def find_models(options: Namespace) -> None:
    """Replace ids on the Hugging Face Hub by the folders of their snapshots, downloaded if needed.

    Raises:
        CheckpointError: a snapshot is neither in the cache nor can it be downloaded.
        UsageError: a revision of folders.
    """
    ids = {
        name: str(path)
        for name in getattr(options, "models", ())
        if (path := getattr(options, name)) is not None and is_hub_id(path)
    }
    if not ids and getattr(options, "revision", None) is not None:
        raise UsageError("--revision: a folder has none; name an id on the Hugging Face Hub.")
    for name, hub_id in ids.items():
        setattr(options, name, snapshot_folder(hub_id, options.revision))


def layout_of(options: Namespace) -> Layout:
    """Return the parallel layout of the options.

    Raises:
        UnsupportedLayout: the sizes contradict each other.
    """
    given = {name: getattr(options, name) for name in (*_SIZES, "sp") if hasattr(options, name)}
    return Layout(**given)


def add_path(parser: ArgumentParser, name: str, metavar: str, what: str, **more: Any) -> None:
    """Add an argument that is a path."""
    parser.add_argument(name, metavar=metavar, type=Path, help=what, **more)


def add_json(parser: ArgumentParser) -> None:
    """Add --json, with or without a file."""
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        nargs="?",
        const=STANDARD_OUTPUT,
        help="JSON instead of text; without FILE or with `-` on standard output",
    )


def add_follow_links(parser: ArgumentParser) -> None:
    """Add --follow-links."""
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="read weights that are links to files outside the folder, which you trust",
    )


def add_models(
    parser: ArgumentParser, *, nargs: str | None = None, **models: tuple[str, str]
) -> None:
    """Add arguments that name a model: by a folder, or by its id on the Hugging Face Hub."""
    for name, (metavar, what) in models.items():
        add_path(parser, name, metavar, f"{what}, or an id on the Hugging Face Hub", nargs=nargs)
    parser.add_argument("--revision", metavar="REV", help="commit, branch or tag of a Hub id")
    parser.set_defaults(models=tuple(models))


def add_layout(parser: ArgumentParser, **defaults: int | None) -> None:
    """Add the sizes of the parallel layout, with these defaults; None: that of --tp."""
    group = parser.add_argument_group("parallel layout")
    for name, default in defaults.items():
        if name == "sp":
            group.add_argument("--sp", action="store_true", help="sequence parallelism over TP")
            continue
        text = f"{_SIZES[name]} (default: {'that of --tp' if default is None else default})"
        group.add_argument(f"--{name}", metavar="N", type=positive, default=default, help=text)


def add_backend(parser: ArgumentParser) -> None:
    """Add --backend."""
    parser.add_argument(
        "--backend",
        type=_backend,
        default="auto",
        help="auto (default), transformer_engine or torch",
    )


def add_conversion(parser: ArgumentParser) -> None:
    """Add --workers and --dry-run."""
    parser.add_argument(
        "--workers",
        metavar="N",
        type=_workers,
        default=1,
        help="processes, each with one or two tensors in memory (default: 1)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")


def add_dtype(parser: ArgumentParser) -> None:
    """Add --dtype, in which a command loads the model."""
    parser.add_argument(
        "--dtype",
        type=dtype,
        help="float32, bfloat16, float16, or fp32, bf16, fp16 (default: the checkpoint's)",
    )


def dtype(text: str) -> str:
    """Return the dtype that a name or its short form stands for."""
    name = DTYPE_ALIASES.get(text, text)
    if name not in MODEL_DTYPES:
        raise UnsupportedConfig("--dtype", got=text, known=MODEL_DTYPES, where="command line")
    return name


def _backend(text: str) -> str:
    if text not in _BACKENDS:
        raise UnsupportedConfig("backend", got=text, known=_BACKENDS, where="command line")
    return text


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    return _whole_number(text, 1)


def not_negative(text: str) -> int:
    """Return a whole number of at least 0."""
    return _whole_number(text, 0)


def _workers(text: str) -> int:
    return _whole_number(text, 1, _MAX_WORKERS)


def _whole_number(text: str, least: int, most: int = 2**63 - 1) -> int:
    value = int(text) if text.isdecimal() and len(text) < 20 else -1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return value
