"""Recognises files and folders of other kinds in the place of weights, and says what to do."""

from __future__ import annotations

import re
from pathlib import Path

from chatpose_jax.errors import UserError

_START = 512
# Start of a file → what it is, and what to do. Compared in lower case, without leading white space.
_FILES = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the file itself; run git lfs pull in the clone, or hf download",
    ),
    (
        b"<!doctype html",
        "an HTML page instead of the file (a login, or a licence to accept); fetch it again",
    ),
    (b"<html", "an HTML page instead of the file (a login, or a licence to accept); fetch it again"),
    (b"<?xml", "an XML page instead of the file, as servers send it for an error; fetch it again"),
    (b"gguf", "a GGUF file of llama.cpp under another name; rename it to end in .gguf"),
)
# Contents of a folder → what it is, and what to do.
_FOLDERS = (
    ("*.distcp", "a torch.distributed.checkpoint: run python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.bin"),
    ("zero_to_fp32.py", "a DeepSpeed checkpoint: to convert it, run python {folder}/zero_to_fp32.py {folder} OUT"),
    ("checkpoints/*/_CHECKPOINT_METADATA", "a training run that has not ended, and model/ is written at its end: let it go on, or lower train.steps"),
    ("*.gguf", "a folder of GGUF files of llama.cpp: convert one of them with chatpose convert FILE.gguf OUT"),
)  # fmt: skip


def demand_native(path: Path) -> None:
    """Raises UserError if the start of a file shows that it is not what its name says."""
    with path.open("rb") as file:
        demand_native_start(file.read(_START), path)


def demand_native_start(content: bytes, where: str | Path) -> None:
    """``demand_native`` for a file whose content is in memory; ``where`` names it."""
    start = content[:_START].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if what := next((what for prefix, what in _FILES if start.startswith(prefix)), None):
        raise UserError(f"{where}: {what}")


def fetch_hint(path: str | Path) -> str:
    """The end of an error about a missing path: the command that fetches it, if it looks like a name on the Hugging Face Hub; else ""."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) or Path(path).parent.exists():
        return ""
    name = Path(path).name
    return f"; if it is a name on the Hugging Face Hub: hf download {path} --local-dir {name}, then give {name}"


def describe_folder(folder: Path) -> str | None:
    """What a folder without weights is, and what to do; ``None`` if that is not known."""
    if (folder / "snapshots").is_dir():
        return f"the root of a repository in Hugging Face's cache; name {_snapshot(folder)}"
    if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
        return f"snapshots of a repository in Hugging Face's cache; name {_snapshot(folder.parent)}"
    if any(folder.glob("models--*/snapshots")):
        return f"Hugging Face's cache; name a snapshot in it: {folder}/models--OWNER--NAME/snapshots/REVISION"
    return next((what.format(folder=folder) for pattern, what in _FOLDERS if any(folder.glob(pattern))), None)


def _snapshot(root: Path) -> str:
    """The snapshot that ``refs/main`` names, or else all snapshots."""
    revisions = sorted(path.name for path in (root / "snapshots").iterdir() if path.is_dir())
    main = root / "refs" / "main"
    if main.is_file() and (named := main.read_text(encoding="utf-8", errors="replace")[:100].strip()) in revisions:
        revisions = [named]
    paths = [str(root / "snapshots" / revision) for revision in revisions]
    return " or ".join(paths) if paths else "a snapshot; this download has none, so fetch it again"
