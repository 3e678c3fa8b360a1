"""The processor of a tiny EXAONE 4.5, with or without torchvision."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None


def load_processor(hf_path: Path) -> Any:
    """Load the processor of a directory.

    Transformers' video processor needs torchvision. Without it, the processor is assembled from its
    other parts.
    """
    from transformers import AutoProcessor, AutoTokenizer, Exaone4_5_Processor
    from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

    if HAS_TORCHVISION:
        return AutoProcessor.from_pretrained(hf_path)
    processor = object.__new__(Exaone4_5_Processor)
    processor.tokenizer = AutoTokenizer.from_pretrained(hf_path)
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(hf_path)
    processor.video_processor = None
    processor.chat_template = processor.tokenizer.chat_template
    for kind in ("image", "video"):
        token = f"<|{kind}_pad|>"
        setattr(processor, f"{kind}_token", token)
        token_id = processor.tokenizer.convert_tokens_to_ids(token)
        setattr(processor, f"{kind}_token_id", token_id)
    return processor
