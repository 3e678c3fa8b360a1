"""Lets checkpoints of earlier releases be loaded, although modules and fields were renamed.

A checkpoint's `run_config.yaml` names the provider's class, its functions and its fields. Whoever
renames one of them, or adds a field, adds a line to these tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from exaone_bridge.patches.patch import patch
from exaone_bridge.schema.json_types import JSONObject

__all__ = ["ADDED_FIELDS", "apply_run_config_backward_compat", "with_present_names"]

# Former prefix of a `_target_` -> present prefix; the first that matches counts. Of release 0.1.
_PREFIXES = {
    "exaone_bridge.families.exaone45.tower.": "exaone_bridge.models.exaone45.vision_encoder.",
    "exaone_bridge.families.": "exaone_bridge.models.",
    "exaone_bridge.parts.moe.": "exaone_bridge.modules.moe.",
    "exaone_bridge.parts.moe_provider.": "exaone_bridge.modules.moe_provider.",
    "exaone_bridge.parts.output_bias.": "exaone_bridge.models.ernie45.output_bias.",
    "exaone_bridge.parts.router.": "exaone_bridge.models.ernie45.router.",
    "exaone_bridge.parts.mtp.": "exaone_bridge.modules.mtp.",
    "exaone_bridge.parts.qk_norm_rope.": "exaone_bridge.modules.kernels.qk_norm_rope.",
    "exaone_bridge.parts.swiglu.": "exaone_bridge.modules.kernels.swiglu.",
    "exaone_bridge.parts.": "exaone_bridge.modules.",
}
# Former field of a provider -> present field. Of release 0.1.
_FIELDS = {
    "rope_scaling_original_max_positions": "rope_scaling_original_max_position_embeddings",
    "mtp_windowed": "mtp_sliding",
    "mtp_rotated": "mtp_use_rope",
    "mtp_layers_carried": "mtp_layers_passthrough",
}
# Field that providers have got since release 0.1 -> its value in a model from before.
ADDED_FIELDS: JSONObject = {"head": {}}


@patch(
    "megatron.bridge.training.utils.checkpoint_utils:apply_run_config_backward_compat",
    version="Megatron-Bridge 0.6.2",
    reason="It prepares the run_config.yaml of older checkpoints, and cannot know which modules "
    "and fields of exaone_bridge were renamed since.",
)
def apply_run_config_backward_compat(
    original: Callable[[JSONObject], JSONObject], config_dict: JSONObject
) -> JSONObject:
    """Replace former names of exaone_bridge by the present ones, then apply the original."""
    return original(with_present_names(config_dict))


def with_present_names(config: Any) -> Any:
    """Return this part of a run config with the present names of targets and provider fields."""
    if isinstance(config, list):
        return [with_present_names(value) for value in config]
    if not isinstance(config, dict):
        return config
    target = config.get("_target_")
    is_exaone_bridge = isinstance(target, str) and target.startswith("exaone_bridge.")
    names = _FIELDS if is_exaone_bridge else {}
    renamed = {names.get(key, key): with_present_names(value) for key, value in config.items()}
    return {**renamed, "_target_": _present_target(target)} if is_exaone_bridge else renamed


def _present_target(target: Any) -> Any:
    for former, present in _PREFIXES.items():
        if target.startswith(former):
            return present + target.removeprefix(former)
    return target
