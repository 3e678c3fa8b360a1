"""A script of somebody who has installed exaone_bridge: `mypy --strict` checks it, nobody runs it.

Each `assert_type` fails if a public name is untyped there, or of another type than documented.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import exaone_bridge
from exaone_bridge import Inspection, Layout, MegatronInspection, Report, Summary, errors, recipes
from exaone_bridge.errors import BridgeError, UnsupportedLayout


def convert(source: Path, folder: Path) -> None:
    imported = exaone_bridge.import_checkpoint(source, folder / "megatron", tp=2, pp=2, workers=2)
    assert_type(imported, Summary)
    assert_type(imported.nbytes, int)
    exported = exaone_bridge.export_checkpoint(folder / "megatron", folder / "exported")
    assert_type(exported, Summary)


def check(source: str) -> dict[str, Any]:
    layout = Layout(tp=2, pp=2)
    assert_type(layout.ranks, int)
    report = exaone_bridge.verify(source, layout=layout, progress=False)
    assert_type(report, Report)
    assert_type(report.passed, bool)
    assert_type(report.to_dict(), dict[str, Any])
    assert_type(report.check("logits").summary, str)
    report.write_html("report.html")
    report.write_json(Path("report.json"))
    return report.to_dict() if report else {}


def describe(source: str) -> Iterator[str]:
    inspection = exaone_bridge.inspect(source, tp=2)
    assert_type(inspection, Inspection | MegatronInspection)
    assert_type(inspection.passed, bool)
    yield from inspection.missing
    yield from inspection.unexpected


def other_names() -> None:
    with exaone_bridge.cpu_runtime() as nothing:
        assert_type(nothing, None)
    assert_type(exaone_bridge.__version__, str)
    for architecture, bridge in exaone_bridge.supported().items():
        print(architecture.lower(), bridge.__name__)
    recipes.exaone4_1p2b_sft_config(gpu_memory_gb=80, hf_path="model")
    try:
        raise UnsupportedLayout("tp", got=3, wanted="even", remedy="choose another")
    except errors.BridgeError as error:
        assert_type(error, BridgeError)
