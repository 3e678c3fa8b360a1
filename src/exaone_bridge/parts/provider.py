"""The model provider that our families share: what Megatron-Bridge's GPTModelProvider lacks to be exact.

Every field is plain data, so that a Megatron checkpoint's `run_config.yaml` builds the same model again, and knows
the Hugging Face configuration it came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.utils.config_utils import _ConfigContainerBase
from megatron.core.models.gpt import GPTModel

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.parts.backend import cannot_run, resolve_backend
from exaone_bridge.parts.layout import Layout
from exaone_bridge.parts.rotary import Llama3RotaryEmbedding
from exaone_bridge.parts.vocab import mask_padded_vocabulary

__all__ = ["ExactGPTModelProvider"]


@dataclass
class ExactGPTModelProvider(GPTModelProvider):
    """GPTModelProvider with a choice of backend, every Llama 3 RoPE field, and a memory of its configuration.

    Attributes:
        backend: `auto`, `transformer_engine` or `torch` (`parts/backend.py`).
        rope_scaling_low_freq_factor, rope_scaling_high_freq_factor, rope_scaling_original_max_positions:
            with `rope_scaling` and `rope_scaling_factor`, Llama 3's scaling (`parts/rotary.py`).
        hf_config: the Hugging Face configuration this provider was made from, for what Megatron-Core has no
            field for (token ids, spelling). Empty: made by hand.
    """

    backend: str = "auto"
    rope_scaling_low_freq_factor: float = 1.0
    rope_scaling_high_freq_factor: float = 4.0
    rope_scaling_original_max_positions: int = 8192
    hf_config: dict[str, Any] = field(default_factory=dict)

    def finalize(self) -> None:
        """Check layout and per-layer lists, switch off what the backend cannot run, then Megatron-Core's own checks.

        Raises:
            UnsupportedLayout: a layout that the model cannot be cut into.
            UnsupportedConfig: per-layer lists whose length is not num_layers, or an unknown backend.
        """
        if not self._has_custom_pipeline():
            layout = Layout(
                tp=self.tensor_model_parallel_size,
                pp=self.pipeline_model_parallel_size,
                vpp=self.virtual_pipeline_model_parallel_size or 1,
            )
            layout.check(
                layers=self.num_layers,
                heads=self.num_attention_heads,
                kv_heads=self.num_query_groups,
                ffn=self.ffn_hidden_size,
            )
        if self.pipeline_model_parallel_size == 2 and self.virtual_pipeline_model_parallel_size:
            # With two stages the next rank is the previous one too, and Megatron-Core's batched sends and receives mix
            # up activations and gradients: on gloo the first gradients came out thousands of times too large.
            self.overlap_p2p_comm, self.batch_p2p_comm = True, False
        for name in ("window_attn_skip_freq", "no_rope_freq"):
            values = getattr(self, name)
            if isinstance(values, list) and len(values) != self.num_layers:
                raise UnsupportedConfig(
                    name,
                    got=f"{len(values)} entries",
                    wanted=f"one entry for each of num_layers={self.num_layers}",
                    where="provider",
                    remedy=f"set provider.{name} together with provider.num_layers",
                )
        for name in cannot_run(resolve_backend(self.backend)):
            self._switch_off(name)
        super().finalize()

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """The GPTModel of this rank (of its chunk `vp_stage`), with exact RoPE and padding that does not count."""
        model = super().provide(pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
        if self.rope_scaling:
            model.rotary_pos_emb = Llama3RotaryEmbedding(
                factor=self.rope_scaling_factor,
                low_freq_factor=self.rope_scaling_low_freq_factor,
                high_freq_factor=self.rope_scaling_high_freq_factor,
                original_max_positions=self.rope_scaling_original_max_positions,
                kv_channels=self.kv_channels,
                rotary_percent=self.rotary_percent,
                rotary_interleaved=self.rotary_interleaved,
                seq_len_interpolation_factor=self.seq_len_interpolation_factor,
                rotary_base=self.rotary_base,
                use_cpu_initialization=self.use_cpu_initialization,
                cp_group=model.pg_collection.cp,
            )
        mask_padded_vocabulary(model, self.vocab_size)
        return model

    def to_cfg_dict(self) -> dict[str, Any]:
        """What `run_config.yaml` holds: the wishes, not what the backend of this machine could not run."""
        result = {"_target_": f"{type(self).__module__}.{type(self).__qualname__}"}
        wished = self.__dict__.get("_switched_off", {})
        for name in self.__dataclass_fields__:
            if not name.startswith("_"):
                value = wished.get(name, False) or getattr(self, name)
                result[name] = _ConfigContainerBase._convert_value_to_dict(value)
        return result

    def _switch_off(self, name: str) -> None:
        """Switch a field off for this machine; `to_cfg_dict` remembers what was wished."""
        wished = self.__dict__.setdefault("_switched_off", {})
        wished[name] = getattr(self, name) or wished.get(name, False)
        setattr(self, name, False)

    def _has_custom_pipeline(self) -> bool:
        return bool(
            self.pipeline_model_parallel_layout
            or self.num_layers_in_first_pipeline_stage
            or self.num_layers_in_last_pipeline_stage
            or self.account_for_embedding_in_pipeline_split
            or self.account_for_loss_in_pipeline_split
        )
