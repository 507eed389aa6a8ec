"""What lies where weights should, and is something else: said by name, with what to do."""

from __future__ import annotations

import re
from pathlib import Path

from chatpose_jax.errors import UserError

_START = 512
# How a file begins → what it is, and what to do. Compared in lower case, without space in front.
_FILES = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the file itself; run git lfs pull in the clone, or hf download",
    ),
    (
        b"<!doctype html",
        "an HTML page that was saved in the file's place (a login, a licence to accept); fetch it again",
    ),
    (b"<html", "an HTML page that was saved in the file's place (a login, a licence to accept); fetch it again"),
    (b"<?xml", "an XML page, as servers answer with an error, saved in the file's place; fetch it again"),
    (b"gguf", "a GGUF file of llama.cpp, which is not read here; take the safetensors that it was made from"),
)
# What a folder holds → what it is, and what to do.
_FOLDERS = (
    ("*.distcp", "a torch.distributed.checkpoint: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.bin"),
    ("zero_to_fp32.py", "a DeepSpeed checkpoint: python {folder}/zero_to_fp32.py {folder} OUT puts it together"),
    ("*.gguf", "GGUF files of llama.cpp, which are not read here; take the safetensors that they were made from"),
)  # fmt: skip


def demand_native(path: Path) -> None:
    """Raises UserError for a file that is plainly something else than its name says."""
    with path.open("rb") as file:
        start = file.read(_START).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if what := next((what for prefix, what in _FILES if start.startswith(prefix)), None):
        raise UserError(f"{path}: {what}")


def fetch_hint(path: str | Path) -> str:
    """How an error about a path that is not there ends: with the command that fetches it, where it reads like a name on the Hub."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) or Path(path).parent.exists():
        return ""
    name = Path(path).name
    return f"; if it is a name on the Hugging Face Hub: hf download {path} --local-dir {name}, then give {name}"


def describe_folder(folder: Path) -> str | None:
    """What a folder without weights is and what to do, where that is known."""
    if (folder / "snapshots").is_dir():
        return f"the root of a repository in Hugging Face's cache; name {_snapshot(folder)}"
    if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
        return f"snapshots of a repository in Hugging Face's cache; name {_snapshot(folder.parent)}"
    if any(folder.glob("models--*/snapshots")):
        return f"Hugging Face's cache; name a snapshot in it: {folder}/models--OWNER--NAME/snapshots/REVISION"
    return next((what.format(folder=folder) for pattern, what in _FOLDERS if any(folder.glob(pattern))), None)


def _snapshot(root: Path) -> str:
    """The snapshot that ``refs/main`` names; else those that there are."""
    revisions = sorted(path.name for path in (root / "snapshots").iterdir() if path.is_dir())
    main = root / "refs" / "main"
    if main.is_file() and (named := main.read_text(encoding="utf-8", errors="replace")[:100].strip()) in revisions:
        revisions = [named]
    paths = [str(root / "snapshots" / revision) for revision in revisions]
    return " or ".join(paths) if paths else "it once it holds a snapshot: this download has none, fetch it again"
