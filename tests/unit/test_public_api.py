"""The public names of the package: listed, documented, typed, and imported when they are used."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import exaone_bridge
from exaone_bridge.bridge.registration import _AFTER_IT
from exaone_bridge.errors import UnsupportedConfig, UnsupportedLayout
from tests.helpers.paths import ROOT

FUNCTIONS = ("verify", "import_checkpoint", "export_checkpoint", "inspect", "write_random")
NAMES = (*FUNCTIONS, "supported", "cpu_runtime", "recipes", "Layout", "errors")


def test_every_public_name_is_listed_and_has_a_docstring(megatron_bridge: Any) -> None:
    listed = dir(exaone_bridge)
    assert set(NAMES) <= set(exaone_bridge.__all__) <= set(listed)
    assert [name for name in listed if not name.startswith("__")] == [
        name for name in sorted(exaone_bridge.__all__) if not name.startswith("__")
    ]
    for name in {*exaone_bridge.__all__} - {"__version__"}:
        assert (getattr(exaone_bridge, name).__doc__ or "").strip(), name
    assert isinstance(exaone_bridge.recipes, ModuleType)
    with pytest.raises(AttributeError, match="no attribute 'verfy'"):
        exaone_bridge.verfy  # noqa: B018


def test_the_names_are_imported_when_they_are_used() -> None:
    program = (
        "import sys, exaone_bridge; from exaone_bridge import recipes, inspect, Report;"
        "assert not {'torch', 'rich', 'megatron'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_modules_of_models_that_need_megatron_come_after_it() -> None:
    """Or else a module of `_AFTER_IT` that one of them imports finds it half imported."""
    models = ROOT / "src" / "exaone_bridge" / "models"
    needs = re.compile(r"^(from|import) (megatron|exaone_bridge\.modules)", re.MULTILINE)
    names = {
        f"exaone_bridge.models.{path.parent.name}.{path.stem}"
        for path in models.glob("*/*.py")
        if needs.search(path.read_text())
    }
    assert "exaone_bridge.models.ernie45.router" in names
    assert [name for name in names if not re.fullmatch(_AFTER_IT, name)] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "import exaone_bridge; exaone_bridge.Ernie45Bridge",
        "from exaone_bridge.bridge.exaone4 import Exaone4Bridge",
        "import exaone_bridge.models.exaone45.provider",
        "import exaone_bridge.models.ernie45.router",
        "import exaone_bridge.modules.provider",
        "import exaone_bridge.patches.table",
    ],
)
def test_a_module_of_megatron_bridge_can_be_the_first_import(program: str) -> None:
    """It imports Megatron-Bridge, whose import hook imports the module again."""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_name_every_argument(name: str) -> None:
    """An editor and Jupyter show them; each argument is documented."""
    function = getattr(exaone_bridge, name)
    parameters = inspect.signature(function).parameters
    documented = (function.__doc__ or "").partition("Args:")[2]
    for parameter in parameters.values():
        assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        assert f"{parameter.name}:" in documented or f"{parameter.name}," in documented
    if name in ("verify", "import_checkpoint", "inspect"):
        sizes = [size for size in exaone_bridge.Layout.__dataclass_fields__ if size in parameters]
        assert sizes == ["tp", "pp", "vpp", "sp", "ep", "etp", "cp"]


def test_sizes_are_a_layout(tiny: Any) -> None:
    folder = tiny("exaone4")
    found = exaone_bridge.inspect(folder, tp=2, pp=2)
    assert found.plan == exaone_bridge.inspect(folder, exaone_bridge.Layout(tp=2, pp=2)).plan
    with pytest.raises(UnsupportedLayout, match=r"pass either layout= or tp=, pp= and so on\.$"):
        exaone_bridge.inspect(folder, exaone_bridge.Layout(tp=2), pp=2)


def test_an_inspection_is_short_and_says_whether_the_keys_fit(tiny: Any, tmp_path: Path) -> None:
    found = exaone_bridge.inspect(tiny("exaone4"), tp=2)
    assert found and found.passed and found.to_dict()["layout"] == "TP2 x PP1"
    assert 8 <= len(repr(found).splitlines()) <= 14 and "LLLGLLLG" in repr(found)
    assert found._repr_html_().startswith("<pre>") and "missing" not in repr(found)
    folder = tmp_path / "<model>"
    exaone_bridge.write_random(
        folder,
        found.checkpoint.config
        | {"num_hidden_layers": 4}
        | {"layer_types": found.checkpoint.config["layer_types"][:4]},
    )
    shutil.copy(found.checkpoint.folder / "config.json", folder)
    broken = exaone_bridge.inspect(folder)
    assert not broken and len(broken.missing) == 44 and broken.unexpected == ()
    assert "  44 missing keys" in repr(broken) and "&lt;model&gt;" in broken._repr_html_()


def test_a_random_model_of_an_unknown_config_raises(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedConfig, match="architectures"):
        exaone_bridge.write_random(tmp_path / "model", {"architectures": ["Unknown"]})


def test_a_script_that_uses_the_package_passes_mypy_strict(tmp_path: Path) -> None:
    """The environment has the package and nothing else, so that mypy reads neither torch nor ours
    as source: errors inside an installed package are not those of its user."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    shutil.copytree(ROOT / "src" / "exaone_bridge", packages / "exaone_bridge")
    shutil.copy(ROOT / "tests" / "helpers" / "consumer.py", tmp_path)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "consumer.py"]
    command += ["--python-executable", str(tmp_path / "venv" / "bin" / "python")]
    environment = {"PATH": str(Path(sys.executable).parent)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
