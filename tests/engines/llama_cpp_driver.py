"""Converts exports to GGUF and computes their logits, in llama.cpp's environment. Not a test.

    python tests/engines/llama_cpp_driver.py LLAMA_CPP FOLDER ...

LLAMA_CPP is the source with the converter. Each FOLDER has `exported` and `tokens.npy`, and gets
`model.gguf` and `logits.npy`, or `error.txt`.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import numpy as np

CONTEXT, BATCH = 512, 128  # tokens; a prompt of 300 takes three batches


def convert(folder: Path) -> None:
    """Run the converter as its command does, with every weight in fp32."""
    import convert_hf_to_gguf

    target = folder / "model.gguf"
    sys.argv = ["convert_hf_to_gguf.py", str(folder / "exported"), "--outtype", "f32"]
    sys.argv += ["--outfile", str(target)]
    convert_hf_to_gguf.main()


def logits(folder: Path) -> np.ndarray:
    """Return the logits [S, V] of the tokens [S], with a KV cache in fp32."""
    from llama_cpp import GGML_TYPE_F32, Llama

    tokens = np.load(folder / "tokens.npy").tolist()
    model = Llama(
        str(folder / "model.gguf"),
        n_ctx=CONTEXT,
        n_batch=BATCH,
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)])


def main() -> None:
    """Convert and run every folder; one that fails does not stop the others."""
    source, *folders = sys.argv[1:]
    sys.path.insert(0, source)
    from conversion.base import TextModel

    # The converter knows a tokenizer by a hash of what it makes of a text. Those of the published
    # models are in its list; the tiny ones' are not, and the logits do not depend on the answer.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    for folder in map(Path, folders):
        try:
            convert(folder)
            np.save(folder / "logits.npy", logits(folder))
        except (Exception, SystemExit):
            (folder / "error.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main()
