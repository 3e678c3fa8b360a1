"""`python -m exaone_bridge.run` runs scripts as Python does, with the bridges registered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_PRINT_CONTEXT = """
import json, sys
is_main = sys.modules["__main__"].__dict__ is globals()
print(json.dumps([__name__, sys.argv, sys.path[0], __file__, is_main]))
"""


def _python(
    *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | environment,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("script", "form"),
    [
        ("script.py", "script.py"),
        ("script.py", "./script.py"),
        ("folder/__main__.py", "folder"),
        ("part/s.py", "part/s.py"),
    ],
)
def test_script_runs_as_with_python(tmp_path: Path, script: str, form: str) -> None:
    (tmp_path / script).parent.mkdir(exist_ok=True)
    (tmp_path / script).write_text(_PRINT_CONTEXT)
    run = _python("-m", "exaone_bridge.run", form, "--a", "b c", cwd=tmp_path)
    expected = _python(form, "--a", "b c", cwd=tmp_path)
    assert run.returncode == expected.returncode == 0, run.stderr
    assert run.stdout == expected.stdout


@pytest.mark.parametrize("name", ["module", "package"])
def test_module_runs_as_with_python(tmp_path: Path, name: str) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(_PRINT_CONTEXT)
    (tmp_path / "module.py").write_text(_PRINT_CONTEXT)
    run = _python("-m", "exaone_bridge.run", "-m", name, "-m", "x", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout == _python("-m", name, "-m", "x", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("raise KeyError('lost')", 1, "KeyError: 'lost'\n"),
        ("print(1)", 0, ""),
        ("import os; os._exit(9)", 9, ""),
        ("def f(:", 1, "SyntaxError: invalid syntax\n"),
    ],
)
def test_exit_code_and_exception_pass_through(
    tmp_path: Path, body: str, code: int, stderr: str
) -> None:
    (tmp_path / "script.py").write_text(body)
    done = _python("-m", "exaone_bridge.run", "script.py", cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.endswith(stderr) if stderr else done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [["missing.py"], ["."], ["-m", "missing"], ["-m", "json.missing"], ["-m", "..x"], ["-m"]],
)
def test_missing_script_or_module_exits_with_2(tmp_path: Path, arguments: list[str]) -> None:
    done = _python("-m", "exaone_bridge.run", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.endswith(".\n")
    assert "Traceback" not in done.stderr


def test_help_shows_the_usage() -> None:
    assert _python("-m", "exaone_bridge.run").returncode == 2
    shown = _python("-m", "exaone_bridge.run", "--help")
    assert shown.returncode == 0 and "usage:" in shown.stdout


# A script without exaone_bridge. Every script for a CPU must replace these functions of torch.cuda.
_UNCHANGED = """
import sys, tempfile
import torch
torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.set_device = lambda device: None
torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
torch.cuda.manual_seed = torch.manual_seed
from megatron.bridge import AutoBridge
from megatron.bridge.peft.lora import LoRA
from megatron.core import parallel_state

store = "file://" + tempfile.mktemp()
torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
bridge = AutoBridge.from_hf_pretrained(sys.argv[1])
print("bridge", type(bridge._model_bridge).__module__)
provider = bridge.to_megatron_provider()
provider.finalize()
model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
model = LoRA(dim=4, alpha=4, target_modules=["linear_proj"])(model, training=False)
wrapper = model[0].decoder.layers[0].self_attention.linear_proj
torch.nn.init.normal_(wrapper.adapter.linear_out.weight)
x = torch.randn(5, 1, wrapper.to_wrap.weight.shape[1])
with torch.no_grad():
    output, norm = wrapper(x)[0], wrapper.to_wrap.post_layernorm
    before = norm(x @ wrapper.to_wrap.weight.T + wrapper.adapter(x))
    after = norm(x @ wrapper.to_wrap.weight.T) + wrapper.adapter(x)
differences = [(output - expected).abs().max().item() for expected in (before, after)]
print("before", differences[0] < 1e-5, "after", differences[1] < 1e-5)
"""


@pytest.mark.slow
def test_unchanged_script_uses_the_bridge_and_the_patched_lora(tiny: Any, tmp_path: Path) -> None:
    """Megatron-Bridge's LoRA is added before a post norm."""
    script = tmp_path / "script.py"
    script.write_text(_UNCHANGED)
    done = _python("-m", "exaone_bridge.run", script, tiny("exaone4"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("bridge", "before"))]
    assert lines == ["bridge exaone_bridge.bridge.exaone4", "before True after False"]
