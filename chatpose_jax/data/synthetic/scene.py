"""Renders images of posed bodies with random camera, body shape, clothes, light and background."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from chatpose_jax.settings import one_line
from smpl_jax import body as body_functions
from smpl_jax import render
from smpl_jax.body import BodyModel
from smpl_jax.io import load_body
from smpl_jax.keypoints import locate
from smpl_jax.raster import Camera

MAX_YAW, MAX_PITCH = 20.0, 6.0  # degrees
_JOINTS_OF = {
    "shirt": (3, 6, 9, 13, 14, 16, 17),
    "trousers": (0, 1, 2, 4, 5),
    "shoes": (7, 8, 10, 11),
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything in an image but the pose.

    yaw, pitch: view in degrees (``dataset.to_camera``). betas: (10,) body shape. palette: (24, 3) sRGB, the colour of
    each joint's skin or clothes. hair: sRGB. fov: degrees. margin: free border as a fraction of the image. shift:
    (2,) displacement of the body, as a fraction too. light: (3,) towards the light, camera frame. background: "flat",
    "gradient", "noise" or "room". colors: two sRGB colours of it. noise_seed: of the noise.
    """

    yaw: float
    pitch: float
    betas: np.ndarray
    palette: np.ndarray
    hair: np.ndarray
    fov: float
    margin: float
    shift: np.ndarray
    light: np.ndarray
    background: str
    colors: np.ndarray
    noise_seed: int

    __repr__ = one_line


def draw_scene(rng: np.random.Generator, max_yaw: float = MAX_YAW) -> Scene:
    """A random scene. The yaw of the view is uniform within ±max_yaw degrees, its pitch within ±6."""
    skin = np.array(_SKINS[int(rng.integers(len(_SKINS)))]) + rng.normal(0, 0.02, 3)
    palette = np.tile(skin, (24, 1))
    clothes = {
        "shirt": rng.uniform(0.05, 0.65, 3),
        "trousers": rng.uniform(0.05, 0.5, 3),
        "shoes": rng.uniform(0.05, 0.4, 3),
    }
    for name, color in clothes.items():
        palette[list(_JOINTS_OF[name])] = color
    return Scene(
        yaw=rng.uniform(-max_yaw, max_yaw),
        pitch=rng.uniform(-MAX_PITCH, MAX_PITCH),
        betas=rng.normal(0, 0.5, 10).clip(-1, 1),
        palette=palette.clip(0, 1),
        hair=np.array(_HAIR[int(rng.integers(len(_HAIR)))]),
        fov=rng.uniform(20, 35),
        margin=rng.uniform(0.03, 0.06),
        shift=rng.uniform(-0.02, 0.02, 2),
        light=np.array([rng.uniform(-0.8, 0.8), -rng.uniform(0.4, 1.0), -rng.uniform(0.5, 1.0)]),
        background=("flat", "gradient", "noise", "room")[int(rng.integers(4))],
        # Light walls and dark clothes: a vision tower then learns from thousands of images instead of millions.
        colors=0.7 * rng.uniform(0.85, 1.0, (2, 1)) + 0.3 * rng.uniform(0.6, 1.0, (2, 3)),
        noise_seed=int(rng.integers(2**31)),
    )


_SKINS = ((0.94, 0.78, 0.69), (0.87, 0.67, 0.55), (0.76, 0.57, 0.43), (0.58, 0.40, 0.29), (0.42, 0.28, 0.20))
_HAIR = (
    (0.10, 0.08, 0.07),
    (0.25, 0.16, 0.10),
    (0.45, 0.30, 0.16),
    (0.80, 0.66, 0.38),
    (0.62, 0.62, 0.62),
    (0.55, 0.25, 0.12),
)


