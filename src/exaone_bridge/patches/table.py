"""Every change that exaone_bridge makes to Megatron-Bridge, Megatron-Core and Transformers.

`python -m exaone_bridge.patches.table > docs/dev/patches.md` writes the page that lists them.
"""

from __future__ import annotations

import textwrap

from exaone_bridge.patches import (
    auto_bridge_save,
    blend,
    chat_data,
    dora,
    former_names,
    heads,
    import_guard,
    jit_warm_up,
    listed_config_fields,
    lora,
    missing_tokenizer,
    mtp_spec,
    optimizer,
    pinned_revision,
    tracked_iteration,
    vlm_data,
)
from exaone_bridge.patches.patch import Patch

__all__ = ["PATCHES", "markdown"]

PATCHES: tuple[Patch, ...] = (
    import_guard.transformer_engine_placeholder,
    auto_bridge_save.save_hf_weights,
    auto_bridge_save.save_hf_pretrained,
    auto_bridge_save.export_hf_weights,
    auto_bridge_save.mtp_source_key_prefixes,
    pinned_revision.from_hf_pretrained,
    heads.supported_hf_architectures,
    heads.resolve_pretrained_wrapper_cls,
    heads.save_hf_adapter,
    tracked_iteration.load_megatron_model,
    tracked_iteration.from_auto_config,
    missing_tokenizer.load_tokenizer,
    missing_tokenizer.save_megatron_model,
    former_names.apply_run_config_backward_compat,
    mtp_spec.mtp_block_spec,
    optimizer.build_optimizer_group_ranges,
    jit_warm_up.warmup_jit_function,
    lora.have_te,
    lora.init_adapter_wrapper,
    dora.get_weight_norm,
    dora.init_weight_magnitude,
    dora.infer_rank_pattern,
    listed_config_fields.from_dict,
    vlm_data.collators,
    vlm_data.adapters,
    chat_data.tokenize_chat_example,
    chat_data.tokenize_dataset,
    blend.validate,
)

_INTRODUCTION = """\
# Patches

`import exaone_bridge` changes the following functions of Megatron-Bridge, Megatron-Core and
Transformers, when Megatron-Bridge is imported. The original stays reachable as `__wrapped__`.
Every patch acts on EXAONE and ERNIE only: with other models each function does what it does without
exaone_bridge. `exaone_bridge.patches.table` writes this page, and
`exaone_bridge.patches.fingerprints` records the source of these functions, by which
`exaone-bridge doctor` finds those that differ.
"""


def markdown() -> str:
    """Return the page that lists the patches: where, for which version, and why."""
    return "\n".join([_INTRODUCTION, *map(_section, PATCHES)])


def _section(patch: Patch) -> str:
    module, _, name = patch.target.partition(":")
    file = patch.replacement.__module__.replace("exaone_bridge.", "").replace(".", "/") + ".py"
    source = f"{patch.version}, `{module.replace('.', '/')}.py`; patched by `{file}`."
    paragraphs = (
        textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
        for text in (source, patch.reason)
    )
    return "\n\n".join([f"## `{name or module}`", *paragraphs]) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
