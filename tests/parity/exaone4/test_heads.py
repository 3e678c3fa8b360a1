"""EXAONE 4.0 with a head against Transformers: logits, pooling, gradients and round trips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.errors import HeadInputError
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.workflow.options import VerifyOptions
from exaone_bridge.verification.workflow.run import Session, run
from tests.helpers.heads import (
    ANSWER,
    FIELDS,
    SEQUENCE,
    TOKEN,
    head_folder,
    run_megatron,
    run_transformers,
)
from tests.helpers.layouts import slow
from tests.helpers.training import assert_gradients_equal, train_megatron

PAD = 0
TOKENS = torch.randint(1, 387, (4, 24), generator=torch.Generator().manual_seed(3))
LAYOUTS = [
    Layout(tp=2, sp=True),
    Layout(pp=2, vpp=2),
    Layout(tp=2, pp=2, sp=True),
    *slow(Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2, vpp=2, sp=True)),
]


@pytest.mark.usefixtures("cached_references")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("architecture", FIELDS)
def test_a_head_passes_verify_with_gradients(
    megatron_bridge: Any, tiny: Any, architecture: str, layout: Layout
) -> None:
    """Tensors and config.json are bitwise equal; every gradient is that of Transformers."""
    folder = head_folder(tiny, architecture)
    options = VerifyOptions(gradients=True, generation=True)
    report = run(Session(source=folder, layout=layout, options=options))
    assert report.passed, report.failures()
    checks = {check.name: check for check in report.checks}
    assert report.max_logit_difference <= 1e-4
    assert checks["gradients"].metrics["gradients"] == len(report.tensors)
    assert checks["gradients"].metrics["relative"] <= 1e-4
    assert "has a head" in checks["generation"].details


@pytest.mark.parametrize("name", ["exaone4-1.2b", "exaone4"])
def test_a_head_of_a_tied_model_and_layer_by_layer(
    megatron_bridge: Any, tiny: Any, name: str
) -> None:
    """config.json keeps tie_word_embeddings, although no output layer is tied."""
    folder = tiny(name, architectures=[ANSWER], dtype="bfloat16", tie_word_embeddings=True)
    report = run(Session(source=folder, options=VerifyOptions(stream=name == "exaone4")))
    assert report.passed, report.failures()


def padded(lengths: list[int], side: str) -> dict[str, torch.Tensor]:
    """Return tokens [B, S] of which only these many of each row are not padding, and the mask."""
    position = torch.arange(TOKENS.shape[1])
    sizes = torch.tensor(lengths)[:, None]
    mask = position < sizes if side == "right" else position >= TOKENS.shape[1] - sizes
    return {"input_ids": TOKENS.where(mask, PAD), "attention_mask": mask.long()}


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sp=True)], ids=str)
def test_pooling_takes_the_token_that_transformers_takes(
    megatron_bridge: Any, tiny: Any, layout: Layout
) -> None:
    """Padding is on either side, with a mask and without, inside a sequence, and everywhere."""
    folder = head_folder(tiny, SEQUENCE, id2label={"0": "no", "1": "yes", "2": "perhaps"})
    batches = [padded([24, 9, 1, 17], side) for side in ("right", "left")]
    batches += [{"input_ids": batch["input_ids"]} for batch in batches]
    inside = TOKENS.clone()
    inside[0, 5], inside[1] = PAD, PAD
    batches.append({"input_ids": inside})
    expected = run_transformers(folder, batches)
    for outputs in run_megatron(folder, layout, batches):
        for output, reference in zip(outputs, expected, strict=True):
            assert output.shape == (4, 3)
            assert (output - reference).abs().max() <= 1e-5
    assert (expected[0][1:] - expected[2][1:]).abs().max() <= 1e-5  # the mask hides later tokens
    assert (expected[1][1:] - expected[3][1:]).abs().max() > 1e-3  # but padding before the tokens


@pytest.mark.parametrize("architecture", [TOKEN, ANSWER])
def test_left_padding_changes_no_token(megatron_bridge: Any, tiny: Any, architecture: str) -> None:
    folder = head_folder(tiny, architecture)
    batch = padded([24, 9, 1, 17], "left")
    (expected,) = run_transformers(folder, [batch])
    for (output,) in run_megatron(folder, Layout(tp=2, sp=True), [batch]):
        is_token = batch["attention_mask"].bool()
        assert (output - expected)[is_token].abs().max() <= 1e-5


def test_without_a_padding_token_there_is_one_sequence(megatron_bridge: Any, tiny: Any) -> None:
    folder = head_folder(tiny, SEQUENCE, pad_token_id=None)
    one, two = {"input_ids": TOKENS[:1]}, {"input_ids": TOKENS[:2]}
    (expected,) = run_transformers(folder, [one])
    ((output,),) = run_megatron(folder, Layout(), [one])
    assert (output - expected).abs().max() <= 1e-5
    with pytest.raises(Exception, match="Cannot handle batch sizes > 1"):
        run_transformers(folder, [two])
    with pytest.raises(HeadInputError, match="has 2 sequences, and must have one"):
        run_megatron(folder, Layout(), [two])


def test_wrong_inputs_are_rejected(megatron_bridge: Any, tiny: Any) -> None:
    folder = head_folder(tiny, SEQUENCE)
    with pytest.raises(HeadInputError, match="labels: a model with a head takes none"):
        run_megatron(folder, Layout(), [{"input_ids": TOKENS}], labels=TOKENS)
    hole = padded([24] * 4, "right")
    hole["attention_mask"][2, 7] = 0
    with pytest.raises(HeadInputError, match="padding between tokens"):
        run_megatron(folder, Layout(), [hole])


def test_dropout_before_the_head_is_independent_over_sequence_parallel_ranks(
    megatron_bridge: Any, tiny: Any
) -> None:
    """All TP ranks have the same logits; each dropped other values of its tokens."""
    batch = {"input_ids": TOKENS[:1, :1].expand(1, 2).contiguous()}  # one token on each rank
    layers = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    folder = head_folder(tiny, TOKEN, **layers)
    kept = run_megatron(folder, Layout(tp=2, sp=True), [batch])
    first, second = run_megatron(folder, Layout(tp=2, sp=True), [batch] * 2, training=True)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])
    assert torch.allclose(kept[0][0][0, 0], kept[0][0][0, 1], atol=1e-5)  # equal tokens, no RoPE
    assert not torch.allclose(first[0][0, 0], first[0][0, 1], atol=1e-3)


def pooled_step(batches: Iterator[tuple[torch.Tensor, Any]], model: Any) -> tuple[Any, Any]:
    """Run one sequence; the loss is that of a reward above zero."""
    tokens, _ = next(batches)
    tokens = tokens[:, :-1]
    output = model(tokens, torch.arange(tokens.shape[1])[None], None)

    def loss(rewards: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert rewards.shape == (1, 1)
        value = -torch.nn.functional.logsigmoid(rewards).mean()
        return value, {"loss": value.detach()}

    return output, loss


def _reference_gradients(folder: Path, sequences: torch.Tensor) -> dict[str, torch.Tensor]:
    from exaone_bridge.verification.workflow.transformers import load

    model = load(folder, torch.float32)
    for tokens in sequences[:, :-1].split(1):
        reward = model(tokens, use_cache=False).logits
        (-torch.nn.functional.logsigmoid(reward).mean() / len(sequences)).backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize(
    "layout", [Layout(tp=2, sp=True), Layout(tp=2, pp=2, vpp=2, sp=True)], ids=str
)
def test_gradients_of_pooled_logits_equal_those_of_transformers(
    megatron_bridge: Any, tiny: Any, layout: Layout
) -> None:
    """The last token is on one TP rank only, and so is the gradient of the head."""
    folder = head_folder(tiny, SEQUENCE)
    sequences = torch.cat([TOKENS, TOKENS[:, :1]], 1)  # train_megatron leaves the last token out
    sequences[:, 20:-1] = PAD
    reference = ForkLauncher().first(_reference_gradients, folder, sequences)
    batches = [(tokens, {}) for tokens in sequences.split(1)]
    runs = ForkLauncher(layout.ranks).all(_train, folder, layout, batches)
    for found in runs:
        assert found.gradients.keys() == reference.keys()
        assert_gradients_equal(found.gradients, reference)


def _train(folder: Path, layout: Layout, batches: Any) -> Any:
    return train_megatron(folder, layout, batches, forward_step=pooled_step)
