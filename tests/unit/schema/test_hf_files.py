"""Everything beside weights and config goes from source to export, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from exaone_bridge.schema.hf_files import (
    FOLLOW_LINKS,
    copy_companion_files,
    has_tokenizer,
    links_left_out,
)

COMPANIONS = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "vocab.txt"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("README.md", "LICENSE", "modeling_x.py", "tokenization_x.py", "spm.model", ".gitattributes"),
    *("additional_chat_templates/tools.jinja", "assets/figures/loss.png"),
]
OTHERS = [
    *("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    *("pytorch_model.bin.index.json", "model.gguf", "optimizer.pt", "model.fp8.safetensors"),
    *(".git/HEAD", ".cache/huggingface/x.lock", "__pycache__/modeling_x.pyc"),
    *("checkpoint-5/model.safetensors", "checkpoint-5/tokenizer.json", "onnx/model.onnx"),
]


def test_everything_but_weights_and_config_is_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    for name in COMPANIONS + OTHERS:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(f"{name}\r\n\0".encode())
    (source / "empty_folder").mkdir()
    assert copy_companion_files(source, target) == sorted(COMPANIONS)
    copied = {str(path.relative_to(target)): path for path in target.rglob("*") if path.is_file()}
    assert copied.keys() == set(COMPANIONS)
    assert all(path.read_bytes() == (source / name).read_bytes() for name, path in copied.items())


def test_links_that_leave_the_folder_are_followed_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They always are into the blobs of the hub cache, where every file of a snapshot is."""
    snapshot, target = tmp_path / "model" / "snapshots" / "abc", tmp_path / "target"
    for folder in (snapshot, tmp_path / "model" / "blobs", target):
        folder.mkdir(parents=True)
    (tmp_path / "model" / "blobs" / "0").write_text("tokenizer")
    (tmp_path / "secret").write_text("secret")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0")
    (snapshot / "README.md").symlink_to(tmp_path / "secret")
    (snapshot / "gone.txt").symlink_to(tmp_path / "gone")
    (snapshot / "inside.txt").symlink_to("tokenizer.json")
    assert copy_companion_files(snapshot, target) == ["inside.txt", "tokenizer.json"]
    assert links_left_out(snapshot) == ["README.md"]
    monkeypatch.setenv(FOLLOW_LINKS, "1")
    assert "README.md" in copy_companion_files(snapshot, target)
    assert links_left_out(snapshot) == []
    assert not any(path.is_symlink() for path in target.iterdir())


def test_a_tokenizer_is_recognised(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    (tmp_path / "spm.model").touch()
    assert has_tokenizer(tmp_path)
