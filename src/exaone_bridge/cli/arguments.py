"""The argument parser of all commands. It imports neither torch nor rich, which take seconds."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from exaone_bridge.cli.options import (
    add_backend,
    add_conversion,
    add_dtype,
    add_follow_links,
    add_json,
    add_layout,
    add_models,
    add_path,
    dtype,
    not_negative,
    positive,
)
from exaone_bridge.cli.parser import Completion, Parser, Version, add_command
from exaone_bridge.models import FAMILIES
from exaone_bridge.schema.json_types import JSONObject

__all__ = ["TINY_CONFIGS", "make_parser"]

TINY_CONFIGS = {name: config for family in FAMILIES for name, config in family.tiny.items()}


def make_parser() -> ArgumentParser:
    """Return the parser of all commands; its Namespace names the command in `command`.

    Its methods raise UsageError where argparse would exit with an error.
    """
    parser = Parser(
        prog="exaone-bridge",
        description="Convert, inspect and verify EXAONE and ERNIE models, "
        "between Hugging Face and Megatron-Core.",
        epilog="Example: exaone-bridge demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    parser.add_argument(
        "--print-completion",
        metavar="SHELL",
        action=Completion,
        choices=("bash", "zsh", "tcsh"),
        help="print the completion script of bash, zsh or tcsh and exit",
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    for add in (
        _add_demo,
        _add_tiny,
        _add_inspect,
        _add_import,
        _add_export,
        _add_train,
        _add_generate,
        _add_perplexity,
        _add_verify,
    ):
        add(commands)
    _add_doctor(commands)
    return parser


def _add_demo(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        "Convert tiny random models to Megatron-Core and back, and verify them.",
        "exaone-bridge demo",
    )
    add_layout(parser, tp=2, pp=2, vpp=1, ep=2)
    add_backend(parser)


def _add_tiny(commands: Any) -> None:
    parser = add_command(
        commands,
        "tiny",
        "Write a tiny random checkpoint with the topology of a published model.\n\n"
        "With --from, write the first layers of a real model instead, with their weights.",
        "exaone-bridge tiny exaone4 tiny-model --set num_hidden_layers=4 --set dtype=bfloat16",
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help=f"one of {', '.join(TINY_CONFIGS)}"
    )
    add_path(parser, "folder", "FOLDER", "output; must not exist, or be empty")
    parser.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="change a field of config.json; dots reach nested fields, the value is JSON "
        "(repeatable)",
    )
    parser.add_argument("--seed", metavar="N", type=int, help="random seed (default: 0)")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="DIR",
        type=Path,
        help="in place of MODEL: a Hugging Face folder, or an id on the Hugging Face Hub",
    )
    parser.add_argument("--revision", metavar="REV", help="commit, branch or tag of a Hub id")
    parser.set_defaults(models=("source",))
    parser.add_argument("--layers", metavar="N", type=positive, help="of --from (default: 4)")


def _add_inspect(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        "Describe a checkpoint: its config, its parameter mapping, its parallel layout.\n\n"
        "Reads tensors only to compare duplicates. Lists unexpected, passthrough and missing\n"
        "tensors, and exits with 2 where `import` would reject the checkpoint. Of a Megatron\n"
        "checkpoint: its iteration, its layout, its optimizer state, and what `export` writes.",
        "exaone-bridge inspect /models/EXAONE-4.0-32B --tp 8 --pp 4",
    )
    add_models(
        parser, nargs="?", folder=("FOLDER", "a Hugging Face folder or a Megatron checkpoint")
    )
    add_follow_links(parser)
    add_layout(parser, tp=1, pp=1, vpp=1, sp=False, ep=1, etp=None)
    add_json(parser)


def _add_import(commands: Any) -> None:
    parser = add_command(
        commands,
        "import",
        "Convert a Hugging Face folder to a Megatron checkpoint (torch_dist).\n\n"
        "The checkpoint loads at any layout; its run_config.yaml records the one given here.",
        "exaone-bridge import /models/EXAONE-4.0-1.2B /checkpoints/exaone --tp 2",
    )
    add_models(parser, source=("HF_FOLDER", "a Hugging Face folder"))
    add_path(parser, "target", "MEGATRON_FOLDER", "output; must not exist, or be empty")
    add_follow_links(parser)
    add_layout(parser, tp=1, pp=1, vpp=1, sp=False, ep=1, etp=None)
    add_backend(parser)
    add_conversion(parser)


def _add_export(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        "Convert a Megatron checkpoint of any layout to a Hugging Face folder.\n\n"
        "Needs the checkpoint alone. The same command resumes an interrupted export. With an\n"
        "adapter, MEGATRON_FOLDER may also be the Hugging Face folder that it was trained on.",
        "exaone-bridge export /checkpoints/exaone /models/exported",
    )
    add_path(parser, "source", "MEGATRON_FOLDER", "a Megatron-Bridge checkpoint")
    add_path(parser, "target", "HF_FOLDER", "output; must not exist, or be empty")
    parser.add_argument(
        "--iteration",
        metavar="N",
        type=not_negative,
        help="the iteration to export (default: the one that the checkpoint's tracker file names)",
    )
    parser.add_argument(
        "--hf-source",
        metavar="DIR",
        type=Path,
        help="a Hugging Face folder to take the tokenizer and other files from (default: those "
        "that the checkpoint has)",
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        type=Path,
        help="merge the LoRA or DoRA adapter in this Megatron checkpoint into the weights",
    )
    parser.add_argument(
        "--peft", action="store_true", help="write the adapter alone, in PEFT's format"
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="re-shard the safetensors files, such as 5GB (default: the shards of the source)",
    )
    parser.add_argument(
        "--drop-passthrough", action="store_true", help="leave out passthrough tensors"
    )
    add_conversion(parser)


def _add_train(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        "Run a recipe in Megatron-Bridge's training loop; start it with torchrun.\n\n"
        "Settings without a dot are the recipe's arguments (hf_path, dataset_root, packed,\n"
        "peft_scheme, gpu_memory_gb, tp, pp, seq_length, ...); those with a dot are fields of\n"
        "Megatron-Bridge's ConfigContainer, in its own (Hydra's) syntax. The same command resumes\n"
        "from the last checkpoint.",
        "exaone-bridge train exaone4_1p2b_pretrain_config tp=2 train.train_iters=100 --dry-run",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's name (docs/recipes.md)")
    parser.add_argument("settings", metavar="NAME=VALUE", nargs="*", help="see above")
    parser.add_argument(
        "--save", metavar="FOLDER", type=Path, help="output: checkpoints, losses, TensorBoard"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the plan, the memory of a GPU and the tokens of a step; run nothing",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="print Megatron's output instead of logging it"
    )


def _add_generate(commands: Any) -> None:
    parser = add_command(
        commands,
        "generate",
        "Continue a prompt greedily with Megatron-Core, at any layout.\n\n"
        "Prints the text as it grows. There is no key-value cache: each token takes a pass over\n"
        "the whole sequence, as in training.",
        'exaone-bridge generate /models/EXAONE-4.0-1.2B --chat "Who are you?" --max-new-tokens 64',
    )
    add_models(parser, source=("SOURCE", "a Hugging Face folder or a Megatron checkpoint"))
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="a plain prompt")
    prompt.add_argument("--chat", metavar="TEXT", help="a user's message, by the chat template")
    parser.add_argument(
        "--image",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="an image before the message of --chat (repeatable)",
    )
    parser.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="enable_thinking of the chat template (default: the template's)",
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=positive, default=128, help="default: 128"
    )
    add_dtype(parser)
    add_layout(parser, tp=1, pp=1, vpp=1, sp=False, ep=1, etp=None, cp=1)
    add_backend(parser)


def _add_perplexity(commands: Any) -> None:
    parser = add_command(
        commands,
        "perplexity",
        "Compute the perplexity of a text with Megatron-Core, and with Transformers beside it.\n\n"
        "The text is split into windows. In fp32 (--dtype float32), the exit code is 1 if the\n"
        "losses differ by more than 1e-4 nats per token.",
        "exaone-bridge perplexity /models/EXAONE-4.0-1.2B --text book.txt --length 2048",
    )
    add_models(
        parser, nargs="?", source=("SOURCE", "a Hugging Face folder or a Megatron checkpoint")
    )
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="in UTF-8")
    parser.add_argument(
        "--length",
        metavar="N",
        type=positive,
        default=1024,
        help="predicted tokens of a window (default: 1024)",
    )
    parser.add_argument(
        "--transformers",
        action=argparse.BooleanOptionalAction,
        help="run Transformers too (default: if SOURCE is a Hugging Face folder)",
    )
    add_dtype(parser)
    add_json(parser)
    add_layout(parser, tp=1, pp=1, vpp=1, sp=False, ep=1, etp=None, cp=1)
    add_backend(parser)


def _add_verify(commands: Any) -> None:
    parser = add_command(
        commands,
        "verify",
        "Verify the round trip through Megatron-Core, and logits against Transformers.\n\n"
        "With OTHER, compare two models. Thresholds are derived, not configured.",
        "exaone-bridge verify tiny-model --tp 2 --pp 2 --report report.html",
    )
    model = "a Hugging Face folder or a Megatron checkpoint"
    add_models(
        parser,
        nargs="?",
        source=("SOURCE", model),
        other=("OTHER", f"{model} (default: SOURCE after its round trip)"),
    )
    add_follow_links(parser)
    add_layout(parser, tp=1, pp=1, vpp=1, sp=False, ep=1, etp=None, cp=1)
    add_backend(parser)
    checks = parser.add_argument_group("checks")
    flag: JSONObject = {"action": "store_true"}
    checks.add_argument(
        "--dtype",
        type=dtype,
        default="float32",
        help="float32 (default), bfloat16, float16, or fp32, bf16, fp16",
    )
    checks.add_argument("--quick", help="one prompt of each length, no generation", **flag)
    checks.add_argument(
        "--count",
        metavar="N",
        type=positive,
        default=3,
        help="number of long prompts (default: 3)",
    )
    checks.add_argument(
        "--length",
        metavar="N",
        type=positive,
        help="tokens of a long prompt (default: more than the sliding window)",
    )
    checks.add_argument(
        "--seed",
        metavar="N",
        type=not_negative,
        default=0,
        help="random seed of the prompts (default: 0)",
    )
    checks.add_argument("--gradients", help="also compare the gradients of one step", **flag)
    checks.add_argument(
        "--mtp", help="build multi-token prediction; otherwise its tensors are passthrough", **flag
    )
    checks.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="run layer by layer (default: above 2 GiB of weights in fp32)",
    )
    checks.add_argument(
        "--self-test", help="inject faults into tiny models; show that each is caught", **flag
    )
    outputs = parser.add_argument_group("outputs")
    json_text = "as JSON; `-` is standard output"
    for name, what in (("json", json_text), ("report", "as one HTML file")):
        outputs.add_argument(f"--{name}", metavar="FILE", type=Path, help=f"the report {what}")
    outputs.add_argument(
        "--card", metavar="FILE", type=Path, help="a model card (Markdown), written or extended"
    )
    outputs.add_argument("--name", help="the model's name in the card (default: SOURCE)")
    outputs.add_argument("--note", default="", help="a sentence for the card")


def _add_doctor(commands: Any) -> None:
    add_command(
        commands,
        "doctor",
        "Print installed versions, GPUs, and what is missing for which use.\n\n"
        "Exits with 1 where some commands cannot run. A bug report should hold its output.",
        "exaone-bridge doctor",
    )
