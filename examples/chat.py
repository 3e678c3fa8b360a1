"""From conversations to a model that answers: LoRA, merged, exported, run by Transformers.

It needs a tiny model on a CPU, or HF_PATH, a directory of any family, on a GPU:
    exaone-bridge tiny ernie45-dense /tmp/tiny
    python examples/chat.py /tmp/tiny /tmp/chat
    torchrun --nproc-per-node 1 examples/chat.py HF_PATH OUTPUT --lr 1e-4
"""

import argparse
import json
from pathlib import Path

from exaone_bridge.recipes import ernie45_tiny_chat_peft_config  # isort: skip  (comes first)
from images import forward_step
from megatron.bridge import AutoBridge
from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetBuilder
from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer
from train import DEVICE, run, train

ANSWERS = {"Is the sea wet?": "Yes.", "Is the sun cold?": "No.", "Who are you?": "A model."}


def main(options: argparse.Namespace) -> None:
    from transformers import pipeline

    options.output.mkdir(parents=True)
    with (options.output / "training.jsonl").open("w") as file:
        for question, answer in ANSWERS.items():
            turns = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
            file.write(json.dumps({"messages": turns}) + "\n")
    config = ernie45_tiny_chat_peft_config(hf_path=options.hf_path, dataset_root=options.output)
    rows = GPTSFTDatasetBuilder(config.dataset, build_tokenizer(config.tokenizer)).build()[0]
    batches = []
    for batch in (rows.collate_fn([rows[number]]) for number in range(len(rows))):
        labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
        batches.append({"tokens": batch["tokens"].to(DEVICE), "labels": labels.to(DEVICE)})
    bridge = AutoBridge.from_hf_pretrained(options.hf_path)
    provider = bridge.to_megatron_provider()
    provider.register_pre_wrap_hook(lambda model: config.peft(model, training=True))
    provider.finalize()
    model = train(provider, forward_step, batches, 128, options.steps, lr=options.lr)
    bridge.save_hf_pretrained(model, options.output / "merged", show_progress=False)
    chat = pipeline("text-generation", str(options.output / "merged"), device=DEVICE)
    chat.generation_config.update(
        do_sample=False, eos_token_id=list(chat.tokenizer.added_tokens_decoder)
    )
    for question in ANSWERS:
        found = chat([{"role": "user", "content": question}], clean_up_tokenization_spaces=False)
        print(question, found[0]["generated_text"][-1]["content"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hf_path", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-2)
    run(main, parser.parse_args())
