"""A cache of the Hugging Face Hub, made by hand: one model in two revisions. The Hub is offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

MODEL, PINNED, MAIN = "owner/model", "a" * 40, "b" * 40


@pytest.fixture
def hub(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cached model, with two revisions of other weights; `main` is the second."""
    folder = tmp_path / "hub" / "models--owner--model"
    for number, commit in enumerate((PINNED, MAIN)):
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (folder / "blobs").mkdir(exist_ok=True)
        for path in tiny("exaone4-1.2b", seed=number).iterdir():
            blob = folder / "blobs" / f"{number}{path.name}"
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
        config = json.loads((snapshot / "config.json").read_text())
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").write_text(json.dumps(config | {"x_revision": number}))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(MAIN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder
