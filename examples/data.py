"""Data and a tiny model for fine-tuning, made on this machine without downloads."""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common import check_installed

from exaone_bridge import write_random
from exaone_bridge.recipes import recipe


def prepare(options: argparse.Namespace, write_dataset: Callable[[Path], None]) -> None:
    """Make the dataset and the model where `--data` and `--hf-path` do not name them."""
    if not (options.data or options.save / "data").exists():
        check_installed(options)
    if not (options.hf_path or options.save / "model").exists():
        check_installed(options)
    if options.data is None:
        options.data = make_once(options.save / "data", write_dataset)
    if options.hf_path is None:
        options.hf_path = make_once(
            options.save / "model", lambda path: write_random_model(path, options.recipe)
        )


def make_once(target: Path, write: Callable[[Path], None]) -> Path:
    """Make a directory on rank 0, complete or not at all, while other ranks wait for it."""
    if os.environ.get("RANK", "0") != "0":
        while not target.exists():
            time.sleep(0.2)
    elif not target.exists():
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.rename(target)
    return target


def write_random_model(path: Path, recipe_name: str) -> None:
    """Write the recipe's model with random weights and a byte-level tokenizer."""
    write_random(path, recipe(recipe_name)().model.hf_config)


def write_text(path: Path, validation: int = 200) -> None:
    """Write `training.jsonl` and `validation.jsonl` from `docstrings`."""
    path.mkdir()
    examples = list(docstrings())
    interval = max(2, len(examples) // validation)
    splits = {
        "validation": examples[::interval],
        "training": [example for index, example in enumerate(examples) if index % interval],
    }
    for name, split in splits.items():
        lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in split]
        (path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def docstrings() -> Iterator[dict[str, str]]:
    """Yield questions about Python's standard library; answers are the docstrings' first lines."""
    questions: set[str] = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (
                docstring := ast.get_docstring(node)
            ):
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                question = f"What does the {kind} {node.name} of Python's module {path.stem} do?"
                if question not in questions:  # methods may share a name
                    questions.add(question)
                    yield {"input": question, "output": docstring.splitlines()[0]}
