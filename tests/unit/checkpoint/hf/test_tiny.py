"""Random checkpoints: away from identity, reproducible, and complete."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from exaone_bridge.checkpoint.hf.tiny import random_weights, write_random
from exaone_bridge.errors import BridgeError, CheckpointError, UnsupportedConfig
from exaone_bridge.models import FAMILIES
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.models.exaone45 import EXAONE45
from exaone_bridge.schema.param_mapping import HFTensor

SINGLE = "model.safetensors"


def drawn(
    shapes: dict[str, tuple[int, ...]], dtype: str, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Random tensors of these shapes: every axis of every tensor has a letter of its own."""
    dims: dict[str, int] = {}
    tensors = []
    for name, shape in shapes.items():
        axes = "".join(chr(0x4E00 + len(dims) + number) for number in range(len(shape)))
        dims |= dict(zip(axes, shape, strict=True))
        tensors.append(HFTensor(name, axes))
    return random_weights(tensors, dims, dtype, seed)


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


SHAPES = {"norm": (400,), "wide": (30, 500), "tall": (500, 30), "embedding": (387, 64)}


def test_random_weights_depend_on_the_seed_only() -> None:
    one, again, other = (dict(drawn(SHAPES, "float32", seed)) for seed in (1, 1, 2))
    assert (
        list(one) == list(SHAPES)
        and {name: tuple(tensor.shape) for name, tensor in one.items()} == SHAPES
    )
    assert all(torch.equal(one[name], again[name]) for name in SHAPES)
    assert not any(torch.equal(one[name], other[name]) for name in SHAPES)


def test_random_weights_leave_torchs_generator_alone() -> None:
    state = torch.get_rng_state()
    dict(drawn(SHAPES, "float32", 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_weights_are_away_from_identity_and_keep_the_scale() -> None:
    made = dict(drawn(SHAPES, "float32", 0))
    assert made["norm"].mean().item() == pytest.approx(1, abs=0.06)
    assert made["norm"].std().item() == pytest.approx(0.3, abs=0.04)
    for name in ("wide", "tall", "embedding"):
        assert made[name].mean().item() == pytest.approx(0, abs=0.01)
        assert (made[name].std() * SHAPES[name][1] ** 0.5).item() == pytest.approx(1, abs=0.03)
    assert not torch.equal(made["wide"].flatten(), made["tall"].flatten())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_random_weights_are_rounded_from_the_same_numbers(dtype: str) -> None:
    full, rounded = (dict(drawn(SHAPES, kind, 0)) for kind in ("float32", dtype))
    assert all(torch.equal(full[name].to(getattr(torch, dtype)), rounded[name]) for name in SHAPES)


def test_write_random_writes_all_or_nothing(tmp_path: Path) -> None:
    config = EXAONE4.tiny["exaone4-1.2b"]
    write_random(tmp_path / "a", config, seed=3)
    assert names_in(tmp_path / "a") == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        SINGLE,
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(CheckpointError, match="exists already"):
        write_random(tmp_path / "a", config, seed=4)
    with pytest.raises(UnsupportedConfig, match="num_hidden_layers"):
        write_random(tmp_path / "b", {**config, "num_hidden_layers": 0})
    with pytest.raises(BridgeError, match="architectures"):
        write_random(tmp_path / "b", {**config, "architectures": ["GPT2LMHeadModel"]})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    write_random(tmp_path / "c", config, seed=3, tokenizer=False)
    assert names_in(tmp_path / "c") == ["config.json", SINGLE]
    assert (tmp_path / "c" / SINGLE).read_bytes() == before[SINGLE]


def test_tiny_model_has_exactly_the_tensors_of_the_mappings(tmp_path: Path) -> None:
    for name, config in EXAONE4.tiny.items():
        write_random(tmp_path / name, config)
        with safe_open(tmp_path / name / SINGLE, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
        assert shapes == EXAONE4.describe(config).hf_shapes


@pytest.mark.parametrize("name", ["exaone4", "exaone-moe", "ernie45"])
def test_tokenizer_has_merges_that_are_applied(name: str, tiny: Any) -> None:
    """Converters to other formats require merges."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny(name))
    text = " the hen and a thing\n\u00e9"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokens)[:3] == ["\u0120the", "\u0120", "he"]
    assert len(tokens) < len(text.encode()) and tokenizer.decode(tokens) == text
    assert isinstance(AutoConfig.from_pretrained(tiny(name)).vocab_size, int)


def test_processor_has_the_patches_of_the_vision_encoder(tiny: Any) -> None:
    from transformers import AutoProcessor

    vision = EXAONE45.tiny["exaone45"]["vision_config"]
    fields = {"patch_size": 6, "spatial_merge_size": 1, "window_size": 18}
    folder = tiny("exaone45", vision_config=vision | fields)
    processor = AutoProcessor.from_pretrained(folder)
    images = processor.image_processor(images=[Image.new("RGB", (30, 18))], return_tensors="pt")
    assert images["image_grid_thw"].tolist() == [[1, 3, 5]]
    assert tuple(images["pixel_values"].shape) == (15, 3 * 2 * 6 * 6)


def test_configs_of_tiny_models_load_in_transformers_alone() -> None:
    """In a process without exaone_bridge, which would make numbers of ERNIE's lists."""
    script = "import json, sys; from transformers import AutoConfig\n"
    script += "for c in json.load(sys.stdin): AutoConfig.for_model(**c)"
    configs = [config for family in FAMILIES for config in family.tiny.values()]
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(configs),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
