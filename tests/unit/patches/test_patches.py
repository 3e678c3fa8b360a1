"""The patches: PATCHES is complete, applying them again changes nothing, and the docs list them."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import exaone_bridge
from exaone_bridge.patches.patch import Patch, ValuePatch, patch_of
from exaone_bridge.patches.table import PATCHES, markdown

ROOT = Path(__file__).parents[3]
PACKAGE = str(Path(exaone_bridge.__file__).parent)
FUNCTION_PATCHES = [patch for patch in PATCHES if type(patch) is Patch]


def _modules() -> list[Any]:
    package = importlib.import_module("exaone_bridge.patches")
    return [
        importlib.import_module(f"{package.__name__}.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
    ]


def _target(patch: Patch) -> Any:
    module, _, path = patch.target.partition(":")
    owner: Any = importlib.import_module(module)
    *owners, name = path.split(".")
    found = inspect.getattr_static(functools.reduce(getattr, owners, owner), name)
    return getattr(found, "__func__", found)


def test_every_declared_patch_is_in_the_table() -> None:
    declared = [
        value
        for module in _modules()
        for value in vars(module).values()
        if isinstance(value, Patch) and value.replacement.__module__ == module.__name__
    ]
    assert sorted(patch.target for patch in declared) == sorted(patch.target for patch in PATCHES)
    assert len({patch.target for patch in PATCHES}) == len(PATCHES)


def _functions_of(owner: Any) -> list[FunctionType]:
    found = [getattr(value, "__func__", value) for value in vars(owner).values()]
    return [value for value in found if isinstance(value, FunctionType)]


def test_nothing_else_is_changed(megatron_bridge: Any) -> None:
    """Modules and classes of Megatron have no function of exaone_bridge but those in the table."""
    strangers = []
    for module in list(sys.modules.values()):
        if not getattr(module, "__name__", "").startswith("megatron."):
            continue
        classes = [value for value in vars(module).values() if inspect.isclass(value)]
        for owner in [module, *(one for one in classes if one.__module__ == module.__name__)]:
            strangers += [
                f"{owner.__name__}.{function.__name__}"
                for function in _functions_of(owner)
                if function.__code__.co_filename.startswith(PACKAGE)
                and patch_of(function) not in PATCHES
            ]
    assert strangers == []


@pytest.mark.parametrize("patch", FUNCTION_PATCHES, ids=lambda patch: patch.target)
def test_a_patch_is_applied_once_and_keeps_the_original(megatron_bridge: Any, patch: Patch) -> None:
    replaced = _target(patch)
    assert patch_of(replaced) is patch
    assert not replaced.__wrapped__.__code__.co_filename.startswith(PACKAGE)
    patch.apply()
    assert _target(patch) is replaced


@pytest.mark.parametrize(
    "patch",
    [patch for patch in PATCHES if isinstance(patch, ValuePatch)],
    ids=lambda patch: patch.target,
)
def test_a_value_is_replaced_by_an_equal_one(megatron_bridge: Any, patch: ValuePatch) -> None:
    module, _, name = patch.target.partition(":")
    owner = importlib.import_module(module)
    value = getattr(owner, name)
    patch.apply()
    assert getattr(owner, name) == value == patch.replacement(value)


def test_the_docs_list_every_patch() -> None:
    """`python -m exaone_bridge.patches.table > docs/dev/patches.md` writes the page."""
    assert (ROOT / "docs" / "dev" / "patches.md").read_text() == markdown()


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_a_patch_names_version_and_reason(patch: Patch) -> None:
    assert patch.version.split()[0] in ("Megatron-Bridge", "Megatron-Core", "Transformers")
    assert patch.reason.endswith(".") and patch.replacement.__doc__
