"""Run every case of `test_two_gpus.py` in the same two processes, whose start takes half a minute.

    torchrun --nproc-per-node 2 tests/gpu/two_gpus.py FOLDER

The folder has `cases.json`; rank 0 writes `results.json` with each case's metrics or traceback.
Without a GPU the cases run on gloo with the torch backend, to try this script anywhere.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # before transformer_engine: each brings another version of cuDNN
import torch.distributed as dist

import exaone_bridge

GPU = torch.cuda.is_available()
BACKEND = "transformer_engine" if GPU else "torch"


def start_world(store: Path, rank: int, seconds: int = 60) -> None:
    """Start new process groups: the NCCL communicators of the last layout would keep gigabytes.

    Args:
        store: a file that does not exist; torchrun's own store has keys of the last world.
        rank: this process's rank of two.
        seconds: the timeout of collectives.
    """
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        gc.collect()
        dist.destroy_process_group()
    dist.init_process_group(
        "nccl" if GPU else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        device_id=torch.device("cuda", rank) if GPU else None,
        timeout=timedelta(seconds=seconds),
    )


def logits_case(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Measure distances to Transformers' fp32 logits, and compare the export."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build
    from exaone_bridge.schema.parallel_layout import Layout
    from exaone_bridge.verification.checks.folders import compare_tensors
    from tests.helpers.bf16 import Closeness, Distance, hf_outputs, outputs_of
    from tests.helpers.gpu import hf_logits, logits_of, long_prompts

    # Quantiles in bf16 need more prompts.
    runs = long_prompts(folder, count=4 if case["name"] == "exaone45" else 8)
    layout, dtype = Layout(**case["layout"]), getattr(torch, case["dtype"])
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, layout, dtype=dtype, backend=BACKEND, **case.get("fields", {}))
    result: dict[str, Any] = {"cp_comm_type": getattr(model[0].config, "cp_comm_type", None)}
    if dtype is torch.float32:
        if (logits := logits_of(model, runs)) is not None:
            distance = Distance.between(logits, hf_logits(folder, runs, dtype))
            result |= {"distances": str(distance), "max": distance.max}
    elif (outputs := outputs_of(folder, model, runs)) is not None:
        both = (hf_outputs(folder, runs, each) for each in (dtype, torch.float32))
        closeness = Closeness.of(outputs, *both)
        result |= {"distances": str(closeness), "failures": closeness.failures()}
    exported = folder.with_name(f"{folder.name}-{case['id']}".replace(" ", ""))
    bridge.save_hf_pretrained(model, exported, show_progress=False)
    dist.barrier()
    check = compare_tensors(folder, exported)
    return result | {"bitwise": bool(check.passed), "details": str(check.details)}


def packed_case(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Measure how much packing changes the logits of documents; mean and maximum."""
    from exaone_bridge.schema.parallel_layout import Layout
    from tests.helpers.packing import packing_error

    layout, options = Layout(**case["layout"]), {"dtype": torch.bfloat16, "backend": BACKEND}
    return {"packed": packing_error(folder, layout, [256, 64, 192], 512, **options)}


def mtp_case(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Measure how far multi-token prediction is from its reference; gradients are relative."""
    from exaone_bridge.schema.parallel_layout import Layout
    from exaone_bridge.verification.checks.gradients import relative_norm
    from tests.helpers.mtp import mtp_of_megatron, mtp_of_reference, random_tokens

    tokens, layout = random_tokens(512, 2, 201), Layout(**case["layout"])
    expected = mtp_of_reference(folder, tokens, 1)
    found = mtp_of_megatron(folder, layout, tokens, 1, {"backend": BACKEND})
    gradients = {
        name: relative_norm(found.gradients[name], value)
        for name, value in expected.gradients.items()
    }
    worst = max(gradients, key=lambda name: gradients[name])
    return {
        "logits": (found.logits[0] - expected.logits[0])[:, :-1].abs().max().item(),
        "loss": abs(found.losses[0] - expected.losses[0]),
        "gradient": [worst, gradients[worst]],
        "differing": sorted(found.differing),
    }


KINDS = {"logits": logits_case, "packed": packed_case, "mtp": mtp_case}


def main() -> None:
    """Run the cases of the folder that the command line names."""
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    if GPU:
        torch.cuda.set_device(rank)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    exaone_bridge.supported()
    results: dict[str, Any] = {}
    layout = None
    for case in json.loads((folder / "cases.json").read_text()):
        if case["layout"] != layout:
            layout = case["layout"]
            start_world(folder / f"store-{len(results)}", rank)
        begin = time.monotonic()
        try:
            with exaone_bridge.cpu_runtime():
                result = KINDS[case["kind"]](Path(case["folder"]), case)
        except Exception:
            result = {"error": traceback.format_exc()[-3000:]}
        gathered: list[Any] = [None, None]
        dist.all_gather_object(gathered, result)
        # Only the last pipeline stage has logits.
        results[case["id"]] = {key: value for part in gathered for key, value in part.items()}
        print(f"{time.monotonic() - begin:.1f} s: {case['id']}", flush=True)
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()
        if rank == 0:
            (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
