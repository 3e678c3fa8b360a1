"""The commands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from exaone_bridge.cli.read_size import read_size
from exaone_bridge.cli.show import say, stages, table
from exaone_bridge.cli.verify import verify
from exaone_bridge.errors import ParityFailure, UnsupportedConfig
from exaone_bridge.models import FAMILIES
from exaone_bridge.schema.hf_config import language_config
from exaone_bridge.schema.parallel_layout import Layout

app = typer.Typer(
    help="EXAONE and ERNIE between Hugging Face and Megatron-Core: convert, inspect, verify.",
    epilog="Example: [bold]exaone-bridge demo[/bold]",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

TINY_CONFIGS = {
    name: (family, config) for family in FAMILIES for name, config in family.tiny.items()
}

Tp = Annotated[int, typer.Option("--tp", help="Tensor-parallel size.", min=1)]
Pp = Annotated[int, typer.Option("--pp", help="Pipeline-parallel size.", min=1)]
Vpp = Annotated[int, typer.Option("--vpp", help="Virtual pipeline stages per rank.", min=1)]
Sp = Annotated[bool, typer.Option("--sp", help="Sequence parallelism over the TP ranks.")]
Ep = Annotated[int, typer.Option("--ep", help="Expert-parallel size.", min=1)]
Etp = Annotated[
    int | None, typer.Option("--etp", help="Expert tensor-parallel size; default: --tp.", min=1)
]
Backend = Annotated[str, typer.Option("--backend", help="auto, transformer_engine or torch.")]

Workers = Annotated[
    int, typer.Option("--workers", help="Processes; each holds a tensor or two.", min=1, max=256)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, and write nothing.")]


def _example(text: str) -> str:
    return f"Example: [bold]{text}[/bold]"


@app.command(epilog=_example("exaone-bridge demo"))
def demo(tp: Tp = 2, pp: Pp = 2, vpp: Vpp = 1, ep: Ep = 2, backend: Backend = "auto") -> None:
    """Write tiny random models, convert them to Megatron-Core and back, and compare everything."""
    import tempfile

    from exaone_bridge.checkpoint.hf.tiny import write_random
    from exaone_bridge.verification.workflow.job import VerifyOptions
    from exaone_bridge.verification.workflow.verify import verify as run

    reports = []
    with tempfile.TemporaryDirectory(prefix="exaone_bridge-demo-") as work:
        for name, (_, config) in TINY_CONFIGS.items():
            with stages(name) as progress:
                progress.stage("importing Megatron-Core (half a minute, once)")
                folder = Path(work) / name
                config, layout = _fitted(config, Layout(tp=tp, pp=pp, vpp=vpp, ep=ep))
                write_random(folder, config)
                reports.append(
                    run(folder, layout, VerifyOptions(backend=backend), progress=progress)
                )
    table(
        "Hugging Face -> Megatron-Core -> Hugging Face",
        [
            "model",
            "parameters",
            "layout",
            "max |logit difference|",
            "first differing layer",
            "round trip",
            "seconds",
        ],
        [
            [
                report.source,
                f"{report.parameters:,}",
                report.layout,
                f"{report.max_logit_difference:.1e}",
                report.first_differing_layer,
                "bitwise equal" if report.round_trip else "FAILED",
                f"{report.seconds:.1f}",
            ]
            for report in reports
        ],
    )
    if not all(report.passed for report in reports):
        raise ParityFailure("\n".join(report.faults() for report in reports))


def _fitted(config: Any, layout: Layout) -> tuple[dict[str, Any], Layout]:
    """The configuration with as many layers as the layout needs, its layer pattern repeated or cut; and the layout,
    without expert parallelism where there are no experts, and each expert whole where they are dealt out."""
    stages_ = layout.pp * layout.vpp
    if (language := language_config(config)) is not config:
        fitted, layout = _fitted(language, layout)
        return {**config, "text_config": fitted}, layout
    layers = -(-config["num_hidden_layers"] // stages_) * stages_
    experts = "moe_num_experts" in config and layout.ep > 1
    layout = dataclasses.replace(layout, ep=layout.ep if experts else 1, etp=1 if experts else None)
    if "layer_types" not in config:
        return {**config, "num_hidden_layers": layers}, layout
    types = (config["layer_types"] * layers)[:layers]
    return {**config, "num_hidden_layers": layers, "layer_types": types}, layout


@app.command(
    epilog=_example(
        "exaone-bridge tiny exaone4 /tmp/tiny --set num_hidden_layers=4 --set dtype=bfloat16"
    )
)
def tiny(
    family: Annotated[str, typer.Argument(help=f"One of: {', '.join(TINY_CONFIGS)}.")],
    folder: Annotated[Path, typer.Argument(help="To be written; must not exist.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="field=value of config.json, the value as JSON."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write a small random checkpoint with a published topology."""
    if family not in TINY_CONFIGS:
        raise UnsupportedConfig(
            "family", got=family, known=tuple(TINY_CONFIGS), where="command line"
        )
    if not 0 <= seed < 2**63:
        raise UnsupportedConfig(
            "--seed", got=seed, wanted="from 0 to 2^63 - 1", where="command line"
        )
    _, config = TINY_CONFIGS[family]
    config = _with_settings(config, set_ or [])
    from exaone_bridge.checkpoint.hf.tiny import write_random

    write_random(folder, config, seed=seed)
    say(f"{folder}: {language_config(config)['num_hidden_layers']} layers, {config['dtype']}")


