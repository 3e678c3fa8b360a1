"""Runs the command `verify` under torchrun for `test_verify_torchrun.py`. Not a test.

    torchrun --nproc-per-node 2 tests/gpu/verify_driver.py FOLDER
    torchrun --nproc-per-node 2 tests/gpu/verify_driver.py FAULT verify SOURCE --tp 2 ...

The first runs every case of FOLDER/cases.json in one process per rank, and writes the exit codes
and the output of both ranks to FOLDER/results.json. The second runs one command with an injected
fault.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # before transformer_engine: the two bring different versions of cuDNN
import torch.distributed as dist

import exaone_bridge
from exaone_bridge import cli
from exaone_bridge.verification.self_test.fault import ModelChange, changed_model
from tests.gpu.two_gpus import start_world

# `two_gpus` sets it when it is imported; here `verify` must set it.
del os.environ["NVIDIA_TF32_OVERRIDE"]


def _change_one_weight(model: list[Any]) -> None:
    """Change one number of one linear layer, on the second rank alone."""
    if dist.get_rank() == 1:
        _projection(model)[0, 0] += 1.0


def _negate_one_projection(model: list[Any]) -> None:
    _projection(model).neg_()


def _projection(model: list[Any]) -> torch.Tensor:
    from megatron.core.utils import unwrap_model

    layer = unwrap_model(model)[0].decoder.layers[2]
    weight: torch.Tensor = layer.self_attention.linear_proj.weight
    return weight


FAULTS: dict[str, ModelChange] = {
    "one-weight": _change_one_weight,
    "one-projection": _negate_one_projection,
}


def injected(fault: str | None) -> contextlib.AbstractContextManager[None]:
    """Make a context in which every model that is loaded has this fault."""
    if fault is None:
        return contextlib.nullcontext()
    exaone_bridge.supported()
    return changed_model(FAULTS[fault])


def run_cases(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    cli._GRACE_SECONDS = 0  # no rank ends here
    exaone_bridge.supported()  # so that the output that libraries print on import is not captured
    results: dict[str, Any] = {}
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        start_world(folder / f"store-{number}", rank, seconds=300)
        begin, out, err = time.monotonic(), io.StringIO(), io.StringIO()
        sys.argv = ["exaone-bridge", *case["arguments"]]
        code: Any = None
        with (
            injected(case.get("fault")),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                cli.main()
            except SystemExit as end:
                code = end.code or 0
        found: list[Any] = [None, None]
        dist.all_gather_object(
            found, {"code": code, "out": out.getvalue(), "err": err.getvalue()[-3000:]}
        )
        results[case["id"]] = found
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if rank == 0:
            print(f"{time.monotonic() - begin:.1f} s: {case['id']}", flush=True)
            (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] in FAULTS:
        with injected(sys.argv.pop(1)):
            cli.main()
    else:
        run_cases(Path(sys.argv[1]))
