"""What the training examples share: arguments, small data, and what happens at the end of a step and of a run."""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch  # before transformer_engine: the two bring different versions of cuDNN

# before megatron.bridge: registers the models
from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.models import family_of
from exaone_bridge.recipes import recipe
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.schema.hf_config import language_config

LAYOUT = ("tp", "pp", "vpp", "ep", "etp", "cp")


def arguments(description: str, default_recipe: str) -> argparse.ArgumentParser:
    """The arguments of every training example."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default=default_recipe, help="a name of docs/recipes.md")
    parser.add_argument(
        "--gpu-memory", type=int, default=80, help="GB of a GPU that the recipe is sized for"
    )
    parser.add_argument(
        "--hf-path", type=Path, help="Hugging Face folder: configuration, tokenizer and weights"
    )
    for name in LAYOUT:
        parser.add_argument(f"--{name}", type=int, help="instead of the recipe's")
    parser.add_argument("--seq-length", type=int)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--global-batch-size", type=int)
    parser.add_argument("--iters", type=int, default=10)
    parser.add_argument("--rate", type=float, help="learning rate's peak")
    parser.add_argument(
        "--save", type=Path, required=True, help="folder for all that the run writes"
    )
    parser.add_argument(
        "--save-every", type=int, default=0, help="steps; 0: at the end only; -1: never"
    )
    parser.add_argument("--load", type=Path, help="folder of an earlier run to resume from")
    parser.add_argument(
        "--load-step", type=int, help="the step to resume from, instead of the last"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and stop before the first GPU call"
    )
    return parser


def changes(options: argparse.Namespace) -> dict[str, Any]:
    """What the arguments change of the recipe's plan; the number of GPUs is torchrun's."""
    given = {
        name: getattr(options, name)
        for name in (*LAYOUT, "seq_length", "micro_batch_size", "global_batch_size")
    }
    found = {name: value for name, value in given.items() if value is not None}
    if "tp" in found:
        found["sp"] = found["tp"] > 1
    if "WORLD_SIZE" in os.environ:
        found["gpus"] = int(os.environ["WORLD_SIZE"])
    return found


def configured(options: argparse.Namespace, **more: Any) -> Any:
    """The recipe's configuration with the arguments in it."""
    config = recipe(options.recipe)(
        gpu_memory_gb=options.gpu_memory, hf_path=options.hf_path, **more, **changes(options)
    )
    config.train.train_iters = config.scheduler.lr_decay_iters = options.iters
    config.scheduler.lr_warmup_iters = min(config.scheduler.lr_warmup_iters, options.iters // 10)
    if options.rate is not None:
        config.optimizer.lr, config.optimizer.min_lr = options.rate, options.rate / 10
    config.validation.eval_iters, config.validation.eval_interval = 0, options.iters
    config.logger.log_interval, config.logger.tensorboard_dir = 1, None
    config.checkpoint.save = str(options.save / "checkpoints") if options.save_every >= 0 else None
    config.checkpoint.save_interval = max(options.save_every, 0) or options.iters
    config.checkpoint.load = None if options.load is None else str(options.load / "checkpoints")
    config.checkpoint.ckpt_step = options.load_step
    return config


def to_fine_tune(options: argparse.Namespace, make: Callable[[Path], None], **more: Any) -> Any:
    """`configured`, with the data that `make` writes and a model of random weights where the arguments name none."""
    data = options.data or once(options.save / "data", make)
    options.hf_path = options.hf_path or once(
        options.save / "model", lambda folder: write_model(folder, options.recipe)
    )
    return configured(options, dataset_root=data, packed=options.packed, **more)


def steps(options: argparse.Namespace, at_end: Callable[[list[Any]], None] | None = None) -> Any:
    """A callback of the host's: losses into `losses.jsonl`, and `at_end` with the trained model."""
    from megatron.bridge.training.callbacks import Callback

    class Steps(Callback):
        def on_train_step_end(self, context: Any) -> None:
            loss = context.loss_dict.get("lm loss") if context.loss_dict else None
            if loss is None:  # not the last stage of the pipeline
                return
            loss = loss.float().flatten()
            value = (loss[0] / loss[1] if loss.numel() == 2 else loss[0]).item()
            line = {
                "step": context.state.train_state.step + 1,
                "loss": value,
                "grad_norm": float(context.grad_norm or 0),
                "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            }
            if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
                with (options.save / "losses.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"step {line['step']}: loss {value:.4f}", flush=True)

        def on_train_end(self, context: Any) -> None:
            if at_end is not None:
                at_end(context.model)

    return Steps()


def bridge_of(config: Any, hf_path: Path | None) -> Any:
    """The AutoBridge of the model in training: of its folder, or of its configuration alone."""
    from megatron.bridge import AutoBridge
    from transformers import CONFIG_MAPPING

    if hf_path is not None:
        return AutoBridge.from_hf_pretrained(str(hf_path))
    hf_config = dict(config.model.hf_config)
    return AutoBridge.from_hf_config(CONFIG_MAPPING[hf_config["model_type"]].from_dict(hf_config))


def show(config: Any) -> None:
    """For --dry-run: what would run."""
    model, train = config.model, config.train
    print(
        f"{type(model).__name__}: {model.num_layers} layers, hidden {model.hidden_size}, "
        f"vocabulary {model.vocab_size}; TP{model.tensor_model_parallel_size} PP{model.pipeline_model_parallel_size} "
        f"EP{model.expert_model_parallel_size} CP{model.context_parallel_size}, sequence {model.seq_length}, "
        f"batch {train.micro_batch_size} / {train.global_batch_size}, {train.train_iters} steps"
    )


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made by the first rank in a folder beside it and renamed when it is whole; the others wait for it."""
    if int(os.environ.get("RANK", "0")) == 0:
        if not target.exists():
            partial = target.with_name(target.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
            make(partial)
            partial.rename(target)
    else:
        while not target.exists():
            time.sleep(0.2)
    return target


def docstrings() -> Iterator[dict[str, str]]:
    """Questions and answers that every Python installation ships: what a function of the standard library does."""
    asked: set[str] = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (
                answer := ast.get_docstring(node)
            ):
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                question = f"What does the {kind} {node.name} of Python's module {path.stem} do?"
                if question not in asked:  # methods of one name: the first
                    asked.add(question)
                    yield {"input": question, "output": answer}


def write_dataset(folder: Path, validation: int = 200) -> None:
    """`training.jsonl` and `validation.jsonl` of `docstrings`."""
    folder.mkdir()
    examples = list(docstrings())
    every = max(2, len(examples) // validation)
    parts = {
        "validation": examples[::every],
        "training": [example for index, example in enumerate(examples) if index % every],
    }
    for name, part in parts.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in part)


def train_tokenizer(folder: Path, texts: Iterator[str], config: dict[str, Any]) -> None:
    """A byte-level BPE tokenizer of the model's vocabulary, with the family's special tokens at their ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    family = family_of(config["architectures"], where=str(folder))
    config = language_config(config)
    special = sorted(family.tiny_files.special_tokens.items(), key=lambda item: item[1])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config["vocab_size"] - len(special) - 64,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Words take the ids that special tokens leave free; a merge names words, not ids.
    content = json.loads(tokenizer.to_str())
    taken = {number for _, number in special}
    free = iter(number for number in range(config["vocab_size"]) if number not in taken)
    words = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    content["model"]["vocab"] = {word: next(free) for word in words}
    highest = max(taken | set(content["model"]["vocab"].values()))
    missing = set(range(highest)) - taken - set(content["model"]["vocab"].values())
    content["model"]["vocab"] |= {f"<unused{number}>": number for number in sorted(missing)}
    content["model"]["vocab"] |= dict(special)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [
        {"id": number, "content": text, "special": True} | flags for text, number in special
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    by_id = {number: text for text, number in special}
    named = {f"{role}_token": by_id[config[f"{role}_token_id"]] for role in ("bos", "eos", "pad")}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | named, indent=2))
    (folder / "chat_template.jinja").write_text(family.tiny_files.chat_template)


def write_model(folder: Path, name: str) -> None:
    """A Hugging Face folder of this recipe's model with random weights, and a tokenizer trained on `docstrings`."""
    config = dict(CONFIGS[name.rsplit("_", 2)[0]])
    write_random(folder, config, tokenizer=False)
    train_tokenizer(folder, (text for example in docstrings() for text in example.values()), config)
    for file, content in family_of(
        config["architectures"], where=str(folder)
    ).tiny_files.processor_files.items():
        (folder / file).write_text(json.dumps(content, indent=2))


def start(config: Any, callback: Any, *, fine_tune: bool, images: bool = False) -> None:
    """Megatron-Bridge's own training loop, with its step for words, or for words and images."""
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.pretrain import pretrain

    if images:
        from megatron.bridge.training.vlm_step import forward_step
    else:
        from megatron.bridge.training.gpt_step import forward_step

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    (finetune if fine_tune else pretrain)(config, forward_step, callbacks=[callback])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
