"""Fixtures of all tests: Megatron-Bridge, imported once, and tiny random checkpoints.

Importing Megatron-Bridge takes 20 s, so ranks are forked after the `megatron_bridge` fixture ran.
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
from hypothesis import HealthCheck, settings

from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.models import FAMILIES
from exaone_bridge.schema.parallel_layout import Layout

# How fast inputs are generated is a property of the machine, not of the code under test.
settings.register_profile(
    "any machine", suppress_health_check=[HealthCheck.too_slow], deadline=None
)
settings.load_profile("any machine")

TINY_CONFIGS = {name: config for family in FAMILIES for name, config in family.tiny.items()}
# The form in which ERNIE 4.5 is published, and which Transformers 5 rejects.
TINY_CONFIGS["ernie45-lists"] = TINY_CONFIGS["ernie45"] | {
    "moe_num_experts": [8],
    "moe_intermediate_size": [40, 40],
    "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [3, 3],
}
TinyFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def megatron_bridge() -> Any:
    """Return our registered bridges; import all that every forked rank would import otherwise."""
    import exaone_bridge

    logging.disable(logging.WARNING)
    supported = exaone_bridge.supported()
    importlib.import_module("exaone_bridge.runtime.model")
    return supported


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFactory:
    """Return `tiny(name, seed=0, **fields)`: a tiny model's folder with changed config fields."""
    folders: dict[str, Path] = {}

    def make(name: str, seed: int = 0, **fields: Any) -> Path:
        key = json.dumps([name, seed, fields], sort_keys=True)
        if key not in folders:
            folder = tmp_path_factory.mktemp("tiny") / name
            write_random(folder, {**TINY_CONFIGS[name], **fields}, seed=seed)
            folders[key] = folder
        return folders[key]

    return make


@pytest.fixture(scope="session")
def _reference_cache() -> dict[bytes, bytes]:
    return {}


@pytest.fixture
def cached_references(
    _reference_cache: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let `verify` run Transformers once per folder and prompts, for all layouts and faults.

    It is not for tests that inject a fault into Transformers. Each test gets a copy of the result.
    """
    from exaone_bridge.runtime.fork import ForkLauncher
    from exaone_bridge.verification.workflow.transformers import run_transformers

    first = ForkLauncher.first

    def cached_first(launcher: ForkLauncher, fn: Any, *args: Any, **options: Any) -> Any:
        if fn is not run_transformers:
            return first(launcher, fn, *args, **options)
        checkpoint, workload = args
        independent = dataclasses.replace(workload, layout=Layout(), backend="", overrides={})
        key = pickle.dumps((checkpoint.folder, independent))
        if key not in _reference_cache:
            _reference_cache[key] = pickle.dumps(first(launcher, fn, *args, **options))
        return pickle.loads(_reference_cache[key])

    monkeypatch.setattr(ForkLauncher, "first", cached_first)
