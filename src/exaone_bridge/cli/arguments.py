"""The argument parser of all commands. It imports neither torch nor rich, which take seconds."""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from exaone_bridge.cli.outputs import STANDARD_OUTPUT
from exaone_bridge.errors import BridgeError, UnsupportedConfig
from exaone_bridge.models import FAMILIES
from exaone_bridge.schema.dtypes import DTYPE_ALIASES, MODEL_DTYPES
from exaone_bridge.schema.hf_snapshot import is_hub_id, snapshot_folder
from exaone_bridge.schema.json_types import JSONObject
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["TINY_CONFIGS", "UsageError", "find_models", "layout_of", "make_parser"]

TINY_CONFIGS = {name: config for family in FAMILIES for name, config in family.tiny.items()}

_SIZES = {
    "tp": "tensor-parallel size",
    "pp": "pipeline-parallel size",
    "vpp": "virtual pipeline stages per rank",
    "ep": "expert-parallel size",
    "etp": "expert tensor-parallel size",
    "cp": "context-parallel size",
}
# The commands whose --json may be followed by their model, as a file's name is optional there.
_AFTER_JSON = {"inspect": "folder", "perplexity": "source"}
_MAX_WORKERS = 256
_BACKENDS = ("auto", "torch", "transformer_engine")


