"""The command `demo`: tiny random models, converted to Megatron-Core and back, and verified."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.cli.arguments import TINY_CONFIGS
from exaone_bridge.cli.show import stages, table
from exaone_bridge.errors import ParityFailure
from exaone_bridge.schema.hf_config import language_config
from exaone_bridge.schema.json_types import JSONObject
from exaone_bridge.schema.parallel_layout import Layout

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
                f"{report.max_logit_difference:.1e}",
                report.first_diverging_layer,
                "bitwise equal" if report.round_trip_passed else "FAILED",
                f"{report.seconds:.1f}",
            ]
            for report in reports
        ],
    )
    if not all(report.passed for report in reports):
        raise ParityFailure("\n".join(report.failures() for report in reports))


def _fit(config: JSONObject, layout: Layout) -> tuple[JSONObject, Layout]:
    """Return the config with a number of layers that PP and VPP divide, and a layout for it.

    The layer pattern is repeated or truncated. A dense model gets no EP; an MoE model with EP gets
    an expert TP of 1.
    """
    if (language := language_config(config)) is not config:
        fitted, layout = _fit(language, layout)
        return {**config, "text_config": fitted}, layout
    stage_count = layout.pp * layout.vpp
    layers = -(-config["num_hidden_layers"] // stage_count) * stage_count
    moe = "moe_num_experts" in config and layout.ep > 1
    layout = dataclasses.replace(layout, ep=layout.ep if moe else 1, etp=1 if moe else None)
    fitted = {**config, "num_hidden_layers": layers}
    if "layer_types" in config:
        fitted["layer_types"] = (config["layer_types"] * layers)[:layers]
    return fitted, layout
