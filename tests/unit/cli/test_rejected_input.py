"""Invalid input: one sentence and exit code 2, before Megatron-Core is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.cli.arguments import make_parser
from tests.helpers.cli import Cli, Rejected, Snapshot, arguments_of
from tests.helpers.damage import INDEX, WEIGHTS, set_config


@pytest.mark.parametrize("command", ["inspect", "import", "verify"])
def test_damaged_folder_is_rejected(
    command: str, tiny: Any, tmp_path: Path, rejected: Rejected
) -> None:
    """One damage: all commands open a folder in one way (tests/unit/checkpoint/hf)."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("exaone4"), folder)
    os.truncate(folder / WEIGHTS, 100)
    rejected(arguments_of(command, folder), WEIGHTS, "the file has 100", "copy it again")


@pytest.mark.parametrize("command", ["inspect", "import", "export", "verify"])
def test_missing_folder_is_rejected(command: str, tmp_path: Path, rejected: Rejected) -> None:
    fragments = ("nowhere: this folder does not exist", "name a ")
    rejected(arguments_of(command, tmp_path / "nowhere"), *fragments)
    (tmp_path / "nowhere").write_text("a file")
    rejected(arguments_of(command, tmp_path / "nowhere"), "nowhere: is a file", "name a ")


@pytest.mark.parametrize("command", ["inspect", "import", "verify"])
@pytest.mark.parametrize(
    "fields",
    [{"tie_word_embeddings": "maybe"}, {"bos_token_id": "one"}, {"use_cache": "yes"}],
    ids=str,
)
def test_config_field_of_a_wrong_type_is_rejected(
    command: str,
    fields: dict[str, object],
    megatron_bridge: Any,
    tiny: Any,
    tmp_path: Path,
    rejected: Rejected,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("exaone4"), folder)
    set_config(**fields)(folder)
    rejected(arguments_of(command, folder), *fields)


LAYOUTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "heads over tp": (["--tp", "3"], ("tp is 3", "a divisor of 4 attention heads", "another --tp")),
    "more ranks than heads": (
        ["--tp", "8"],
        ("tp is 8", "a divisor of 4 attention heads", "another --tp"),
    ),
    "layers over pp": (
        ["--pp", "3"],
        ("pp x vpp is 3 x 1", "a divisor of 8 layers", "another --pp or --vpp"),
    ),
    "layers over pp x vpp": (
        ["--pp", "4", "--vpp", "4"],
        ("pp x vpp is 4 x 4", "a divisor of 8 layers", "another --pp or --vpp"),
    ),
    "vpp without pp": (["--vpp", "2"], ("vpp is 2", "must be 1 where pp is 1", "raise --pp")),
    "vpp with pp 1": (
        ["--pp", "1", "--vpp", "2"],
        ("vpp is 2", "must be 1 where pp is 1", "raise --pp"),
    ),
}
SP = ["--sp", "--tp", "1"], ("sp is on", "off where tp is 1", "raise --tp")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("command", ["inspect", "import", "verify"])
def test_layout_that_the_model_does_not_support_is_rejected(
    command: str, name: str, tiny: Any, tmp_path: Path, rejected: Rejected
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("exaone4"), folder)
    options, fragments = LAYOUTS[name]
    rejected(arguments_of(command, folder) + options, "parallel layout: ", *fragments)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_sequence_parallelism_without_tp_is_rejected(
    command: str, tiny: Any, rejected: Rejected
) -> None:
    options, fragments = SP
    rejected([command, tiny("exaone4"), *options], *fragments)


@pytest.mark.parametrize("name", ["heads over tp", "more ranks than heads", "vpp with pp 1"])
def test_demo_rejects_a_layout_that_a_model_does_not_support(name: str, rejected: Rejected) -> None:
    options, fragments = LAYOUTS[name]
    rejected(["demo", *options], "parallel layout: ", *fragments)


def test_tp_that_does_not_fit_the_kv_heads_is_rejected(tiny: Any, rejected: Rejected) -> None:
    folder = tiny("exaone4", num_attention_heads=12, num_key_value_heads=4)
    fragments = ("tp is 6", "a divisor or a multiple of 4 KV heads", "another --tp")
    rejected(["inspect", folder, "--tp", 6], *fragments)


