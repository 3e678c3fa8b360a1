"""What `test_verify_torchrun.py` runs under torchrun. Not a test.

    torchrun --nproc-per-node 2 tests/gpu/verify_driver.py FOLDER    # every case of FOLDER/cases.json in one process
    torchrun --nproc-per-node 2 tests/gpu/verify_driver.py FAULT verify SOURCE --tp 2 ...    # the command, with a fault

The first writes FOLDER/results.json: of each case, both ranks' exit codes, and how much each of them printed.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # before transformer_engine: the two bring different versions of cuDNN
import torch.distributed as dist

import exaone_bridge
from exaone_bridge import cli
from tests.gpu.two_gpus import start_world

del os.environ[
    "NVIDIA_TF32_OVERRIDE"
]  # set as `two_gpus` was imported; here it is the command's business


def _one_weight(model: list[Any]) -> None:
    """A single number of one linear, on the second rank alone."""
    if dist.get_rank() == 1:
        _projection(model)[0, 0] += 1.0


def _one_projection(model: list[Any]) -> None:
    _projection(model).neg_()


def _projection(model: list[Any]) -> torch.Tensor:
    from megatron.core.utils import unwrap_model

    weight: torch.Tensor = (
        unwrap_model(model)[0].decoder.layers[2].self_attention.linear_proj.weight
    )
    return weight


FAULTS: dict[str, Callable[[list[Any]], None]] = {
    "one-weight": _one_weight,
    "one-projection": _one_projection,
}


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """Every model that is built is changed after it was loaded."""
    if fault is None:
        yield
        return
    exaone_bridge.supported()
    import exaone_bridge.runtime.model as module

    build = module.build

    def faulty(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        with torch.no_grad():
            FAULTS[fault](model)
        return model

    module.build = faulty
    try:
        yield
    finally:
        module.build = build


def run_cases(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    cli._GRACE = 0  # nobody ends here
    exaone_bridge.supported()  # what libraries print as they are imported is nobody's report
    results: dict[str, Any] = {}
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        start_world(folder / f"store-{number}", rank, seconds=300)
        begin, out, err = time.monotonic(), io.StringIO(), io.StringIO()
        sys.argv = ["exaone-bridge", *case["arguments"]]
        code: Any = None
        with (
            planted(case.get("fault")),
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
        with planted(sys.argv.pop(1)):
            cli.main()
    else:
        run_cases(Path(sys.argv[1]))
