"""`doctor` names what each use lacks, and runs where nothing else is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import exaone_bridge
from exaone_bridge.cli import doctor
from exaone_bridge.cli.doctor import REQUIREMENTS, Package, packages, uses
from tests.helpers.cli import Cli

SOURCE = str(Path(exaone_bridge.__file__).parents[1])


@pytest.fixture
def installed() -> dict[str, Package]:
    """Return the packages of a machine that has all of them."""
    return {name: Package(name, "", "1.0") for name in packages()}


def _bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command without site-packages."""
    program = f"import sys; sys.path.insert(0, {SOURCE!r}); from exaone_bridge.cli import main"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"{program}; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_doctor_finds_this_environment_ready(cli: Cli) -> None:
    run = cli("doctor")
    assert (run.code, run.err) == (0, "")
    assert f"exaone-bridge {exaone_bridge.__version__}, Python 3.12" in run.out
    for text in ("megatron-bridge     0.6", "export: ready", "import, verify: ready", "torch: 2."):
        assert text in run.out
    assert max(map(len, run.out.splitlines())) <= 100


def test_doctor_runs_where_nothing_else_is_installed() -> None:
    done = _bare("doctor")
    assert done.returncode == 1, done.stderr
    for missing in (
        "export: missing: torch, safetensors, pyyaml, rich",
        "import, verify: missing: megatron-bridge, megatron-core, transformers, torch, safetensors",
        'pip install "torch" "safetensors" "pyyaml" "rich"\n',
    ):
        assert missing in done.stdout
    assert f"pip install --no-deps -r {REQUIREMENTS}" in done.stdout and REQUIREMENTS.is_file()
    assert done.stderr.endswith("the lines above have the reasons and the remedies.\n")


def test_other_commands_name_the_command_that_installs(tmp_path: Path) -> None:
    done = _bare("tiny", "exaone4", str(tmp_path / "tiny"))
    assert done.returncode == 2
    install = 'pip install "torch" "safetensors" "pyyaml" "rich"`.\n'
    assert done.stderr.startswith("exaone-bridge: torch is not installed; run `")
    assert done.stderr.endswith(install)


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None  # which importing takes for missing
sys.argv[:2] = ["exaone-bridge"]
from exaone_bridge.cli import main
main()
"""


def test_every_command_names_the_command_that_installs(tiny: Any, tmp_path: Path) -> None:
    """What pip cannot resolve on a machine without a GPU is installed from the list."""
    folder, output = str(tiny("exaone4")), str(tmp_path / "output")
    tiny_, import_ = ["tiny", "exaone4", output], ["import", folder, output]
    verify = ["verify", folder]
    running = {
        (module, command[0]): subprocess.Popen(
            [sys.executable, "-c", WITHOUT, module, *command], stderr=subprocess.PIPE, text=True
        )
        for module, commands in {
            "torch": (tiny_, import_, verify),
            "megatron.core": (import_, verify),
            "megatron.bridge": (import_, verify),
        }.items()
        for command in commands
    }
    for (module, command), process in running.items():
        (line,) = process.communicate(timeout=300)[1].splitlines()
        assert process.returncode == 2, (module, command, line)
        name = module.replace(".", "-")
        assert line.startswith(f"exaone-bridge: {name} is not installed; run `"), line
        install = '"torch' if name == "torch" else f"--no-deps -r {REQUIREMENTS}`."
        assert f"pip install {install}" in line, line
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("0.6.2", ">=0.6.2,<0.7", True),
        ("0.6.10+cu13", ">=0.6.2,<0.7", True),
        ("0.7.0rc1", ">=0.6.2,<0.7", False),
        ("0.6.1", ">=0.6.2,<0.7", False),
        ("5.12.1", ">=5.8,<=5.12.1", True),
        ("5.12.2", ">=5.8,<=5.12.1", False),
        ("5.8.0", ">=5.8,<=5.12.1", True),
        ("13", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, wanted: str, fits: bool) -> None:
    assert Package("name", wanted, version).fits is fits


def test_missing_and_unfit_packages_have_a_remedy(installed: dict[str, Package]) -> None:
    assert [use.faults for use in uses(installed, has_gpu=True)] == [()] * 4
    installed["transformers"] = Package("transformers", ">=5.8,<=5.12.1", "5.24.0")
    installed["torchvision"] = Package("torchvision", ">=0.21", None)
    _, commands, _, images = uses(installed, has_gpu=True)
    assert commands.faults == ("transformers 5.24.0 does not fit",)
    assert commands.remedies[0].endswith('pip install "transformers>=5.8,<=5.12.1"')
    assert images.faults == ("missing: torchvision",)
    assert images.remedies[0].endswith('pip install "torchvision>=0.21"')


def test_training_needs_a_gpu_and_names_transformer_engine(installed: dict[str, Package]) -> None:
    assert uses(installed, has_gpu=False)[2].faults == ("torch sees no GPU",)
    installed["transformer-engine"] = Package("transformer-engine", "", None)
    training = uses(installed, has_gpu=True)[2]
    assert training.faults == ("missing: transformer-engine (models use the torch backend)",)
    assert "transformer-engine[pytorch]" in training.remedies[0]


def test_doctor_names_a_changed_patch(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    target = "megatron.bridge.models.gpt_provider:mtp_block_spec"
    monkeypatch.setattr(doctor, "known_fingerprints", lambda: {target: ["another"]})
    run = cli("doctor")
    assert run.code == 1
    assert f"patches: 0 of 1 change the code that they know\n    {target}" in run.out
    assert 'pip install "megatron-bridge' in run.out


def test_doctor_names_a_newer_version(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "newer_than_tested", lambda: {"megatron-bridge": "0.7.0"})
    assert "megatron-bridge 0.7.0 is newer than 0.6.2, which was tested." in cli("doctor").out