@pytest.mark.parametrize(
    "option", [["--tp", "0"], ["--pp", "-1"], ["--vpp", "two"], ["--tpp", "2"]], ids=str
)
@pytest.mark.parametrize("command", ["inspect", "import", "export", "verify"])
def test_invalid_layout_option_is_rejected(
    command: str, option: list[str], tiny: Any, cli: Cli, snapshot: Snapshot, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("exaone4"), folder)
    before = snapshot(tmp_path)
    run = cli(*arguments_of(command, folder), *option)
    assert run.code == 2 and option[0] in run.err and "Traceback" not in run.err
    assert snapshot(tmp_path) == before


def sources_of(tiny: Any) -> dict[str, list[object]]:
    """Return the arguments before the output; `export` checks its output before its source."""
    return {
        "tiny": ["tiny", "exaone4"],
        "import": ["import", tiny("exaone4")],
        "export": ["export", tiny("exaone4")],
    }


OUTPUTS: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: (path.mkdir(), (path / "config.json").write_text("{}")),
    "a file": lambda path: path.write_text("content"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to a folder": lambda path: (
        path.with_name("real").mkdir(),
        (path.with_name("real") / "notes").write_text("kept"),
        path.symlink_to("real"),
    ),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("command", ["tiny", "import", "export"])
def test_existing_output_is_rejected(
    command: str, kind: str, tiny: Any, tmp_path: Path, rejected: Rejected
) -> None:
    OUTPUTS[kind](tmp_path / "output")
    fragments = ("output: the output exists already", "name another folder, or remove this one")
    rejected([*sources_of(tiny)[command], tmp_path / "output"], *fragments)
    rejected([*sources_of(tiny)[command], "output"], *fragments)


@pytest.mark.parametrize("command", ["tiny", "import", "export"])
def test_output_in_a_missing_folder_is_rejected(
    command: str, tiny: Any, tmp_path: Path, rejected: Rejected
) -> None:
    fragments = ("does not exist", "create that folder first")
    rejected([*sources_of(tiny)[command], tmp_path / "no" / "output"], *fragments)


NO_TE = "one of 'auto', 'torch'", "Transformer Engine is not installed here"


@pytest.mark.parametrize("backend", ["nonsense", "transformer_engine"])
@pytest.mark.parametrize("command", ["import", "verify"])
def test_missing_backend_is_rejected(
    command: str,
    backend: str,
    megatron_bridge: Any,
    tiny: Any,
    tmp_path: Path,
    rejected: Rejected,
) -> None:
    from exaone_bridge.modules.backend import TRANSFORMER_ENGINE

    if backend == "transformer_engine" and TRANSFORMER_ENGINE is not None:
        pytest.skip("Transformer Engine is installed here")
    folder = tiny("exaone4")
    output = [] if command == "verify" else [tmp_path / "output"]
    fragments = (
        ("one of 'auto', 'torch', 'transformer_engine'",) if backend == "nonsense" else NO_TE
    )
    rejected(
        [command, folder, *output, "--backend", backend], f"backend is '{backend}'", *fragments
    )


VERIFY_OPTIONS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no source": ([], ("SOURCE is missing, the folder to verify",)),
    "a report that cannot be written": (
        ["{source}", "--card", "/proc/card.md"],
        ("/proc/card.md: cannot be written", "name a file that you can write"),
    ),
    "no such other": (
        ["{source}", "nowhere"],
        ("nowhere", "does not exist", "a Megatron checkpoint"),
    ),
    "an empty other": (["{source}", "tmp"], ("neither model.safetensors", "download the weights")),
    "an unknown data type": (["{source}", "--dtype", "int8"], ("--dtype is 'int8'", "'bfloat16'")),
    "a report in no folder": (
        ["{source}", "--report", "no/report.html"],
        ("no/report.html", "a folder that exists"),
    ),
    "a folder for a report": (["{source}", "--json", "tmp"], ("output is 'tmp'",)),
}


@pytest.mark.parametrize("name", VERIFY_OPTIONS)
def test_invalid_verify_option_is_rejected(name: str, tiny: Any, rejected: Rejected) -> None:
    options, fragments = VERIFY_OPTIONS[name]
    rejected(["verify", *(option.format(source=tiny("exaone4")) for option in options)], *fragments)


