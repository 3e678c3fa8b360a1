"""Our providers say themselves what multi-token prediction is made of.

`GPTModelProvider.provide` (`megatron/bridge/models/gpt_provider.py`, 0.6.2) asks a function of its own module, which
knows Transformer Engine's classes alone, and takes the decoder's last layer on the stage for the one to repeat.
"""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["providers_choose_mtp_layers"]


def providers_choose_mtp_layers() -> None:
    """Ask a provider's `mtp_spec` where it has one; doing it again is harmless."""
    from megatron.bridge.models import gpt_provider

    stock = gpt_provider.mtp_block_spec
    if hasattr(stock, "_exaone_bridge"):
        return

    @functools.wraps(stock)
    def chosen(config: Any, vp_stage: int | None = None) -> Any:
        own = getattr(config, "mtp_spec", None)
        return stock(config, vp_stage=vp_stage) if own is None else own(vp_stage)

    chosen._exaone_bridge = True  # type: ignore[attr-defined]
    gpt_provider.mtp_block_spec = chosen
