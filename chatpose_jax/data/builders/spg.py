"""Questions that imply a pose of PoseScript and do not describe it, for ``readers.spg``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from chatpose_jax.data.build import Item
from chatpose_jax.data.config import Split
from chatpose_jax.data.readers.posescript import PoseScript, Release, Version
from chatpose_jax.data.readers.spg import FILE
from chatpose_jax.endpoint import Messages
from chatpose_jax.errors import UserError

INSTRUCTIONS = """You are given the description of a body pose. Find an everyday situation, activity or feeling in which a person \
would take just this pose. Write one question that a user asks to see the pose of somebody in that situation. The question must not name \
any joint, limb, angle or direction, and must not repeat the description. One or two sentences.
Answer with a JSON object: {"query": "the question"}."""


class SpgBuilder:
    """Rewrites captions of PoseScript to indirect questions, as ChatPose's authors did with GPT-4.

    source: the folder of PoseScript. split: of PoseScript, and of the rows. version: as ``readers.posescript``.

    Raises UserError where files are missing.
    """

    def __init__(self, source: Path, *, split: Split = "test", version: Version = "auto") -> None:
        if split not in get_args(Split):
            raise UserError(f"split must be one of {', '.join(get_args(Split))}; found {split!r}")
        self.split, self.release = split, Release(PoseScript.about, source, version)

    def file(self, row: Mapping[str, Any]) -> str:
        return FILE

    def items(self) -> Sequence[Item]:
        """The poses that have a caption; a person's caption where there is one."""
        items = []
        for pose_id in self.release.split(self.split):
            captions = self.release.captions(pose_id)
            if found := (*captions["human"], *captions["automatic"]):
                items.append(Item(pose_id, found[0]))
        return items

    def names(self) -> Sequence[str]:
        return ("query",)

    def messages(self, item: Item) -> Messages:
        return [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": item.place}]

    def by_rule(self, item: Item) -> Mapping[str, str]:
        raise UserError(
            "there are no rules that turn a caption of PoseScript into an indirect question: name a --model, "
            "or build them for the generated set with --source generated"
        )

    def row(self, item: Item, name: str, text: str, folder: Path) -> dict[str, Any]:
        """A line of ``spg.jsonl``, with the caption for the reviewer."""
        return {
            "id": item.id,
            "pose_id": int(item.id),
            "query": text,
            "source": "posescript",
            "version": self.release.version,
            "split": self.split,
            "caption": item.place,
        }
