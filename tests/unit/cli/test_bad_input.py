"""Invalid input: one sentence and exit code 2, before anything heavy is imported."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exaone_bridge.checkpoint.hf.shards import ShardWriter
from exaone_bridge.convert import to_hf, to_megatron
from exaone_bridge.errors import CheckpointError
from exaone_bridge.runtime.progress import Progress
from tests.helpers.damage import INDEX, WEIGHTS, Damage, set_config

Cli = Callable[..., Any]
Snapshot = Callable[[Path], dict[str, object]]


@pytest.fixture
def refused(cli: Cli, snapshot: Snapshot, tmp_path: Path) -> Callable[..., str]:
    """`refused(arguments, *fragments)`: the command rejects in one line, and changes nothing."""

    def check(arguments: list[object], *says: str) -> str:
        before = snapshot(tmp_path)
        run = cli(*arguments)
        assert run.code == 2, run
        assert snapshot(tmp_path) == before
        assert "Traceback" not in run.out + run.err
        (line,) = run.err.splitlines()
        assert line.startswith("exaone-bridge: ") and line.endswith(".")
        for fragment in says:
            assert fragment in line
        return line

    return check


# --- Hugging Face folders ---------------------------------------------------------------------


def arguments_of(command: str, folder: Path) -> list[object]:
    """The command on `folder`; what it would write has a name of its own beside it."""
    return [command, folder] + (
        [folder.parent / "output"] if command in ("import", "export") else []
    )


@pytest.mark.parametrize("command", ["inspect", "import", "verify"])
def test_damaged_folder_is_rejected(
    command: str, tiny: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """One damage: all commands open a folder in one way (tests/unit/checkpoint/hf)."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("exaone4"), folder)
    os.truncate(folder / WEIGHTS, 100)
    refused(arguments_of(command, folder), WEIGHTS, "the file has 100", "copy it again")


