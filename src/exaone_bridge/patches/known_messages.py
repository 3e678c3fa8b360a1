"""Hides messages of libraries that a user of exaone_bridge cannot act on. No torch.

They say that Transformer Engine, Apex or a GPU is missing, although no model of exaone_bridge needs
them on a CPU, or that a class is deprecated which Megatron-Bridge itself chooses. Each is hidden by
its text; other messages of the same module stay. The environment variable
EXAONE_BRIDGE_SHOW_WARNINGS=1 shows all of them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from exaone_bridge.patches.import_hook import around_import

if TYPE_CHECKING:  # importing it would add a tenth to the time of `import exaone_bridge`
    from logging import LogRecord

__all__ = ["LOGGED", "SHOW_WARNINGS", "WARNED", "hide_known_messages"]

SHOW_WARNINGS = "EXAONE_BRIDGE_SHOW_WARNINGS"

# The beginning of a message of `warnings.warn`, and its category. Megatron-Core 0.19.2,
# Megatron-Bridge 0.6.2, flash-linear-attention 0.4.
WARNED: dict[str, type[Warning]] = {
    "Transformer Engine and Apex are not installed. Falling back to": UserWarning,
    "Apex is not installed. Falling back to Torch Norm": UserWarning,
    "Only transformer-engine>=1.7.0 supports MoE experts, but your version is 0.0.0.": UserWarning,
    "Triton is not supported on current platform, roll back to CPU.": UserWarning,
    "Could not determine local rank from LOCAL_RANK or SLURM_LOCALID. Defaulting": UserWarning,
    "full scope is deprecated. Use empty cuda_graph_modules": UserWarning,
    "MimoModelConfig is experimental and still under active development.": UserWarning,
    "ModelProviderMixin-based model configuration is deprecated.": DeprecationWarning,
}
# The module whose logger logs it -> the beginning of a message. The same versions, and torch 2.11.
LOGGED: dict[str, str] = {
    "torch.utils.cpp_extension": "No CUDA runtime is found, using CUDA_HOME=",
    "megatron.bridge.utils.import_utils": "Import of FP8GlobalStateManager from "
    "megatron.core.extensions.transformer_engine failed with: ",
    "megatron.bridge.utils.fusions": "gradient_accumulation_fusion requires either "
    "TransformerEngine or the fused_weight_gradient_mlp_cuda APEX extension, but neither",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED.",
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec with module ",
}


def hide_known_messages() -> None:
    """Hide the messages of `WARNED` and `LOGGED`, unless the environment variable is set."""
    if os.environ.get(SHOW_WARNINGS):
        return
    import re

    for start, category in WARNED.items():
        warnings.filterwarnings("ignore", re.escape(start), category)
    for module, start in LOGGED.items():
        _hide_logged(module, start)


def _hide_logged(module: str, start: str) -> None:
    """Filter the module's logger, which may log while the module is imported."""

    def is_other(record: LogRecord) -> bool:
        return not record.getMessage().startswith(start)

    @contextlib.contextmanager
    def filtered() -> Iterator[None]:
        import logging

        logging.getLogger(module).addFilter(is_other)
        yield

    if module in sys.modules:
        with filtered():
            return
    around_import(module, filtered)
