"""Fine-tuning on conversations, through Megatron-Bridge's data path, compared with Transformers."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from exaone_bridge.errors import CheckpointError, ConversationError
from exaone_bridge.recipes import recipe
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.chat_template import tokenize_chat
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.workflow.transformers import load
from tests.helpers.training import StragglerTimer

LENGTH = 128
TURNS = ["one", "two", "three \u00e9\u4e2d", "four", "five and six"]


def _rows() -> list[dict[str, Any]]:
    """Conversations of one to three turns, of different lengths."""
    rows: list[dict[str, Any]] = []
    for number in range(8):
        messages = [{"role": "system", "content": "s" * number}] if number % 3 == 0 else []
        for turn in range(number % 3 + 1):
            messages.append({"role": "user", "content": TURNS[(number + turn) % 5]})
            messages.append({"role": "assistant", "content": TURNS[(number + 2 * turn) % 5]})
        rows.append({"messages": messages})
    return rows


@pytest.fixture(scope="module")
def dataset_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    for split in ("training", "validation"):
        lines = [json.dumps(row) + "\n" for row in _rows()]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def _config(recipe_name: str, hf_path: Path, dataset_root: Path, **options: Any) -> Any:
    fields = {"seq_length": LENGTH, "global_batch_size": 8, **options}
    return recipe(recipe_name)(hf_path=hf_path, dataset_root=dataset_root, **fields)


def _training_split(config: Any) -> Any:
    from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetBuilder
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    config.dataset.finalize()
    builder = GPTSFTDatasetBuilder(config.dataset, build_tokenizer(config.tokenizer))
    training, validation, _ = builder.build()
    assert len(training) == len(validation) > 0
    return training


def _batches(training: Any) -> list[dict[str, Any]]:
    """Collate microbatches of one sample, as Megatron-Bridge's loop does."""
    return [training.collate_fn([training[index]]) for index in range(len(training))]


def _transformers_loss(hf_path: Path, last_turn: bool) -> tuple[float, int]:
    """Transformers' mean loss of the assistant's tokens, each conversation alone; their number."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_path)
    model = load(hf_path, torch.float32)
    losses = []
    for row in _rows():
        chat = tokenize_chat(tokenizer, row, last_turn=last_turn)
        tokens, mask = torch.tensor(chat.input_ids)[None], torch.tensor(chat.assistant_mask)
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
        losses.append(loss[mask[1:]])
    every = torch.cat(losses)
    return every.mean().item(), len(every)


def _partitioned_indices(offsets: torch.Tensor, total: int, cp: int, rank: int) -> torch.Tensor:
    """Stand for Transformer Engine's function: the positions of one context-parallel rank."""
    from exaone_bridge.modules.context_parallel import local_positions

    bounds = offsets.tolist()
    assert bounds[-1] == total
    return torch.cat(
        [begin + local_positions(rank, cp, end - begin) for begin, end in pairwise(bounds)]
    )


def _megatron_loss(
    hf_path: Path, layout: Layout, config: Any, batches: list[dict[str, Any]]
) -> tuple[float, int] | None:
    """On a rank: the loss through Megatron-Bridge's `gpt_step` and Megatron-Core's schedule."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    provider = AutoBridge.from_hf_pretrained(hf_path).to_megatron_provider()
    fields = {"calculate_per_token_loss": config.model.calculate_per_token_loss}
    provider.apply_overrides_and_finalize(torch.float32, layout.provider_overrides() | fields)
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    timer = SimpleNamespace(start=lambda: None, stop=lambda: None)
    state = SimpleNamespace(
        cfg=config, timers=lambda *_, **__: timer, straggler_timer=StragglerTimer()
    )
    model.eval()
    partition = SimpleNamespace(thd_get_partitioned_indices=_partitioned_indices)
    with torch.no_grad(), mock.patch("megatron.core.utils.tex", partition):
        outputs = get_forward_backward_func()(
            forward_step_func=functools.partial(forward_step, state),
            data_iterator=iter(batches),
            model=model,
            num_microbatches=len(batches),
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=True,
        )
    if not outputs:
        return None
    total_and_count = sum(output["lm loss"] for output in outputs)
    torch.distributed.all_reduce(total_and_count, group=parallel_state.get_context_parallel_group())
    total, count = total_and_count.tolist()
    return total / count, int(count)


@pytest.mark.parametrize(
    ("tiny_name", "recipe_name", "layout", "options"),
    [
        ("exaone4", "exaone4_tiny_chat_sft_config", Layout(), {"packed": False}),
        ("exaone4", "exaone4_tiny_chat_sft_config", Layout(), {"packed": True}),
        ("exaone4", "exaone4_tiny_chat_sft_config", Layout(), {"packed": True, "last_turn": True}),
        ("exaone4", "exaone4_tiny_chat_sft_config", Layout(cp=2), {"packed": True, "cp": 2}),
        (
            "exaone4",
            "exaone4_tiny_chat_sft_config",
            Layout(tp=2, cp=2, sp=True),
            {"packed": True, "tp": 2, "cp": 2, "sp": True},
        ),
        ("exaone45", "exaone45_33b_chat_peft_config", Layout(), {"packed": True}),
        ("ernie45", "ernie45_tiny_chat_sft_config", Layout(), {"packed": True}),
        ("exaone-moe", "k_exaone_tiny_chat_sft_config", Layout(pp=2), {"packed": True}),
    ],
    ids=str,
)
def test_loss_equals_transformers(
    megatron_bridge: Any,
    tiny: Any,
    dataset_root: Path,
    tiny_name: str,
    recipe_name: str,
    layout: Layout,
    options: dict[str, Any],
) -> None:
    hf_path = tiny(tiny_name)
    gpus = {"gpus": layout.ranks} if "tiny" in recipe_name else {}
    config = _config(recipe_name, hf_path, dataset_root, **options, **gpus)
    batches = _batches(_training_split(config))
    assert (len(batches) < 8) == options["packed"]
    expected, tokens = ForkLauncher(1).first(
        _transformers_loss, hf_path, options.get("last_turn", False)
    )
    found = ForkLauncher(layout.ranks).all(_megatron_loss, hf_path, layout, config, batches)
    for loss, count in filter(None, found):
        assert count == tokens
        assert abs(loss - expected) <= 1e-4
    assert any(found)


def test_loss_on_other_tokens_differs(megatron_bridge: Any, tiny: Any, dataset_root: Path) -> None:
    """The comparison above fails for a loss on the last turn alone."""
    losses = {ForkLauncher(1).first(_transformers_loss, tiny("exaone4"), last) for last in (0, 1)}
    (first, _), (second, _) = losses
    assert abs(first - second) > 1e-3


def test_batches_have_the_tokens_and_labels_of_transformers(
    megatron_bridge: Any, tiny: Any, dataset_root: Path
) -> None:
    """Every sample of Megatron-Bridge's data set, with the tokenizer that the run builds."""
    from transformers import AutoTokenizer

    hf_path = tiny("exaone4")
    tokenizer = AutoTokenizer.from_pretrained(hf_path)
    config = _config("exaone4_tiny_chat_peft_config", hf_path, dataset_root, last_turn=True)
    for batch, row in zip(_batches(_training_split(config)), _rows(), strict=True):
        tokens = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        length = len(tokens) - 1
        assert batch["tokens"][0, :length].tolist() == tokens[:-1]
        assert batch["labels"][0, :length].tolist() == tokens[1:]
        written = batch["labels"][batch["loss_mask"] > 0]
        assert tokenizer.decode(written) == row["messages"][-1]["content"] + "[|endofturn|]"


