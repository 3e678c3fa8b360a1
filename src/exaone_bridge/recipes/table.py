"""The table of all training plans in docs/recipes.md. No torch."""

from __future__ import annotations

from exaone_bridge.models import family_of
from exaone_bridge.recipes.memory import GB, estimate
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.recipes.training_plans import ADAPTER_RANK, TRAINING_PLANS

__all__ = ["plan_table"]


def plan_table() -> str:
    """Return a Markdown table: per recipe and GPU size, the plan and its estimated memory in GB."""
    lines: list[list[str]] = []
    for (model, stage), plans in TRAINING_PLANS.items():
        if model.endswith("_tiny"):
            continue
        family = family_of(CONFIGS[model]["architectures"], where=model)
        description = family.describe(CONFIGS[model])
        adapter_rank = ADAPTER_RANK if stage == "peft" else 0
        for gpu_memory_gb, plan in plans.items():
            memory = estimate(description, plan, adapter_rank=adapter_rank)
            columns = {
                "recipe": f"`{model}_{stage}_config`",
                "GPU, GB": str(gpu_memory_gb),
                **plan.table_row(),
                "weights, GB": f"{memory.parameters / GB:.1f}",
                "gradients, GB": f"{memory.gradients / GB:.1f}",
                "optimizer, GB": f"{memory.optimizer / GB:.1f}",
                "activations, GB": f"{memory.activations / GB:.1f}",
                "all, GB": f"{memory.total / GB:.1f}",
            }
            if not lines:
                lines = [list(columns), ["---"] * len(columns)]
            lines.append(list(columns.values()))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
