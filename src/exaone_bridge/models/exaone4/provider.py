"""EXAONE 4.0's model config <-> model provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec

from exaone_bridge.errors import UnsupportedLayout
from exaone_bridge.models.exaone4.config import Exaone4ModelConfig
from exaone_bridge.models.exaone4.head_model import Exaone4HeadModel
from exaone_bridge.models.exaone4.layer_spec import exaone4_block_spec
from exaone_bridge.modules.provider import ExactGPTModelProvider, provider_fields
from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.schema.layer_schedule import megatron_rope, megatron_window
from exaone_bridge.schema.model_config import HeadConfig

__all__ = [
    "Exaone4ModelProvider",
    "exaone4_provider",
    "exaone4_provider_fields",
]


@dataclass
class Exaone4ModelProvider(ExactGPTModelProvider):
    """The provider of EXAONE 4.0: defaults of every model here, sizes from `exaone4_provider`.

    Attributes:
        head: the fields of `HeadConfig`; empty: the model is a language model.
    """

    transformer_layer_spec: ModuleSpec | Callable[..., Any] = exaone4_block_spec
    normalization: str = "RMSNorm"
    activation_func: Callable[[torch.Tensor], torch.Tensor] = F.silu
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    qk_layernorm: bool = True
    position_embedding_type: str = "rope"
    hidden_dropout: float = 0.0
    should_pad_vocab: bool = (
        True  # default: False, which fails where tp does not divide the vocabulary
    )
    apply_rope_fusion: bool = True  # 8% of a 1.2B step at 8192 (docs/benchmarks.md)
    bias_activation_fusion: bool = True
    bias_dropout_fusion: bool = (
        False  # no bias, no dropout: a plain add, without torch.compile's guards (4%)
    )
    head: dict[str, Any] = field(default_factory=dict)

    def finalize(self) -> None:
        """Check the fields and complete them, as the base class does.

        Raises:
            UnsupportedLayout: context parallelism with a head, or what the base class rejects.
        """
        if self.head and self.context_parallel_size > 1:
            raise UnsupportedLayout(
                "context parallelism",
                got=self.context_parallel_size,
                wanted="1 for a model with a head, whose pooling needs the full sequence",
                remedy="use TP with sequence parallelism",
            )
        super().finalize()

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Return the GPTModel of this rank (of its chunk `vp_stage`), with its head."""
        model = super().provide(
            pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        return Exaone4HeadModel.from_gpt(model, HeadConfig(**self.head)) if self.head else model


def exaone4_provider(
    model_config: Exaone4ModelConfig, hf_config: JSONMapping
) -> Exaone4ModelProvider:
    """Return the provider of this model.

    Args:
        model_config: of the model to be built.
        hf_config: the config.json that it came from, which the provider keeps for the export.
    """
    head = {} if model_config.head is None else asdict(model_config.head)
    return Exaone4ModelProvider(**exaone4_provider_fields(model_config, hf_config), head=head)


def exaone4_provider_fields(model_config: Exaone4ModelConfig, hf_config: JSONMapping) -> JSONObject:
    """Return the keyword arguments of the provider, for this class and those derived from it."""
    window_size, window_layers = megatron_window(model_config.windows)
    llama3 = model_config.llama3
    return {
        **provider_fields(model_config, hf_config),
        **({} if llama3 is None else {"rope_scaling": True} | llama3.provider_fields()),
        "window_size": window_size,
        "window_attn_skip_freq": window_layers,
        "no_rope_freq": megatron_rope(model_config.rope),
    }
