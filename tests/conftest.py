"""What all tests share: Megatron imported once, and tiny random checkpoints.

Megatron-Bridge's import takes half a minute, so ranks are forked from this process after the `host` fixture ran.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.checkpoint.tiny import write_random
from exaone_bridge.families import FAMILIES

MINIATURES = {name: config for family in FAMILIES for name, config in family.tiny.items()}
TinyFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def host() -> Any:
    """Megatron-Bridge, imported with our bridges registered, and what every forked rank would import for itself."""
    import exaone_bridge

    logging.disable(logging.WARNING)
    supported = exaone_bridge.supported()
    importlib.import_module("exaone_bridge.host.model")
    return supported


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFactory:
    """`tiny(name, seed=0, **fields)`: the folder of a miniature with these fields of config.json changed."""
    made: dict[str, Path] = {}

    def make(name: str, seed: int = 0, **fields: Any) -> Path:
        key = json.dumps([name, seed, fields], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny") / name
            write_random(folder, {**MINIATURES[name], **fields}, seed=seed)
            made[key] = folder
        return made[key]

    return make
