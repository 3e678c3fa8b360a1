"""All models over two GPUs on NCCL: logits at each kind of layout, exports, packing, MTP."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.gpu import LANGUAGE_MODELS, MOE_MODELS, wide

BF16 = "bfloat16"
LAYOUTS: list[dict[str, Any]] = [
    {"tp": 2},
    {"tp": 2, "sp": True},
    {"pp": 2},
    {"pp": 2, "vpp": 2},
    {"cp": 2},
    {"ep": 2},
]
# EXAONE 4.5 runs text longer than the window, and prompts with one image, several, and videos.
VISION_LAYOUTS: list[tuple[dict[str, Any], str]] = [
    ({"tp": 2}, "float32"),
    ({"tp": 2}, BF16),
    ({"tp": 2, "sp": True}, "float32"),
    ({"tp": 2, "sp": True}, BF16),
    ({"pp": 2}, "float32"),
    ({"pp": 2, "vpp": 2}, "float32"),
    ({"cp": 2}, BF16),
]


def _case(kind: str, name: str, layout: dict[str, Any], dtype: str, **fields: Any) -> Any:
    parts = [kind, name, *(f"{axis}{size}" for axis, size in layout.items())]
    parts += [*([] if kind == "packed" else [dtype]), *map(str, fields.values())]
    case = {"id": " ".join(parts), "kind": kind, "name": name, "layout": layout, "dtype": dtype}
    return case | {"fields": fields}


def _dtypes(layout: dict[str, Any]) -> list[str]:
    # Only Transformer Engine's fused attention, which has no fp32, supports context parallelism.
    return [BF16] if "cp" in layout else ["float32", BF16] if layout == {"tp": 2} else ["float32"]


CASES = [
    _case("logits", name, layout, dtype)
    for name in LANGUAGE_MODELS
    for layout in LAYOUTS
    if "ep" not in layout or name in MOE_MODELS
    for dtype in _dtypes(layout)
]
CASES += [_case("logits", "exaone4", {"cp": 2}, BF16, cp_comm_type="a2a")]
CASES += [_case("packed", name, {"cp": 2}, BF16) for name in ("exaone4", "ernie45")]
CASES += [_case("logits", "exaone45", layout, dtype) for layout, dtype in VISION_LAYOUTS]
CASES += [_case("mtp", "exaone45", {"tp": 2, "sp": True}, "float32")]
# One process group runs all cases of a layout.
CASES.sort(key=lambda case: json.dumps(case["layout"]))


def write_cases(folder: Path, cases: list[dict[str, Any]], tiny: Any) -> None:
    """Write `cases.json` and the models that it names."""
    for case in cases:
        fields = wide(case["name"], case["dtype"])
        if case["name"] == "exaone4-1.2b":  # two stages of two chunks divide eight layers
            fields |= {"num_hidden_layers": 8, "layer_types": ["full_attention"] * 8}
        case["folder"] = str(tiny(case["name"], **fields))
    (folder / "cases.json").write_text(json.dumps(cases))


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tiny: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Run all selected cases in one run of torchrun; return case id -> metrics or error."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("two_gpus")
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    cases = [call.params["case"] for call in calls if call and call.params.get("case") in CASES]
    write_cases(folder, cases, tiny)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(Path(__file__).with_name("two_gpus.py")), str(folder)]
    with (folder / "log.txt").open("w") as log, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=450,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
    log_tail = (folder / "log.txt").read_text(errors="replace")[-6000:]
    print(log_tail)
    path = folder / "results.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    missing = {"error": f"did not run: {log_tail}"}
    return {case["id"]: found.get(case["id"], missing) for case in cases}


def cases_of(kind: str) -> pytest.MarkDecorator:
    cases = [case for case in CASES if case["kind"] == kind]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["id"])


def _result(results: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = results[case["id"]]
    assert "error" not in result, result["error"]
    print(case["id"], result)
    return result


@cases_of("logits")
def test_logits_and_export_over_two_gpus(results: dict[str, Any], case: dict[str, Any]) -> None:
    """fp32 logits equal those of Transformers, bf16 logits are as exact; exports are bitwise."""
    result = _result(results, case)
    if case["dtype"] == "float32":
        assert result["max"] <= 1e-3
    else:
        assert not result["failures"]
    assert result["bitwise"], result["details"]


@cases_of("packed")
def test_packed_documents_over_two_gpus_have_the_logits_of_single_documents(
    results: dict[str, Any], case: dict[str, Any]
) -> None:
    """2e-2 is the mean distance of bf16 to fp32; attention to other documents gives 100 times."""
    assert _result(results, case)["packed"][0] <= 2e-2


@cases_of("mtp")
def test_mtp_over_two_gpus_equals_the_reference(
    results: dict[str, Any], case: dict[str, Any]
) -> None:
    result = _result(results, case)
    assert result["logits"] <= 1e-3 and result["loss"] <= 1e-4 and result["gradient"][1] <= 1e-3
    assert not result["differing"]
