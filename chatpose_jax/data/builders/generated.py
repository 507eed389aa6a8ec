"""SPG and RPE of the generated set. Rules can write their texts, because pose, shape and clothes of the generated bodies are known."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from chatpose_jax.data.build import Item
from chatpose_jax.data.builders import rpe, spg
from chatpose_jax.data.config import Split
from chatpose_jax.data.record import seeded
from chatpose_jax.data.synthetic import captions
from chatpose_jax.data.synthetic.dataset import SyntheticDataset, sentence
from chatpose_jax.data.synthetic.scene import Scene, backdrop
from chatpose_jax.endpoint import Messages
from chatpose_jax.errors import UserError
from chatpose_jax.settings import whole
from smpl_jax import body as bodies
from smpl_jax.body import BodyModel
from smpl_jax.io import load_body

COLORS: dict[str, tuple[float, float, float]] = {
    "black": (0.08, 0.08, 0.08), "grey": (0.4, 0.4, 0.4), "brown": (0.4, 0.25, 0.12), "red": (0.55, 0.1, 0.1),
    "orange": (0.62, 0.35, 0.1), "yellow": (0.6, 0.55, 0.15), "green": (0.12, 0.45, 0.15), "turquoise": (0.1, 0.5, 0.5),
    "blue": (0.12, 0.2, 0.55), "purple": (0.4, 0.12, 0.5), "pink": (0.6, 0.3, 0.45), "blond": (0.8, 0.66, 0.38),
}  # fmt: skip
"""Names of sRGB colours; a colour has the name of the nearest."""
TRUNK, SHIRT, TROUSERS, SHOES = 6, 6, 1, 7
"""Joints whose part of the body is measured for the build, and those whose colours are the clothes'."""


class GeneratedSpg:
    """Indirect questions about generated poses, as rows of ``readers.jsonlines``.

    By rule, the question is one of ``synthetic.situations``, and the pose was drawn for it. A language model rewrites the caption of the pose.

    split: "train", "val" or "test". size: number of poses. seed: of the poses.
    """

    def __init__(self, source: Path, *, split: Split = "test", size: int = 100, seed: int = 0) -> None:
        whole("size", size, 1)
        self.rows = SyntheticDataset(split, size, seed, tasks={"situation": 1})
        self.seed = seed

    def file(self, row: Mapping[str, Any]) -> str:
        """That of the row's split, with which its id begins: a review file may hold rows of several."""
        split = str(row.get("id")).partition("-")[0]
        if split not in get_args(Split):
            raise UserError(f"expected an id that begins with a split, as it was written; found {row.get('id')!r:.60}")
        return f"{split}.jsonl"

    def items(self) -> Sequence[Item]:
        return [Item(self.rows[index].id, index) for index in range(len(self.rows))]

    def names(self) -> Sequence[str]:
        return ("query",)

    def messages(self, item: Item) -> Messages:
        return [{"role": "system", "content": spg.INSTRUCTIONS}, {"role": "user", "content": self._caption(item)}]

    def by_rule(self, item: Item) -> Mapping[str, str]:
        return {"query": self.rows[item.place].messages[0]["content"]}

    def row(self, item: Item, name: str, text: str, folder: Path) -> dict[str, Any]:
        example = self.rows[item.place]
        answer = {"role": "assistant", "content": example.messages[1]["content"]}
        fields = rpe.pose_fields(example.poses)
        pose = {"axis_angle": np.reshape(fields["pose"], (24, 3)).tolist(), "frame": "camera"}
        return {"id": item.id, "messages": [{"role": "user", "content": text}, answer], "poses": [pose]}

    def _caption(self, item: Item) -> str:
        rotations = np.array(self.rows[item.place].poses.rotations[0], float)
        rotations[0] = np.diag([1.0, -1.0, -1.0]) @ rotations[0]  # the body frame: these bodies face the camera
        return captions.describe(rotations, "detailed", seed=item.place)