BEFORE_MEGATRON = """
import json, sys
from exaone_bridge.cli import main
for arguments in json.loads(sys.stdin.read()):
    sys.argv = ["exaone-bridge", *arguments]
    try:
        main()
        code = None
    except SystemExit as end:
        code = end.code
    slow = [name for name in ("torch", "transformers", "megatron") if name in sys.modules]
    sys.stderr.write(json.dumps([arguments[0], code, slow]) + "\\n")
"""


def test_input_is_rejected_before_megatron_is_imported(
    tiny: Any, sharded: Path, tmp_path: Path
) -> None:
    truncated, unindexed = tmp_path / "truncated", tmp_path / "unindexed"
    shutil.copytree(tiny("exaone4"), truncated)
    os.truncate(truncated / WEIGHTS, 100)
    shutil.copytree(sharded, unindexed)
    (unindexed / INDEX).write_text("<html>")
    folders = (truncated, unindexed)
    valid = str(tiny("exaone4"))
    missing, existing, output = str(tmp_path / "nowhere"), str(tmp_path), str(tmp_path / "output")
    layouts = [options for options, _ in LAYOUTS.values()]
    runs = [["inspect", str(folder)] for folder in folders]
    runs += [["inspect", valid, *options] for options in layouts] + [["inspect", missing]]
    runs += [["tiny", "nonsense", output], ["tiny", "exaone4", output, "--set", "nonsense"]]
    runs += [["import", str(folder), output] for folder in folders]
    runs += [["import", missing, output], ["import", valid, existing], ["verify"]]
    runs += [["export", missing, output], ["export", valid, output], ["export", valid, existing]]
    runs += [["export", valid, str(tmp_path / "no" / "output")]]
    runs += [[command, valid, output, "--backend", "x"] for command in ("import", "verify")]
    runs += [["verify", valid, "--dtype", "int8"], ["verify", valid, "--json", "/proc/x"]]
    runs += [["import", valid, "/proc/output", "--dry-run"]]
    no_torch = len(runs)
    runs += [["verify", str(folder)] for folder in folders]
    runs += [
        [command, valid, *more, *options]
        for command, *more in (["import", output], ["verify"])
        for options in layouts
    ]
    (tmp_path / "empty").mkdir()
    runs += [["verify", missing], ["verify", valid, str(tmp_path / "empty")]]
    runs += [
        ["tiny", "exaone4", existing],
        ["demo", "--vpp", "2", "--pp", "1"],
        ["demo", "--tp", "3"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", BEFORE_MEGATRON],
        input=json.dumps(runs),
        text=True,
        capture_output=True,
        timeout=300,
    )
    lines = [
        json.loads(line)
        for line in done.stderr.splitlines()
        if not line.startswith("exaone-bridge: ")
    ]
    assert done.returncode == 0 and len(lines) == len(runs), done.stderr[-2000:]
    for number, (arguments, (command, code, slow)) in enumerate(zip(runs, lines, strict=True)):
        assert (command, code) == (arguments[0], 2), arguments
        assert "megatron" not in slow, arguments
        assert slow == [] or number >= no_torch, arguments
    assert not Path(output).exists()


@pytest.mark.parametrize("command", ["import", "tiny"])
def test_unwritable_output_is_rejected(command: str, tiny: Any, rejected: Rejected) -> None:
    arguments = {"import": ["import", tiny("exaone4"), "/proc/output", "--dry-run"]}
    arguments["tiny"] = ["tiny", "exaone4", "/proc/output"]
    rejected(arguments[command], "/proc/output: cannot be created", "change the permissions")


@pytest.mark.parametrize(
    ("alias", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")]
)
def test_dtype_has_aliases(alias: str, dtype: str) -> None:
    assert make_parser().parse_args(["verify", "model", "--dtype", alias]).dtype == dtype


def test_installed_command_exits_with_2(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("exaone-bridge")
    done = subprocess.run(
        [command, "inspect", "nowhere"], cwd=tmp_path, text=True, capture_output=True, timeout=120
    )
    fragments = (
        "exaone-bridge: nowhere: this folder does not exist; name a Hugging Face model folder.\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", fragments)
