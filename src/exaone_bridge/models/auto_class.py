"""Which of Transformers' auto classes loads a model. It imports Transformers when called."""

from __future__ import annotations

from typing import Any

__all__ = ["auto_class"]

_HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


def auto_class(config: Any) -> Any:
    """Return the auto class for models with images, with a head, or for language models.

    Args:
        config: Transformers' config of the model.
    """
    import transformers

    if hasattr(config, "vision_config"):
        return transformers.AutoModelForImageTextToText
    first = (config.architectures or [""])[0]
    kind = next((head for head in _HEADS if first.endswith(f"For{head}")), "CausalLM")
    return getattr(transformers, f"AutoModelFor{kind}")
