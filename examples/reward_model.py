"""Train a reward model on pairs of answers, in the training loop of train.py.

    exaone-bridge tiny exaone4-1.2b /tmp/tiny
    python examples/reward_model.py /tmp/tiny /tmp/start --init         # a head of one label
    python examples/reward_model.py /tmp/start /tmp/reward --steps 10                # on a CPU
    torchrun --nproc-per-node 8 examples/reward_model.py HF_PATH OUTPUT --tp 8       # on GPUs
    python examples/reward_model.py /tmp/start /tmp/reward --lora /tmp/adapter  # LoRA and the head

The loss is that of Bradley and Terry: -log sigmoid(reward of chosen - reward of rejected). The
script makes up its answers: the chosen ones are polite. At the end it prints the rewards, which
are those of Transformers' AutoModelForSequenceClassification with OUTPUT. With --lora, OUTPUT has
the adapter merged, and `peft.PeftModel.from_pretrained` loads adapter and head from its folder.
"""

# ruff: noqa: I001  (exaone_bridge before megatron.bridge, which needs it without Transformer Engine)

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exaone_bridge  # noqa: F401  registers the models with Megatron-Bridge
import torch
from megatron.bridge import AutoBridge
from megatron.bridge.peft.lora import LoRA
from train import DEVICE, run, train

QUESTIONS = ["Is it far?", "What is the time?", "Can you help me?", "Why?"]
CHOSEN, REJECTED = "I will gladly tell you.", "Go away."


def main(options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    bridge = AutoBridge.from_hf_pretrained(options.hf_path)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = options.tp
    provider.sequence_parallel = options.tp > 1
    provider.finalize()
    lora = LoRA(dim=8, alpha=16)

    def add_adapters(model: list[Any]) -> list[Any]:
        model = lora(model, training=True)
        for chunk in model:
            if chunk.post_process:  # the last pipeline stage has the head, which LoRA has frozen
                chunk.output_layer.requires_grad_(True)
        return model

    if options.lora is not None:
        provider.register_pre_wrap_hook(add_adapters)
    length = options.seq_length
    tokenizer = AutoTokenizer.from_pretrained(options.hf_path)
    pairs = [make_pair(tokenizer, question, length) for question in QUESTIONS]
    model = train(
        provider, forward_step, pairs, length, options.steps, lr=options.lr, weight_decay=0.0
    )
    bridge.save_hf_pretrained(model, options.output, show_progress=False)
    if options.lora is not None:
        bridge.save_hf_adapter(model, options.lora, lora, show_progress=False)
    with torch.no_grad():
        rewards = [forward_step(iter([pair]), model[0].eval())[0] for pair in pairs]
    if torch.distributed.get_rank() == 0:
        for question, (chosen, rejected) in zip(QUESTIONS, rewards, strict=True):
            print(f"{question} chosen {chosen.item():.5f}, rejected {rejected.item():.5f}")


def make_pair(tokenizer: Any, question: str, length: int) -> torch.Tensor:
    """Make tokens [2, S]: the chosen answer, and the rejected one, padded on the right."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            tokenize=False,
        )
        for answer in (CHOSEN, REJECTED)
    ]
    padding = {"padding": "max_length", "padding_side": "right", "max_length": length}
    batch = tokenizer(texts, add_special_tokens=False, return_tensors="pt", **padding)
    return batch["input_ids"].to(DEVICE)


def forward_step(pairs: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    """Run one pair: the output is the rewards [2, 1] of the last tokens that are not padding."""
    tokens = next(pairs)
    position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]

    def loss_function(rewards: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        chosen, rejected = rewards.float()
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        return loss, {"loss": loss.detach()}

    return model(tokens, position_ids, None), loss_function


def add_head(options: argparse.Namespace) -> None:
    """Write a language model with a head of one label, whose weights are random."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.hf_path)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.hf_path, num_labels=1, dtype="auto", pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf_path", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--init", action="store_true", help="write a model to start from")
    parser.add_argument("--lora", type=Path, help="train an adapter, and save it here for PEFT")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    if arguments.init:
        add_head(arguments)
    else:
        run(main, arguments)
