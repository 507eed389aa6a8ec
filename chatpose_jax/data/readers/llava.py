"""LLaVA's instructions: conversations with and without images. Other readers of data in LLaVA's form use its functions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.readers.crop import to_jpeg
from chatpose_jax.data.readers.json_rows import Rows, read_rows, split_rows
from chatpose_jax.data.readers.untrusted import image_size, inside, parse_json, read_bytes
from chatpose_jax.data.record import Record
from chatpose_jax.errors import UserError
from chatpose_jax.processing.images import load_image
from chatpose_jax.settings import whole

FILE = "llava_v1_5_mix665k.json"
FOLDERS = ("coco", "gqa", "ocr_vqa", "textvqa", "vg")
"""The first folders of images' names."""
RELEASED = ("coco", "gqa", "vg")
IMAGE = "<image>"
MAX_IMAGE = 2**26
"""Bytes of an encoded image."""
_ROLES = (("human", "user"), ("gpt", "assistant"))


class Llava:
    """Reads LLaVA-1.5's ``llava_v1_5_mix665k.json``, or another file of its form: a JSON list (or JSON lines) of

    ``{"id": str, "image": "coco/train2017/x.jpg", "conversations": [{"from": "human" | "gpt", "value": str}, …]}``.

    About 40,000 rows of mix665k have no ``image``: conversations in words only. Rows have no poses.

    The image comes before the words of its turn, wherever ``<image>`` stands in them. A first turn that is not the user's is dropped. If an exchange
    lacks a question or an answer, it and all after it are dropped. ``group`` is the image; GQA's images are Visual Genome's and count as such.

    ``extras``: ``image`` (its name in the file; "" without one).

    Options:
        file: the name of the file in the source folder.
        images: the folder that names of images are relative to; by default the source folder.
        subset: "released" takes only rows whose image's name contains coco, gqa or vg. ChatPose's released code trains on these.
        text_only: take rows without image too.
        decode: decode each image, so that a damaged one is found now and not in training. Otherwise only the header is read.
        max_side: images whose longer side has more pixels are resized to it and written as JPEG (quality 95); 0 for none. All others keep their
            bytes.

    Source: the repositories haotian-liu/LLaVA (``llava/train/train.py``) and yfeng95/PoseGPT (``utils/vqa_dataset.py``).
    """

    about: ClassVar[About] = About(
        title="LLaVA-1.5's instructions (mix665k)",
        licence="text: CC BY 4.0 and OpenAI's terms of use; images: those of COCO, GQA, OCR-VQA, TextVQA and Visual Genome",
        page="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
        files=(
            FILE,
            "the images in coco/train2017, gqa/images, ocr_vqa/images, textvqa/train_images, vg/VG_100K and vg/VG_100K_2 (as many as you have)",
        ),
        options=("--set images=FOLDER is the folder with coco, gqa, …, by default the source folder",),
    )

    def __init__(
        self,
        source: Path,
        *,
        file: str = FILE,
        images: str = "",
        subset: Literal["all", "released"] = "all",
        text_only: bool = True,
        decode: bool = True,
        max_side: int = 0,
    ) -> None:
        self.source, self.file = source, str(inside(Path(), file))
        self.images = Path(images).expanduser() if images else source
        self.subset, self.text_only = subset, text_only
        self.decode, self.max_side = decode, whole("max_side", max_side, 0)
        if absent := [path for path in (source / self.file, self.images) if not path.exists()]:
            raise missing(self.about, *absent)
        self._parts: Sequence[Rows] | None = None

    def parts(self, split: Split) -> Sequence[Rows]:
        """Neighbouring rows. The file is read once for this. All rows are for training.

        Raises UserError for a damaged file, and where rows name images and not one of them is there.
        """
        if split != "train":
            return ()
        if self._parts is None:
            search = _Search(self.images)
            self._parts = split_rows(self.source, self.file, see=search)
            if search.named and not search.found:
                raise missing(self.about, self.images / search.named)
        return self._parts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": None}

    def read(self, split: Split, part: Rows) -> Iterator[Record | Skipped]:
        """The rows of a part, in their order."""
        for number, data in read_rows(self.source, part):
            try:
                row = row_of(data, f"{self.file}, row {number}")
            except UserError as error:
                yield Skipped(f"#{number}", "a damaged row", True, f"{error}")
                continue
            key = f"{row_id(row)}#{number}"
            try:
                yield self._record(key, row)
            except (UserError, OSError) as error:  # OSError: a name that no file can have
                yield Skipped(key, "a damaged row or image", True, f"{error}")

    def _record(self, key: str, row: Mapping[str, Any]) -> Record | Skipped:
        names = image_names(row)
        if not names and not self.text_only:
            return Skipped(key, "without image")
        if self.subset == "released" and not any(word in name for word in RELEASED for name in names):
            return Skipped(key, "not of the subset that ChatPose's released code takes")
        paths = [inside(self.images, name) for name in names]
        for name, path in zip(names, paths):
            if not path.is_file():
                return Skipped(key, _absent(name), detail=f"no {path}")
        messages = messages_of(row.get("conversations"), len(names))
        if not messages:
            return Skipped(key, "no question with an answer")
        return Record(
            key,
            "instruction",
            (messages,),
            images=tuple(read_image(path, self.decode, self.max_side) for path in paths),
            group=image_group(names[0]) if names else "",
            extras={"image": names[0] if names else ""},
        )