class UsageError(BridgeError):
    """An argument of the command line is unknown, missing or malformed."""


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` lists the arguments.")

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        options: Namespace
        options, rest = self.parse_known_args(*args, **kwargs)
        if hasattr(options, "settings"):  # argparse takes those before the first option only
            options.settings += [each for each in rest if not each.startswith("-")]
            rest = [each for each in rest if each.startswith("-")]
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        model = _AFTER_JSON.get(options.command)
        if model is not None and getattr(options, model) is None:
            if options.json in (None, STANDARD_OUTPUT):
                raise UsageError(
                    f"{model.upper()} is missing; "
                    f"`exaone-bridge {options.command} --help` lists the arguments."
                )
            setattr(options, model, options.json)  # `inspect --json FOLDER`
            options.json = STANDARD_OUTPUT
        if options.command == "export" and options.peft and options.adapter is None:
            raise UsageError(
                "--peft needs --adapter DIR; `exaone-bridge export --help` lists the arguments."
            )
        return options

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse's own hides a BrokenPipeError

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # raises BrokenPipeError here, where main() catches it
        super().exit(status, message)


def make_parser() -> ArgumentParser:
    """Return the parser of all commands; its Namespace names the command in `command`.

    Its methods raise UsageError where argparse would exit with an error.
    """
    parser = _Parser(
        prog="exaone-bridge",
        description="Convert, inspect and verify EXAONE and ERNIE models, "
        "between Hugging Face and Megatron-Core.",
        epilog="Example: exaone-bridge demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument(
        "--print-completion",
        metavar="SHELL",
        action=_Completion,
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


def find_models(options: Namespace) -> None:
    """Replace ids on the Hugging Face Hub by the folders of their snapshots, downloaded if needed.

    Raises:
        CheckpointError: a snapshot is neither in the cache nor can it be downloaded.
        UsageError: a revision of folders.
    """
    ids = {
        name: str(path)
        for name in getattr(options, "models", ())
        if (path := getattr(options, name)) is not None and is_hub_id(path)
    }
    if not ids and getattr(options, "revision", None) is not None:
        raise UsageError("--revision: a folder has none; name an id on the Hugging Face Hub.")
    for name, hub_id in ids.items():
        setattr(options, name, snapshot_folder(hub_id, options.revision))


def layout_of(options: Namespace) -> Layout:
    """Return the parallel layout of the options.

    Raises:
        UnsupportedLayout: the sizes contradict each other.
    """
    given = {name: getattr(options, name) for name in (*_SIZES, "sp") if hasattr(options, name)}
    return Layout(**given)


class _Version(argparse.Action):
    def __call__(self, parser: ArgumentParser, *_: object) -> None:
        from exaone_bridge import __version__

        print(__version__)
        parser.exit()


class _Completion(argparse.Action):
    def __call__(self, parser: ArgumentParser, _: object, shell: Any, __: object = None) -> None:
        try:
            import shtab
        except ImportError:
            raise UsageError(
                "--print-completion needs shtab; run `pip install 'exaone-bridge[completion]'`."
            ) from None
        for action in _actions(parser):
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell))
        parser.exit()


def _actions(parser: ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def _command(commands: Any, name: str, description: str, example: str) -> ArgumentParser:
    parser: ArgumentParser = commands.add_parser(
        name,
        help=description.partition(".")[0],
        description=description,
        epilog=f"Example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "Convert tiny random models to Megatron-Core and back, and verify them.",
        "exaone-bridge demo",
    )
    _add_layout(parser, tp=2, pp=2, vpp=1, ep=2)
    _add_backend(parser)


def _add_tiny(commands: Any) -> None:
    parser = _command(
        commands,
        "tiny",
        "Write a tiny random checkpoint with the topology of a published model.\n\n"
        "With --from, write the first layers of a real model instead, with their weights.",
        "exaone-bridge tiny exaone4 tiny-model --set num_hidden_layers=4 --set dtype=bfloat16",
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help=f"one of {', '.join(TINY_CONFIGS)}"
    )
    _add_path(parser, "folder", "FOLDER", "output; must not exist, or be empty")
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
    parser.add_argument("--layers", metavar="N", type=_positive, help="of --from (default: 4)")


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        "Describe a checkpoint: its config, its parameter mapping, its parallel layout.\n\n"
        "Reads tensors only to compare duplicates. Lists unexpected, passthrough and missing\n"
        "tensors, and exits with 2 where `import` would reject the checkpoint. Of a Megatron\n"
        "checkpoint: its iteration, its layout, its optimizer state, and what `export` writes.",
        "exaone-bridge inspect /models/EXAONE-4.0-32B --tp 8 --pp 4",
    )
    _add_models(
        parser, nargs="?", folder=("FOLDER", "a Hugging Face folder or a Megatron checkpoint")
    )
    _add_follow_links(parser)
    _add_layout(parser, tp=1, pp=1, vpp=1, sp=False, ep=1, etp=None)
    _add_json(parser)


def _add_import(commands: Any) -> None:
    parser = _command(
        commands,
        "import",
        "Convert a Hugging Face folder to a Megatron checkpoint (torch_dist).\n\n"
        "The checkpoint loads at any layout; its run_config.yaml records the one given here.",
        "exaone-bridge import /models/EXAONE-4.0-1.2B /checkpoints/exaone --tp 2",
    )
    _add_models(parser, source=("HF_FOLDER", "a Hugging Face folder"))
    _add_path(parser, "target", "MEGATRON_FOLDER", "output; must not exist, or be empty")
    _add_follow_links(parser)
    _add_layout(parser, tp=1, pp=1, vpp=1, sp=False, ep=1, etp=None)
    _add_backend(parser)
    _add_conversion(parser)


def _add_export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        "Convert a Megatron checkpoint of any layout to a Hugging Face folder.\n\n"
        "Needs the checkpoint alone. The same command resumes an interrupted export. With an\n"
        "adapter, MEGATRON_FOLDER may also be the Hugging Face folder that it was trained on.",
        "exaone-bridge export /checkpoints/exaone /models/exported",
    )
    _add_path(parser, "source", "MEGATRON_FOLDER", "a Megatron-Bridge checkpoint")
    _add_path(parser, "target", "HF_FOLDER", "output; must not exist, or be empty")
    parser.add_argument(
        "--iteration",
        metavar="N",
        type=_not_negative,
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
    _add_conversion(parser)


def _add_train(commands: Any) -> None:
    parser = _command(
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
    parser = _command(
        commands,
        "generate",
        "Continue a prompt greedily with Megatron-Core, at any layout.\n\n"
        "Prints the text as it grows. There is no key-value cache: each token takes a pass over\n"
        "the whole sequence, as in training.",
        'exaone-bridge generate /models/EXAONE-4.0-1.2B --chat "Who are you?" --max-new-tokens 64',
    )
    _add_models(parser, source=("SOURCE", "a Hugging Face folder or a Megatron checkpoint"))
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
        "--max-new-tokens", metavar="N", type=_positive, default=128, help="default: 128"
    )
    parser.add_argument(
        "--dtype",
        type=_dtype,
        help="float32, bfloat16, float16, or fp32, bf16, fp16 (default: the checkpoint's)",
    )
    _add_layout(parser, tp=1, pp=1, vpp=1, sp=False, ep=1, etp=None, cp=1)
    _add_backend(parser)


def _add_perplexity(commands: Any) -> None:
    parser = _command(
        commands,
        "perplexity",
        "Compute the perplexity of a text with Megatron-Core, and with Transformers beside it.\n\n"
        "The text is split into windows. In fp32 (--dtype float32), the exit code is 1 if the\n"
        "losses differ by more than 1e-4 nats per token.",
        "exaone-bridge perplexity /models/EXAONE-4.0-1.2B --text book.txt --length 2048",
    )
    _add_models(
        parser, nargs="?", source=("SOURCE", "a Hugging Face folder or a Megatron checkpoint")
    )
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="in UTF-8")
    parser.add_argument(
        "--length",
        metavar="N",
        type=_positive,
        default=1024,
        help="predicted tokens of a window (default: 1024)",
    )
    parser.add_argument(
        "--transformers",
        action=argparse.BooleanOptionalAction,
        help="run Transformers too (default: if SOURCE is a Hugging Face folder)",
    )
    parser.add_argument(
        "--dtype",
        type=_dtype,
        help="float32, bfloat16, float16, or fp32, bf16, fp16 (default: the checkpoint's)",
    )
    _add_json(parser)
    _add_layout(parser, tp=1, pp=1, vpp=1, sp=False, ep=1, etp=None, cp=1)
    _add_backend(parser)


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands,
        "verify",
        "Verify the round trip through Megatron-Core, and logits against Transformers.\n\n"
        "With OTHER, compare two models. Thresholds are derived, not configured.",
        "exaone-bridge verify tiny-model --tp 2 --pp 2 --report report.html",
    )
    model = "a Hugging Face folder or a Megatron checkpoint"
    _add_models(
        parser,
        nargs="?",
        source=("SOURCE", model),
        other=("OTHER", f"{model} (default: SOURCE after its round trip)"),
    )
    _add_follow_links(parser)
    _add_layout(parser, tp=1, pp=1, vpp=1, sp=False, ep=1, etp=None, cp=1)
    _add_backend(parser)
    checks = parser.add_argument_group("checks")
    flag: JSONObject = {"action": "store_true"}
    checks.add_argument(
        "--dtype",
        type=_dtype,
        default="float32",
        help="float32 (default), bfloat16, float16, or fp32, bf16, fp16",
    )
    checks.add_argument("--quick", help="one prompt of each length, no generation", **flag)
    checks.add_argument(
        "--count",
        metavar="N",
        type=_positive,
        default=3,
        help="number of long prompts (default: 3)",
    )
    checks.add_argument(
        "--length",
        metavar="N",
        type=_positive,
        help="tokens of a long prompt (default: more than the sliding window)",
    )
    checks.add_argument(
        "--seed",
        metavar="N",
        type=_not_negative,
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
    _command(
        commands,
        "doctor",
        "Print installed versions, GPUs, and what is missing for which use.\n\n"
        "Exits with 1 where some commands cannot run. A bug report should hold its output.",
        "exaone-bridge doctor",
    )


def _add_path(parser: ArgumentParser, name: str, metavar: str, what: str, **more: Any) -> None:
    parser.add_argument(name, metavar=metavar, type=Path, help=what, **more)


def _add_json(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        nargs="?",
        const=STANDARD_OUTPUT,
        help="JSON instead of text; without FILE or with `-` on standard output",
    )


def _add_follow_links(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="read weights that are links to files outside the folder, which you trust",
    )


def _add_models(
    parser: ArgumentParser, *, nargs: str | None = None, **models: tuple[str, str]
) -> None:
    """Add arguments that name a model: by a folder, or by its id on the Hugging Face Hub."""
    for name, (metavar, what) in models.items():
        _add_path(parser, name, metavar, f"{what}, or an id on the Hugging Face Hub", nargs=nargs)
    parser.add_argument("--revision", metavar="REV", help="commit, branch or tag of a Hub id")
    parser.set_defaults(models=tuple(models))


def _add_layout(parser: ArgumentParser, **defaults: int | None) -> None:
    group = parser.add_argument_group("parallel layout")
    for name, default in defaults.items():
        if name == "sp":
            group.add_argument("--sp", action="store_true", help="sequence parallelism over TP")
            continue
        text = f"{_SIZES[name]} (default: {'that of --tp' if default is None else default})"
        group.add_argument(f"--{name}", metavar="N", type=_positive, default=default, help=text)


def _add_backend(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        type=_backend,
        default="auto",
        help="auto (default), transformer_engine or torch",
    )


def _add_conversion(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        metavar="N",
        type=_workers,
        default=1,
        help="processes, each with one or two tensors in memory (default: 1)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")


def _dtype(text: str) -> str:
    dtype = DTYPE_ALIASES.get(text, text)
    if dtype not in MODEL_DTYPES:
        raise UnsupportedConfig("--dtype", got=text, known=MODEL_DTYPES, where="command line")
    return dtype


def _backend(text: str) -> str:
    if text not in _BACKENDS:
        raise UnsupportedConfig("backend", got=text, known=_BACKENDS, where="command line")
    return text


def _positive(text: str) -> int:
    return _whole_number(text, 1)


def _not_negative(text: str) -> int:
    return _whole_number(text, 0)


def _workers(text: str) -> int:
    return _whole_number(text, 1, _MAX_WORKERS)


def _whole_number(text: str, least: int, most: int = 2**63 - 1) -> int:
    value = int(text) if text.isdecimal() and len(text) < 20 else -1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return value
