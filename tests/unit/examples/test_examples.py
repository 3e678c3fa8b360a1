"""The examples run as written."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exaone_bridge.verification.checks.folders import compare_tensors
from tests.helpers.paths import ROOT
from tests.helpers.scripts import fork_script


def _run(script: object, *arguments: object) -> str:
    """Run `python script arguments`, which must print no warning, and return its output."""
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "MASTER_PORT"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def _imports(script: str) -> list[str]:
    """List the modules that a script imports, also inside functions, in the order of lines."""
    found = [
        (node.lineno, alias.name if isinstance(node, ast.Import) else str(node.module))
        for node in ast.walk(ast.parse(script))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    return [name for _, name in sorted(found)]


@pytest.mark.parametrize(
    "script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name
)
def test_example_imports_exaone_bridge_first(script: Path) -> None:
    """Megatron-Bridge cannot be imported without Transformer Engine before exaone_bridge is."""
    modules = _imports(script.read_text())
    plugin = [
        number
        for number, name in enumerate(modules)
        if name.partition(".")[0] in ("exaone_bridge", "common")
    ]
    bridge = [number for number, name in enumerate(modules) if name.startswith("megatron.bridge")]
    assert plugin and plugin[0] < min(bridge, default=len(modules))


@pytest.mark.parametrize(
    "path",
    [
        *sorted((ROOT / "examples").glob("*.py")),
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ],
    ids=lambda path: path.name,
)
def test_examples_and_pages_import_public_names_only(path: Path) -> None:
    text = path.read_text()
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    imported = {name for name in _imports(text) if name.partition(".")[0] == "exaone_bridge"}
    assert imported <= {"exaone_bridge", "exaone_bridge.errors", "exaone_bridge.recipes"}


def test_round_trip_example_is_bitwise_equal(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    folder = tiny("exaone4")
    printed = fork_script(
        tmp_path, ROOT / "examples/round_trip.py", folder, tmp_path / "out", "--tp", 2, "--pp", 2
    )
    assert "91 tensors bitwise equal" in printed
    assert compare_tensors(folder, tmp_path / "out" / "exported").passed


@pytest.mark.slow
def test_train_example_lowers_the_loss(tiny: Any, tmp_path: Path) -> None:
    """The exported directory has the same tensors with other values."""
    folder = tiny("exaone4-1.2b")
    with socket.socket() as server:  # the port that Megatron-Bridge takes by itself
        with contextlib.suppress(OSError):  # another program has it
            server.bind(("", 12355))
            server.listen()
        printed = _run("examples/train.py", folder, tmp_path / "out", "--steps", 2)
    losses = [float(text) for text in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    check = compare_tensors(folder, tmp_path / "out")
    assert not check.passed
    assert check.summary == "68 of 68 tensors differ"


def test_images_example_learns_from_images(megatron_bridge: Any, tiny: Any, tmp_path: Path) -> None:
    """The loss falls below that of a guess of the side; only the vision encoder is unchanged."""
    folder = tiny("exaone45")
    printed = fork_script(
        tmp_path, ROOT / "examples/images.py", folder, tmp_path / "out", "--steps", 20
    )
    losses = [float(text) for text in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 20
    # A guess of one of four sides costs log 4 on the first of five letters.
    assert losses[-1] < 0.8 * math.log(4) / 5
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    same = {name for name, value in before.items() if torch.equal(after[name], value)}
    vision_encoder = {name for name in before if ".visual." in name and ".merger." not in name}
    assert same == vision_encoder | {name for name in before if name.startswith("mtp.")}


def test_chat_example_goes_from_conversations_to_answers(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    """LoRA learns the answers, and Transformers gives them from the merged export."""
    script = ROOT / "examples/chat.py"
    assert len(script.read_text().splitlines()) < 60
    folder, output = tiny("ernie45-dense"), tmp_path / "out"
    printed = fork_script(tmp_path, script, folder, output, "--steps", 10)
    losses = [float(text) for text in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 10 and losses[-1] < 0.1 * losses[0]
    for answer in ("wet? Yes.", "cold? No.", "Who are you? A model."):
        assert answer + "\n" in printed
    before, after = (load_file(path / "model.safetensors") for path in (folder, output / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if re.search(r"(self_attn|mlp)\..*_proj", name)}


@pytest.mark.parametrize("lora", [False, True])
def test_reward_model_example_learns_and_transformers_scores_the_same(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, lora: bool
) -> None:
    """The rewards that Megatron-Core printed are those of the exports in Transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    script, start, trained = ROOT / "examples/reward_model.py", tmp_path / "start", tmp_path / "out"
    fork_script(tmp_path, script, tiny("exaone4-1.2b"), start, "--init")
    options = ("--lora", tmp_path / "adapter", "--lr", 5e-3) if lora else ()
    printed = fork_script(tmp_path, script, start, trained, "--steps", 10, *options)
    losses = [float(text) for text in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 10
    assert losses[-1] < 0.5 * losses[0]
    rewards = re.findall(r"(\S.*) chosen (\S+), rejected (\S+)", printed)
    assert len(rewards) == 4
    tokenizer = AutoTokenizer.from_pretrained(trained)
    models = [AutoModelForSequenceClassification.from_pretrained(trained, dtype=torch.float32)]
    if lora:
        base = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32)
        models.append(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    for question, *found in rewards:
        assert float(found[0]) > float(found[1])
        for answer, reward in zip(("I will gladly tell you.", "Go away."), found, strict=True):
            messages = [("user", question), ("assistant", answer)]
            text = tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages], tokenize=False
            )
            tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            for model in models:
                assert abs(model.eval()(tokens).logits.item() - float(reward)) <= 1e-4


def test_readme_python_is_short_and_imports_exaone_bridge_first() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 8
    modules = _imports(block)
    assert modules.index("exaone_bridge") < modules.index("megatron.bridge")


def test_tokenized_text_is_read_by_megatron_core(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from transformers import AutoTokenizer

    texts = ["The first document. 첫 문서.", "", "A file of plain text,\nof two lines."]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts[:2]), encoding="utf-8"
    )
    texts[2] *= 50  # longer than the model's positions, which is not worth a warning
    (tmp_path / "b.txt").write_text(texts[2], encoding="utf-8")
    folder, prefix = tiny("exaone4"), tmp_path / "text"
    files = (tmp_path / "a.jsonl", tmp_path / "b.txt")
    script = ROOT / "examples/tokenize_text.py"
    printed = fork_script(tmp_path, script, "--tokenizer", folder, "--output", prefix, *files)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    dataset = IndexedDataset(str(prefix))
    assert [list(map(int, dataset[index])) for index in range(len(dataset))] == expected
    assert f"3 documents, {sum(map(len, expected)):,} tokens" in printed


@pytest.mark.parametrize("line", ['{"text"', '{"content": "a"}', '["text"]', '{"text": 5}'])
def test_bad_line_of_raw_text_is_named(megatron_bridge: Any, tmp_path: Path, line: str) -> None:
    example = runpy.run_path(str(ROOT / "examples/tokenize_text.py"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(SystemExit, match=re.escape(f"{bad}, line 3 ")):
        list(example["texts"]([bad]))
