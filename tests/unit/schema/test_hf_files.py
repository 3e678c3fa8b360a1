"""Files beside weights and config that go from source to export as they are."""

from __future__ import annotations

from pathlib import Path

from exaone_bridge.schema.hf_files import copy_companion_files


def test_companion_files_are_copied_and_no_others(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    companions = [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "vocab.json",
    ]
    companions += [
        "merges.txt",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
    ]
    companions += [
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
        "vocab.txt",
    ]
    others = [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "README.md",
        "modeling_x.py",
        "pytorch_model.bin",
        ".gitattributes",
    ]
    for name in companions + others:
        (source / name).write_bytes(f"{name}\r\n\0".encode())
    (source / "tokenizer_folder").mkdir()
    assert copy_companion_files(source, target) == sorted(companions)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        name: (source / name).read_bytes() for name in companions
    }
