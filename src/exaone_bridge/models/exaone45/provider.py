"""EXAONE 4.5's model config <-> model provider."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.exaone4.layer_spec import exaone4_layer_spec
from exaone_bridge.models.exaone4.provider import (
    Exaone4ModelProvider,
    exaone4_provider_fields,
)
from exaone_bridge.models.exaone45.config import Exaone45ModelConfig
from exaone_bridge.models.exaone45.from_provider import vision_config_of
from exaone_bridge.models.exaone45.model import Exaone45Model
from exaone_bridge.models.exaone45.vision_encoder import build_vision_encoder
from exaone_bridge.modules.backend import resolve_backend
from exaone_bridge.modules.mtp import mtp_block_spec
from exaone_bridge.schema.json_types import JSONMapping

__all__ = ["Exaone45ModelProvider", "exaone45_provider"]


@dataclass
class Exaone45ModelProvider(Exaone4ModelProvider):
    """The provider of EXAONE 4.5: EXAONE 4.0's with a vision encoder.

    Sizes come from `exaone45_provider`.

    Attributes:
        vision: the fields of `VisionConfig`.
        image_token_id: the placeholder token of image features.
        video_token_id: the placeholder token of video features.
        mtp_depth: the depth of multi-token prediction (MTP) on disk. MTP is built and trained where
            `mtp_num_layers` is set; else its tensors pass through.
        mtp_sliding: whether the MTP layer has sliding-window attention.
        mtp_use_rope: whether RoPE is applied in the MTP layer.
        freeze_language_model: do not train the language model.
        freeze_vision_model: do not train the vision encoder, its merger excepted.
        freeze_vision_projection: do not train the vision encoder's merger (the names are
            Megatron-Bridge's).
        freeze_mtp_model: do not train MTP.
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
        """Check the fields and complete them, as the base class does.

        Raises:
            UnsupportedConfig: several MTP layers are to be built, or what the base class rejects.
        """
        if (self.mtp_num_layers or 0) > 1 and not self.mtp_use_repeated_layer:
            raise UnsupportedConfig(
                "mtp_share_layers",
                got=False,
                wanted="true where several tokens are predicted: the projection into the MTP layer "
                "is on disk once, and Megatron-Core has one for each layer",
                where="provider",
                remedy="leave provider.mtp_num_layers out, and the MTP tensors pass through",
            )
        super().finalize()

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Exaone45Model:
        """Return this rank's model (of its chunk `vp_stage`); stage 0 has the vision encoder."""
        language_model = super().provide(
            pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        model_config = vision_config_of(self.vision)
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
        """Return the spec of MTP with EXAONE 4.0's layer; None where it is not built."""
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
        """Return whether the parameter of this name is not trained."""
        if name.startswith("mtp."):
            return self.freeze_mtp_model
        if name.startswith("visual.merger."):
            return self.freeze_vision_projection
        return (
            self.freeze_vision_model if name.startswith("visual.") else self.freeze_language_model
        )


def exaone45_provider(
    model_config: Exaone45ModelConfig, hf_config: JSONMapping
) -> Exaone45ModelProvider:
    """Return the provider of this model.

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
