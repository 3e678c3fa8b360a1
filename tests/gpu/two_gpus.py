"""What `test_two_gpus.py` runs under torchrun: every case in the same two processes, which take half a minute to start.

    torchrun --nproc-per-node 2 tests/gpu/two_gpus.py FOLDER

FOLDER holds `cases.json`; rank 0 writes `results.json`, one entry a case: its figures, or the error's last line.
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
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # before transformer_engine: the two bring different versions of cuDNN
import torch.distributed as dist

import exaone_bridge


def start_world(store: Path, rank: int) -> None:
    """A new world for a new layout; the old one's NCCL communicators would keep gigabytes."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        gc.collect()
        dist.destroy_process_group()
    dist.init_process_group(
        "nccl",
        init_method=f"file://{store}",  # torchrun's own store still holds what the last world wrote
        rank=rank,
        world_size=2,
        device_id=torch.device("cuda", rank),
        timeout=timedelta(seconds=60),
    )


def logits_case(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Distances to Transformers' fp32 logits, and whether the export is the source, bit by bit."""
    from megatron.bridge import AutoBridge
    from transformers import AutoModelForCausalLM

    from exaone_bridge.host.model import build, forward_logits
    from exaone_bridge.parts.layout import Layout
    from exaone_bridge.verify.folders import compare_tensors
    from exaone_bridge.verify.logits import prompts

    tokens = prompts(512, 8, 300)  # of bf16 experts' maximum, a few prompts say nothing

    def reference(dtype: torch.dtype) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").cuda().eval()
        with torch.no_grad():
            return torch.cat([model(prompt[None].cuda(), use_cache=False).logits.float().cpu() for prompt in tokens])

    dtype = getattr(torch, case["dtype"])
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, Layout(**case["layout"]), dtype=dtype, backend="transformer_engine", **case.get("fields", {}))
    logits, _ = forward_logits(model, tokens)
    result: dict[str, Any] = {"exchanges": getattr(model[0].config, "cp_comm_type", None)}
    if logits is not None:
        truth = reference(torch.float32)
        ours, theirs = (logits - truth).abs(), (reference(dtype) - truth).abs()
        result |= {
            "ours": [ours.mean().item(), ours.max().item()],
            "theirs": [theirs.mean().item(), theirs.max().item()],
        }
    exported = folder.with_name(f"{folder.name}-{case['id']}".replace(" ", ""))
    bridge.save_hf_pretrained(model, exported, show_progress=False)
    dist.barrier()
    check = compare_tensors(folder, exported)
    return result | {"bitwise": bool(check.holds), "where": str(check.where)}


def packed_case(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    from packing import difference

    from exaone_bridge.parts.layout import Layout

    options = {"dtype": torch.bfloat16, "backend": "transformer_engine"}
    return {"packed": difference(folder, Layout(**case["layout"]), [256, 64, 192], 512, **options)}


def main() -> None:
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    torch.backends.cuda.matmul.allow_tf32 = False
    exaone_bridge.supported()
    results: dict[str, Any] = {}
    layout = None
    for case in json.loads((folder / "cases.json").read_text()):
        if case["layout"] != layout:
            layout = case["layout"]
            start_world(folder / f"store-{len(results)}", rank)
        begin = time.monotonic()
        run = {"logits": logits_case, "packed": packed_case}[case["kind"]]
        try:
            result = run(Path(case["folder"]), case)
        except Exception:
            result = {"error": traceback.format_exc()[-3000:]}
        gathered: list[Any] = [None, None]
        dist.all_gather_object(gathered, result)
        # The last pipeline stage alone has logits.
        results[case["id"]] = {key: value for part in gathered for key, value in part.items()}
        print(f"{time.monotonic() - begin:.1f} s: {case['id']}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        if rank == 0:
            (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
