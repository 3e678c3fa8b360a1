"""The table of all plans, as the documentation shows it. No torch."""

from __future__ import annotations

from exaone_bridge.models import family_of
from exaone_bridge.recipes.memory import GB, estimate
from exaone_bridge.recipes.plans import ADAPTER_RANK, PLANS
from exaone_bridge.recipes.published import CONFIGS

__all__ = ["table"]


def table() -> str:
    """Markdown: a line for each recipe and GPU, with the memory that it is estimated to need."""
    lines: list[list[str]] = []
    for (model, stage), plans in PLANS.items():
        if model.endswith("_tiny"):
            continue
        family = family_of(CONFIGS[model]["architectures"], where=model)
        model_config = family.read_hf_config(CONFIGS[model])
        for memory, plan in plans.items():
            needed = estimate(
                family.mappings(model_config),
                model_config,
                plan,
                adapter_rank=ADAPTER_RANK if stage == "peft" else 0,
            )
            parts = (
                needed.parameters,
                needed.gradients,
                needed.optimizer,
                needed.activations,
                needed.total,
            )
            figures = {
                f"{name}, GB": f"{part / GB:.1f}"
                for name, part in zip(
                    ("weights", "gradients", "optimizer", "activations", "all"), parts, strict=True
                )
            }
            row = {"recipe": f"`{model}_{stage}_config`", "GPU, GB": memory} | plan.row() | figures
            if not lines:
                lines = [list(row), ["---"] * len(row)]
            lines.append([str(value) for value in row.values()])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
