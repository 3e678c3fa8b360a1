"""`exaone-bridge generate`: the tokens are those of Transformers' greedy generation."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.runtime.progress import NO_PROGRESS
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.cli import Cli

NEW_TOKENS = 20  # with a prompt of some 30 tokens several times the tiny models' window
CHAT = [{"role": "user", "content": "What is the capital of Korea? 한국의 수도는?"}]


def reference(folder: Path) -> list[int]:
    from transformers import AutoModelForCausalLM as AutoModel
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    if "exaone45" in folder.name:
        AutoModel = AutoModelForImageTextToText
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
    )
    return list(map(int, output[0, prompt.shape[1] :]))


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=str)
@pytest.mark.parametrize("name", ["exaone4", "ernie45", "ernie45-dense", "exaone45", "exaone-moe"])
def test_tokens_equal_those_of_transformers(
    megatron_bridge: Any, tiny: Callable[..., Path], name: str, layout: Layout
) -> None:
    from exaone_bridge.runtime.generate import generate

    folder = tiny(name)
    work = functools.partial(
        generate,
        folder,
        None,
        CHAT,
        layout,
        template={},
        backend="auto",
        dtype=torch.float32,
        most=NEW_TOKENS,
        progress=NO_PROGRESS,
    )
    expected = ForkLauncher().first(reference, folder)
    assert len(expected) > 3
    assert ForkLauncher(layout.ranks).all(work) == [expected] * layout.ranks


def test_text_of_a_megatron_checkpoint_is_that_of_its_source(
    megatron_bridge: Any, tiny: Callable[..., Path], megatron_folder: Path, cli: Cli
) -> None:
    prompt = ("--prompt", "the capital of Korea", "--max-new-tokens", 12)
    runs = [
        cli("generate", source, *prompt, *layout)
        for source, layout in ((tiny("exaone4"), ()), (megatron_folder, ("--tp", 2)))
    ]
    assert [run.code for run in runs] == [0, 0], runs
    assert runs[0].out == runs[1].out and runs[0].out.strip()
    assert "generate: loading the model" in runs[0].err


def image_reference(folder: Path, image: Path) -> list[int]:
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[Image.open(image)], return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    return list(map(int, output[0, inputs["input_ids"].shape[1] :]))


def test_tokens_after_an_image_equal_those_of_transformers(
    megatron_bridge: Any, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from PIL import Image

    from exaone_bridge.runtime.generate import generate

    folder, file = tiny("exaone45"), tmp_path / "image.png"
    noise = torch.randint(256, (40, 56, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.to(torch.uint8).numpy()).save(file)
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    work = functools.partial(
        generate,
        folder,
        None,
        [{"role": "user", "content": parts}],
        Layout(tp=2),
        images=[file],
        template={},
        backend="auto",
        dtype=torch.float32,
        most=NEW_TOKENS,
        progress=NO_PROGRESS,
    )
    expected = ForkLauncher().first(image_reference, folder, file)
    assert ForkLauncher(2).all(work) == [expected] * 2


def test_text_goes_to_standard_output_where_a_launcher_redirects_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from exaone_bridge.cli.generate import _Printed

    progress = _Printed()
    with contextlib.redirect_stdout(sys.stderr):  # as TorchrunLauncher.all does
        progress.stage("generating")
        progress.output("text")
    assert capsys.readouterr() == ("text", "generate: generating\n")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ((), "one of the arguments --prompt --chat is required"),
        (("--prompt", "a", "--image", "b.png"), "--image"),
        (("--prompt", "a", "--dtype", "int8"), "--dtype is 'int8'"),
        (("--prompt", "a", "--max-new-tokens", "0"), "not a whole number"),
        (("--chat", "a", "--image", "b.png"), "this model takes none"),
    ],
)
def test_bad_arguments_are_rejected(
    arguments: tuple[str, ...], fragment: str, tiny: Callable[..., Path], cli: Cli
) -> None:
    run = cli("generate", tiny("exaone4"), *arguments)
    assert run.code == 2 and fragment in run.err and run.out == ""


@pytest.mark.parametrize(
    "command", [("generate", "--prompt", "a"), ("perplexity", "--text", "text.txt")]
)
def test_dtype_of_a_megatron_checkpoint_is_its_own(
    command: tuple[str, ...], megatron_folder: Path, cli: Cli
) -> None:
    name, *options = command
    run = cli(name, megatron_folder, *options, "--dtype", "bfloat16")
    assert run.code == 2 and "is loaded in its own dtype" in run.err


@pytest.mark.parametrize(
    "command", [("generate", "--prompt", "a"), ("perplexity", "--text", "text.txt")]
)
def test_code_of_a_tokenizer_is_not_run(
    command: tuple[str, ...], megatron_bridge: Any, tiny: Callable[..., Path], cli: Cli
) -> None:
    shutil.copytree(tiny("exaone4"), "model")
    file = Path("model/tokenizer_config.json")
    code = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    file.write_text(json.dumps(json.loads(file.read_text()) | code))
    Path("text.txt").write_text("text")
    name, *options = command
    run = cli(name, "model", *options)
    assert run.code == 2 and "the tokenizer needs remote code, which is not run" in run.err
