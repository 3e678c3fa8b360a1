"""EXAONE 4.5: EXAONE 4.0's GPTModel with a vision encoder on the first pipeline stage.

Image and video features replace the embeddings of placeholder tokens. Positions are plain 1D ones,
as in `Exaone4_5_Model.forward` (Transformers 5.12.1, `modeling_exaone4_5.py`): rows and columns of
an image matter to the vision encoder only.

Axes: B batch, S sequence (this rank's shard with context parallelism), H hidden, P patches of all
images, C elements per patch (channels x frames x rows x columns), I images, F features (one per
placeholder token).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams

from exaone_bridge.errors import VisionInputError
from exaone_bridge.models.exaone45.vision_encoder import dummy_image
from exaone_bridge.modules.collectives import all_gather_sequence
from exaone_bridge.modules.context_parallel import local_positions
from exaone_bridge.schema.model_config import VisionConfig

__all__ = ["Exaone45Model"]


@dataclass(frozen=True, slots=True)
class _Modality:
    """The images, or the videos, of a batch.

    Attributes:
        name: "image" or "video".
        token_id: of the placeholder token.
        pixels: [P, C].
        grid: [I, 3].
    """

    name: str
    token_id: int
    pixels: torch.Tensor | None
    grid: torch.Tensor | None


class Exaone45Model(GPTModel):
    """A GPTModel with a vision encoder; without images it is the plain GPTModel.

    Attributes:
        visual: Transformers' vision encoder, on the first pipeline stage; its parameters have the
            names of the Hugging Face checkpoint.
        vision: the vision config.
        image_token_id, video_token_id: the ids of the placeholder tokens.
    """

    visual: torch.nn.Module
    vision: VisionConfig
    image_token_id: int
    video_token_id: int

    @classmethod
    def from_language_model(
        cls,
        language_model: GPTModel,
        visual: torch.nn.Module | None,
        vision: VisionConfig,
        *,
        image_token_id: int,
        video_token_id: int,
    ) -> Exaone45Model:
        """Turn a GPTModel into an Exaone45Model, in place.

        Megatron-Bridge 0.6.2's `GPTModelProvider.provide` names the class that it builds.

        Args:
            language_model: the GPTModel of this pipeline stage.
            visual: the vision encoder; None on all stages but the first.
            vision: the vision config.
            image_token_id, video_token_id: the ids of the placeholder tokens.
        """
        language_model.__class__ = cls
        assert isinstance(language_model, cls)
        language_model.vision = vision
        language_model.image_token_id, language_model.video_token_id = (
            image_token_id,
            video_token_id,
        )
        if visual is not None:
            language_model.visual = visual
        return language_model

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *args: Any,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Run the forward pass, with images and videos as Transformers' processor returns them.

        Args:
            input_ids: [B, S] tokens. With context parallelism, this rank's shard, or the full
                sequence if `position_ids` count up from 0: then tokens, positions, labels and loss
                mask are sharded here.
            position_ids: [B, S].
            attention_mask: ignored by causal attention.
            decoder_input: [S, B, H] embeddings that replace those of `input_ids`.
            labels: [B, S]; None: logits are returned.
            args, kwargs: of `GPTModel.forward`.
            pixel_values, pixel_values_videos: [P, C], image after image in the order of their
                placeholder tokens, sample after sample; all of them on each rank of the first
                stage. Without pixels, placeholder tokens are ordinary tokens, as in Transformers.
            image_grid_thw, video_grid_thw: [I, 3], the number of patches in time, rows, columns.

        Returns:
            GPTModel's output: the loss [B, S], logits [B, S, V / tp], or hidden states [S, B, H]
            between pipeline stages; a pair with the local loss mask [B, S] if that was sharded
            here.

        Raises:
            VisionInputError: the number of placeholder tokens is not that of the features, the
                pixels do not match their grids, or packed sequences are not sharded.
        """
        loss_mask = kwargs.get("loss_mask")
        self._check_packed_is_sharded(input_ids, kwargs.get("packed_seq_params"))
        shard = self._needs_sharding(position_ids)
        if shard:
            group = self.pg_collection.cp
            length, device = input_ids.shape[1], input_ids.device
            local = local_positions(group.rank(), group.size(), length, device)
            input_ids, position_ids = input_ids[:, local], position_ids[:, local]  # type: ignore[index]
            labels = None if labels is None else labels[:, local]
            if loss_mask is not None:
                kwargs["loss_mask"] = loss_mask[:, local]
        if self.pre_process and decoder_input is None:
            images = _Modality("image", self.image_token_id, pixel_values, image_grid_thw)
            videos = _Modality("video", self.video_token_id, pixel_values_videos, video_grid_thw)
            decoder_input = self._embed(input_ids, position_ids, images, videos)
        output = super().forward(
            input_ids, position_ids, attention_mask, decoder_input, labels, *args, **kwargs
        )
        return (output, kwargs["loss_mask"]) if shard and loss_mask is not None else output

    def _needs_sharding(self, position_ids: torch.Tensor | None) -> bool:
        """Return whether the inputs are full sequences that are still to be sharded over CP.

        Megatron-Bridge 0.6.2's forward step for models with images (`training/vlm_step.py`) leaves
        that to the model. The positions of a shard never count up from 0.
        """
        if self.pg_collection.cp.size() == 1 or position_ids is None:
            return False
        first = position_ids[0]
        return bool((first == torch.arange(len(first), device=first.device)).all())

    def _check_packed_is_sharded(
        self, input_ids: torch.Tensor, packed: PackedSeqParams | None
    ) -> None:
        """Reject packed sequences that are not sharded over CP yet: each has its own sharding."""
        ranks = self.pg_collection.cp.size()
        if ranks == 1 or packed is None or packed.cu_seqlens_q is None:
            return
        padded = packed.cu_seqlens_q_padded
        offsets = packed.cu_seqlens_q if padded is None else padded
        if int(offsets[-1]) == input_ids.shape[1]:
            raise VisionInputError(
                f"packed sequences: each of the {ranks} context-parallel ranks has all "
                f"{input_ids.shape[1]} tokens, and must have its shard; set "
                "dataset.enable_in_batch_packing=False with context parallelism."
            )

    def _embed(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, *modalities: _Modality
    ) -> torch.Tensor | None:
        """Embed tokens [B, S], and put features in the place of placeholder tokens.

        Returns:
            [S, B, H] ([S / tp, B, H] with sequence parallelism); None: GPTModel embeds them, since
            there are no images and the vision encoder needs no gradient.
        """
        features = [self._features(modality) for modality in modalities]
        if all(feature is None for feature in features):
            if not self._vision_is_trained():
                return None
            # Data-parallel ranks wait for the gradient of every parameter, so the vision encoder
            # runs on each of them, whether or not its batch has images.
            pixels, grid = dummy_image(self.vision, next(self.visual.parameters()))
            embeddings = self.embedding(input_ids=input_ids, position_ids=position_ids)
            return embeddings + 0.0 * self.visual(pixels, grid_thw=grid).pooler_output.sum()
        embeddings = self.embedding(input_ids=input_ids, position_ids=position_ids)
        shard = self._sequence_parallel_shard(embeddings.shape[0])
        for modality, feature in zip(modalities, features, strict=True):
            if feature is None:
                continue
            placeholders, indices = self._placeholders(input_ids, modality, len(feature))
            in_shard = (placeholders[:, 1] >= shard.start) & (placeholders[:, 1] < shard.stop)
            sample, position = placeholders[in_shard].unbind(1)
            embeddings = embeddings.index_put(
                (position - shard.start, sample), feature[indices[in_shard]].to(embeddings.dtype)
            )
        return embeddings

    def _vision_is_trained(self) -> bool:
        has_gradient = any(parameter.requires_grad for parameter in self.visual.parameters())
        return has_gradient and self.training and torch.is_grad_enabled()

    def _sequence_parallel_shard(self, length: int) -> range:
        """Return the positions of [B, S] whose `length` embeddings are on this TP rank."""
        first = self.pg_collection.tp.rank() * length if self.config.sequence_parallel else 0
        return range(first, first + length)

    def _features(self, modality: _Modality) -> torch.Tensor | None:
        """Return the features [F, H] of all images, or of all videos; None: there are none."""
        name, pixels, grid = modality.name, modality.pixels, modality.grid
        if pixels is None or grid is None or not len(grid):
            if pixels is not None and len(pixels):
                raise VisionInputError(
                    f"{name} grids: there are none for {len(pixels)} patches of pixels; pass "
                    f"{name}_grid_thw together with the pixels, as the processor returns them."
                )
            return None
        patches = int(grid.prod(-1).sum())
        if len(pixels) != patches:
            raise VisionInputError(
                f"{name} pixels: there are {len(pixels)} patches, but {name}_grid_thw has "
                f"{patches}; the counts must match (pass both as one call of the processor "
                "returned them)."
            )
        return self.visual(pixels.to(self.visual.dtype), grid_thw=grid).pooler_output

    def _placeholders(
        self, input_ids: torch.Tensor, modality: _Modality, features: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the local placeholder tokens in [B, S].

        Returns:
            Sample and position of each, [n, 2], and the index of its feature, [n].
        """
        is_local = input_ids == modality.token_id
        group = self.pg_collection.cp
        is_placeholder = all_gather_sequence(is_local, group, 1)
        if (count := int(is_placeholder.sum())) != features:
            raise VisionInputError(
                f"{modality.name} placeholders: found {count} tokens with "
                f"{modality.name}_token_id={modality.token_id}, but the pixels yield {features} "
                f"features; the counts must match (do not truncate inside {modality.name}s, and "
                "pass each sample's pixels once)."
            )
        index = (is_placeholder.flatten().cumsum(0) - 1).view_as(is_placeholder)
        if group.size() > 1:
            length, device = is_placeholder.shape[1], is_placeholder.device
            index = index[:, local_positions(group.rank(), group.size(), length, device)]
        return is_local.nonzero(), index[is_local]
