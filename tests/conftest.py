"""What all tests share: Megatron imported once, and tiny random checkpoints.

Megatron-Bridge's import takes half a minute, so ranks are forked from this process after the `host` fixture ran.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.models import FAMILIES
from exaone_bridge.schema.parallel_layout import Layout

TINY_CONFIGS = {name: config for family in FAMILIES for name, config in family.tiny.items()}
TinyFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def megatron_bridge() -> Any:
    """Megatron-Bridge, imported with our bridges registered, and what every forked rank would import for itself."""
    import exaone_bridge

    logging.disable(logging.WARNING)
    supported = exaone_bridge.supported()
    importlib.import_module("exaone_bridge.runtime.model")
    return supported


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFactory:
    """`tiny(name, seed=0, **fields)`: the folder of a miniature with these fields of config.json changed."""
    made: dict[str, Path] = {}

    def make(name: str, seed: int = 0, **fields: Any) -> Path:
        key = json.dumps([name, seed, fields], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny") / name
            write_random(folder, {**TINY_CONFIGS[name], **fields}, seed=seed)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def _seen() -> dict[bytes, bytes]:
    return {}


@pytest.fixture
def references(_seen: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` runs Transformers once for a folder and its prompts, however many layouts or faults it is held against.

    Not for tests that plant something on Transformers' side. Every test has a copy of its own.
    """
    from exaone_bridge.runtime.fork import ForkLauncher
    from exaone_bridge.verification.workflow import verify as module

    first = ForkLauncher.first

    def once(launcher: ForkLauncher, fn: Any, *args: Any, **options: Any) -> Any:
        if fn is not module.run_transformers:
            return first(launcher, fn, *args, **options)
        folder, job = args
        key = pickle.dumps((folder, dataclasses.replace(job, layout=Layout(), backend="")))
        if key not in _seen:
            _seen[key] = pickle.dumps(first(launcher, fn, folder, job, **options))
        return pickle.loads(_seen[key])

    monkeypatch.setattr(ForkLauncher, "first", once)
