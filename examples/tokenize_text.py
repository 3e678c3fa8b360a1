"""Tokenize raw text into Megatron-Core's indexed dataset, for (continued) pretraining.

    python examples/tokenize_text.py --tokenizer /models/EXAONE-4.0-1.2B --output /data/text \\
        corpus/*.jsonl notes.txt

A line of a .jsonl file is a document, whose text is in the field `text`; any other file is one
document. Each document ends with the tokenizer's end-of-sequence token. Then train on it:

    torchrun --nproc-per-node 8 -m exaone_bridge train exaone4_1p2b_pretrain_config \\
        hf_path=/models/EXAONE-4.0-1.2B --save /runs/text dataset.data_path=/data/text

A blend of several sources has a weight before each: "dataset.data_path=[0.3,/data/a,0.7,/data/b]".
"""

# ruff: noqa: I001  (exaone_bridge before megatron)

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

import exaone_bridge  # noqa: F401  hides messages about packages that only GPUs need
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)
from transformers import AutoTokenizer

BATCH = 256  # documents that the tokenizer gets at once, which it spreads over the cores


def main() -> None:
    options = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    end = tokenizer.eos_token_id
    if end is None:
        raise SystemExit(f"{options.tokenizer}: the tokenizer has no end-of-sequence token")
    prefix = str(options.output)
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=DType.optimal_dtype(len(tokenizer)))
    documents = tokens = 0
    for batch in batches(options.files):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            document = torch.tensor([*ids, end])
            builder.add_document(document, [len(document)])
            documents, tokens = documents + 1, tokens + len(document)
    builder.finalize(get_idx_path(prefix))
    print(f"{prefix}.bin: {documents:,} documents, {tokens:,} tokens")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument(
        "--output", type=Path, required=True, help="prefix of the .bin and .idx file"
    )
    parser.add_argument("files", type=Path, nargs="+", help=".jsonl files, or files of plain text")
    return parser.parse_args()


def batches(files: list[Path]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts(files):
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def texts(files: list[Path]) -> Iterator[str]:
    for file in files:
        if file.suffix != ".jsonl":
            yield file.read_text(encoding="utf-8")
            continue
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield text_of(line, f"{file}, line {number}")


def text_of(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{where} is no JSON object with a field `text`") from error
    if not isinstance(text, str):
        raise SystemExit(f"{where} has a `text` that is no string")
    return text


if __name__ == "__main__":
    main()
