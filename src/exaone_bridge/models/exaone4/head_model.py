"""EXAONE 4.0 with a head in place of the output layer, as Transformers' models with a head compute.

Transformers builds them in `modeling_layers.py` (5.12.1). The head is replicated over TP, like
`LinearForLastLayer` of Megatron-Bridge (`training/utils/train_utils.py`, 0.6.2), which has neither
bias nor dropout.

Axes: B batch, S sequence, H hidden, L labels, tp tensor-parallel size.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from exaone_bridge.errors import HeadInputError
from exaone_bridge.schema.model_config import HeadConfig

__all__ = ["Exaone4HeadModel", "Head", "pool_last_token"]


def pool_last_token(
    logits: torch.Tensor, input_ids: torch.Tensor, pad_token_id: int | None
) -> torch.Tensor:
    """Return the logits of each sequence's last token that is not padding.

    The rule is that of `GenericForSequenceClassification.forward` (Transformers 5.12.1), on
    whichever side the padding is.

    Args:
        logits: [B, S, L].
        input_ids: [B, S].
        pad_token_id: None: the batch has one sequence without padding.

    Returns:
        [B, L].

    Raises:
        HeadInputError: several sequences without a padding token.
    """
    count, length = input_ids.shape
    if pad_token_id is None:
        if count != 1:
            raise HeadInputError(
                f"batch: it has {count} sequences, and must have one, because config.json has no "
                "pad_token_id; set it in config.json (or provider.head)."
            )
        return logits[:, -1]
    positions = torch.arange(length, device=input_ids.device)
    last = (positions * (input_ids != pad_token_id)).argmax(-1)
    return logits[torch.arange(count, device=logits.device), last]


class Head(torch.nn.Linear):
    """A head, called like Megatron-Core's output layer; the same on every TP rank."""

    def __init__(self, config: TransformerConfig, head: HeadConfig) -> None:
        """Make a head of random weights."""
        super().__init__(
            config.hidden_size,
            head.num_labels,
            bias=head.has_bias,
            device="cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
            dtype=config.params_dtype,
        )
        if config.perform_initialization:
            assert config.init_method is not None
            config.init_method(self.weight)
            if self.bias is not None:
                torch.nn.init.zeros_(self.bias)
        self.dropout = torch.nn.Dropout(head.dropout)
        self.sequence_parallel = config.sequence_parallel
        for parameter in self.parameters():
            # Each rank has the gradient of its tokens: finalize_model_grads sums them over TP.
            parameter.sequence_parallel = config.sequence_parallel
        self.weight.is_embedding_or_output_parameter = True

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Compute the logits of every token on every TP rank.

        Args:
            input_: [S, B, H]; [S / tp, B, H] with sequence parallelism.
            weight, runtime_gather_output: of Megatron-Core's output layer; ignored.

        Returns:
            [S, B, L], and no bias.
        """
        if not self.sequence_parallel:
            return super().forward(self.dropout(input_)), None
        # TP ranks drop independently of each other, because each has other tokens.
        drops = self.training and self.dropout.p > 0
        with get_cuda_rng_tracker().fork() if drops else contextlib.nullcontext():
            hidden = self.dropout(input_)
        logits = super().forward(hidden)
        return gather_from_sequence_parallel_region(logits, tensor_parallel_output_grad=False), None


class Exaone4HeadModel(GPTModel):
    """A GPTModel with a head; its output is what Transformers' model with this head returns.

    Attributes:
        head: the head config.
    """

    head: HeadConfig

    @classmethod
    def from_gpt(cls, model: GPTModel, head: HeadConfig) -> Exaone4HeadModel:
        """Turn a GPTModel into an Exaone4HeadModel, in place.

        Megatron-Bridge 0.6.2's `GPTModelProvider.provide` names the class that it builds.

        Args:
            model: the GPTModel of this pipeline stage; the last one gets the head.
            head: the head config.
        """
        model.__class__ = cls
        assert isinstance(model, cls)
        model.head = head
        if model.post_process:
            model.output_layer = Head(model.config, head)
        return model

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *args: Any,
        pool: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run the forward pass.

        Args:
            input_ids: [B, S] tokens; of sequence classification on the last pipeline stage too.
            position_ids: [B, S].
            attention_mask: [B, S], as Transformers' tokenizers return it: 1 for tokens, 0 for
                padding on one side. Any other is ignored by causal attention.
            decoder_input: [S, B, H] embeddings that replace those of `input_ids`.
            labels: None: the caller computes the loss.
            args, kwargs: of `GPTModel.forward`.
            pool: False: also sequence classification returns the logits of every token.

        Returns:
            Logits on the last pipeline stage, hidden states [S, B, H] on others: [B, L] of sequence
            classification, [B, S, L] of token classification, and [B, S, 2] of question answering,
            for the start and the end of the answer.

        Raises:
            HeadInputError: labels; padding inside a sequence; or what cannot be pooled.
        """
        if labels is not None:
            raise HeadInputError(
                "labels: a model with a head takes none, and returns logits; compute the loss from "
                "them in the loss function of the forward step."
            )
        tokens, shift = input_ids, _left_padding(attention_mask)
        if shift is not None and tokens is not None:
            tokens = tokens.gather(1, _rolled(shift, tokens.shape[1]))
        output = super().forward(
            tokens,
            position_ids,
            None if shift is not None else attention_mask,
            decoder_input,
            None,
            *args,
            **kwargs,
        )
        if not self.post_process:
            return output
        if shift is not None:
            back = _rolled(-shift, output.shape[1])[..., None]
            output = output.gather(1, back.expand_as(output))
        return self._pooled(output, input_ids, kwargs) if self.head.pools and pool else output

    def _pooled(
        self, logits: torch.Tensor, input_ids: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        if input_ids is None:
            raise HeadInputError(
                "input_ids: the last pipeline stage has none, and needs them to find the last "
                "token of each sequence; pass them on every stage."
            )
        if kwargs.get("packed_seq_params") is not None:
            raise HeadInputError(
                "packed_seq_params: sequence classification pools one token of each row, and a "
                "row has several sequences; pass pool=False and pool them yourself."
            )
        return pool_last_token(logits, input_ids, self.head.pad_token_id)


def _left_padding(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return the padding [B] before each sequence; None for a mask that is not Transformers'.

    Raises:
        HeadInputError: padding inside a sequence.
    """
    if mask is None or mask.ndim != 2:
        return None
    is_token = mask.bool()
    starts = is_token & ~is_token.roll(1, 1)
    starts[:, 0] = is_token[:, 0]
    if (starts.sum(-1) > 1).any():
        raise HeadInputError(
            "attention_mask: a sequence has padding between tokens, and must have it on one side; "
            "pad with the tokenizer."
        )
    return is_token.int().argmax(-1)


def _rolled(shift: torch.Tensor, length: int) -> torch.Tensor:
    """Return the indices [B, S] that move each row to the left by its shift [B].

    Causal attention sees no padding at the end, and RoPE knows differences of positions only.
    """
    return (torch.arange(length, device=shift.device) + shift[:, None]) % length
