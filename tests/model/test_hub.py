from __future__ import annotations

from pathlib import Path

import pytest

from specdec.errors import CheckpointError
from specdec.model.hub import BUNDLED_FOLDER, resolve_model


def test_bundled_and_folders(tmp_path: Path) -> None:
    assert resolve_model("bundled") == BUNDLED_FOLDER
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(tmp_path) == tmp_path


def test_what_does_not_exist_raises(tmp_path: Path) -> None:
    for name in ("nonsense", "./a/b", "/no/such/folder", "a/b/c", tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="does not exist: give 'bundled', a checkpoint folder or a Hub id"):
            resolve_model(name)
    with pytest.raises(CheckpointError, match="model '' is empty"):
        resolve_model("")
    with pytest.raises(CheckpointError, match="model '~nosuchuser/x' does not exist"):
        resolve_model("~nosuchuser/x")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file: give the checkpoint's folder"):
        resolve_model(tmp_path / "file")
    for name in ("bundled", str(tmp_path)):
        with pytest.raises(CheckpointError, match="revision 'v2'"):
            resolve_model(name, revision="v2")


def test_hub_ids_are_downloaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot_download(repo_id: str, **arguments: object) -> str:
        asked.update(arguments, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("zai-org/GLM-4.5-Air", revision="main") == tmp_path
    assert asked["repo_id"] == "zai-org/GLM-4.5-Air"
    assert asked["revision"] == "main"
    assert asked["allow_patterns"] == ["*.json", "*.safetensors", "*.jinja"]


def test_a_hub_that_cannot_serve_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise ConnectionError("offline\nlong explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"'a/b' is no local folder and cannot be had from the Hub: offline$"):
        resolve_model("a/b")