@pytest.mark.parametrize("command", ["inspect", "import", "export", "verify"])
def test_a_folder_that_is_not_there(
    command: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    says = ("nowhere: this folder does not exist", "name a ")
    refused(arguments_of(command, tmp_path / "nowhere"), *says)
    (tmp_path / "nowhere").write_text("a file")
    refused(arguments_of(command, tmp_path / "nowhere"), *says)


@pytest.mark.parametrize("command", ["inspect", "import", "verify"])
@pytest.mark.parametrize(
    "fields",
    [{"tie_word_embeddings": "maybe"}, {"bos_token_id": "one"}, {"use_cache": "yes"}],
    ids=str,
)
def test_a_field_of_a_type_that_transformers_refuses(
    command: str,
    fields: dict[str, object],
    megatron_bridge: Any,
    tiny: Any,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("exaone4"), folder)
    set_config(**fields)(folder)
    refused(arguments_of(command, folder), *fields)


def with_remote_code(folder: Path) -> None:
    """config.json asks for Python code that lies in the folder, and would leave a trace."""
    set_config(auto_map={"AutoConfig": "remote.C", "AutoModelForCausalLM": "remote.M"})(folder)
    trace = folder.parent / "remote_code_ran"
    (folder / "remote.py").write_text(f"open({str(trace)!r}, 'w')\nclass C: pass\nclass M: pass\n")


@pytest.mark.parametrize("command", ["inspect", "import", "verify"])
def test_remote_code_beside_a_known_architecture_never_runs(
    command: str, megatron_bridge: Any, cli: Cli, tiny: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("exaone4"), folder)
    with_remote_code(folder)
    run = cli(*arguments_of(command, folder))
    assert not (tmp_path / "remote_code_ran").exists()
    assert run.code == 0 or not (tmp_path / "output").exists()


@pytest.mark.parametrize("command", ["inspect", "import", "verify"])
def test_remote_code_beside_a_known_architecture_is_refused(
    command: str, megatron_bridge: Any, tiny: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("exaone4"), folder)
    with_remote_code(folder)
    refused(arguments_of(command, folder), "auto_map", "remote.M", "trust_remote_code")


# --- layouts ----------------------------------------------------------------------------------

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
def test_a_layout_that_does_not_fit(
    command: str, name: str, tiny: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("exaone4"), folder)
    options, says = LAYOUTS[name]
    refused(arguments_of(command, folder) + options, "parallel layout: ", *says)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_sequence_parallelism_without_tp(
    command: str, tiny: Any, refused: Callable[..., str]
) -> None:
    options, says = SP
    refused([command, tiny("exaone4"), *options], *says)


@pytest.mark.parametrize("name", ["heads over tp", "more ranks than heads", "vpp with pp 1"])
def test_a_layout_that_does_not_fit_the_demo(name: str, refused: Callable[..., str]) -> None:
    options, says = LAYOUTS[name]
    refused(["demo", *options], "parallel layout: ", *says)


def test_key_value_heads_over_tp(tiny: Any, refused: Callable[..., str]) -> None:
    folder = tiny("exaone4", num_attention_heads=12, num_key_value_heads=4)
    refused(
        ["inspect", folder, "--tp", 6],
        "tp is 6",
        "a divisor or a multiple of 4 KV heads",
        "another --tp",
    )


@pytest.mark.parametrize(
    "option", [["--tp", "0"], ["--pp", "-1"], ["--vpp", "two"], ["--tpp", "2"]], ids=str
)
@pytest.mark.parametrize("command", ["inspect", "import", "export", "verify"])
def test_a_layout_that_is_no_layout(
    command: str, option: list[str], tiny: Any, cli: Cli, snapshot: Snapshot, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("exaone4"), folder)
    before = snapshot(tmp_path)
    run = cli(*arguments_of(command, folder), *option)
    assert run.code == 2 and option[0] in run.err and "Traceback" not in run.err
    assert snapshot(tmp_path) == before


# --- outputs ----------------------------------------------------------------------------------


def sources_of(tiny: Any) -> dict[str, list[object]]:
    """The arguments before the output; `export` checks its output before its source."""
    return {
        "tiny": ["tiny", "exaone4"],
        "import": ["import", tiny("exaone4")],
        "export": ["export", tiny("exaone4")],
    }


OUTPUTS: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: (path.mkdir(), (path / "config.json").write_text("{}")),
    "an empty folder": Path.mkdir,
    "a file": lambda path: path.write_text("precious"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to a folder": lambda path: (path.with_name("real").mkdir(), path.symlink_to("real")),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("command", ["tiny", "import", "export"])
def test_an_output_that_is_there(
    command: str, kind: str, tiny: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    OUTPUTS[kind](tmp_path / "output")
    says = ("output: the output exists already", "name another folder, or remove this one")
    refused([*sources_of(tiny)[command], tmp_path / "output"], *says)
    refused([*sources_of(tiny)[command], "output"], *says)


@pytest.mark.parametrize("command", ["tiny", "import", "export"])
def test_an_output_in_no_folder(
    command: str, tiny: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    says = ("does not exist", "create that folder first")
    refused([*sources_of(tiny)[command], tmp_path / "no" / "output"], *says)


# --- Megatron checkpoints and backends --------------------------------------------------------


def test_exporting_an_empty_folder(
    megatron_bridge: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "empty").mkdir()
    says = ("not a Megatron-Bridge checkpoint", "run_config.yaml is missing", "that `import` wrote")
    refused(arguments_of("export", tmp_path / "empty"), "empty", *says)


def test_exporting_a_hugging_face_folder(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    refused(
        ["export", tiny("exaone4"), tmp_path / "output"],
        "not a Megatron-Bridge checkpoint",
        "that `import` wrote",
    )


def test_importing_a_megatron_checkpoint(
    megatron_folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    refused(["import", megatron_folder, tmp_path / "output"], "config.json", "missing")


def iteration(folder: Path) -> Path:
    return folder / "iter_0000000"


def each_shard(folder: Path, change: Callable[[Path], object]) -> None:
    for path in iteration(folder).glob("*.distcp"):
        change(path)


MEGATRON: dict[str, Damage] = {
    "run_config.yaml not YAML": lambda folder: (iteration(folder) / "run_config.yaml").write_text(
        "{{{"
    ),
    "run_config.yaml without a model": lambda folder: (
        iteration(folder) / "run_config.yaml"
    ).write_text("a: 1\n"),
    "a shard missing": lambda folder: (iteration(folder) / "__2_0.distcp").unlink(),
    "shards cut": lambda folder: each_shard(folder, lambda path: os.truncate(path, 100)),
    ".metadata missing": lambda folder: (iteration(folder) / ".metadata").unlink(),
    "the remembered index has no weight_map": lambda folder: (folder / "hf" / INDEX).write_text(
        "{}"
    ),
    "the remembered index is wrong": lambda folder: set_remembered(folder, lambda file: 5),
    "the remembered index leads out": lambda folder: set_remembered(
        folder, lambda file: f"../{file}"
    ),
}


def set_remembered(folder: Path, change: Callable[[str], object]) -> None:
    """Change the file names in the index that the source had, which `export` writes by."""
    path = folder / "hf" / INDEX
    files = {
        name: change(file) for name, file in json.loads(path.read_text())["weight_map"].items()
    }
    path.write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("name", MEGATRON)
def test_exporting_a_damaged_checkpoint(
    name: str, megatron_folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "megatron"
    shutil.copytree(megatron_folder, folder)
    MEGATRON[name](folder)
    refused(arguments_of("export", folder), "megatron")


@pytest.mark.parametrize("name", MEGATRON)
def test_exporting_a_damaged_checkpoint_leaves_no_output(
    name: str,
    megatron_folder: Path,
    tmp_path: Path,
    cli: Cli,
    snapshot: Snapshot,
    request: pytest.FixtureRequest,
) -> None:
    folder = tmp_path / "megatron"
    shutil.copytree(megatron_folder, folder)
    MEGATRON[name](folder)
    before = snapshot(tmp_path)
    try:
        run = cli(*arguments_of("export", folder))
    except Exception:  # a traceback, which test_exporting_a_damaged_checkpoint complains about
        pass
    else:
        assert run.code != 0
    assert snapshot(tmp_path) == before


def stale_index(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Shards of other weights, with their index, beside the single file that Transformers reads."""
    save_file(tensors, folder / "old-1.safetensors")
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "old-1.safetensors")})
    )


def hostile_index(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """An index of weights outside the folder, beside the file that Transformers reads."""
    save_file(tensors, folder.parent / "evil.safetensors")
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "../evil.safetensors")})
    )


def stray(name: str) -> Callable[[Path, dict[str, torch.Tensor]], None]:
    return lambda folder, tensors: save_file(tensors, folder / name)


BESIDE = {
    "a stale index": stale_index,
    "a hostile index": hostile_index,
    "a stray file, first by name": stray("consolidated.safetensors"),
    "a stray file, last by name": stray("original.safetensors"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_the_weights_that_were_checked_are_the_weights_that_are_read(
    name: str,
    megatron_bridge: Any,
    tiny: Any,
    tmp_path: Path,
    cli: Cli,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`model.safetensors` wins, as in Transformers; or the folder is refused."""
    in_any_order = (
        glob.glob
    )  # the order of the host's files decides: here it is the same on every file system
    monkeypatch.setattr(glob, "glob", lambda *args, **kwargs: sorted(in_any_order(*args, **kwargs)))
    folder, room = tmp_path / "model", tmp_path / "room"
    shutil.copytree(tiny("exaone4"), folder)
    room.mkdir()
    checked = load_file(folder / WEIGHTS)
    BESIDE[name](folder, {tensor: value + 1 for tensor, value in checked.items()})
    before = snapshot(tmp_path)
    run = cli("import", folder, tmp_path / "megatron")
    if run.code == 2:
        assert snapshot(tmp_path) == before
        return
    assert run.code == 0
    assert cli("export", tmp_path / "megatron", room / "output").code == 0
    assert [path.name for path in room.iterdir()] == ["output"]
    after = {
        path: kind
        for path, kind in snapshot(tmp_path).items()
        if path.partition("/")[0] not in ("megatron", "room")
    }
    assert after == {path: kind for path, kind in before.items() if path != "room"}
    assert [path.name for path in (room / "output").glob("*safetensors*")] == [WEIGHTS]
    exported = load_file(room / "output" / WEIGHTS)
    assert exported.keys() == checked.keys()
    assert all(torch.equal(exported[tensor], value) for tensor, value in checked.items())


NO_TE = "one of 'auto', 'torch'", "Transformer Engine is not installed here"


@pytest.mark.parametrize("backend", ["nonsense", "transformer_engine"])
@pytest.mark.parametrize("command", ["import", "verify"])
def test_a_backend_that_is_not_there(
    command: str,
    backend: str,
    megatron_bridge: Any,
    tiny: Any,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    from exaone_bridge.modules.backend import TRANSFORMER_ENGINE

    if backend == "transformer_engine" and TRANSFORMER_ENGINE is not None:
        pytest.skip("Transformer Engine is installed here")
    folder = tiny("exaone4")
    output = [] if command == "verify" else [tmp_path / "output"]
    says = (
        NO_TE if TRANSFORMER_ENGINE is None else ("one of 'auto', 'torch', 'transformer_engine'",)
    )
    refused([command, folder, *output, "--backend", backend], f"backend is '{backend}'", *says)


VERIFY_OPTIONS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no source": ([], ("SOURCE", "a folder")),
    "no such other": (
        ["{source}", "nowhere"],
        ("nowhere", "does not exist", "a Megatron checkpoint"),
    ),
    "an empty other": (["{source}", "tmp"], ("neither model.safetensors", "download the weights")),
    "a type that is none": (["{source}", "--dtype", "int8"], ("--dtype is 'int8'", "'bfloat16'")),
    "a report in no folder": (
        ["{source}", "--report", "no/report.html"],
        ("no/report.html", "a folder that exists"),
    ),
    "a folder for a report": (["{source}", "--json", "tmp"], ("output is 'tmp'",)),
}


@pytest.mark.parametrize("name", VERIFY_OPTIONS)
def test_what_cannot_be_verified(name: str, tiny: Any, refused: Callable[..., str]) -> None:
    options, says = VERIFY_OPTIONS[name]
    refused(["verify", *(option.format(source=tiny("exaone4")) for option in options)], *says)


# --- tiny -------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no equals": (["num_hidden_layers"], ("--set is 'num_hidden_layers'", "field=value")),
    "no field": (["=3"], ("--set is '=3'", "field=value")),
    "rope": (['rope_parameters={"rope_type": "yarn"}'], ("rope_type is 'yarn'", "'llama3'")),
    "rope of a word": (
        ["rope_parameters=yarn"],
        ("rope_parameters is 'yarn'", "must be an object"),
    ),
    "layer_types": (
        ['layer_types=["full_attention"]'],
        ("layer_types is '1 entries'", "num_hidden_layers=8"),
    ),
    "layer_types of a number": (
        ["layer_types=5", "num_hidden_layers=3"],
        ("layer_types is 5", "must be a list of"),
    ),
    "pattern": (["layer_types=null"], ("sliding_window_pattern is 'LLLG'", 'write "layer_types":')),
    "layers": (["num_hidden_layers=0"], ("num_hidden_layers is 0", "a positive whole number")),
    "layers below none": (
        ["num_hidden_layers=-2"],
        ("num_hidden_layers is -2", "a positive whole number"),
    ),
    "layers of a word": (
        ["num_hidden_layers=many"],
        ("num_hidden_layers is 'many'", "a positive whole number"),
    ),
    "layers of true": (
        ["num_hidden_layers=true"],
        ("num_hidden_layers is True", "a positive whole number"),
    ),
    "heads": (
        ["num_key_value_heads=3"],
        ("num_key_value_heads is 3", "a divisor of num_attention_heads=4"),
    ),
    "head_dim": (["head_dim=7"], ("head_dim is 7", "even")),
    "epsilon": (["rms_norm_eps=NaN"], ("rms_norm_eps is nan", "a finite number")),
    "dtype": (["dtype=int8"], ("dtype is 'int8'", "'bfloat16'")),
    "architecture": (
        ['architectures=["LlamaForCausalLM"]'],
        ("['LlamaForCausalLM']", "'Exaone4ForCausalLM'"),
    ),
    "architecture of a number": (
        ["architectures=5"],
        ("architectures is 5", "'Exaone4ForCausalLM'"),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_make_no_model(
    name: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    settings, says = SETTINGS[name]
    options = [part for setting in settings for part in ("--set", setting)]
    refused(["tiny", "exaone4", tmp_path / "output", *options], *says)


@pytest.mark.parametrize("family", ["nonsense", "", "exaone", "EXAONE4"])
def test_a_miniature_that_is_not_there(
    family: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    refused(
        ["tiny", family, tmp_path / "output"],
        f"family is '{family}'",
        "one of 'exaone4', 'exaone4-1.2b'",
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--set", "eos_token_id={}"], "eos_token_id"), (["--seed", str(2**70)], "seed")],
    ids=["eos_token_id", "seed"],
)
def test_a_miniature_that_cannot_be_written(
    options: list[str], says: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    refused(["tiny", "exaone4", tmp_path / "output", *options], says)


# --- when, and from where ---------------------------------------------------------------------

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
    heavy = [name for name in ("torch", "transformers", "megatron") if name in sys.modules]
    sys.stderr.write(json.dumps([arguments[0], code, heavy]) + "\\n")
"""


def test_refusals_come_before_megatron_is_imported(
    tiny: Any, sharded: Path, tmp_path: Path
) -> None:
    truncated, unindexed = tmp_path / "truncated", tmp_path / "unindexed"
    shutil.copytree(tiny("exaone4"), truncated)
    os.truncate(truncated / WEIGHTS, 100)
    shutil.copytree(sharded, unindexed)
    (unindexed / INDEX).write_text("<html>")
    folders = (truncated, unindexed)
    good = str(tiny("exaone4"))
    missing, existing, output = str(tmp_path / "nowhere"), str(tmp_path), str(tmp_path / "output")
    layouts = [options for options, _ in LAYOUTS.values()]
    runs = [["inspect", str(folder)] for folder in folders]
    runs += [["inspect", good, *options] for options in layouts] + [["inspect", missing]]
    runs += [["tiny", "nonsense", output], ["tiny", "exaone4", output, "--set", "nonsense"]]
    no_torch = len(runs)
    runs += [["import", str(folder), output] for folder in folders]
    runs += [["verify", str(folder)] for folder in folders]
    runs += [
        [command, good, *more, *options]
        for command, *more in (["import", output], ["verify"])
        for options in layouts
    ]
    runs += [["import", missing, output], ["import", good, existing], ["verify", missing]]
    runs += [
        ["export", missing, output],
        ["export", good, existing],
        ["export", good, str(tmp_path / "no" / "output")],
    ]
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
    for number, (arguments, (command, code, heavy)) in enumerate(zip(runs, lines, strict=True)):
        assert (command, code) == (arguments[0], 2), arguments
        assert "megatron" not in heavy, arguments
        assert heavy == [] or number >= no_torch, arguments
    assert not Path(output).exists()


def test_the_installed_command_ends_with_two(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("exaone-bridge")
    done = subprocess.run(
        [command, "inspect", "nowhere"], cwd=tmp_path, text=True, capture_output=True, timeout=120
    )
    says = "exaone-bridge: nowhere: this folder does not exist; name a Hugging Face model folder.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", says)


# --- in the middle ----------------------------------------------------------------------------


def write_something(*arguments: Any) -> None:
    """Write where a rank does: an export's into its writer's folder, an import's into its target.

    Args:
        arguments: the rank's own, the source and the target first.
    """
    writers = [each.folder for each in arguments if isinstance(each, ShardWriter)]
    target = writers[0] if writers else arguments[1]
    (target / "half.bin").write_bytes(b"half")
    (target / "deep").mkdir(exist_ok=True)
    (target / "deep" / "file").write_text("half")


def fail(*arguments: Any, progress: Progress) -> None:
    write_something(*arguments)
    raise RuntimeError("a fault in the middle")


def die(*arguments: Any, progress: Progress) -> None:
    write_something(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(*arguments: Any, progress: Progress) -> None:
    write_something(*arguments)
    raise CheckpointError("somewhere", "cannot be read", remedy="read something else")


@pytest.mark.parametrize(
    ("rank", "code", "says"),
    [
        (fail, 3, "a fault in the middle"),
        (die, 3, "died (exit code -9)"),
        (refuse, 2, "exaone-bridge: somewhere: cannot be read; read something else.\n"),
    ],
)
@pytest.mark.parametrize("command", ["import", "export"])
def test_a_fault_in_the_middle_leaves_no_output(
    command: str,
    rank: Callable[..., None],
    code: int,
    says: str,
    tiny: Any,
    megatron_folder: Path,
    tmp_path: Path,
    cli: Cli,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = megatron_folder if command == "export" else tiny("exaone4")
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            to_hf if command == "export" else to_megatron, f"_{command}_rank", rank
        )  # ranks are forked: they have the fault too
        run = cli(command, source, tmp_path / "output", "--workers", 2)
    assert run.code == code and says in run.err and run.err.startswith("exaone-bridge: ")
    if command == "import" or rank is refuse:
        assert snapshot(tmp_path) == before
        return
    assert not (
        tmp_path / "output"
    ).exists()  # an export is begun, and the next one goes on with it
    assert [path.name for path in tmp_path.iterdir() if path.name != "tmp"] == [".output.partial"]
    assert cli(command, source, tmp_path / "output").code == 0
    assert [path.name for path in tmp_path.iterdir() if path.name != "tmp"] == ["output"]
    assert (
        not (tmp_path / "output" / "half.bin").exists()
        and not (tmp_path / "output" / "deep").exists()
    )


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "where",
    [
        "checkpoint.staging.tempfile.mkdtemp",
        "convert.to_megatron.write_config_json",
        "convert.to_megatron.copy_companion_files",
    ],
)
def test_a_fault_outside_the_ranks_ends_with_three(
    where: str,
    megatron_bridge: Any,
    tiny: Any,
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"exaone_bridge.{where}", full)
    run = cli("import", tiny("exaone4"), tmp_path / "output")
    assert run.code == 3 and "No space left on device" in run.err


def test_a_fault_outside_the_ranks_leaves_nothing(
    megatron_bridge: Any,
    tiny: Any,
    tmp_path: Path,
    cli: Cli,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(to_megatron, "copy_companion_files", full)
    before = snapshot(tmp_path)
    with contextlib.suppress(
        OSError
    ):  # its traceback is test_a_fault_outside_the_ranks_ends_with_three's
        assert cli("import", tiny("exaone4"), tmp_path / "output").code == 3
    assert snapshot(tmp_path) == before


def test_an_interrupt_leaves_nothing_and_is_no_difference(
    megatron_bridge: Any,
    tiny: Any,
    tmp_path: Path,
    cli: Cli,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(to_megatron, "copy_companion_files", interrupt)
    before = snapshot(tmp_path)
    run = cli("import", tiny("exaone4"), tmp_path / "output")
    assert run.code not in (0, 1, 2)
    assert snapshot(tmp_path) == before
