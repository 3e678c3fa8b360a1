"""Programs that run in a new process, also without exaone_bridge."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import exaone_bridge

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
# Programs that import Megatron-Bridge before exaone_bridge, or without it, begin with this.
_IMPORT_GUARD = """
import importlib.abc, importlib.machinery, sys, types

class Anything(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name) if name == "ops" else type(name, (), {})

class Guard(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "megatron.bridge.peft.lora_layers":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            for stub in ("transformer_engine", "transformer_engine.pytorch"):
                sys.modules[stub] = Anything(stub)
            sys.modules["transformer_engine"].pytorch = sys.modules["transformer_engine.pytorch"]
            try:
                execute(module)
            finally:
                del sys.modules["transformer_engine"], sys.modules["transformer_engine.pytorch"]
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Guard())
"""
IMPORT_GUARD = "" if HAS_TE else _IMPORT_GUARD


def fresh(program: str) -> dict[str, Any]:
    """Run a program in a new process; return what it printed after RESULT."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(Path(exaone_bridge.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("RESULT")[2])
