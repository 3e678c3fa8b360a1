"""Configurations and prompts with images of the tiny EXAONE 4.5."""

from __future__ import annotations

import copy
from typing import Any

import torch

from exaone_bridge.models.exaone45.config import read_hf_config
from exaone_bridge.models.exaone45.prompts import image_prompts
from exaone_bridge.models.exaone45.tiny import TINY
from tests.helpers.training import Batches

CONFIG = TINY["exaone45"]


def changed(**fields: Any) -> dict[str, Any]:
    """Return config.json fields for the `tiny` fixture; `text_config__x=1` changes a nested one."""
    result: dict[str, Any] = {}
    for path, value in fields.items():
        outer, _, inner = path.partition("__")
        if inner:
            result.setdefault(outer, copy.deepcopy(CONFIG[outer]))[inner] = value
        else:
            result[outer] = value
    return result


def image_batches(count: int = 4, seed: int = 7, config: dict[str, Any] = CONFIG) -> Batches:
    """Return prompts of even length S, with one image, several, a video, and none."""
    tokens, images = image_prompts(read_hf_config(config), count, seed)
    # Transformers gives the embedding of the padding token no gradient.
    tokens = torch.where(tokens == 0, 1, tokens)
    appended = torch.full((len(tokens), 2 if tokens.shape[1] % 2 else 1), 5)
    return list(zip(torch.cat((tokens, appended), dim=1).split(1), images, strict=True))
