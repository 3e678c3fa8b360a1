"""Every damage of a Hugging Face folder raises one sentence where the folder is opened."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.errors import BridgeError
from tests.helpers.damage import (
    INDEX,
    Q_PROJ,
    WEIGHTS,
    Damage,
    config_text,
    elsewhere,
    in_shards,
    into_pickles,
    link_out,
    misplace,
    overlap,
    set_bytes,
    set_config,
    set_header,
    set_rope,
    set_tensors,
)

SINGLE_FILE: dict[str, tuple[Damage, tuple[str, ...]]] = {
    # files
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        (f"neither {WEIGHTS} nor", "download the weights"),
    ),
    "empty weights": (
        set_bytes(lambda data: b""),
        (WEIGHTS, "0 bytes long", "download or copy it again"),
    ),
    "truncated in the header": (
        set_bytes(lambda data: data[:100]),
        (WEIGHTS, "the file has 100", "copy it again"),
    ),
    "truncated in the data": (
        set_bytes(lambda data: data[:-1]),
        (WEIGHTS, "its header is not valid", "copy it again"),
    ),
    "bytes too many": (
        set_bytes(lambda data: data + b"\0"),
        (WEIGHTS, "its header is not valid", "copy it again"),
    ),
    "overlap": (
        set_header(overlap),
        (WEIGHTS, "its header is not valid", "copy it again"),
    ),
    "header of nonsense": (
        set_bytes(lambda data: data[:8] + b"}" + data[9:]),
        (WEIGHTS, "its header is not valid"),
    ),
    "a folder for weights": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
        (f"neither {WEIGHTS} nor",),
    ),
    "pickles": (
        into_pickles("pytorch_model.bin"),
        ("'pytorch_model.bin'", "pickles", "rejected", "save_pretrained"),
    ),
    "pickles in shards": (
        into_pickles("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
        ("'pytorch_model-00001-of-00002.bin'", "rejected", "convert them to safetensors"),
    ),
    "a pickle by another name": (
        into_pickles("consolidated.00.pth"),
        ("'consolidated.00.pth'", "rejected"),
    ),
    # tensors
    "wrong shape": (
        set_tensors(lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].T.contiguous()})),
        (WEIGHTS, Q_PROJ, "[64, 96]", "[96, 64]", "check that config.json belongs"),
    ),
    "wrong rank": (
        set_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(1, 64)})),
        (WEIGHTS, "model.norm.weight", "[1, 64]", "[64]", "check that config.json belongs"),
    ),
    "wrong dtype": (
        set_tensors(lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].double() / 3})),
        (WEIGHTS, Q_PROJ, "itself in F32", "makes it F32", "most at [", "convert the weights"),
    ),
    "a dtype of no family": (
        set_tensors(lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].long()})),
        (WEIGHTS, Q_PROJ, "dtype I64", "makes it F32"),
    ),
    "tensor missing": (
        set_tensors(lambda tensors: tensors.pop(Q_PROJ)),
        ("1 missing keys", Q_PROJ, "download them again"),
    ),
    "many tensors missing": (
        set_tensors(
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "norm" in name]
        ),
        ("33 missing keys", "model.layers.0.", "and 28 more"),
    ),
    "tensor extra": (
        set_tensors(
            lambda tensors: tensors.update({"model.layers.8.mlp.router.weight": torch.ones(2)})
        ),
        (
            "1 unexpected keys",
            "model.layers.8.mlp.router.weight",
            "check that config.json",
        ),
    ),
    "fewer layers than weights": (
        set_config(num_hidden_layers=7, layer_types=["full_attention"] * 7, sliding_window=None),
        (
            "11 unexpected keys",
            "model.layers.7.",
            "check that config.json belongs",
        ),
    ),
    # config.json
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        ("config.json", "missing", "copy it again"),
    ),
    "config not JSON": (
        config_text("{'a': 1}"),
        ("config.json", "not valid JSON", "copy it again"),
    ),
    "config truncated": (
        config_text('{"architectures": ["Exaone4'),
        ("config.json", "not valid JSON", "copy it again"),
    ),
    "config empty": (config_text(""), ("config.json", "not valid JSON", "copy it again")),
    "config a list": (
        config_text("[1, 2]"),
        ("config.json", "[1, 2]", "must be a JSON object", "copy it again"),
    ),
    "config not text": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"),
        ("config.json", "not UTF-8", "copy it again"),
    ),
    "unknown rope_type": (
        set_rope(rope_type="yarn"),
        ("rope_type is 'yarn'", "one of 'default', 'llama3'"),
    ),
    "unknown rope_type, old name": (
        set_config(
            rope_parameters=..., rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0}
        ),
        ("rope_type is 'linear'", "one of 'default', 'llama3'"),
    ),
    "half a llama3": (
        set_rope(low_freq_factor=None),
        ("low_freq_factor is None", "must be a finite number"),
    ),
    "layer_types too short": (
        set_config(layer_types=["full_attention"] * 7),
        ("layer_types is '7 entries'", "one entry for each of num_hidden_layers=8"),
    ),
    "layer_types too long": (
        set_config(layer_types=["sliding_attention"] * 9),
        ("layer_types is '9 entries'", "one entry for each of num_hidden_layers=8"),
    ),
    "layer_types of another name": (
        set_config(layer_types=["full_attention"] * 7 + ["chunked_attention"]),
        ("layer_types", "chunked_attention", "a list of 'full_attention' and 'sliding_attention'"),
    ),
    "a pattern of letters": (
        set_config(layer_types=..., sliding_window_pattern="LLLG"),
        (
            "sliding_window_pattern is 'LLLG'",
            "Transformers",
            """write "layer_types": ['sliding_attention', ...,""",
        ),
    ),
    "a pattern of null": (
        set_config(layer_types=None, sliding_window_pattern=None),
        ("sliding_window_pattern is None", "Transformers", 'write "layer_types":'),
    ),
    "a pattern of zero": (
        set_config(layer_types=None, sliding_window_pattern=0),
        ("sliding_window_pattern is 0", "a positive whole number", 'write "layer_types":'),
    ),
    "no window and no layer_types": (
        set_config(layer_types=..., sliding_window=None, sliding_window_pattern=4),
        (
            "layer_types is None",
            "Transformers divides by zero",
            "write \"layer_types\": ['full_attention'",
        ),
    ),
    "sliding layers, no window": (
        set_config(sliding_window=None),
        ("sliding_window is None", "a number of keys"),
    ),
    "unknown activation": (
        set_config(hidden_act="gelu"),
        ("hidden_act is 'gelu'", "one of 'silu'"),
    ),
    "unknown dtype": (
        set_config(dtype="float8_e4m3fn"),
        ("dtype is 'float8_e4m3fn'", "'bfloat16'"),
    ),
    "a count of text": (
        set_config(hidden_size="64"),
        ("hidden_size is '64'", "a positive whole number"),
    ),
    "heads not divisible by groups": (
        set_config(num_key_value_heads=3),
        ("num_key_value_heads is 3", "a divisor of num_attention_heads=4"),
    ),
    "an architecture of others": (
        set_config(architectures=["LlamaForCausalLM"]),
        ("config.json", "architectures is ['LlamaForCausalLM']", "one of 'Exaone4ForCausalLM'"),
    ),
    "no architecture": (
        set_config(architectures=...),
        ("architectures is None", "one of 'Exaone4ForCausalLM'"),
    ),
    "an empty architecture": (
        set_config(architectures=[]),
        ("architectures is []", "one of 'Exaone4ForCausalLM'"),
    ),
}

THREE_SHARDS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "index leads to the parent": (
        elsewhere("../escaped.safetensors"),
        (
            INDEX,
            "'../escaped.safetensors'",
            "not the plain name",
            "use a checkpoint that you trust",
        ),
    ),
    "index leads to the root": (
        elsewhere("{tmp}/escaped.safetensors"),
        (INDEX, "escaped.safetensors'", "not the plain name", "use a checkpoint that you trust"),
    ),
    "index leads below": (
        elsewhere("deep/a.safetensors"),
        (INDEX, "'deep/a.safetensors'", "not the plain name"),
    ),
    "shard is a link out": (
        in_shards(link_out),
        ("model-00002-of-00003", "outside.safetensors", "put the file itself"),
    ),
    "shard missing": (
        in_shards(lambda folder, index: (folder / "model-00002-of-00003.safetensors").unlink()),
        (
            INDEX,
            "'model-00002-of-00003.safetensors', which is missing",
            "download or copy that file again",
        ),
    ),
    "shard truncated": (
        in_shards(
            lambda folder, index: os.truncate(folder / "model-00003-of-00003.safetensors", 5000)
        ),
        ("model-00003-of-00003.safetensors", "copy it again"),
    ),
    "tensor in another shard": (
        in_shards(misplace),
        (INDEX, Q_PROJ, "according to this index", "copy the full checkpoint again"),
    ),
    "tensor not in the index": (
        in_shards(lambda folder, index: index["weight_map"].pop(Q_PROJ)),
        (INDEX, Q_PROJ, "is missing according to this index", "copy the full checkpoint again"),
    ),
    "index without a map": (
        in_shards(lambda folder, index: index.pop("weight_map")),
        (INDEX, "has no weight_map"),
    ),
    "index not JSON": (
        lambda folder: (folder / INDEX).write_text("<html>"),
        (INDEX, "not valid JSON", "copy it again"),
    ),
}


def rejected(folder: Path, fragments: tuple[str, ...]) -> None:
    with pytest.raises(BridgeError) as caught:
        HFCheckpoint.open(folder)
    (line,) = str(caught.value).splitlines()
    assert line.endswith(".")
    for fragment in fragments:
        assert fragment in line
    assert not (folder / "loaded").exists()


@pytest.mark.parametrize("name", SINGLE_FILE)
def test_damaged_folder_is_rejected(name: str, tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny("exaone4"), tmp_path / "model")
    damage, fragments = SINGLE_FILE[name]
    damage(tmp_path / "model")
    rejected(tmp_path / "model", fragments)


@pytest.mark.parametrize("name", THREE_SHARDS)
def test_damaged_shards_are_rejected(name: str, sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "model")
    damage, fragments = THREE_SHARDS[name]
    damage(tmp_path / "model")
    rejected(tmp_path / "model", fragments)