def _absent(name: str) -> str:
    first = name.partition("/")[0]
    return f"an image of {first} is not there" if first in FOLDERS else "an image is not there"


class _Search:
    """Looks for the images of rows, until one is found. named: one of those that are not there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.named, self.found = folder, "", False

    def __call__(self, row: Mapping[str, Any]) -> None:
        name = row.get("image")
        if self.found or not isinstance(name, str) or not name:
            return
        self.named = self.named or name
        try:
            self.found = inside(self.folder, name.encode("latin-1", "replace")).is_file()
        except (UserError, OSError):
            return


def row_of(data: bytes, where: str) -> Mapping[str, Any]:
    """A row of LLaVA's form. Raises UserError for other JSON."""
    row = parse_json(data, where)
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object with id and conversations, found a {type(row).__name__}")
    return row


def row_id(row: Mapping[str, Any]) -> str:
    """The id of a row as text, which may be empty, and is not always unique."""
    return str(row.get("id", "")).encode(errors="replace").decode()[:100]


def image_names(row: Mapping[str, Any]) -> Sequence[str]:
    """The names of a row's images: of none, of one or of a list. Raises UserError for anything else."""
    value = row.get("image")
    names = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"image: expected a name or a list of names, found {value!r:.100}")
    return names


def messages_of(conversations: Any, images: int) -> tuple[dict[str, Any], ...]:
    """Messages as in ``Example``, of turns ``{"from": "human" | "gpt", "value": str}``; empty where no question has an answer.

    images: how many the row has. ``<image>`` is taken out of its turn's words, and the image is placed before them. In a row
    without images it is ordinary text.

    Raises UserError for other turns, for two turns of one speaker in a row, and where ``<image>`` does not occur once for each image.
    """
    if not isinstance(conversations, list) or not all(isinstance(turn, Mapping) for turn in conversations):
        raise UserError(f"conversations: expected a list of turns, found {conversations!r:.100}")
    turns = conversations[1:] if conversations and conversations[0].get("from") == "gpt" else conversations
    messages: list[dict[str, Any]] = []
    seen = 0
    for number, turn in enumerate(turns):
        words, (speaker, role) = turn.get("value"), _ROLES[number % 2]
        if not isinstance(words, str) or turn.get("from") != speaker:
            raise UserError(
                f"conversations: expected a turn of {speaker} with text as value, found {dict(turn)!r:.150}"
            )
        shown = words.count(IMAGE) if images and role == "user" else 0
        words = (words.replace(IMAGE, "") if shown else words).strip()
        if not words and not shown:
            break
        seen += shown
        parts = [{"type": "image"}] * shown + ([{"type": "text", "text": words}] if words else [])
        messages.append({"role": role, "content": parts if shown else words})
    if seen != images:
        raise UserError(
            f"conversations: expected {IMAGE} for each of {images} images in the user's turns, found {seen}"
        )
    return tuple(messages[: len(messages) // 2 * 2])


def image_group(name: str) -> str:
    """One name for one image, whatever folder it lies in: COCO's is its id of 12 digits, Visual Genome's (which is GQA's) ``vg/ID``."""
    *folders, last = re.split(r"[/\\]", name)
    stem = last.rpartition(".")[0] or last
    if found := re.fullmatch(r"(?:COCO_(?:train|val)2014_)?(\d{12})", stem):
        return found[1]
    folder = folders[0] if folders else ""
    return f"{'vg' if folder == 'gqa' else folder}/{stem}"


def read_image(path: Path, decode: bool = True, max_side: int = 0) -> bytes:
    """The bytes of an image file, or, where its longer side has more than ``max_side`` (not 0) pixels, those of a reduced JPEG.

    decode: decode it, so that a damaged one is found.

    Raises UserError for what is no image, is damaged, has too many pixels, or more than ``MAX_IMAGE`` bytes.
    """
    data = read_bytes(path, MAX_IMAGE)
    width, height = image_size(data, path)
    large = max_side and max(width, height) > max_side
    if not (decode or large):
        return data
    image = load_image(data, str(path))
    if not large:
        return data
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return to_jpeg(np.asarray(image))
