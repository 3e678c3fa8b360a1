"""The wheel installs on a laptop and beside Megatron-Bridge, by the commands of the docs.

The environments are made by uv from its cache, in seconds. The third way, from a clone with `make`,
is what CI does.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.environments import UV
from tests.helpers.paths import ROOT

REQUIREMENTS = ROOT / "src" / "exaone_bridge" / "requirements-cpu.txt"
WHEEL = "exaone_bridge-0.1.0-py3-none-any.whl"
NEWEST_TRANSFORMERS = "5.24.0"
# What `override-dependencies` of pyproject.toml leaves out, in versions Megatron-Bridge accepts.
NOT_ON_A_LAPTOP = {
    "comet-ml": "3.50.0",
    "diffusers": "0.36.0",
    "fast-hadamard-transform": "1.1.0",
    "flashinfer-cubin": "0.6.8.post1",
    "flashinfer-python": "0.6.8.post1",
    "mistral-common": "1.10.0",
    "mlflow": "3.16.0",
    "nvidia-cudnn-frontend": "1.26.0",
    "nvidia-resiliency-ext": "0.6.0",
    "onnxscript": "0.5.0",
    "open-clip-torch": "3.2.0",
    "qwen-vl-utils": "0.0.14",
    "timm": "1.0.0",
    "wandb": "0.29.0",
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(UV).exists(), reason="uv is not installed"),
]


def _run(*command: object, cwd: Path = ROOT) -> str:
    """Run a command without this project's own paths, and return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment | {"UV": UV},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel and the list of requirements."""
    path = tmp_path_factory.mktemp("install")
    _run(UV, "build", "--quiet", "--wheel", "--out-dir", path)
    shutil.copy(REQUIREMENTS, path)
    return path


@pytest.fixture(scope="module")
def environment(folder: Path) -> Iterator[Path]:
    """Return a new environment, installed as docs/compatibility.md says for uv."""
    page = (ROOT / "docs" / "compatibility.md").read_text()
    (command,) = re.findall(r"^uv (pip install .*)$", page, re.MULTILINE)
    path = folder / "environment"
    _run(UV, "venv", "--quiet", "--seed", "--python", sys.executable, path)
    _run(UV, *command.split(), "--quiet", "--python", path / "bin" / "python", cwd=folder)
    yield path
    shutil.rmtree(path)


def test_the_wheel_has_what_it_ships_and_its_description_renders(folder: Path) -> None:
    with zipfile.ZipFile(folder / WHEEL) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (wheel.read(name).decode() for name in names if name.endswith("/METADATA"))
    for name in ("py.typed", "requirements-cpu.txt", "verification/report/report.schema.json"):
        assert f"exaone_bridge/{name}" in names
    assert "exaone_bridge_autoload.pth" in names
    assert "Requires-Python: <3.13,>=3.12" in metadata
    description = metadata.partition("\n\n")[2]
    links = re.findall(r"\]\(([^)]*)\)", description)
    assert links and all(link.startswith("https://") for link in links)
    _run(UV, "tool", "run", "--quiet", "twine", "check", "--strict", folder / WHEEL)


def test_the_list_of_requirements_is_that_of_the_lock_file(tmp_path: Path) -> None:
    """`make requirements` writes it."""
    _run("make", "requirements", f"REQUIREMENTS={tmp_path / 'list.txt'}", f"UV={UV}")
    assert (tmp_path / "list.txt").read_text() == REQUIREMENTS.read_text()


def test_the_wheel_verifies_a_model_on_a_machine_without_a_gpu(
    environment: Path, tmp_path: Path
) -> None:
    command = environment / "bin" / "exaone-bridge"
    assert "import, verify: ready" in _run(command, "doctor", cwd=tmp_path)
    _run(command, "tiny", "exaone4", "tiny-model", cwd=tmp_path)
    printed = _run(command, "verify", "tiny-model", "--tp", 2, "--quick", cwd=tmp_path)
    assert "91 tensors bitwise equal" in printed


_AUTOLOADED = "import sys; print('exaone_bridge' in sys.modules, 'torch' in sys.modules)"


def _autoloaded(python: Path) -> list[str]:
    """Return what a process with and one without the variable have imported when they start."""
    switch = ["env", "EXAONE_BRIDGE_AUTOLOAD=1"], ["env", "-u", "EXAONE_BRIDGE_AUTOLOAD"]
    return [_run(*words, python, "-c", _AUTOLOADED, cwd=python.parent).strip() for words in switch]


def test_the_variable_registers_in_every_process_of_an_installation(
    environment: Path, tmp_path: Path
) -> None:
    assert _autoloaded(environment / "bin" / "python") == ["True False", "False False"]
    editable = tmp_path / "editable" / "bin" / "python"
    _run(UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "editable")
    _run(UV, "pip", "install", "--quiet", "--python", editable, "--no-deps", "--editable", ROOT)
    assert _autoloaded(editable) == ["True False", "False False"]


def _stub(site_packages: Path, name: str, version: str) -> None:
    """Install an empty package."""
    folder = site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / "METADATA").write_text(text)
    (folder / "INSTALLER").write_text("test\n")


@pytest.mark.parametrize("tool", ["pip", "uv"])
@pytest.mark.parametrize("options", [["--no-deps"], []], ids=["no-deps", "deps"])
def test_nothing_changes_beside_an_installed_megatron_bridge(
    environment: Path, folder: Path, tool: str, options: list[str]
) -> None:
    """The packages that a laptop cannot install are empty here, as if a container had them.

    Without an index, an installation that wanted any other package would fail.
    """
    python = environment / "bin" / "python"
    install = {
        "pip": [python, "-m", "pip", "install"],
        "uv": [UV, "pip", "install", "--python", python],
    }[tool]
    (site_packages,) = (environment / "lib").glob("python*/site-packages")
    for name, version in NOT_ON_A_LAPTOP.items():
        _stub(site_packages, name, version)
    _run(UV, "pip", "uninstall", "--quiet", "--python", python, "exaone-bridge")
    before = _run(UV, "pip", "freeze", "--python", python).splitlines()
    _run(*install, "--quiet", "--no-index", *options, folder / WHEEL)
    after = _run(UV, "pip", "freeze", "--python", python).splitlines()
    added = [line for line in after if line not in before]
    assert [line.partition(" @")[0] for line in added] == ["exaone-bridge"]
    assert [line for line in before if line not in after] == []


def test_every_family_equals_a_newer_transformers(environment: Path, tmp_path: Path) -> None:
    """Megatron-Bridge 0.6 does not allow it, and imports a module that Transformers has removed."""
    python = environment / "bin" / "python"
    removed = "import transformers.modeling_attn_mask_utils as m; print(m.__file__)"
    source = Path(_run(python, "-c", removed).strip())
    text = source.read_text()
    pins = [f"transformers=={NEWEST_TRANSFORMERS}", "tokenizers>=0.23.1", "huggingface-hub>=1.31"]
    _run(UV, "pip", "install", "--quiet", "--no-deps", "--python", python, *pins)
    source.write_text(text)
    _run(environment / "bin" / "exaone-bridge", "demo", cwd=tmp_path)
