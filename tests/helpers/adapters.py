"""Logits of Transformers with a PEFT adapter."""

from __future__ import annotations

from pathlib import Path

import torch


@torch.no_grad()
def hf_logits(folder: Path, tokens: torch.Tensor, adapter: Path | None = None) -> torch.Tensor:
    """Return the fp32 logits [N, S, V] of tokens [N, S], with the adapter if one is given."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    logits: torch.Tensor = model.eval()(tokens, use_cache=False).logits
    return logits
