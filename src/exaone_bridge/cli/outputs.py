"""Output files of the commands: checked before the work begins, and `-` for standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from exaone_bridge.errors import OutputError, UnsupportedConfig
from exaone_bridge.schema.json_types import JSONMapping

__all__ = ["STANDARD_OUTPUT", "check_outputs", "unwritable", "write_json"]

STANDARD_OUTPUT: Final = Path("-")


def check_outputs(paths: Iterable[Path | None]) -> None:
    """Raise if an output file cannot be written; a file beside it is created to find out.

    Raises:
        UnsupportedConfig: A path is a folder, or in a folder that does not exist.
        OutputError: A path cannot be written.
    """
    for path in paths:
        if path is None or path == STANDARD_OUTPUT:
            continue
        parent = path.absolute().parent
        if path.is_dir() or not parent.is_dir():
            wanted = "a file in a folder that exists"
            raise UnsupportedConfig("output", got=str(path), wanted=wanted, where="command line")
        try:
            if path.exists():
                path.open("ab").close()  # which changes nothing
            else:
                import tempfile  # imported late: `inspect` is faster than this import

                tempfile.TemporaryFile(dir=parent).close()
        except OSError as error:
            raise unwritable(path, error) from error


def unwritable(path: str | Path, error: OSError) -> OutputError:
    """Return the error of an output that cannot be written."""
    return OutputError(
        path,
        f"cannot be written ({error.strerror or error})",
        remedy="change its permissions, or name a file that you can write",
    )


def write_json(data: JSONMapping, path: Path, *, indent: int | None = 2) -> None:
    """Write data as JSON to a file, or to standard output where the path is `-`.

    Args:
        data: Without cycles.
        path: The file.
        indent: Of nested values; None: all in one line.
    """
    text = json.dumps(data, indent=indent, check_circular=False) + "\n"
    if path == STANDARD_OUTPUT:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        path.write_text(text)
