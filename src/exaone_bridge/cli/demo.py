"""The command `demo`: tiny random models, converted to Megatron-Core and back, and verified."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.cli.arguments import TINY_CONFIGS
from exaone_bridge.cli.show import say, stages, table
from exaone_bridge.errors import ParityFailure
from exaone_bridge.models import family_of
from exaone_bridge.schema.hf_config import language_config, with_num_layers
from exaone_bridge.schema.json_types import JSONObject
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.report.report import Report

__all__ = ["demo"]

_COLUMNS = [
    "model",
    "parameters",
    "layout",
    "max |logit difference|",
    "first differing layer",
    "round trip",
    "seconds",
]


def demo(layout: Layout, backend: str) -> None:
    """Verify every tiny model and print one table.

    Raises:
        UnsupportedLayout: a tiny model cannot be sharded by the layout.
        ParityFailure: a check of some model fails; the table has been printed by then.
    """
    from exaone_bridge.verification.workflow.options import VerifyOptions
    from exaone_bridge.verification.workflow.run import Session, run

    reports = []
    with tempfile.TemporaryDirectory(prefix="exaone_bridge-demo-") as work:
        for name, tiny_config in TINY_CONFIGS.items():
            with stages(name) as progress:
                progress.stage("importing Megatron-Core (half a minute, once)")
                folder = Path(work) / name
                config, fitted = _fit(dict(tiny_config), layout)
                write_random(folder, config)
                options = VerifyOptions(backend=backend)
                session = Session(source=folder, layout=fitted, options=options, progress=progress)
                reports.append(run(session))
    table(
        "Hugging Face -> Megatron-Core -> Hugging Face",
        _COLUMNS,
        [
            [
                report.source,
                f"{report.parameters:,}",
                report.layout,
                _logit_difference(report),
                report.first_diverging_layer,
                "bitwise equal" if report.round_trip_passed else "FAILED",
                f"{report.seconds:.1f}",
            ]
            for report in reports
        ],
    )
    for report in reports:
        if not (logits := report.check("logits")).ran:
            say(f"{report.source}: logits were not compared: {logits.details}.")
    if not all(report.passed for report in reports):
        raise ParityFailure("\n".join(report.failures() for report in reports))


def _logit_difference(report: Report) -> str:
    logits = report.check("logits")
    return f"{report.max_logit_difference:.1e}" if logits.ran else logits.status.value


def _fit(config: JSONObject, layout: Layout) -> tuple[JSONObject, Layout]:
    """Return the config with a number of layers that PP and VPP divide, and a layout for it.

    The layer pattern is repeated or truncated. A dense model gets no EP; an MoE model with EP gets
    an expert TP of 1.
    """
    stage_count = layout.pp * layout.vpp
    language = language_config(config)
    layers = -(-language["num_hidden_layers"] // stage_count) * stage_count
    fitted = with_num_layers(language, layers)
    if language is not config:
        fitted = {**config, "text_config": fitted}
    experts = family_of(config["architectures"], where="demo").describe(config).config.num_experts
    moe = bool(experts) and layout.ep > 1
    return fitted, dataclasses.replace(layout, ep=layout.ep if moe else 1, etp=1 if moe else None)
