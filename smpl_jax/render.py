"""Renders meshes and bodies in plain numpy: no display, no GPU, no system package.

`frame` names the body's frame (`smpl_jax.frames`). The default is the model frame, in which a body at rest is upright and
faces the viewer. Cameras and lights are in the camera frame, in which ChatPose predicts: x right, **y down**, z away from
the viewer. In it an upright body that faces the viewer has a global orientation near Rx(π).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from smpl_jax._files import write_whole
from smpl_jax.frames import Frame, turn
from smpl_jax.raster import Camera, fragments, interpolate, mesh, vertex_normals

if TYPE_CHECKING:
    from smpl_jax.body import BodyModel
SKIN = (0.80, 0.62, 0.52)
"""Default sRGB colour of a mesh."""
BACKDROP = (0.95, 0.95, 0.96)
"""Default sRGB colour of the background."""


def render_mesh(
    vertices: ArrayLike,
    faces: ArrayLike,
    *,
    frame: Frame,
    camera: Camera | None = None,
    size: int | tuple[int, int] = 512,
    colors: ArrayLike | None = None,
    background: ArrayLike | None = None,
    light: ArrayLike = (-0.45, -0.75, -0.65),
    supersample: int = 2,
    ground: ArrayLike | None = None,
) -> NDArray[np.uint8]:
    """Draws a mesh with smooth shading.

    Args:
        vertices: (V, 3) metres in `frame`.
        faces: (F, 3) vertex indices, counter-clockwise seen from outside.
        frame: frame of the vertices. It has no default: smplx's vertices are in "model", vertices that match a camera's calibration are in
            "camera".
        camera: the view, in the camera frame; by default one that frames the mesh in an image of `size`.
        size: side of a square image, or (height, width), if no camera is given.
        colors: sRGB in 0..1, one (3,) or one for each vertex (V, 3).
        background: sRGB (3,) in 0..1, or an image (H, W, 3), uint8 or in 0..1.
        light: (3,) direction **towards** the main light, camera frame.
        supersample: samples along each axis of a pixel; 1 is fast and aliased.
        ground: (3,) up direction, camera frame: draws a soft shadow on the plane below the lowest vertex.

    Returns:
        (H, W, 3) uint8, sRGB.
    """
    points, triangles = mesh(vertices, faces)
    points = points @ turn(frame, "camera").T.astype(np.float32)
    base = np.asarray(SKIN if colors is None else colors, np.float32)
    if base.shape not in ((3,), (len(points), 3)):
        raise ValueError(f"colors must have shape (3,) or ({len(points)}, 3), found {base.shape}")
    view = Camera.looking_at(points, size) if camera is None else camera
    points = points + np.asarray(view.translation, np.float32)
    image = _backdrop(background, view)
    if ground is not None:
        _lay_shadow(image, points, view, np.asarray(ground, np.float32))

    fine = view.scaled(supersample)
    seen = fragments(points, triangles, fine, cull=True)
    if not len(seen.pixel):
        return image
    base = base * base  # approximate sRGB to linear; several times faster than a power of 2.2
    per_vertex = [vertex_normals(points, triangles), points] + ([base] if base.ndim == 2 else [])
    values = interpolate(np.concatenate(per_vertex, 1), triangles[seen.face], seen.barycentric)
    albedo = values[6:] if base.ndim == 2 else base[:, None]
    lit = _shade(values[:3], values[3:6], albedo, np.asarray(light, np.float32))

    # Average the samples of each pixel in linear light; samples that miss the mesh show the background.
    row, column = np.divmod(seen.pixel, fine.width)
    target = (row // supersample) * view.width + column // supersample
    count = np.bincount(target, minlength=view.width * view.height)
    (covered,) = np.nonzero(count)
    total = np.stack([np.bincount(target, lit[c], len(count))[covered] for c in range(3)], 1)
    flat = image.reshape(-1, 3)
    behind = (flat[covered] / 255.0) ** 2
    samples = supersample * supersample
    mixed = (total + behind * (samples - count[covered])[:, None]) / samples
    flat[covered] = (np.sqrt(mixed.clip(0, 1)) * 255 + 0.5).astype(np.uint8)
    return image


_VIEWS = {"front": 0.0, "three_quarter": 40.0, "side": 90.0, "back": 180.0, "other_side": -90.0}


def render_body(
    body: BodyModel,
    rotations: ArrayLike,
    betas: ArrayLike | None = None,
    *,
    size: int | tuple[int, int] = 512,
    views: Sequence[str] = ("front",),
    frame: Frame = "model",
    colors: ArrayLike | None = None,
    background: ArrayLike | None = None,
    supersample: int = 2,
    elevation: float = 8.0,
    ground: bool = True,
) -> NDArray[np.uint8]:
    """Draws one posed body, one panel for each view.

    Args:
        body: a body model.
        rotations: (J, 3, 3), joint 0 the global orientation.
        betas: (S,) shape coefficients; zeros by default.
        size: side of a panel, or its (height, width).
        views: any of front, three_quarter, side, back, other_side; "front" is the view of the pose's camera.
        frame: of joint 0's rotation: "model" (y up, facing +z: with an identity root the body is upright, as in smplx), "camera"
            (x right, y down, z away: ChatPose's poses) or "z-up" (AMASS).
        colors: sRGB (3,) or (V, 3); by default `clothing_colors`.
        background: sRGB (3,) or an image of a panel's size.
        supersample: samples along each axis of a pixel.
        elevation: degrees by which the viewer looks down.
        ground: draw a soft shadow on the floor.

    Returns:
        (H, W * len(views), 3) uint8.
    """
    from smpl_jax import body as body_functions

    unknown = [view for view in views if view not in _VIEWS]
    if unknown or not views:
        raise ValueError(f"views must be some of {', '.join(_VIEWS)}; found {', '.join(unknown) or 'none'}")
    vertices = np.asarray(
        body_functions.vertices(body, np.asarray(rotations, np.float32), None if betas is None else np.asarray(betas)),
        np.float32,
    )
    vertices = vertices @ turn(frame, "camera").T.astype(np.float32)
    faces = np.asarray(body.faces)
    if colors is None:
        colors = clothing_colors(body)
    panels = []
    for view in views:
        around = _rotation_x(np.radians(elevation)) @ _rotation_y(np.radians(_VIEWS[view]))
        up = around @ np.array([0, -1, 0], np.float32) if ground else None
        panels.append(
            render_mesh(
                vertices @ around.T,
                faces,
                frame="camera",
                size=size,
                colors=colors,
                background=background,
                supersample=supersample,
                ground=up,
            )
        )
    return np.concatenate(panels, axis=1)


def clothing_colors(
    body: BodyModel,
    *,
    skin: ArrayLike = SKIN,
    shirt: ArrayLike = (0.36, 0.52, 0.66),
    trousers: ArrayLike = (0.30, 0.32, 0.40),
    shoes: ArrayLike = (0.24, 0.22, 0.22),
    hair: ArrayLike | None = (0.24, 0.17, 0.13),
) -> NDArray[np.float32]:
    """Vertex colours (V, 3), sRGB, of a dressed person.

    Each vertex takes the garment of the joint with the largest weight. Hair (`None`: none) covers the region behind and above a line through
    forehead and ears. It uses joint names and the rest pose only, so it works for any body of the family.
    """
    names, weights = body.joint_names, np.asarray(body.weights).T
    rest, ids = np.asarray(body.template).T, dict(body.vertex_ids)
    palette = np.tile(np.asarray(skin, np.float32), (len(names), 1))
    garments = {"shirt": shirt, "trousers": trousers, "shoes": shoes}
    for k, name in enumerate(names):
        part = name.removeprefix("left_").removeprefix("right_")
        if part in _GARMENTS:
            palette[k] = np.asarray(garments[_GARMENTS[part]], np.float32)
    # A high power selects the joint with the largest weight, but blends at a seam instead of following the triangles' edges.
    share = weights**5
    share = share / share.sum(1, keepdims=True)
    colors = (share @ palette).astype(np.float32)
    if "head" in names:
        k = names.index("head")
        above, owned = rest - np.asarray(body.joint_template)[k], weights.argmax(1) == k
        x, y, z = above.T / above[owned, 1].max(initial=1e-6)
        if hair is not None:
            line = np.minimum(y - np.maximum(0.9 * z + 0.30, 1.6 * z - 0.02), 0.42 - np.abs(x))  # leaves the ears free
            mix = (line / 0.05 + 0.5).clip(0, 1)[:, None] * share[:, k : k + 1]
            colors += mix * (np.asarray(hair, np.float32) - colors)
        for eye in ("left_eye", "right_eye"):
            if eye in ids:
                near = np.linalg.norm((rest - rest[ids[eye]]) * (0.75, 1.3, 1.0), axis=1)
                mix = (1.36 - 160 * near).clip(0, 0.85)[:, None]  # dark within 3 mm, skin beyond 8.5 mm
                colors += (mix * (0.1 - colors)).astype(np.float32)
    return colors


_GARMENTS = {
    **dict.fromkeys(("spine1", "spine2", "spine3", "collar", "shoulder"), "shirt"),
    **dict.fromkeys(("pelvis", "hip", "knee"), "trousers"),
    **dict.fromkeys(("ankle", "foot"), "shoes"),
}


def contact_sheet(
    images: Sequence[NDArray[np.uint8]], columns: int, labels: Sequence[str] | None = None, *, gap: int = 4
) -> NDArray[np.uint8]:
    """Arranges images (H, W, 3) uint8 in rows of `columns`, with labels below. Returns one (H', W', 3) uint8."""
    if not images or columns < 1:
        raise ValueError(f"a contact sheet needs images and columns >= 1, found {len(images)} and {columns}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(images)} images need as many labels, found {len(labels)}")
    height = max(i.shape[0] for i in images)
    width = max(i.shape[1] for i in images)
    caption = 16 if labels is not None else 0
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + caption + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        x, y = gap + column * (width + gap), gap + row * (height + caption + gap)
        sheet.paste(Image.fromarray(image), (x + (width - image.shape[1]) // 2, y + (height - image.shape[0]) // 2))
        if labels is not None:
            draw.text((x + width // 2, y + height + caption // 2), labels[k], fill="black", anchor="mm")
    return np.asarray(sheet)


def save_png(path: str | os.PathLike[str], image: NDArray[np.uint8]) -> Path:
    """Writes a (H, W, 3) uint8 image atomically. Returns the path."""
    return write_whole(path, lambda file: Image.fromarray(image).save(file, "PNG"))


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normalises vectors (3, ...); zero stays zero."""
    x, y, z = vectors
    return vectors / np.maximum(np.sqrt(x * x + y * y + z * z), np.float32(1e-20))


def _shade(
    normal: NDArray[np.float32], position: NDArray[np.float32], albedo: NDArray[np.float32], light: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Shades (3, N) arrays; returns linear colour (3, N): light from sky and floor, a wrapped main light, a faint highlight and a rim."""
    normal, towards, light = _unit(normal), _unit(-position), _unit(light)

    def dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
        return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]

    facing = dot(normal, towards).clip(0, 1)
    key = ((dot(normal, light) + np.float32(0.25)) / np.float32(1.25)).clip(0, 1)
    sky = np.float32(0.5) - np.float32(0.5) * normal[1]
    gloss = dot(normal, _unit(towards + light[:, None])).clip(0, 1)
    for _ in range(4):  # to the 16th power
        gloss *= gloss
    edge = np.float32(1) - facing
    diffuse = np.float32(0.16) + np.float32(0.24) * sky + np.float32(0.10) * facing + np.float32(0.85) * key
    return albedo * diffuse + (np.float32(0.05) * gloss + np.float32(0.05) * edge * edge * sky)


def _backdrop(background: ArrayLike | None, camera: Camera) -> NDArray[np.uint8]:
    shape = (camera.height, camera.width, 3)
    value = np.asarray(BACKDROP if background is None else background)
    if value.shape not in ((3,), shape):
        raise ValueError(f"background must have shape (3,) or {shape}, found {value.shape}")
    if value.dtype != np.uint8:
        value = (value.astype(np.float32).clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return np.array(np.broadcast_to(value, shape))


def _lay_shadow(
    image: NDArray[np.uint8],
    points: NDArray[np.float32],
    camera: Camera,
    up: NDArray[np.float32],
    strength: float = 0.55,
) -> None:
    """Draws a soft shadow, in place, on the floor below the lowest point. It is darker where the body is near the floor."""
    up = up / np.sqrt((up * up).sum())
    height = points @ up
    level = height.min()
    side = np.cross(up, np.array([0, 0, 1], np.float32))
    side /= np.sqrt((side * side).sum())
    deep = np.cross(side, up)
    floor = np.stack([points @ side, points @ deep], 1)
    # Occlusion, which falls with height, on a coarse grid, blurred by three box filters.
    cell, margin = np.float32(0.02), 12
    origin = floor.min(0) - margin * cell
    index = ((floor - origin) / cell).astype(np.intp)
    shape = tuple(index.max(0) + 1 + margin)
    weight = np.exp(-(height - level) / np.float32(0.35))
    blocked = np.zeros(shape, np.float32)
    np.maximum.at(blocked, (index[:, 0], index[:, 1]), weight.astype(np.float32))
    for _ in range(3):
        for axis in (0, 1):
            rolled = [np.roll(blocked, s, axis) for s in range(-3, 4)]
            blocked = sum(rolled[1:], rolled[0]) / np.float32(7)
    column, row = np.meshgrid(np.arange(camera.width, dtype=np.float32), np.arange(camera.height, dtype=np.float32))
    ray = np.stack(
        [
            (column + 0.5 - np.float32(camera.center[0])) / np.float32(camera.focal),
            (row + 0.5 - np.float32(camera.center[1])) / np.float32(camera.focal),
            np.ones_like(column),
        ],
        -1,
    )
    slope = ray @ up
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = level / slope
        hit = ray * distance[..., None]
        place = (np.stack([hit @ side, hit @ deep], -1) - origin) / cell - np.float32(0.5)
    valid = (distance > 0) & (place >= 0).all(-1) & (place < np.array(shape, np.float32) - 1).all(-1)
    p = place[valid]
    q = p.astype(np.intp)
    f = p - q
    i, j = q.T
    shade = (blocked[i, j] * (1 - f[:, 0]) + blocked[i + 1, j] * f[:, 0]) * (1 - f[:, 1])
    shade += (blocked[i, j + 1] * (1 - f[:, 0]) + blocked[i + 1, j + 1] * f[:, 0]) * f[:, 1]
    keep = 1 - np.float32(strength) * shade.clip(0, 1)
    image[valid] = (image[valid] * keep[:, None] + 0.5).astype(np.uint8)


def _rotation_x(angle: float) -> NDArray[np.float32]:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]], np.float32)


def _rotation_y(angle: float) -> NDArray[np.float32]:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]], np.float32)
