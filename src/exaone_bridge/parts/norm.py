"""RMSNorm for the torch backend.

Megatron-Core's own wrapper, `WrappedTorchNorm`, refuses sequence parallelism because it does not mark its weight:
there each rank normalises its cut of the sequence and the weight's gradient must be summed over ranks.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["TorchRMSNorm"]


class TorchRMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with Megatron-Core's constructor: x [..., H] -> [..., H], weight [H].

    Like Megatron-Core's own local linears it has an empty extra state, because Transformer Engine's norms look for one
    in a checkpoint.

    Raises:
        ValueError: a normalisation other than plain RMSNorm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise ValueError(f"TorchRMSNorm: normalization is {config.normalization!r}, and must be plain 'RMSNorm'.")
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # finalize_model_grads sums over tp where set
        self._register_load_state_dict_pre_hook(
            lambda state_dict, prefix, *_: state_dict.setdefault(f"{prefix}_extra_state")
        )

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: object) -> None: ...
