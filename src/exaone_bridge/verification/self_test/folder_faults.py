"""Faults on disk: a Hugging Face folder is compared with a copy in which one thing is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from exaone_bridge.verification.self_test.fault import FaultSite, FolderFault

__all__ = ["FOLDER_FAULTS"]

Tensors = dict[str, torch.Tensor]
FolderChange = Callable[[Path], None]

ATTENTION = "model.layers.4.self_attn"
SLIDING, FULL = "sliding_attention", "full_attention"


def _tensors(change: Callable[[Tensors], object]) -> FolderChange:
    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return rewrite


def _config(**fields: Any) -> FolderChange:
    """Change fields of config.json; `...` removes one, a dict changes some of its entries."""

    def rewrite(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for name, value in fields.items():
            if value is ...:
                del config[name]
            else:
                config[name] = {**config[name], **value} if isinstance(value, dict) else value
        path.write_text(json.dumps(config))

    return rewrite


def _text(name: str, before: str, after: str) -> FolderChange:
    """Replace the first occurrence of a text in a file."""

    def rewrite(folder: Path) -> None:
        path = folder / name
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after, 1))

    return rewrite


def _swap(tensors: Tensors, a: str, b: str) -> None:
    tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()


def _flip_one_bit(tensors: Tensors) -> None:
    tensors["model.norm.weight"].view(torch.int32)[3] ^= 1


def _transpose(tensors: Tensors) -> None:
    name = f"{ATTENTION}.o_proj.weight"
    tensors[name] = tensors[name].t().contiguous()


def _to_bf16(tensors: Tensors) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].bfloat16()


def _duplicate(tensors: Tensors) -> None:
    copied = tensors["model.layers.7.mlp.up_proj.weight"].clone()
    tensors["model.layers.8.mlp.up_proj.weight"] = copied


def _swap_experts(tensors: Tensors) -> None:
    experts = "model.layers.3.mlp.experts"
    for projection in ("gate_proj", "up_proj", "down_proj"):
        _swap(tensors, *(f"{experts}.{number}.{projection}.weight" for number in (1, 6)))


def _drop_passthrough(tensors: Tensors) -> None:
    for name in [name for name in tensors if "mtp" in name]:
        del tensors[name]


def _selection_bias_with_two_axes(tensors: Tensors) -> None:
    name = "model.layers.2.mlp.e_score_correction_bias"
    tensors[name] = tensors[name][None]


def _gates_to_bf16(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        tensors[name] = tensors[name].bfloat16()


def _remove(name: str) -> FolderChange:
    return lambda folder: (folder / name).unlink()


def _fault(
    name: str,
    change: FolderChange,
    *failing: str,
    site: FaultSite | None = None,
    model: str = "exaone4",
    generation: bool = False,
) -> FolderFault:
    return FolderFault(
        name=name, model=model, failing=failing, site=site, change=change, generation=generation
    )


def _ernie(
    name: str, change: FolderChange, *failing: str, site: FaultSite | None = None
) -> FolderFault:
    return _fault(name, change, *failing, site=site, model="ernie45")


def _exaone_moe(
    name: str, change: FolderChange, *failing: str, site: FaultSite | None = None
) -> FolderFault:
    return _fault(name, change, *failing, site=site, model="exaone-moe")


FOLDER_FAULTS: tuple[FolderFault, ...] = (
    _fault(
        "a tensor missing",
        _tensors(lambda tensors: tensors.pop(f"{ATTENTION}.q_proj.weight")),
        "tensors",
        "logits",
    ),
    _fault(
        "a tensor duplicated under another name",
        _tensors(_duplicate),
        "tensors",
        "logits",
    ),
    _fault(
        "a tensor renamed",
        _tensors(lambda tensors: tensors.update({"norm.weight": tensors.pop("model.norm.weight")})),
        "tensors",
        "logits",
    ),
    _fault(
        "a tensor of another dtype",
        _tensors(_to_bf16),
        "tensors",
        "logits",
        site=FaultSite("mlp", 1),
    ),
    _fault("a tensor transposed", _tensors(_transpose), "tensors", "logits"),
    _fault("one bit on disk flipped", _tensors(_flip_one_bit), "tensors"),
    _fault(
        "keys and values swapped on disk",
        _tensors(
            lambda tensors: _swap(
                tensors, f"{ATTENTION}.k_proj.weight", f"{ATTENTION}.v_proj.weight"
            )
        ),
        "tensors",
        "logits",
        site=FaultSite("attention", 4),
    ),
    _fault(
        "layer_types with sliding-window layer 3",
        _config(layer_types=[SLIDING] * 7 + [FULL]),
        "config",
        "logits",
        site=FaultSite("attention", 3),
    ),
    _fault("layer_types removed", _config(layer_types=...), "config", "logits"),
    _fault(
        "sliding_window 9 instead of 8",
        _config(sliding_window=9),
        "config",
        "logits",
        site=FaultSite("attention", 0),
    ),
    _fault(
        "RoPE factor changed in config.json",
        _config(rope_parameters={"factor": 8.0}),
        "config",
        "logits",
        site=FaultSite("attention", 0),
    ),
    _fault(
        "rms_norm_eps changed in config.json",
        _config(rms_norm_eps=1e-6),
        "config",
        "logits",
        site=FaultSite("norm", 0),
    ),
    _fault(
        "tie_word_embeddings changed in config.json",
        _config(tie_word_embeddings=True),
        "config",
        "logits",
    ),
    _fault("eos_token_id changed in config.json", _config(eos_token_id=2), "config"),
    _fault(
        "a setting of the tokenizer changed",
        _text("tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true'),
        "files",
        "generation",
        generation=True,
    ),
    _fault(
        "the chat template always thinking",
        _text("chat_template.jinja", "and enable_thinking", "or true"),
        "files",
        "generation",
        generation=True,
    ),
    _fault("generation_config.json missing", _remove("generation_config.json"), "files"),
    _fault(
        "a space appended to the chat template",
        _text("chat_template.jinja", "{%- endif %}", "{%- endif %} "),
        "files",
    ),
    _ernie("passthrough tensors missing", _tensors(_drop_passthrough), "tensors"),
    _ernie(
        "experts 1 and 6 swapped on disk",
        _tensors(_swap_experts),
        "tensors",
        "logits",
        site=FaultSite("mlp", 3),
    ),
    _ernie(
        "an expert's tensor missing",
        _tensors(lambda tensors: tensors.pop("model.layers.2.mlp.experts.3.up_proj.weight")),
        "tensors",
        "logits",
    ),
    _ernie(
        "moe_k 2 instead of 3",
        _config(moe_k=2),
        "config",
        "logits",
        site=FaultSite("router", 1),
    ),
    _ernie(
        "moe_norm_min 0.9",
        _config(moe_norm_min=0.9),
        "config",
        "logits",
        site=FaultSite("router", 1),
    ),
    _ernie(
        "num_nextn_predict_layers removed",
        _config(num_nextn_predict_layers=...),
        "config",
    ),
    _exaone_moe("passthrough tensors missing", _tensors(_drop_passthrough), "tensors"),
    _exaone_moe(
        "a selection bias written as [1, E]",
        _tensors(_selection_bias_with_two_axes),
        "tensors",
        "logits",
    ),
    _exaone_moe(
        "gates written in another dtype",
        _tensors(_gates_to_bf16),
        "tensors",
        "logits",
        site=FaultSite("router", 1),
    ),
    _exaone_moe("layer_types removed", _config(layer_types=...), "config", "logits"),
    _exaone_moe(
        "windows of 4096 instead of 5",
        _config(sliding_window=4096, sliding_windows=[4096, 4096, 4096, 0]),
        "config",
        "logits",
        site=FaultSite("attention", 0),
    ),
    _exaone_moe(
        "norm_topk_prob false",
        _config(norm_topk_prob=False),
        "config",
        "logits",
        site=FaultSite("router", 1),
    ),
    _exaone_moe(
        "first_k_dense_replace and mlp_layer_types changed",
        _config(first_k_dense_replace=2, mlp_layer_types=["dense", "dense", "sparse", "sparse"]),
        "config",
        "logits",
    ),
)