class GeneratedRpe:
    """Descriptions of generated bodies in images, one body in each, for ``readers.rpe``.

    split: "train", "val" or "test". size: number of images, of image_size × image_size pixels. seed: of poses and scenes.
    """

    def __init__(
        self, source: Path, *, split: Split = "test", size: int = 50, image_size: int = 256, seed: int = 0
    ) -> None:
        whole("size", size, 1)
        whole("image_size", image_size, 16)
        self.rows = SyntheticDataset(split, size, seed, image_size, {"image": 1})
        self.split, self.seed, self.body = split, seed, load_body()

    def file(self, row: Mapping[str, Any]) -> str:
        return rpe.FILE

    def items(self) -> Sequence[Item]:
        return [Item(f"{self.split}-{self.seed}-{index}", index) for index in range(len(self.rows))]

    def names(self) -> Sequence[str]:
        return rpe.TYPES

    def messages(self, item: Item) -> Messages:
        return rpe.descriptions_of(self._image(item), self._box(item))

    def by_rule(self, item: Item) -> Mapping[str, str]:
        shown = self.rows.shown(item.place)
        rng = seeded(self.seed, "rpe", item.id)
        shape, outfit = shape_words(shown.scene.betas, self.body), outfit_words(shown.scene)
        doing = captions.summary(shown.codes, shown.row, rng, shown.family)
        return {
            "behaviour": sentence(doing),
            "shape": f"The person is {shape} and has {color_name(shown.scene.hair)} hair.",
            "outfit": f"The person wears {outfit}.",
            "pose": captions.caption(shown.codes, shown.row, rng, "detailed", shown.family),
            "summary": f"{sentence(doing)} The person is {shape} and wears {outfit}.",
        }

    def row(self, item: Item, name: str, text: str, folder: Path) -> dict[str, Any]:
        example = self.rows[item.place]
        return {
            "id": item.id,
            "type": name,
            "image": rpe.write_image(folder, item.id, self._image(item)),
            "description": text,
            "box": self._box(item),
            **rpe.pose_fields(example.poses),
            "split": self.split,
        }

    def _image(self, item: Item) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self._pixels(item)).save(file, "PNG")
        return file.getvalue()

    def _pixels(self, item: Item) -> np.ndarray:
        return np.asarray(self.rows[item.place].messages[0]["content"][0]["image"])

    def _box(self, item: Item) -> list[float]:
        """Left, top, width and height of the pixels that are not background."""
        pixels = self._pixels(item)
        rows, columns = np.nonzero((pixels != backdrop(self.rows.shown(item.place).scene, len(pixels))).any(-1))
        left, top = columns.min(), rows.min()
        return [float(left), float(top), float(columns.max() + 1 - left), float(rows.max() + 1 - top)]


def shape_words(betas: np.ndarray, body: BodyModel) -> str:
    """Height and build of a body shape beside the average one, for example "tall and slim"."""
    rest = np.eye(3, dtype=np.float32)[None].repeat(body.num_joints, 0)
    sizes = []
    for shape in (np.zeros_like(betas), betas):
        points = np.asarray(bodies.vertices(body, rest, shape[: body.num_betas].astype(np.float32)))
        trunk = points[np.asarray(body.weights).argmax(0) == TRUNK]
        sizes.append((np.ptp(points[:, 1]), np.ptp(trunk[:, 0]) * np.ptp(trunk[:, 2])))
    (height, girth), (own_height, own_girth) = sizes
    tall = own_height / height - 1
    broad = np.sqrt(own_girth / girth) / (1 + tall) - 1
    words = [_word(tall, 0.01, "short", "tall"), _word(broad, 0.01, "slim", "sturdy")]
    return " and ".join(word for word in words if word) or "of average height and build"


def outfit_words(scene: Scene) -> str:
    """The clothes of a scene with their colours."""
    shirt, trousers, shoes = (color_name(scene.palette[joint]) for joint in (SHIRT, TROUSERS, SHOES))
    return f"a {shirt} shirt, {trousers} trousers and {shoes} shoes"


def color_name(color: np.ndarray) -> str:
    """The entry of ``COLORS`` that is nearest to an sRGB colour in 0..1."""
    return min(COLORS, key=lambda name: float(np.square(np.subtract(COLORS[name], color)).sum()))


def _word(value: float, least: float, low: str, high: str) -> str:
    return low if value < -least else high if value > least else ""
