"""Every code block of README and docs runs as printed, or a comment before it says why not.

The comment is `<!-- needs: a GPU -->`, or `<!-- run by: FILE, ... -->` with the tests that run it.
The blocks of a page run in order, each by itself, in a directory with the tiny models of `GIVEN`.
"""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import read_config, read_tensors, same_bits
from tests.helpers.paths import ROOT
from tests.helpers.scripts import fork_script

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(page for page in (ROOT / "docs").rglob("*.md") if not {"_build", "api"} & set(page.parts)),
]
RUN_LANGUAGES = ("bash", "python")
NEEDS = ("a GPU",)
# The folders that the blocks of a page read, and the tiny models that are there.
GIVEN = {
    "README.md": {"LGAI-EXAONE/EXAONE-4.0-1.2B": "exaone4-1.2b", "MODEL": "exaone4"},
    "docs/python-api.md": {"tiny-model": "exaone4-1.2b"},
    "docs/quickstart.md": {},
    "docs/rl/index.md": {"tiny-model": "exaone4-1.2b"},
    "docs/verification.md": {"SOURCE": "ernie45", "OTHER": "ernie45"},
}
COMMAND = ROOT / "src" / "exaone_bridge" / "__main__.py"


@dataclass(frozen=True, slots=True)
class Block:
    """A code block of a page.

    Attributes:
        language: "bash", "python", "text" and so on.
        text: what is printed.
        needs: what a machine must have, of a comment before the block; empty: nothing.
        run_by: the files that run the block, of another such comment.
    """

    language: str
    text: str
    needs: str
    run_by: tuple[str, ...]


def blocks_of(page: Path) -> list[Block]:
    """Read the code blocks of a page."""
    found = re.findall(
        r"^(?:<!-- (needs|run by): (.*?) -->\n)?```(\w*)\n(.*?)^```",
        page.read_text(),
        re.MULTILINE | re.DOTALL,
    )
    return [
        Block(
            language,
            text,
            value if kind == "needs" else "",
            tuple(value.split(", ")) if kind == "run by" else (),
        )
        for kind, value, language, text in found
    ]


def runnable(page: Path) -> list[Block]:
    """Return the blocks that this test runs."""
    return [
        block
        for block in blocks_of(page)
        if block.language in RUN_LANGUAGES and not block.needs and not block.run_by
    ]


def test_every_block_runs_or_says_why_not() -> None:
    pages = {str(page.relative_to(ROOT)) for page in PAGES if runnable(page)}
    assert pages == set(GIVEN)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_comments_name_a_need_or_a_file_that_runs_the_block(page: Path) -> None:
    text = page.read_text()
    blocks = blocks_of(page)
    commented = [block for block in blocks if block.needs or block.run_by]
    assert len(commented) == len(re.findall(r"^<!-- (?:needs|run by):", text, re.MULTILINE))
    for block in commented:
        assert block.needs in ("", *NEEDS)
        for name in block.run_by:
            assert (ROOT / name).is_file(), name


def _run_command(work: Path, line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    assert program == "exaone-bridge", f"no test runs {line!r}"
    fork_script(work, COMMAND, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", GIVEN)
def test_blocks_run_as_printed(
    name: str, megatron_bridge: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, model in GIVEN[name].items():
        shutil.copytree(tiny(model), tmp_path / folder)
    work = tmp_path / "output"
    work.mkdir()
    for number, block in enumerate(runnable(ROOT / name)):
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                _run_command(work, line)
        else:
            script = work / f"block{number}.py"
            script.write_text(block.text)
            fork_script(work, script)
    if (exported := tmp_path / "tiny-exported").is_dir():  # which two pages make of tiny-model
        assert same_bits(read_tensors(exported), read_tensors(tmp_path / "tiny-model"))
        assert read_config(exported) == read_config(tmp_path / "tiny-model")
    else:
        assert name not in ("docs/python-api.md", "docs/quickstart.md")
