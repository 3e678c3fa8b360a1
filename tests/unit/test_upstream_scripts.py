"""Megatron-Bridge's own conversion scripts, unchanged, over all families.

The wheel of Megatron-Bridge 0.6.2 does not have them; a checkout is named by the environment
variable MEGATRON_BRIDGE_SOURCE.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.checkpoint.hf.headers import read_headers
from exaone_bridge.verification.checks.folders import compare_tensors
from tests.helpers.alone import run_alone

SOURCE = "MEGATRON_BRIDGE_SOURCE"
EXAMPLES, CONVERSION = "examples/conversion", "scripts/conversion"
FAMILIES = ["exaone4", "ernie45", "exaone45", "exaone-moe"]


def _run(script: str, arguments: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= rank | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


@pytest.fixture
def run(megatron_bridge: Any) -> Any:
    """Return `run(script, *arguments)`, which runs a script in a process of its own."""
    import megatron.bridge

    roots = [os.environ.get(SOURCE), *(Path(path).parents[2] for path in megatron.bridge.__path__)]
    root = next((Path(each) for each in roots if each and (Path(each) / CONVERSION).is_dir()), None)
    if root is None:
        pytest.skip(f"the wheel of Megatron-Bridge has no scripts, and {SOURCE} names no checkout")

    def run_script(script: str, *arguments: object) -> None:
        run_alone(_run, str(root / script), [str(each) for each in arguments])

    return run_script


def test_list_supported_architectures(run: Any) -> None:
    run(f"{EXAMPLES}/list_supported_architectures.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_run_conversion(run: Any, tiny: Any, tmp_path: Path, name: str) -> None:
    """Import and export on the CPU, and the round trip; the default dtype of an import is bf16."""
    source, script = tiny(name), f"{CONVERSION}/run_conversion.py"
    on_cpu = ("--device", "cpu", "--hf-model", source, "--megatron-path")
    run(script, "import", *on_cpu, tmp_path / "bf16")
    run(script, "import", *on_cpu, tmp_path / "megatron", "--torch-dtype", "float32")
    run(script, "export", *on_cpu, tmp_path / "megatron", "--hf-path", tmp_path / "exported")
    assert compare_tensors(source, tmp_path / "exported").passed
    run(script, "roundtrip", "--device", "gpu", "--hf-model", source)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trips_and_generation(run: Any, tiny: Any, tmp_path: Path, name: str) -> None:
    source = tiny(name)
    model = ("--hf-model-id", source, "--output-dir")
    run(f"{EXAMPLES}/hf_megatron_roundtrip.py", *model, tmp_path / "one")
    run(f"{EXAMPLES}/hf_megatron_roundtrip_multi_gpu.py", *model, tmp_path / "several")
    assert compare_tensors(source, tmp_path / "one" / source.name).passed
    several = read_headers(tmp_path / "several" / source.name)  # in bf16, which the script asks for
    assert several.keys() == read_headers(source).keys()
    prompt = ("--prompt", "Hello", "--max_new_tokens", "3")
    run(f"{EXAMPLES}/hf_to_megatron_generate_text.py", "--hf_model_path", source, *prompt)