class Studio:
    """Renders posed bodies. body: one with SMPL's 24 joints; the default body where it is None."""

    batch = 64  # bodies skinned by one call

    def __init__(self, body: BodyModel | None = None):
        self.body = load_body() if body is None else body
        self.faces = np.asarray(self.body.faces)
        self.owner = np.asarray(self.body.weights).argmax(0)  # the joint with the largest weight

    def render(self, rotations: np.ndarray, scene: Scene, size: int) -> np.ndarray:
        """One image (size, size, 3) uint8 of a pose (24, 3, 3) in the camera frame."""
        return self.render_batch([rotations], [scene], size)[0]

    def render_batch(
        self, rotations: Sequence[np.ndarray], scenes: Sequence[Scene], size: int, workers: int = 1
    ) -> list[np.ndarray]:
        """Images (size, size, 3) uint8 of poses (24, 3, 3) in the camera frame. workers: threads that render."""
        images: list[np.ndarray] = []
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(scenes), self.batch):
                part = scenes[start : start + self.batch]
                vertices = self._skin(rotations[start : start + self.batch], part)
                images += pool.map(functools.partial(self._draw, size=size), vertices, part)
        return images

    def keypoints(
        self, rotations: Sequence[np.ndarray], scenes: Sequence[Scene], size: int, points: str
    ) -> list[np.ndarray]:
        """Where the points of a set (``smpl_jax.keypoints``) are in the images of ``render_batch``: (K, 3), x and y in pixels and the confidence 1.
        A point that the body lacks is 0."""
        located = locate(self.body, points, near=True, missing="mask")
        found: list[np.ndarray] = []
        for start in range(0, len(scenes), self.batch):
            part = scenes[start : start + self.batch]
            poses, betas = self._padded(rotations[start : start + self.batch], part)
            places = np.asarray(_located(located, poses, betas))
            for scene, vertices, place in zip(part, self._skin(rotations[start : start + self.batch], part), places):
                pixels = _camera(vertices, scene, size).project(place)
                found.append(np.where(located.known[:, None], np.pad(pixels, ((0, 0), (0, 1)), constant_values=1), 0))
        return found

    def _skin(self, rotations: Sequence[np.ndarray], scenes: Sequence[Scene]) -> np.ndarray:
        """Vertices (N, V, 3) in metres."""
        return np.asarray(_vertices(self.body, *self._padded(rotations, scenes)))[: len(scenes)]

    def _padded(self, rotations: Sequence[np.ndarray], scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray]:
        """Poses and betas, padded to 1 or ``batch`` bodies, so that only two programs are compiled."""
        count = 1 if len(scenes) == 1 else self.batch
        pad = ((0, count - len(scenes)),)
        poses = np.pad(np.stack(rotations).astype(np.float32), (*pad, (0, 0), (0, 0), (0, 0)))
        betas = np.pad(np.stack([s.betas for s in scenes]).astype(np.float32), (*pad, (0, 0)))
        return poses, betas[:, : self.body.num_betas]

    def _draw(self, vertices: np.ndarray, scene: Scene, size: int) -> np.ndarray:
        return render.render_mesh(
            vertices,
            self.faces,
            frame="camera",
            camera=_camera(vertices, scene, size),
            colors=self._colors(scene),
            background=backdrop(scene, size),
            light=scene.light,
            supersample=1 if size > 128 else 2,
        )

    def _colors(self, scene: Scene) -> np.ndarray:
        colors = scene.palette[self.owner]
        colors[self._hair] = scene.hair
        return colors

    @functools.cached_property
    def _hair(self) -> np.ndarray:
        """Which vertices are hair: the top and the back of the head."""
        rest = np.asarray(self.body.template).T
        head = self.owner == 15
        low, high = rest[head].min(0), rest[head].max(0)
        up = (rest[:, 1] - low[1]) / (high[1] - low[1])
        back = (high[2] - rest[:, 2]) / (high[2] - low[2])
        return head & (up + 0.8 * back > 1.05)


def _camera(vertices: np.ndarray, scene: Scene, size: int) -> Camera:
    """The view of a scene on a body (V, 3)."""
    camera = Camera.looking_at(vertices, size, fov=scene.fov, margin=scene.margin)
    x, y = np.asarray(camera.center) + size * scene.shift
    return dataclasses.replace(camera, center=(float(x), float(y)))


_vertices = jax.jit(body_functions.vertices)
_located = jax.jit(lambda located, rotations, betas: located(rotations, betas))


def backdrop(scene: Scene, size: int) -> np.ndarray:
    """The background of a scene, (size, size, 3) uint8."""
    first, second = scene.colors
    ramp = np.linspace(0, 1, size)[:, None, None]
    if scene.background == "gradient":
        image = first * (1 - ramp) + second * ramp * np.ones((1, size, 1))
    elif scene.background == "room":  # a wall and a floor
        image = np.where(ramp < 0.72, first, second) * np.ones((1, size, 1))
    else:
        image = np.broadcast_to(first, (size, size, 3))
    if scene.background == "noise":  # coarse spots
        rng = np.random.default_rng(scene.noise_seed)
        spots = rng.normal(0, 0.03, (8, 8, 3))
        cells = np.minimum(np.arange(size) * 8 // size, 7)
        image = image + spots[cells][:, cells]
    return np.ascontiguousarray(np.clip(image, 0, 1) * 255, np.uint8)
