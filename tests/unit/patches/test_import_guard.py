"""The import guard, with and without Transformer Engine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from exaone_bridge.patches import import_hook

LAYERS = """
    # As megatron/bridge/peft/lora_layers.py uses it: annotations, isinstance, nothing called.
    import sys
    import transformer_engine.pytorch as te
    import transformer_engine

    def branches(self) -> tuple[te.ops.Sequential, te.ops.Sequential]: ...

    names = ("transformer_engine", "transformer_engine.pytorch")
    imported = {name: sys.modules.get(name) for name in names}
    classes = te.Linear, te.LayerNormLinear, te.ops.Sequential, te.ops.RMSNorm
    answers = [isinstance(thing, classes) for thing in (object(), 1, te, te.Linear)]
    same = te.Linear is te.Linear and te.Linear is not te.LayerNormLinear
    same = same and te is transformer_engine.pytorch
    private = hasattr(te, "__no_such_dunder__")
"""
PROBE = """
    def probe():
        try:
            import transformer_engine.pytorch
        except ModuleNotFoundError as error:
            return error.name
        return transformer_engine
    found = probe()
"""
PROGRAM = """
    import contextlib, importlib, sys
    import exaone_bridge
    from exaone_bridge.patches.import_hook import around_import

    around_import("megatron.bridge", contextlib.nullcontext)  # this fake registers nothing
    NAMES = ("transformer_engine", "transformer_engine.pytorch")
"""


@pytest.fixture
def guarded(tmp_path: Path) -> Callable[..., str]:
    """Run a program in a new process where megatron.bridge is a fake with the given lora_layers."""
    peft = tmp_path / "megatron" / "bridge" / "peft"
    peft.mkdir(parents=True)
    for folder in (peft, peft.parent, peft.parent.parent):
        (folder / "__init__.py").write_text("")
    (peft / "before.py").write_text(textwrap.dedent(PROBE))
    (peft / "after.py").write_text(textwrap.dedent(PROBE))

    def run(program: str, layers: str = LAYERS) -> str:
        (peft / "lora_layers.py").write_text(textwrap.dedent(layers))
        paths = [str(tmp_path), str(Path(import_hook.__file__).parents[2])]
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PROGRAM) + textwrap.dedent(program)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def a_transformer_engine(folder: Path) -> None:
    (folder / "transformer_engine" / "pytorch").mkdir(parents=True)
    (folder / "transformer_engine" / "__init__.py").write_text("real = True\n")
    classes = "class Linear: pass\nclass LayerNormLinear: pass\n"
    operations = "class ops:\n    class Sequential: pass\n    class RMSNorm: pass\n"
    (folder / "transformer_engine" / "pytorch" / "__init__.py").write_text(classes + operations)


without_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None,
    reason="Transformer Engine is installed here",
)


@without_te
def test_the_placeholder_is_there_during_the_guarded_module_only(
    guarded: Callable[..., str],
) -> None:
    out = guarded("""
        from megatron.bridge.peft import before
        assert before.found == "transformer_engine", before.found
        from megatron.bridge.peft import lora_layers
        assert not [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]
        from megatron.bridge.peft import after
        assert after.found == "transformer_engine", after.found
        assert importlib.util.find_spec("transformer_engine") is None
        assert all(module is not None for module in lora_layers.imported.values())
        assert lora_layers.answers == [False] * 4, lora_layers.answers
        assert lora_layers.same and not lora_layers.private
        # The module's functions use its classes after the placeholder has left sys.modules.
        te = lora_layers.te
        assert not isinstance(1, (te.Linear, te.GroupedLinear, te.ops.Dropout))
        print("done")
    """)
    assert out == "done"


@without_te
def test_the_placeholder_goes_with_a_guarded_module_that_fails(guarded: Callable[..., str]) -> None:
    out = guarded(
        """
        try:
            import megatron.bridge.peft.lora_layers
        except KeyError:
            assert not set(NAMES) & set(sys.modules)
            assert "megatron.bridge.peft.lora_layers" not in sys.modules
            print("done")
        """,
        layers="import transformer_engine.pytorch\nraise KeyError('injected')\n",
    )
    assert out == "done"


@without_te
def test_without_the_guard_the_import_fails(guarded: Callable[..., str]) -> None:
    """The fake is a fair one: what the guard is for does happen without it."""
    out = guarded("""
        around_import("megatron.bridge.peft.lora_layers", contextlib.nullcontext)
        try:
            import megatron.bridge.peft.lora_layers
        except ModuleNotFoundError as error:
            print(error.name)
    """)
    assert out == "transformer_engine"


@without_te
@pytest.mark.parametrize("imported_before", [True, False])
def test_a_real_transformer_engine_is_left_alone(
    guarded: Callable[..., str], tmp_path: Path, imported_before: bool
) -> None:
    a_transformer_engine(tmp_path)
    out = guarded(f"""
        if {imported_before}:
            import transformer_engine.pytorch
        before = [sys.modules.get(name) for name in NAMES]
        from megatron.bridge.peft import lora_layers
        here = [sys.modules[name] for name in NAMES]
        assert here == list(lora_layers.imported.values())
        assert not {imported_before} or here == before
        assert here[0].real and here[0].__file__.startswith({str(tmp_path)!r})
        assert lora_layers.te.Linear.__module__ == "transformer_engine.pytorch"
        from megatron.bridge.peft import after
        assert after.found is here[0]
        print("done")
    """)
    assert out == "done"


@without_te
def test_a_stub_without_a_spec_is_left_alone(guarded: Callable[..., str]) -> None:
    """As tests, and builders of documentation, plant them."""
    out = guarded(
        """
        from unittest.mock import MagicMock
        package, pytorch = MagicMock(__spec__=None), MagicMock(__spec__=None)
        package.pytorch = pytorch
        sys.modules.update(zip(NAMES, (package, pytorch)))
        from megatron.bridge.peft import lora_layers
        assert lora_layers.te is pytorch
        assert [sys.modules[name] for name in NAMES] == [package, pytorch]
        print("done")
        """,
        layers="import transformer_engine.pytorch as te\n",
    )
    assert out == "done"
