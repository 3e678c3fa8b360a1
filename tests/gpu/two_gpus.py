"""What `test_two_gpus.py` runs under torchrun: every case in the same two processes, which take half a minute to start.

    torchrun --nproc-per-node 2 tests/gpu/two_gpus.py FOLDER

FOLDER holds `cases.json`; rank 0 writes `results.json`, one entry a case: its figures, or the error's last line.
Without a GPU the same cases run on gloo with the torch backend: that the script itself is right can be seen anywhere.
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

import torch  # before transformer_engine: the two bring different versions of cuDNN
import torch.distributed as dist

import exaone_bridge

GPU = torch.cuda.is_available()
BACKEND = "transformer_engine" if GPU else "torch"
Prompts = list[tuple[torch.Tensor, list[dict[str, torch.Tensor]]]]


def start_world(store: Path, rank: int, seconds: int = 60) -> None:
    """A new world for a new layout; the old one's NCCL communicators would keep gigabytes."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        gc.collect()
        dist.destroy_process_group()
    dist.init_process_group(
        "nccl" if GPU else "gloo",
        init_method=f"file://{store}",  # torchrun's own store still holds what the last world wrote
        rank=rank,
        world_size=2,
        device_id=torch.device("cuda", rank) if GPU else None,
        timeout=timedelta(seconds=seconds),
    )


def prompts_of(folder: Path) -> Prompts:
    """Prompts [N, S] and the images of each: words; and for a model that takes them, images and videos."""
    from exaone_bridge.models.exaone45.config import ARCHITECTURE, read_hf_config
    from exaone_bridge.models.exaone45.prompts import image_prompts
    from exaone_bridge.verification.checks.logits import prompts

    config = json.loads((folder / "config.json").read_text())
    if config["architectures"] == [ARCHITECTURE]:
        return [(prompts(512, 4, 300), []), image_prompts(read_hf_config(config), 8, seed=3)]
    return [(prompts(512, 8, 300), [])]  # of bf16 experts' maximum, a few prompts say nothing


def reference(folder: Path, runs: Prompts, dtype: torch.dtype) -> torch.Tensor:
    """Transformers' logits of every position of every prompt, [positions, V] fp32."""
    from exaone_bridge.verification.workflow.transformers import load

    model, found = load(folder, dtype), []
    for tokens, images in runs:
        for prompt, each in zip(tokens.split(1), images or [{}] * len(tokens), strict=True):
            pictures = {name: value.to(model.device) for name, value in each.items()}
            with torch.no_grad():
                found.append(
                    model(prompt.to(model.device), use_cache=False, **pictures)
                    .logits[0]
                    .float()
                    .cpu()
                )
    return torch.cat(found)


def logits_case(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Distances to Transformers' fp32 logits, and whether the export is the source, bit by bit."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits
    from exaone_bridge.schema.parallel_layout import Layout
    from exaone_bridge.verification.checks.folders import compare_tensors

    runs, dtype = prompts_of(folder), getattr(torch, case["dtype"])
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(
        bridge, Layout(**case["layout"]), dtype=dtype, backend=BACKEND, **case.get("fields", {})
    )
    found = [forward_logits(model, tokens, images)[0] for tokens, images in runs]
    result: dict[str, Any] = {"exchanges": getattr(model[0].config, "cp_comm_type", None)}
    if found[0] is not None:
        logits = torch.cat([each.flatten(0, 1) for each in found if each is not None])
        truth = reference(folder, runs, torch.float32)
        ours, theirs = (logits - truth).abs(), (reference(folder, runs, dtype) - truth).abs()
        result |= {
            "ours": [ours.mean().item(), ours.max().item()],
            "theirs": [theirs.mean().item(), theirs.max().item()],
        }
    exported = folder.with_name(f"{folder.name}-{case['id']}".replace(" ", ""))
    bridge.save_hf_pretrained(model, exported, show_progress=False)
    dist.barrier()
    check = compare_tensors(folder, exported)
    return result | {"bitwise": bool(check.passed), "where": str(check.details)}


def packed_case(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    from exaone_bridge.schema.parallel_layout import Layout
    from tests.helpers.packing import packing_error

    options = {"dtype": torch.bfloat16, "backend": BACKEND}
    return {
        "packed": packing_error(folder, Layout(**case["layout"]), [256, 64, 192], 512, **options)
    }


def prediction_case(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Multi-token prediction beside its formula: logits, loss, and the gradient that is farthest off, by its size."""
    from exaone_bridge.schema.parallel_layout import Layout
    from tests.helpers.exaone45_mtp import formula, ours, prompts_of
    from tests.helpers.training import relative_difference

    whole = prompts_of(512, 2, 201)
    expected = formula(folder, whole, 1)
    found = ours(folder, Layout(**case["layout"]), whole, 1, {"backend": BACKEND})
    gaps = {
        name: relative_difference(found.gradients[name], value)
        for name, value in expected.gradients.items()
    }
    worst = max(gaps, key=lambda name: gaps[name])
    return {
        "logits": (found.logits[0] - expected.logits[0])[:, :-1].abs().max().item(),
        "loss": abs(found.losses[0] - expected.losses[0]),
        "gradient": [worst, gaps[worst]],
        "differing": sorted(found.differing),
    }


def main() -> None:
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
        run = {"logits": logits_case, "packed": packed_case, "prediction": prediction_case}[
            case["kind"]
        ]
        try:
            with exaone_bridge.cpu_runtime():
                result = run(Path(case["folder"]), case)
        except Exception:
            result = {"error": traceback.format_exc()[-3000:]}
        gathered: list[Any] = [None, None]
        dist.all_gather_object(gathered, result)
        # The last pipeline stage alone has logits.
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
