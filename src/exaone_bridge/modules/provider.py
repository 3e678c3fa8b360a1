"""The base class of the model providers, and the fields that every family derives in the same way.

Every field is plain data, so that a Megatron checkpoint's `run_config.yaml` builds the same model
again, and keeps the Hugging Face config that the model came from.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.utils.config_utils import _ConfigContainerBase
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.utils import is_layer_window_attention

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.modules.backend import (
    exact_cross_entropy_impl,
    resolve_backend,
    unsupported_fusions,
)
from exaone_bridge.modules.context_parallel import choose_cp_comm_types
from exaone_bridge.modules.grouped_experts import is_swiglu
from exaone_bridge.modules.rotary import Llama3RotaryEmbedding
from exaone_bridge.modules.vocab import mask_padded_vocabulary
from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.schema.model_config import ModelConfig
from exaone_bridge.schema.parallel_layout import UNEVEN_PIPELINE_FIELDS, Layout

__all__ = ["ExactGPTModelProvider", "is_of_our_model", "provider_fields"]


def provider_fields(model_config: ModelConfig, hf_config: JSONMapping) -> JSONObject:
    """Return the provider's keyword arguments that every family derives in the same way.

    Args:
        model_config: of the model to be built.
        hf_config: the config.json that it came from, which the provider keeps for the export.
    """
    dtype = getattr(torch, model_config.dtype)
    return model_config.provider_fields() | {
        "make_vocab_size_divisible_by": 1,  # the vocabulary is padded only as far as tp needs it
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "hf_config": dict(hf_config),
    }


@dataclass
class ExactGPTModelProvider(GPTModelProvider):
    """GPTModelProvider with a choice of backend, every field of Llama 3's RoPE, and the HF config.

    Attributes:
        backend: `auto`, `transformer_engine` or `torch` (`modules/backend.py`).
        cross_entropy_fusion_impl: `te` where it is exact (`modules/backend.py`), else `native`.
        fuse_weight_gradients: Transformer Engine's linears add the gradients of their weights to
            the fp32 main gradients of Megatron-Core's DistributedDataParallel, which the model then
            needs (`modules/causal_layer.py`).
        rope_scaling_low_freq_factor: of Llama 3's RoPE (`modules/rotary.py`), which `rope_scaling`
            turns on.
        rope_scaling_high_freq_factor: likewise.
        rope_scaling_original_max_position_embeddings: likewise.
        hf_config: the Hugging Face config that the provider was made from, for the fields that
            Megatron-Core does not have (token ids); empty for a provider made without one.
    """

    backend: str = "auto"
    cross_entropy_fusion_impl: str = (
        "te"  # 6 ms of 210 and 5 GiB of 23 less than native (docs/benchmarks.md)
    )
    fuse_weight_gradients: bool = False
    rope_scaling_low_freq_factor: float = 1.0
    rope_scaling_high_freq_factor: float = 4.0
    rope_scaling_original_max_position_embeddings: int = 8192
    hf_config: dict[str, Any] = field(default_factory=dict)

    def finalize(self) -> None:
        """Check the fields, override those that the backend does not support, and complete them.

        Raises:
            UnsupportedLayout: a layout that cannot shard the model.
            UnsupportedConfig: a per-layer list whose length is not num_layers, or a backend that is
                unknown.
        """
        if not self._has_uneven_pipeline():
            layout = Layout(
                tp=self.tensor_model_parallel_size,
                pp=self.pipeline_model_parallel_size,
                vpp=self.virtual_pipeline_model_parallel_size or 1,
                ep=self.expert_model_parallel_size,
                etp=self.expert_tensor_parallel_size,
                cp=self.context_parallel_size,
            )
            layout.check(
                layers=self.num_layers,
                heads=self.num_attention_heads,
                kv_heads=self.num_query_groups,
                ffn=self.ffn_hidden_size,
                experts=self.num_moe_experts or 0,
                expert_ffn=self.moe_ffn_hidden_size or 0,
            )
        if self.pipeline_model_parallel_size == 2 and self.virtual_pipeline_model_parallel_size:
            # With two stages the next rank is also the previous one, and Megatron-Core's batched
            # sends and receives (0.19.2) mix up activations and gradients: on gloo the first
            # gradients were thousands of times too large.
            self.overlap_p2p_comm, self.batch_p2p_comm = True, False
        for name in ("window_attn_skip_freq", "no_rope_freq", "moe_layer_freq"):
            values = getattr(self, name)
            if isinstance(values, list) and len(values) != self.num_layers:
                raise UnsupportedConfig(
                    name,
                    got=f"{len(values)} entries",
                    wanted=f"one entry for each of num_layers={self.num_layers}",
                    where="provider",
                    remedy=f"set provider.{name} together with provider.num_layers",
                )
        # Megatron-Core asks whether it is None; a load sets "" (runtime/model.py).
        self.fp8 = self.fp8 or None  # type: ignore[has-type]
        backend = resolve_backend(self.backend)
        self._override(**dict.fromkeys(unsupported_fusions(backend), False))
        if backend.name == "torch":  # so that such a run's checkpoint loads without a GPU too
            self._override(cuda_graph_impl="none", cuda_graph_modules=[], use_te_rng_tracker=False)
            self._override(fp8=None, fp8_param=False, fuse_weight_gradients=False)
            self._override(moe_router_padding_for_quantization=False)  # only for FP8
        for name in ("fp8_multi_head_attention", "fp8_output_proj"):
            # QK norm and RoPE stand between the projection and attention; and the output layer of
            # FP8 is another class, without the padding mask and the bias of ours.
            if self.fp8 and getattr(self, name):
                raise UnsupportedConfig(
                    name, got=True, known=(False,), where="provider", remedy=f"leave {name} out"
                )
        if self.cuda_graph_impl != "none":
            self._check_replay()
        if self.cross_entropy_fusion_impl == "te":
            self._override(
                cross_entropy_fusion_impl=exact_cross_entropy_impl(backend, self.params_dtype)
            )
        has_kernel = backend.activation is not None and self._is_kernel_swiglu()
        if has_kernel:
            self._override(bias_activation_fusion=False, use_te_activation_func=True)
        elif backend.activation is None:
            self._override(use_te_activation_func=False)
        if self.clamps_swiglu:
            # Megatron-Core's fused SwiGLU and its overlapped shared experts drop the clamp
            # silently (mlp.py, experts.py, shared_experts.py, 0.19.2).
            self._override(use_transformer_engine_op_fuser=False)
            if not has_kernel:
                self._override(
                    bias_activation_fusion=False,
                    use_te_activation_func=False,
                    moe_shared_expert_overlap=False,
                )
        if self.context_parallel_size > 1:
            self._override(cp_comm_type=self._cp_comm_types())
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Transformer Engine cross entropy loss fusion has known stability issues"
            )
            super().finalize()

    def _check_replay(self) -> None:
        """Check that a replay of CUDA graphs computes what the model does without them.

        Raises:
            UnsupportedConfig: it would compute something else, without an error of Megatron-Core.
        """
        where = f"provider with cuda_graph_impl={self.cuda_graph_impl!r}"
        remedy = "set cuda_graph_impl='none'"
        # A layer has one graph for each microbatch, whose buffers a second replay overwrites.
        repeats = self.mtp_use_repeated_layer and self.cuda_graph_impl != "full_iteration"
        if repeats and (depth := self.mtp_num_layers or 0) > 1:
            raise UnsupportedConfig(
                "mtp_num_layers", got=depth, known=(0, 1), where=where, remedy=remedy
            )
        # Recorded choices are kept by Python, which a replay does not run.
        if self.moe_enable_routing_replay:
            raise UnsupportedConfig(
                "moe_enable_routing_replay", got=True, known=(False,), where=where, remedy=remedy
            )

    @property
    def clamps_swiglu(self) -> bool:
        """Whether any layer clamps gate and up before SiLU."""
        return bool(self.activation_func_clamp_value)

    def _is_kernel_swiglu(self) -> bool:
        """Return whether the requested activation is one that our fused SwiGLU kernel computes."""
        other = self.add_bias_linear or self.activation_func_fp8_input_store or self.cpu_offloading
        fuses = self._as_requested("bias_activation_fusion")  # finalize turns it off for the kernel
        return fuses and is_swiglu(self) and not other

    def _cp_comm_types(self) -> list[str]:
        """Return each layer's `cp_comm_type`; Megatron-Core's default has no sliding window."""
        layers = range(1, self.num_layers + 1)
        tp = self.tensor_model_parallel_size
        return choose_cp_comm_types(
            [
                is_layer_window_attention(self.window_size, self.window_attn_skip_freq, layer)
                for layer in layers
            ],
            heads=self.num_attention_heads // tp,
            kv_heads=max(1, self.num_query_groups // tp),
            cp=self.context_parallel_size,
            requested=self._as_requested("cp_comm_type"),
        )

    def _override(self, **fields: Any) -> None:
        """Override fields that this machine does not support, and keep the requested values."""
        requested = self.__dict__.setdefault("_requested", {})
        for name, value in fields.items():
            if getattr(self, name) != value:
                requested.setdefault(name, getattr(self, name))
                setattr(self, name, value)

    def _as_requested(self, name: str) -> Any:
        """Return the field's value without overrides: Megatron-Bridge finalizes twice."""
        return self.__dict__.get("_requested", {}).get(name, getattr(self, name))

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Return this rank's model (of its chunk `vp_stage`).

        It has Llama 3's exact RoPE, and the logits of padded vocabulary rows are masked.
        """
        model = super().provide(
            pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        if self.rope_scaling:
            model.rotary_pos_emb = Llama3RotaryEmbedding(
                factor=self.rope_scaling_factor,
                low_freq_factor=self.rope_scaling_low_freq_factor,
                high_freq_factor=self.rope_scaling_high_freq_factor,
                original_max_positions=self.rope_scaling_original_max_position_embeddings,
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

    def to_cfg_dict(self) -> JSONObject:
        """Return the fields for `run_config.yaml`: as requested, without overrides."""
        result = {"_target_": f"{type(self).__module__}.{type(self).__qualname__}"}
        for name in self.__dataclass_fields__:
            if not name.startswith("_"):
                value = self._as_requested(name)
                result[name] = _ConfigContainerBase._convert_value_to_dict(value)
        return result

    def _has_uneven_pipeline(self) -> bool:
        return any(getattr(self, name) for name in UNEVEN_PIPELINE_FIELDS)


def is_of_our_model(module: torch.nn.Module) -> bool:
    """Return whether a Megatron-Core module, or an adapter of one, is in a model of exaone_bridge.

    Their `config` is the provider that built the model.
    """
    return isinstance(getattr(module, "config", None), ExactGPTModelProvider)
