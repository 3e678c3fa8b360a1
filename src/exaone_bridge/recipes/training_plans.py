"""The training plan of each recipe, by GPU memory. No torch.

The plans keep `memory.estimate` below the GPU's memory, keep TP within a node of eight GPUs, and
recompute activations as little as possible. docs/recipes.md shows them as a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.recipes.training_plan import PlanOverrides, TrainingPlan
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["ADAPTER_RANK", "TRAINING_PLANS", "plan_of_recipe", "training_plan"]

ADAPTER_RANK = 32  # of LoRA and DoRA


def _plan(
    *,
    gpus: int,
    seq_length: int,
    global_batch_size: int,
    micro_batch_size: int = 1,
    recompute: bool = False,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    cp: int = 1,
) -> TrainingPlan:
    """Build a plan with sequence parallelism wherever TP is more than 1."""
    return TrainingPlan(
        gpus=gpus,
        layout=Layout(tp=tp, pp=pp, vpp=vpp, sp=tp > 1, ep=ep, etp=etp, cp=cp),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        recompute=recompute,
    )


_TINY = dict.fromkeys(
    (80, 141), _plan(gpus=1, seq_length=256, micro_batch_size=2, global_batch_size=4)
)
_SFT_32B = {
    80: _plan(gpus=16, tp=8, pp=2, seq_length=4096, global_batch_size=64),
    141: _plan(gpus=8, tp=8, seq_length=8192, global_batch_size=64),
}
_PEFT_32B = {
    80: _plan(gpus=4, tp=4, seq_length=4096, global_batch_size=32),
    141: _plan(gpus=2, tp=2, seq_length=4096, global_batch_size=32),
}

# (model, stage) -> GPU memory in GB -> plan; the recipe is named f"{model}_{stage}_config".
TRAINING_PLANS: dict[tuple[str, str], dict[int, TrainingPlan]] = {
    ("exaone4_1p2b", "pretrain"): {
        80: _plan(gpus=8, seq_length=4096, micro_batch_size=4, global_batch_size=256),
        141: _plan(gpus=8, seq_length=4096, micro_batch_size=8, global_batch_size=256),
    },
    ("exaone4_1p2b", "64k_pretrain"): {
        80: _plan(gpus=8, cp=4, seq_length=65536, global_batch_size=32),
        141: _plan(gpus=8, cp=2, seq_length=65536, global_batch_size=32),
    },
    ("exaone4_1p2b", "sft"): {
        80: _plan(gpus=8, seq_length=4096, global_batch_size=64),
        141: _plan(gpus=8, seq_length=8192, global_batch_size=64),
    },
    ("exaone4_1p2b", "peft"): {
        80: _plan(gpus=1, seq_length=4096, global_batch_size=32),
        141: _plan(gpus=1, seq_length=8192, global_batch_size=32),
    },
    ("exaone4_32b", "pretrain"): {
        80: _plan(gpus=64, tp=8, pp=2, vpp=4, seq_length=8192, global_batch_size=256),
        141: _plan(gpus=64, tp=4, pp=2, vpp=4, seq_length=8192, global_batch_size=256),
    },
    ("exaone4_32b", "128k_pretrain"): {
        80: _plan(
            gpus=64, tp=8, pp=2, cp=4, seq_length=131072, global_batch_size=16, recompute=True
        ),
        141: _plan(gpus=64, tp=8, pp=2, cp=4, seq_length=131072, global_batch_size=16),
    },
    ("exaone4_32b", "sft"): _SFT_32B,
    ("exaone4_32b", "peft"): _PEFT_32B,
    ("exaone45_33b", "sft"): _SFT_32B,
    ("exaone45_33b", "peft"): _PEFT_32B,
    ("exaone45_vl_33b", "sft"): _SFT_32B,
    ("exaone45_vl_33b", "peft"): _PEFT_32B,
    ("ernie45_0p3b", "pretrain"): {
        80: _plan(gpus=8, seq_length=4096, micro_batch_size=4, global_batch_size=256),
        141: _plan(gpus=8, seq_length=4096, micro_batch_size=8, global_batch_size=256),
    },
    ("ernie45_0p3b", "sft"): {
        80: _plan(gpus=1, seq_length=4096, global_batch_size=64),
        141: _plan(gpus=1, seq_length=8192, global_batch_size=64),
    },
    ("ernie45_0p3b", "peft"): {
        80: _plan(gpus=1, seq_length=4096, global_batch_size=32),
        141: _plan(gpus=1, seq_length=8192, global_batch_size=32),
    },
    ("ernie45_21b_a3b", "pretrain"): {
        80: _plan(gpus=32, ep=8, seq_length=4096, global_batch_size=512),
        141: _plan(gpus=32, ep=8, seq_length=4096, micro_batch_size=2, global_batch_size=512),
    },
    ("ernie45_21b_a3b", "sft"): {
        80: _plan(gpus=16, ep=8, seq_length=4096, global_batch_size=64),
        141: _plan(gpus=8, ep=8, seq_length=4096, global_batch_size=64),
    },
    ("ernie45_21b_a3b", "peft"): {
        80: _plan(gpus=2, ep=2, seq_length=4096, global_batch_size=32),
        141: _plan(gpus=1, seq_length=4096, global_batch_size=32),
    },
    ("ernie45_300b_a47b", "pretrain"): {
        80: _plan(
            gpus=576, tp=4, pp=9, vpp=2, ep=16, etp=1, seq_length=4096, global_batch_size=2304
        ),
        141: _plan(
            gpus=288, tp=4, pp=9, vpp=2, ep=8, etp=1, seq_length=4096, global_batch_size=2304
        ),
    },
    ("ernie45_300b_a47b", "sft"): {
        80: _plan(gpus=144, tp=8, pp=9, ep=16, etp=1, seq_length=4096, global_batch_size=128),
        141: _plan(gpus=72, tp=8, pp=9, ep=8, etp=1, seq_length=4096, global_batch_size=128),
    },
    ("ernie45_300b_a47b", "peft"): {
        80: _plan(
            gpus=16,
            tp=8,
            pp=2,
            ep=8,
            etp=1,
            seq_length=4096,
            global_batch_size=32,
            recompute=True,
        ),
        141: _plan(
            gpus=8, tp=8, ep=8, etp=1, seq_length=4096, global_batch_size=32, recompute=True
        ),
    },
    ("k_exaone_236b_a23b", "pretrain"): {
        80: _plan(
            gpus=192, tp=4, pp=6, vpp=2, ep=32, etp=1, seq_length=4096, global_batch_size=1536
        ),
        141: _plan(
            gpus=96, tp=4, pp=6, vpp=2, ep=16, etp=1, seq_length=4096, global_batch_size=1536
        ),
    },
    ("k_exaone_236b_a23b", "sft"): {
        80: _plan(
            gpus=96,
            tp=4,
            pp=6,
            ep=16,
            etp=1,
            seq_length=4096,
            global_batch_size=128,
            recompute=True,
        ),
        141: _plan(
            gpus=48,
            tp=4,
            pp=6,
            ep=8,
            etp=1,
            seq_length=4096,
            global_batch_size=128,
            recompute=True,
        ),
    },
    ("k_exaone_236b_a23b", "peft"): {
        80: _plan(
            gpus=16,
            tp=4,
            pp=4,
            ep=4,
            etp=1,
            seq_length=4096,
            global_batch_size=32,
            recompute=True,
        ),
        141: _plan(
            gpus=8, tp=4, ep=8, etp=1, seq_length=4096, global_batch_size=32, recompute=True
        ),
    },
    ("k_exaone_2_750b_a37b", "peft"): {
        80: _plan(
            gpus=48,
            tp=4,
            pp=3,
            ep=16,
            etp=1,
            seq_length=4096,
            global_batch_size=32,
            recompute=True,
        ),
        141: _plan(
            gpus=24,
            tp=8,
            pp=3,
            ep=8,
            etp=1,
            seq_length=4096,
            global_batch_size=32,
            recompute=True,
        ),
    },
    ("k_exaone_tiny", "pretrain"): _TINY,
    ("k_exaone_tiny", "sft"): _TINY,
    ("k_exaone_tiny", "peft"): _TINY,
    ("exaone4_tiny", "pretrain"): _TINY,
    ("exaone4_tiny", "sft"): _TINY,
    ("exaone4_tiny", "peft"): _TINY,
    ("ernie45_tiny", "pretrain"): _TINY,
    ("ernie45_tiny", "sft"): _TINY,
    ("ernie45_tiny", "peft"): _TINY,
    ("exaone45_vl_tiny", "sft"): _TINY,
    ("exaone45_vl_tiny", "peft"): _TINY,
}


def training_plan(model: str, stage: str, gpu_memory_gb: int) -> TrainingPlan:
    """Look up the plan of a recipe.

    Args:
        model: for example "exaone4_1p2b".
        stage: "pretrain", "64k_pretrain", "128k_pretrain", "sft" or "peft".
        gpu_memory_gb: memory of one GPU, 80 or 141.

    Raises:
        UnsupportedConfig: there is no plan for GPUs of this size.
    """
    plans = TRAINING_PLANS[model, stage]
    if gpu_memory_gb not in plans:
        raise UnsupportedConfig(
            "gpu_memory_gb",
            got=gpu_memory_gb,
            known=tuple(plans),
            where=f"recipe {model}_{stage}_config",
            remedy="use the plan for the next smaller GPU",
        )
    return plans[gpu_memory_gb]


def plan_of_recipe(name: str, arguments: Mapping[str, Any]) -> tuple[str, str, TrainingPlan]:
    """Look up the plan with which a recipe would be called with these arguments.

    Args:
        name: of the recipe; one for conversations has the plan of its namesake.
        arguments: of the recipe; those that are no fields of the plan change nothing, but for
            `gpu_memory_gb`, 80 by default.

    Returns:
        The model, the stage and the plan: see `training_plan`.

    Raises:
        UnsupportedConfig: there is no plan for GPUs of this size.
    """
    stages = {f"{model}_{stage}_config": (model, stage) for model, stage in TRAINING_PLANS}
    model, stage = stages[name.replace("_chat", "")]
    plan = training_plan(model, stage, arguments.get("gpu_memory_gb", 80))
    fields = {key: arguments[key] for key in arguments if key in PlanOverrides.__annotations__}
    return model, stage, plan.with_overrides(**fields)