def test_packed_rows_are_made_again_after_a_change(
    megatron_bridge: Any, tiny: Any, dataset_root: Path, tmp_path: Path
) -> None:
    """Megatron-Bridge alone would go on with rows that were packed from another file."""
    lines = (dataset_root / "training.jsonl").read_text().splitlines(keepends=True)
    found = []
    for count in (8, 2):
        for split in ("training", "validation"):
            (tmp_path / f"{split}.jsonl").write_text("".join(lines[:count]))
        config = _config("exaone4_tiny_chat_sft_config", tiny("exaone4"), tmp_path, packed=True)
        config.dataset.offline_packing_specs.num_tokenizer_workers = 2
        batches = _batches(_training_split(config))
        found.append(sum(int(batch["loss_mask"].sum()) for batch in batches))
    assert found[0] > found[1] > 0


def test_rows_that_are_too_long_are_counted(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Packing leaves them out; where none is left, Megatron-Bridge would divide by zero."""
    rows = _rows()
    rows[3]["messages"][0]["content"] = TURNS[2] * LENGTH
    for split in ("training", "validation"):
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    config = _config("exaone4_tiny_chat_sft_config", tiny("exaone4"), tmp_path, packed=True)
    with caplog.at_level(logging.WARNING):  # the tests turn it off
        assert _batches(_training_split(config))
    long = f"1 of 8 rows are longer than seq_length, {LENGTH}, and are left out"
    assert f"{tmp_path}/training.jsonl: {long}" in caplog.text
    assert "Skipped" not in caplog.text
    options = {"packed": True, "seq_length": 8}
    config = _config("exaone4_tiny_chat_sft_config", tiny("exaone4"), tmp_path, **options)
    message = r"8 rows, all longer than seq_length, 8: the shortest has 15 tokens; raise"
    with pytest.raises(ConversationError, match=message):
        _training_split(config)


def test_what_cannot_be_trained_on_raises(megatron_bridge: Any, tiny: Any, tmp_path: Path) -> None:
    row = json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n"
    for split in ("training", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(row)
    config = _config("exaone4_tiny_chat_sft_config", tiny("exaone4"), tmp_path)
    with pytest.raises(ConversationError, match="messages has no message of the assistant"):
        _batches(_training_split(config))
    without = tmp_path / "model"
    shutil.copytree(tiny("exaone4"), without)
    (without / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="the tokenizer has no chat template; add chat_temp"):
        _config("exaone4_tiny_chat_peft_config", without, tmp_path)


def test_conversations_of_other_models_are_megatron_bridges_own(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    """Without our config beside the tokenizer, its own function is called, and raises."""
    from megatron.bridge.data.conversation_processing import tokenize_chat_example
    from transformers import AutoTokenizer

    row = _rows()[0]
    other = tmp_path / "model"
    shutil.copytree(tiny("exaone4"), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["Llama"]}))
    with pytest.raises(ValueError, match="Unable to build assistant loss mask"):
        tokenize_chat_example(row, AutoTokenizer.from_pretrained(other))
    ours = AutoTokenizer.from_pretrained(tiny("exaone4"))
    full = tokenize_chat_example(row, ours, loss_mode="full")
    assert full.assistant_mask.all() and not tokenize_chat_example(row, ours).assistant_mask.all()
    short = tokenize_chat_example({"conversation": row["messages"]}, ours, max_length=5)
    assert len(short.input_ids) == len(short.assistant_mask) == short.final_assistant_start == 5
