"""The plans of the recipes: model, stage, memory of a GPU -> how it is spread. No torch.

Chosen so that `estimate` stays below the GPU's memory, tp stays within a node of eight, and as little as possible is
recomputed. `docs/recipes.md` is the table of them.
"""

from __future__ import annotations

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.recipes.plan import Plan
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["ADAPTER_RANK", "PLANS", "plan_of"]

ADAPTER_RANK = 32

# On words and on images alike.
_EXAONE45 = {
    "sft": {
        80: Plan(gpus=16, layout=Layout(tp=8, pp=2, sp=True), seq_length=4096, global_batch=64),
        141: Plan(gpus=8, layout=Layout(tp=8, sp=True), seq_length=8192, global_batch=64),
    },
    "peft": {
        80: Plan(gpus=4, layout=Layout(tp=4, sp=True), seq_length=4096, global_batch=32),
        141: Plan(gpus=2, layout=Layout(tp=2, sp=True), seq_length=4096, global_batch=32),
    },
}
_TINY_CONFIGS = dict.fromkeys(("exaone4_tiny", "ernie45_tiny"), ("pretrain", "sft", "peft")) | {
    "exaone45_vl_tiny": ("sft", "peft")
}
PLANS: dict[tuple[str, str], dict[int, Plan]] = {
    ("exaone4_1p2b", "pretrain"): {
        80: Plan(gpus=8, layout=Layout(), seq_length=4096, micro_batch=4, global_batch=256),
        141: Plan(gpus=8, layout=Layout(), seq_length=4096, micro_batch=8, global_batch=256),
    },
    ("exaone4_1p2b", "64k_pretrain"): {
        80: Plan(gpus=8, layout=Layout(cp=4), seq_length=65536, global_batch=32),
        141: Plan(gpus=8, layout=Layout(cp=2), seq_length=65536, global_batch=32),
    },
    ("exaone4_1p2b", "sft"): {
        80: Plan(gpus=8, layout=Layout(), seq_length=4096, global_batch=64),
        141: Plan(gpus=8, layout=Layout(), seq_length=8192, global_batch=64),
    },
    ("exaone4_1p2b", "peft"): {
        80: Plan(gpus=1, layout=Layout(), seq_length=4096, global_batch=32),
        141: Plan(gpus=1, layout=Layout(), seq_length=8192, global_batch=32),
    },
    ("exaone4_32b", "pretrain"): {
        80: Plan(
            gpus=64, layout=Layout(tp=8, pp=2, vpp=4, sp=True), seq_length=8192, global_batch=256
        ),
        141: Plan(
            gpus=64, layout=Layout(tp=4, pp=2, vpp=4, sp=True), seq_length=8192, global_batch=256
        ),
    },
    ("exaone4_32b", "128k_pretrain"): {
        80: Plan(
            gpus=64,
            layout=Layout(tp=8, pp=2, sp=True, cp=4),
            seq_length=131072,
            global_batch=16,
            recompute=True,
        ),
        141: Plan(
            gpus=64, layout=Layout(tp=8, pp=2, sp=True, cp=4), seq_length=131072, global_batch=16
        ),
    },
    ("exaone4_32b", "sft"): {
        80: Plan(gpus=16, layout=Layout(tp=8, pp=2, sp=True), seq_length=4096, global_batch=64),
        141: Plan(gpus=8, layout=Layout(tp=8, sp=True), seq_length=8192, global_batch=64),
    },
    ("exaone4_32b", "peft"): {
        80: Plan(gpus=4, layout=Layout(tp=4, sp=True), seq_length=4096, global_batch=32),
        141: Plan(gpus=2, layout=Layout(tp=2, sp=True), seq_length=4096, global_batch=32),
    },
    **{
        (f"exaone45_{kind}33b", stage): plans
        for kind in ("", "vl_")
        for stage, plans in _EXAONE45.items()
    },
    ("ernie45_0p3b", "pretrain"): {
        80: Plan(gpus=8, layout=Layout(), seq_length=4096, micro_batch=4, global_batch=256),
        141: Plan(gpus=8, layout=Layout(), seq_length=4096, micro_batch=8, global_batch=256),
    },
    ("ernie45_0p3b", "sft"): {
        80: Plan(gpus=1, layout=Layout(), seq_length=4096, global_batch=64),
        141: Plan(gpus=1, layout=Layout(), seq_length=8192, global_batch=64),
    },
    ("ernie45_0p3b", "peft"): {
        80: Plan(gpus=1, layout=Layout(), seq_length=4096, global_batch=32),
        141: Plan(gpus=1, layout=Layout(), seq_length=8192, global_batch=32),
    },
    ("ernie45_21b_a3b", "pretrain"): {
        80: Plan(gpus=32, layout=Layout(ep=8), seq_length=4096, global_batch=512),
        141: Plan(gpus=32, layout=Layout(ep=8), seq_length=4096, micro_batch=2, global_batch=512),
    },
    ("ernie45_21b_a3b", "sft"): {
        80: Plan(gpus=16, layout=Layout(ep=8), seq_length=4096, global_batch=64),
        141: Plan(gpus=8, layout=Layout(ep=8), seq_length=4096, global_batch=64),
    },
    ("ernie45_21b_a3b", "peft"): {
        80: Plan(gpus=2, layout=Layout(ep=2), seq_length=4096, global_batch=32),
        141: Plan(gpus=1, layout=Layout(), seq_length=4096, global_batch=32),
    },
    ("ernie45_300b_a47b", "pretrain"): {
        80: Plan(
            gpus=576,
            layout=Layout(tp=4, pp=9, vpp=2, sp=True, ep=16, etp=1),
            seq_length=4096,
            global_batch=2304,
        ),
        141: Plan(
            gpus=288,
            layout=Layout(tp=4, pp=9, vpp=2, sp=True, ep=8, etp=1),
            seq_length=4096,
            global_batch=2304,
        ),
    },
    ("ernie45_300b_a47b", "sft"): {
        80: Plan(
            gpus=144,
            layout=Layout(tp=8, pp=9, sp=True, ep=16, etp=1),
            seq_length=4096,
            global_batch=128,
        ),
        141: Plan(
            gpus=72,
            layout=Layout(tp=8, pp=9, sp=True, ep=8, etp=1),
            seq_length=4096,
            global_batch=128,
        ),
    },
    ("ernie45_300b_a47b", "peft"): {
        80: Plan(
            gpus=16,
            layout=Layout(tp=8, pp=2, sp=True, ep=8, etp=1),
            seq_length=4096,
            global_batch=32,
            recompute=True,
        ),
        141: Plan(
            gpus=8,
            layout=Layout(tp=8, sp=True, ep=8, etp=1),
            seq_length=4096,
            global_batch=32,
            recompute=True,
        ),
    },
} | {
    (model, stage): dict.fromkeys(
        (80, 141), Plan(gpus=1, layout=Layout(), seq_length=256, micro_batch=2, global_batch=4)
    )
    for model, stages in _TINY_CONFIGS.items()
    for stage in stages
}


def plan_of(model: str, stage: str, gpu_memory_gb: int) -> Plan:
    """The plan of this recipe.

    Raises:
        UnsupportedConfig: a GPU that no plan is sized for.
    """
    plans = PLANS[model, stage]
    if gpu_memory_gb not in plans:
        raise UnsupportedConfig(
            "gpu_memory_gb",
            got=gpu_memory_gb,
            known=tuple(plans),
            where=f"recipe {model}_{stage}_config",
            remedy="take the plan of a smaller GPU",
        )
    return plans[gpu_memory_gb]