def _with_settings(config: Mapping[str, Any], settings: list[str]) -> dict[str, Any]:
    changed = json.loads(json.dumps(config))  # nested ones too
    names = set()
    for setting in settings:
        path, equals, text = setting.partition("=")
        *outer, field = path.split(".")
        if not equals or not field:
            raise UnsupportedConfig(
                "--set", got=setting, wanted="field=value", where="command line"
            )
        inside = changed
        for name in outer:
            if not isinstance(inside := inside.get(name), dict):
                wanted = "a field of config.json, dots between it and what it is nested in"
                raise UnsupportedConfig("--set", got=setting, wanted=wanted, where="command line")
        try:
            inside[field] = json.loads(text)
        except ValueError:
            inside[field] = text  # a word: dtype=bfloat16
        names.add(field)
    if names == {"dtype"}:  # one type for the whole model
        for nested in changed.values():
            if isinstance(nested, dict) and "dtype" in nested:
                nested["dtype"] = changed["dtype"]
    language = language_config(changed)
    layers, types = language.get("num_hidden_layers"), language.get("layer_types")
    if (
        "num_hidden_layers" in names
        and "layer_types" not in names
        and isinstance(layers, int)
        and types
    ):
        language["layer_types"] = (types * max(1, layers))[
            : max(0, layers)
        ]  # the pattern goes on, or is cut
    return changed


@app.command(epilog=_example("exaone-bridge inspect /models/EXAONE-4.0-32B --tp 8 --pp 4"))
def inspect(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder.")],
    tp: Tp = 1,
    pp: Pp = 1,
    vpp: Vpp = 1,
    sp: Sp = False,
    ep: Ep = 1,
    etp: Etp = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint is, where each tensor goes, and whether a layout fits. Reads no tensor.

    Tensors that the model lacks or has no place for are listed; the exit code is then 2, as `import` would refuse them.
    """
    from exaone_bridge.cli.inspect import inspect as run

    run(folder, Layout(tp=tp, pp=pp, vpp=vpp, sp=sp, ep=ep, etp=etp), as_json=json_)


@app.command(
    "import",
    epilog=_example("exaone-bridge import /models/EXAONE-4.0-1.2B /checkpoints/exaone --tp 2"),
)
def import_(
    hf_folder: Annotated[Path, typer.Argument(help="A Hugging Face folder.")],
    megatron_folder: Annotated[Path, typer.Argument(help="To be written; must not exist.")],
    tp: Tp = 1,
    pp: Pp = 1,
    vpp: Vpp = 1,
    ep: Ep = 1,
    etp: Etp = None,
    backend: Backend = "auto",
    workers: Workers = 1,
    dry_run: DryRun = False,
) -> None:
    """Convert Hugging Face -> Megatron checkpoint (torch_dist), which loads at any layout; its run config says this."""
    from exaone_bridge.cli.progress import conversion, say_summary
    from exaone_bridge.convert.convert import import_checkpoint

    layout = Layout(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp)
    with conversion("import") as progress:
        done = import_checkpoint(
            hf_folder,
            megatron_folder,
            layout,
            backend=backend,
            workers=workers,
            dry_run=dry_run,
            progress=progress,
        )
    say_summary(megatron_folder, done, dry_run=dry_run)


@app.command(epilog=_example("exaone-bridge export /checkpoints/exaone /models/exported"))
def export(
    megatron_folder: Annotated[
        Path, typer.Argument(help="A Megatron-Bridge checkpoint, of any layout.")
    ],
    hf_folder: Annotated[Path, typer.Argument(help="To be written; must not exist.")],
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Of a file, such as 5GB; default: the source's files.", metavar="SIZE"),
    ] = None,
    drop_passthrough: Annotated[
        bool, typer.Option("--drop-passthrough", help="Leave out the passthrough tensors.")
    ] = False,
    workers: Workers = 1,
    dry_run: DryRun = False,
) -> None:
    """Convert Megatron checkpoint -> Hugging Face, from the checkpoint alone; interrupted, run it again to go on."""
    from exaone_bridge.cli.progress import conversion, say_summary
    from exaone_bridge.convert.convert import export_checkpoint

    max_shard_bytes = (
        None if max_shard_size is None else read_size(max_shard_size, "--max-shard-size")
    )
    with conversion("export") as progress:
        done = export_checkpoint(
            megatron_folder,
            hf_folder,
            max_shard_bytes=max_shard_bytes,
            drop_passthrough=drop_passthrough,
            workers=workers,
            dry_run=dry_run,
            progress=progress,
        )
    say_summary(hf_folder, done, dry_run=dry_run)


app.command(
    epilog=_example("exaone-bridge verify /tmp/tiny --tp 2 --pp 2 --report /tmp/report.html")
)(verify)
