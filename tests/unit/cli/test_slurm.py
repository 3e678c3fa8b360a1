"""The scripts for Slurm, with commands that print in place of srun, torchrun and pip."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.helpers.cli import Cli
from tests.helpers.paths import ROOT

SLURM = ROOT / "examples/slurm"
COMMANDS = {
    # The options of srun that have a value beside them are those of pyxis.
    "srun": 'while [[ $1 == --* ]]; do [[ $1 == *=* ]] || shift; shift; done; exec "$@"',
    "torchrun": 'printf "%q " "$@" > "$LAUNCHED"',
    "scontrol": "printf 'node1\\nnode2\\n'",
    "pip": "true",
}


def _launch(script: Path, work: Path, *arguments: str, **variables: str) -> list[str]:
    """Run a script, and return the arguments of torchrun."""
    for name, body in COMMANDS.items():
        (work / name).write_text(f"#!/bin/bash\n{body}\n")
        (work / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "1"}
    slurm |= {"SLURM_JOB_NODELIST": "node[1-2]", "LAUNCHED": str(work / "launched")}
    path = {"PATH": f"{work}:{os.environ['PATH']}"}
    subprocess.run(
        ["bash", str(script), *arguments], env={**path, **slurm, **variables}, cwd=work, check=True
    )
    return shlex.split((work / "launched").read_text())


@pytest.mark.parametrize("name", ["one_node", "nodes", "container"])
def test_training_scripts_start_a_plan_that_is_accepted(
    name: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their settings stand after --save, beside those of the user."""
    settings = ("gpu_memory_gb=141",)
    found = _launch(SLURM / f"{name}.sbatch", tmp_path, *settings, IMAGE="image")
    assert found[found.index("--nproc-per-node") + 1] == "8"
    begin = found.index("exaone_bridge")
    assert found[begin - 1] == "-m" and found[begin + 1] == "train" and settings[0] in found
    monkeypatch.setenv("WORLD_SIZE", "16" if name == "nodes" else "8")
    monkeypatch.setenv("RANK", "0")
    found = [each for each in found[begin + 1 :] if not each.startswith("train.")]
    run = cli(*found, "--dry-run")
    assert run.code == 0 and "of 141 GB, estimated" in run.out, run.err


def test_conversion_script_starts_the_example_on_two_nodes(tmp_path: Path) -> None:
    found = _launch(SLURM / "convert_nodes.sbatch", tmp_path, HF="hf", OUT="out")
    begin = found.index("examples/round_trip.py")
    assert found[begin + 1 :] == ["hf", "out", "--tp", "8", "--pp", "2"]
    assert found[found.index("--nnodes") + 1] == "2" and "node1:29501" in found
