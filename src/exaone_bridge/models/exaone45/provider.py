"""EXAONE 4.5's facts <-> model provider: EXAONE 4.0's, and the tower."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.exaone4.layer_spec import exaone4_layer_spec
from exaone_bridge.models.exaone4.provider import (
    Exaone4ModelProvider,
    exaone4_config_fields,
    exaone4_provider_fields,
)
from exaone_bridge.models.exaone45.config import Exaone45ModelConfig
from exaone_bridge.models.exaone45.model import Exaone45Model
from exaone_bridge.models.exaone45.mtp import mtp_block_spec
from exaone_bridge.models.exaone45.vision_encoder import build_vision_encoder
from exaone_bridge.modules.backend import resolve_backend
from exaone_bridge.schema.model_config import MTPConfig, VisionConfig

__all__ = ["Exaone45ModelProvider", "exaone45_provider", "model_config_of"]


@dataclass
class Exaone45ModelProvider(Exaone4ModelProvider):
    """Exaone4ModelProvider with a vision tower; sizes come from `exaone45_provider`.

    Attributes:
        vision: the fields of `VisionConfig`.
        image_token_id, video_token_id: the words that hold features' places.
        mtp_depth: of the multi-token prediction on disk. It is built, and trained, where `mtp_num_layers` is set; else
            it travels beside the model.
        mtp_sliding, mtp_use_rope: whether its layer is sliding-window attention, and has RoPE.
        freeze_language_model, freeze_vision_model, freeze_vision_projection, freeze_mtp_model: not to be trained; the
            tower without its merger is the second, the merger the third (Megatron-Bridge's names).
    """

    vision: dict[str, Any] = field(default_factory=dict)
    image_token_id: int = 67
    video_token_id: int = 68
    mtp_depth: int = 0
    mtp_sliding: bool = True
    mtp_use_rope: bool = True
    freeze_language_model: bool = False
    freeze_vision_model: bool = False
    freeze_vision_projection: bool = False
    freeze_mtp_model: bool = False

    def finalize(self) -> None:
        """As the parent's.

        Raises:
            UnsupportedConfig: several layers of multi-token prediction to be built; or what the parent refuses.
        """
        if (self.mtp_num_layers or 0) > 1 and not self.mtp_use_repeated_layer:
            raise UnsupportedConfig(
                "mtp_share_layers",
                got=False,
                wanted="true where several words are predicted: what leads to the layer is one on disk, and "
                "Megatron-Core has it once a layer",
                where="provider",
                remedy="leave provider.mtp_num_layers out, and all of it travels beside the model",
            )
        super().finalize()

    @property
    def vision_model_config(self) -> VisionConfig:
        """`vision` as a typed config."""
        return VisionConfig(
            **{**self.vision, "full_attention": tuple(self.vision["full_attention"])}
        )

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Exaone45Model:
        """EXAONE 4.0's model of this rank (of its chunk `vp_stage`); on the first stage, with the tower."""
        language_model = super().provide(
            pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        model_config = self.vision_model_config
        vision_encoder = (
            build_vision_encoder(model_config, self, self.init_method_std)
            if language_model.pre_process
            else None
        )
        model = Exaone45Model.from_language_model(
            language_model,
            vision_encoder,
            model_config,
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
        )
        for name, parameter in model.named_parameters():
            if self.is_frozen(name):
                parameter.requires_grad_(False)
        return model

    def mtp_spec(self, vp_stage: int | None = None) -> MultiTokenPredictionBlockSubmodules | None:
        """Multi-token prediction of this stage, around EXAONE 4.0's layer (`models/exaone45/mtp.py`)."""
        if not self.mtp_num_layers:
            return None
        backend = resolve_backend(self.backend)
        return mtp_block_spec(
            self,
            backend,
            exaone4_layer_spec(backend),
            sliding=self.mtp_sliding,
            use_rope=self.mtp_use_rope,
            vp_stage=vp_stage,
        )

    def is_frozen(self, name: str) -> bool:
        """Whether the parameter of this name is not to be trained."""
        if name.startswith("mtp."):
            return self.freeze_mtp_model
        if name.startswith("visual.merger."):
            return self.freeze_vision_projection
        return (
            self.freeze_vision_model if name.startswith("visual.") else self.freeze_language_model
        )


def exaone45_provider(
    model_config: Exaone45ModelConfig, hf_config: Mapping[str, Any]
) -> Exaone45ModelProvider:
    """Returns the provider of this model.

    Args:
        model_config: of the model to be built.
        hf_config: the config.json that it came from, which the provider keeps for the export.
    """
    vision, mtp = model_config.vision, model_config.mtp
    return Exaone45ModelProvider(
        **exaone4_provider_fields(model_config, hf_config),
        **({} if mtp is None else mtp.provider_fields()),
        vision=dataclasses.asdict(vision) | {"full_attention": list(vision.full_attention)},
        mtp_sliding=model_config.windows[0] is not None,
        mtp_use_rope=model_config.rope[0],
    )


def model_config_of(provider: Exaone45ModelProvider) -> Exaone45ModelConfig:
    """Returns the config of the model that this provider builds; inverse of `exaone45_provider`."""
    depth = provider.mtp_num_layers or provider.mtp_depth
    mtp = MTPConfig(**MTPConfig.values_from_provider(provider) | {"depth": depth})
    return Exaone45ModelConfig(
        **exaone4_config_fields(Exaone45ModelConfig, provider),
        vision=provider.vision_model_config,
        mtp=mtp if depth else None,
    )
