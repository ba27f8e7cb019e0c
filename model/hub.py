"""Finds the folder that holds a model's checkpoint."""

from __future__ import annotations

from pathlib import Path

from specdec.errors import CheckpointError

BUNDLED = "bundled"
BUNDLED_FOLDER = Path(__file__).parent / "bundled" / "checkpoint"
FILES = ("*.json", "*.safetensors", "*.jinja")


def resolve_model(model: str | Path, revision: str | None = None) -> Path:
    """Returns the folder of a model's checkpoint.

    model: "bundled", a local folder, or a Hub id ("owner/name"), which is downloaded into the Hub's cache.
    revision: of a Hub id; None is the newest.

    Raises CheckpointError where it is none of these, or the Hub cannot serve it; ValueError for another type.
    """
    if not isinstance(model, str | Path):
        raise ValueError(f"model = {model!r} must be a string or a path: 'bundled', a checkpoint folder or a Hub id")
    if str(model) == BUNDLED:
        if revision is not None:
            raise CheckpointError(f"revision {revision!r}: the bundled checkpoint has no revisions")
        return BUNDLED_FOLDER
    if str(model) == "":
        raise CheckpointError("model '' is empty: give 'bundled', a checkpoint folder or a Hub id")
    try:
        folder = Path(model).expanduser()
    except RuntimeError as error:  # ~someone without a home
        raise CheckpointError(f"model {str(model)!r} does not exist: {error}") from error
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"revision {revision!r}: {folder} is a local folder, which has no revisions")
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file: give the checkpoint's folder")
    if isinstance(model, Path) or str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise CheckpointError(f"model {str(model)!r} does not exist: give 'bundled', a checkpoint folder or a Hub id")
    return _download(str(model), revision)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the Hub client's own errors and those of whichever HTTP library it uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"model {repo_id!r} is no local folder and cannot be had from the Hub: {reason}"
        ) from error
