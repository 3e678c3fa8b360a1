"""README and docs: links resolve, commands parse, files and targets that they name exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from exaone_bridge.cli.arguments import make_parser
from tests.helpers.paths import ROOT

MAX_COLUMNS = 100
FACE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [
    *FACE,
    *(page for page in (ROOT / "docs").rglob("*.md") if not {"_build", "api"} & set(page.parts)),
]
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def prose_of(text: str) -> list[str]:
    """The lines outside code blocks, of no table and without a link that does not fit a line."""
    lines = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    return [line for line in lines if not line.startswith("|") and "](" not in line]


@page
def test_links_to_files_resolve(page: Path) -> None:
    """Sphinx checks the links between pages and their anchors; this includes README's."""
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not re.match(r"[a-z]+://", target):
            assert (page.parent / target).exists(), target


@page
def test_named_files_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:src|tests|docs|examples|benchmarks)/[\w./-]+)`", page.read_text()
    ):
        if not name.startswith("examples/conversion/"):  # of Megatron-Bridge
            assert (ROOT / name).exists(), name


@page
def test_no_page_has_a_path_of_the_machine_that_wrote_it(page: Path) -> None:
    assert re.findall(r"(?<![\w.])/(?:tmp|root|work|home|scratch)\b\S*", page.read_text()) == []


@page
def test_commands_parse(page: Path) -> None:
    for block in code_blocks(page.read_text(), "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|;|\|", line.partition(" #")[0]):
                if command.split()[:1] == ["exaone-bridge"]:
                    make_parser().parse_args(shlex.split(command)[1:])


@page
def test_lines_are_not_long(page: Path) -> None:
    if page.parent.name == "cards":  # written by `verify --card`
        return
    assert [line for line in prose_of(page.read_text()) if len(line) > MAX_COLUMNS] == []


@page
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for targets in re.findall(r"(?:^|`)make ([a-z -]+?)(?:`|  |$)", page.read_text(), re.MULTILINE):
        for target in targets.split():
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_readme_is_one_screen() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 80
    for target in ("make demo", "make test"):
        assert target in text


def test_ci_checks_the_docs_before_it_runs_the_tests() -> None:
    steps = re.findall(r"^make ([a-z-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert steps == ["check", "docs", "test-all"]


@pytest.mark.parametrize(
    "command",
    [
        "",
        "demo",
        "tiny",
        "inspect",
        "import",
        "export",
        "train",
        "generate",
        "perplexity",
        "verify",
        "doctor",
    ],
)
def test_the_command_line_page_has_the_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "96")
    with pytest.raises(SystemExit):
        make_parser().parse_args([*command.split(), "--help"])
    printed = capsys.readouterr().out.split()
    blocks = code_blocks((ROOT / "docs" / "cli.md").read_text(), "text")
    assert printed in [block.split() for block in blocks]
