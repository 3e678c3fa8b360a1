"""Lets a provider choose the layer spec of multi-token prediction (MTP)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from exaone_bridge.patches.patch import patch

__all__ = ["mtp_block_spec"]


@patch(
    "megatron.bridge.models.gpt_provider:mtp_block_spec",
    version="Megatron-Bridge 0.6.2",
    reason="GPTModelProvider.provide calls this function for the MTP layers; it knows Transformer "
    "Engine's classes only, and takes the spec of the decoder's last layer on the pipeline stage.",
)
def mtp_block_spec(original: Callable[..., Any], config: Any, vp_stage: int | None = None) -> Any:
    """Return the provider's own `mtp_spec(vp_stage)` if it has one, else the original's spec."""
    own = getattr(config, "mtp_spec", None)
    return original(config, vp_stage=vp_stage) if own is None else own(vp_stage)
