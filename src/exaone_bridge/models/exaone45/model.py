"""EXAONE 4.5: EXAONE 4.0's GPTModel, whose first stage puts image and video features in place of words.

Positions are plain ones (`Exaone4_5_Model.forward`): rows and columns are the tower's own business.

Axes: B batch, S words of this rank, H hidden, P patches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from exaone_bridge.errors import VisionInputError
from exaone_bridge.models.exaone45.vision_encoder import smallest_image
from exaone_bridge.modules.context_parallel import local_positions, restore_sequence_order
from exaone_bridge.schema.model_config import VisionConfig

__all__ = ["Exaone45Model"]


class Exaone45Model(GPTModel):
    """A GPTModel with a tower before it; without images it is nothing else.

    Attributes:
        visual: Transformers' tower, on the first pipeline stage; its names are those of the Hugging Face checkpoint.
    """

    visual: torch.nn.Module
    vision: VisionConfig
    image_token: int
    video_token: int

    @classmethod
    def made_of(
        cls,
        language_model: GPTModel,
        visual: torch.nn.Module | None,
        vision: VisionConfig,
        image: int,
        video: int,
    ) -> Exaone45Model:
        """This GPTModel, in place. Megatron-Bridge's provider names the class of what it builds, and takes no other.

        Args:
            visual: None on every stage but the first.
            image, video: the words that hold features' places.
        """
        language_model.__class__ = cls
        assert isinstance(language_model, cls)
        language_model.vision, language_model.image_token, language_model.video_token = (
            vision,
            image,
            video,
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
        **others: Any,
    ) -> Any:
        """As GPTModel's; with images and videos, as a Hugging Face processor makes them.

        Args:
            input_ids: [B, S]; with context parallelism, this rank's; or all, where `position_ids` are all from 0 on:
                then they are cut here, labels and loss mask too, and the mask's cut is returned with the output.
            pixel_values, pixel_values_videos: [P, channels x frames x patch x patch], image after image, in the order
                of their words, sample after sample. Every rank of the first stage has all of them.
            image_grid_thw, video_grid_thw: [images, 3], patches in time, rows and columns.

        Raises:
            VisionInputError: more or fewer words for features than features, or pixels that their grids do not explain.
                Without any pixels such words are words, as in Transformers. Or packed rows that context parallelism has
                yet to cut.
        """
        whole_mask = others.get("loss_mask")
        self._refuse_whole_packed(input_ids, others.get("packed_seq_params"))
        if cut := self._is_whole(position_ids):
            group = self.pg_collection.cp
            mine = local_positions(group.rank(), group.size(), input_ids.shape[1], input_ids.device)
            input_ids, position_ids = input_ids[:, mine], position_ids[:, mine]  # type: ignore[index]
            labels = None if labels is None else labels[:, mine]
            if whole_mask is not None:
                others["loss_mask"] = whole_mask[:, mine]
        if self.pre_process and decoder_input is None:
            kinds = [
                (self.image_token, "image", pixel_values, image_grid_thw),
                (self.video_token, "video", pixel_values_videos, video_grid_thw),
            ]
            decoder_input = self._embedded(input_ids, position_ids, kinds)
        output = super().forward(
            input_ids, position_ids, attention_mask, decoder_input, labels, *args, **others
        )
        return (output, others["loss_mask"]) if cut and whole_mask is not None else output

    def _is_whole(self, position_ids: torch.Tensor | None) -> bool:
        """Whether context parallelism has yet to cut these words: Megatron-Bridge's step for models with images
        (`megatron/bridge/training/vlm_step.py`) leaves that to the model. What a rank holds never counts up from 0."""
        if self.pg_collection.cp.size() == 1 or position_ids is None:
            return False
        first = position_ids[0]
        return bool((first == torch.arange(len(first), device=first.device)).all())

    def _refuse_whole_packed(self, input_ids: torch.Tensor, packed: Any) -> None:
        """Megatron-Bridge's step leaves packed rows whole too, and their cut goes through each document."""
        ranks = self.pg_collection.cp.size()
        if ranks == 1 or packed is None or packed.cu_seqlens_q is None:
            return
        ends = (
            packed.cu_seqlens_q
            if packed.cu_seqlens_q_padded is None
            else packed.cu_seqlens_q_padded
        )
        if int(ends[-1]) == input_ids.shape[1]:
            raise VisionInputError(
                f"a packed row has all its {input_ids.shape[1]} words on each of the {ranks} ranks that share it; "
                "leave packing out with context parallelism (dataset.enable_in_batch_packing=False)."
            )

    def _embedded(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        kinds: list[tuple[int, str, torch.Tensor | None, torch.Tensor | None]],
    ) -> torch.Tensor | None:
        """[S, B, H] (this rank's cut, with sequence parallelism); None: words only, and nothing of the tower to do."""
        given = [
            (token, kind, self._features(kind, pixels, grid)) for token, kind, pixels, grid in kinds
        ]
        if all(features is None for _, _, features in given):
            if not self._is_trained():
                return None
            # Data-parallel ranks wait for every parameter's gradient, whichever of them has images in its batch.
            pixels, grid = smallest_image(self.vision, next(self.visual.parameters()))
            embedded = self.embedding(input_ids=input_ids, position_ids=position_ids)
            return embedded + 0.0 * self.visual(pixels, grid_thw=grid).pooler_output.sum()
        embedded = self.embedding(input_ids=input_ids, position_ids=position_ids)
        cut = self._cut(embedded.shape[0])
        for token, kind, features in given:
            if features is None:
                continue
            places, rows = self._places(input_ids, token, kind, len(features))
            here = (places[:, 1] >= cut.start) & (places[:, 1] < cut.stop)
            sample, word = places[here].unbind(1)
            embedded = embedded.index_put(
                (word - cut.start, sample), features[rows[here]].to(embedded.dtype)
            )
        return embedded

    def _is_trained(self) -> bool:
        wanted = any(parameter.requires_grad for parameter in self.visual.parameters())
        return wanted and self.training and torch.is_grad_enabled()

    def _cut(self, length: int) -> range:
        """Which of this rank's words sequence parallelism leaves it before the first layer."""
        first = self.pg_collection.tp.rank() * length if self.config.sequence_parallel else 0
        return range(first, first + length)

    def _features(
        self, kind: str, pixels: torch.Tensor | None, grid: torch.Tensor | None
    ) -> torch.Tensor | None:
        """[words, H] of all images, or of all videos."""
        if pixels is None or grid is None or not len(grid):
            if pixels is not None and len(pixels):
                raise VisionInputError(
                    f"{kind}s: there are {len(pixels)} patches of pixels, and no grid says how many."
                )
            return None
        patches = int(grid.prod(-1).sum())
        if len(pixels) != patches:
            raise VisionInputError(
                f"{kind}s: there are {len(pixels)} patches of pixels, and {patches} of them in the grids; "
                "pass what one call of the processor gave."
            )
        return self.visual(pixels.to(self.visual.dtype), grid_thw=grid).pooler_output

    def _places(
        self, input_ids: torch.Tensor, token: int, kind: str, features: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[places, 2] sample and word here, and [places] the number of the feature that belongs there."""
        mine = input_ids == token
        whole = self._over_context(mine)
        if (words := int(whole.sum())) != features:
            raise VisionInputError(
                f"{kind}s: the batch has {words} words of id {token} for features, and the pixels make {features}; "
                "cut no prompt in the middle, and pass each sample's pixels once."
            )
        number = (whole.flatten().cumsum(0) - 1).view_as(whole)
        group = self.pg_collection.cp
        if group.size() > 1:
            number = number[
                :, local_positions(group.rank(), group.size(), whole.shape[1], whole.device)
            ]
        return mine.nonzero(), number[mine]

    def _over_context(self, mine: torch.Tensor) -> torch.Tensor:
        """[B, S of all ranks of context parallelism], in the order of positions."""
        group = self.pg_collection.cp
        if group.size() == 1:
            return mine
        parts = [
            torch.empty_like(mine, memory_format=torch.contiguous_format)
            for _ in range(group.size())
        ]
        dist.all_gather(parts, mine.contiguous(), group=group)
        return restore_sequence_order(parts, 1)
