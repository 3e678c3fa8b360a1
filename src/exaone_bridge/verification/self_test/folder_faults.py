"""Faults on disk: a folder against a copy of it in which one thing is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from exaone_bridge.verification.self_test.fault import Fault

__all__ = ["FOLDER_FAULTS"]

Tensors = dict[str, torch.Tensor]
ATTENTION = "model.layers.4.self_attn"


def _tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return plant


def _config(**fields: Any) -> Callable[[Path], None]:
    """`...` takes a field away; a mapping changes a field's own fields."""

    def plant(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for name, value in fields.items():
            if value is ...:
                del config[name]
            else:
                config[name] = {**config[name], **value} if isinstance(value, dict) else value
        path.write_text(json.dumps(config))

    return plant


def _swap(tensors: Tensors, a: str, b: str) -> None:
    tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()


def _flip(tensors: Tensors) -> None:
    tensors["model.norm.weight"].view(torch.int32)[3] ^= 1


def _transpose(tensors: Tensors) -> None:
    name = f"{ATTENTION}.o_proj.weight"
    tensors[name] = tensors[name].t().contiguous()


def _half(tensors: Tensors) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].bfloat16()


def _duplicate(tensors: Tensors) -> None:
    tensors["model.layers.8.mlp.up_proj.weight"] = tensors[
        "model.layers.7.mlp.up_proj.weight"
    ].clone()


def _permute_experts(tensors: Tensors) -> None:
    for which in ("gate", "up", "down"):
        first, second = (
            f"model.layers.3.mlp.experts.{expert}.{which}_proj.weight" for expert in (1, 6)
        )
        _swap(tensors, first, second)


def _edit(name: str, before: str, after: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / name
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after, 1))

    return plant


def _fault(
    name: str,
    plant: Callable[[Path], None],
    *caught: str,
    begins: tuple[int | None, str] | None = None,
    **more: Any,
) -> Fault:
    return Fault(
        name=name,
        model=more.pop("model", "exaone4"),
        caught=caught,
        begins=begins,
        folder=plant,
        **more,
    )


def _ernie(name: str, plant: Callable[[Path], None], *caught: str, **more: Any) -> Fault:
    return _fault(name, plant, *caught, model="ernie45", **more)


_S, _F = "sliding_attention", "full_attention"

FOLDER_FAULTS: tuple[Fault, ...] = (
    _fault(
        "a tensor missing",
        _tensors(lambda t: t.pop(f"{ATTENTION}.q_proj.weight")),
        "tensors",
        "logits",
    ),
    _fault(
        "a tensor twice, under a second name",
        _tensors(_duplicate),
        "tensors",
        "logits",
    ),
    _fault(
        "a tensor renamed",
        _tensors(lambda t: t.update({"norm.weight": t.pop("model.norm.weight")})),
        "tensors",
    ),
    _fault("a tensor of another type", _tensors(_half), "tensors", "logits"),
    _fault("a tensor transposed", _tensors(_transpose), "tensors", "logits"),
    _fault("one bit on disk", _tensors(_flip), "tensors"),
    _fault(
        "keys and values swapped on disk",
        _tensors(lambda t: _swap(t, f"{ATTENTION}.k_proj.weight", f"{ATTENTION}.v_proj.weight")),
        "tensors",
        "logits",
        begins=(4, "attention"),
    ),
    _fault(
        "layer_types with layer 3 windowed",
        _config(layer_types=[_S, _S, _S, _S, _S, _S, _S, _F]),
        "config",
        "logits",
        begins=(3, "attention"),
    ),
    _fault("layer_types lost", _config(layer_types=...), "config"),
    _fault(
        "sliding_window 9 for 8",
        _config(sliding_window=9),
        "config",
        "logits",
        begins=(0, "attention"),
    ),
    _fault(
        "RoPE factor in config.json",
        _config(rope_parameters={"factor": 8.0}),
        "config",
        "logits",
        begins=(0, "attention"),
    ),
    _fault(
        "epsilon in config.json", _config(rms_norm_eps=1e-6), "config", "logits", begins=(0, "norm")
    ),
    _fault(
        "tie_word_embeddings in config.json", _config(tie_word_embeddings=True), "config", "logits"
    ),
    _fault("eos_token_id in config.json", _config(eos_token_id=2), "config"),
    _fault(
        "a byte of the tokenizer",
        _edit("tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true'),
        "files",
        "generation",
        generation=True,
    ),
    _fault(
        "the template always thinks",
        _edit("chat_template.jinja", "and enable_thinking", "or true"),
        "files",
        "generation",
        generation=True,
    ),
    _fault(
        "generation config lost",
        lambda folder: (folder / "generation_config.json").unlink(),
        "files",
    ),
    _fault(
        "a space at the end of the template",
        _edit("chat_template.jinja", "{%- endif %}", "{%- endif %} "),
        "files",
    ),
    _ernie(
        "tensors beside the model lost",
        _tensors(lambda t: [t.pop(n) for n in list(t) if "mtp" in n]),
        "tensors",
    ),
    _ernie(
        "experts 1 and 6 swapped on disk",
        _tensors(_permute_experts),
        "tensors",
        "logits",
        begins=(3, "mlp"),
    ),
    _ernie(
        "an expert missing",
        _tensors(lambda t: t.pop("model.layers.2.mlp.experts.3.up_proj.weight")),
        "tensors",
        "logits",
    ),
    _ernie("moe_k 2 for 3", _config(moe_k=2), "config", "logits", begins=(1, "router")),
    _ernie("moe_norm_min 0.9", _config(moe_norm_min=0.9), "config", "logits", begins=(1, "router")),
    _ernie("num_nextn_predict_layers lost", _config(num_nextn_predict_layers=...), "config"),
)
