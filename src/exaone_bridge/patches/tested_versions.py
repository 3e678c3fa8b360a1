"""The newest versions of other packages with which exaone_bridge was tested. No torch."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import warnings

__all__ = ["TESTED", "newer_than_tested", "release", "warn_of_newer_versions"]

TESTED = {"megatron-bridge": "0.6.2", "megatron-core": "0.19.2", "transformers": "5.12.1"}


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: (0, 19, 2) of "0.19.2rc0+cu13", without final zeros.

    The package `packaging` may not be installed where this is called.
    """
    numbers = [int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0])]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def newer_than_tested() -> dict[str, str]:
    """Return the installed packages of `TESTED` that are newer: name -> installed version."""
    found = {}
    for name, tested in TESTED.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # its source is on the import path
            continue
        if release(installed) > release(tested):
            found[name] = installed
    return found


@functools.cache
def warn_of_newer_versions() -> None:
    """Warn, once a process, of packages that are newer than those that were tested."""
    for name, installed in newer_than_tested().items():
        warnings.warn(
            f"{name} {installed} is newer than {TESTED[name]}, with which exaone_bridge was "
            "tested; `exaone-bridge doctor` names the patches whose code has changed.",
            stacklevel=2,
        )
