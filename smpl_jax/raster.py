"""A camera, and a rasteriser in plain numpy that finds the visible triangle at each pixel.

The rasteriser is vectorised over (triangle, pixel) pairs. Every triangle lists the pixel centres of its bounding box,
the edge functions keep those inside, and one `np.maximum.at` over (inverse depth, pair) keys is the depth test.
Body meshes have thousands of triangles of a few pixels each. For them this costs little more than reading the mesh.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smpl_jax.printing import one_line

# Number of (triangle, pixel) pairs at a time; bounds memory when a few triangles fill a large image.
_PAIRS_AT_ONCE = 1 << 22
# Near plane, in metres. Triangles that cross it are dropped, not clipped.
_NEAR = 1e-3


@dataclass(frozen=True)
class Camera:
    """A pinhole camera. Pixel centres are at (column + 0.5, row + 0.5).

    Attributes:
        width, height: image size in pixels.
        focal: focal length in pixels.
        center: principal point (x, y) in pixels.
        translation: (3,) metres, added to points before projection, so that a mesh at the origin is visible.
    """

    width: int
    height: int
    focal: float
    center: tuple[float, float]
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def project(self, points: ArrayLike) -> NDArray[np.float32]:
        """Image positions (..., 2) in pixels, x right and y down, of points (..., 3) in metres in the camera frame."""
        p = np.asarray(points, np.float32) + np.asarray(self.translation, np.float32)
        return p[..., :2] * (np.float32(self.focal) / p[..., 2:]) + np.asarray(self.center, np.float32)

    def scaled(self, factor: float) -> Camera:
        """The same view with `factor` times as many pixels along each axis."""
        return replace(
            self,
            width=round(self.width * factor),
            height=round(self.height * factor),
            focal=self.focal * factor,
            center=(self.center[0] * factor, self.center[1] * factor),
        )

    @classmethod
    def looking_at(
        cls, vertices: ArrayLike, size: int | tuple[int, int] = 512, *, fov: float = 25.0, margin: float = 0.06
    ) -> Camera:
        """A camera along +z that frames a mesh.

        Args:
            vertices: (V, 3) metres, camera frame.
            size: side of a square image, or (height, width).
            fov: full vertical field of view in degrees; small angles look like a portrait lens.
            margin: free border on each side, as a fraction of the image.
        """
        v = np.asarray(vertices, np.float64).reshape(-1, 3)
        height, width = (size, size) if isinstance(size, int) else size
        focal = 0.5 * height / np.tan(np.radians(fov) / 2)
        low, high = v.min(0), v.max(0)
        middle = (low + high) / 2
        room = focal / (0.5 * (1 - 2 * margin) * np.array([width, height]))
        # Each vertex must fit at its own depth: distance >= |offset| * focal / half size - its depth offset.
        offset = v - middle
        distance = max(float((np.abs(offset[:, :2]) * room - offset[:, 2:]).max()), 10 * _NEAR)
        x, y, z = (float(c) for c in (-middle[0], -middle[1], distance - middle[2]))
        return cls(width, height, float(focal), (width / 2, height / 2), (x, y, z))


class Raster(NamedTuple):
    """The nearest triangle at each pixel; see `rasterize`."""

    face: NDArray[np.int32]
    barycentric: NDArray[np.float32]
    depth: NDArray[np.float32]

    def __repr__(self) -> str:
        return one_line(self)


class Fragments(NamedTuple):
    """The visible pixels only: `pixel` (N,) row-major, `face` (N,), `barycentric` (N, 3), `depth` (N,)."""

    pixel: NDArray[np.intp]
    face: NDArray[np.intp]
    barycentric: NDArray[np.float32]
    depth: NDArray[np.float32]

    def __repr__(self) -> str:
        return one_line(self)


def rasterize(vertices: ArrayLike, faces: ArrayLike, camera: Camera, *, cull: bool = True) -> Raster:
    """Finds the nearest triangle at each pixel centre.

    Args:
        vertices: (V, 3) metres, camera frame.
        faces: (F, 3) vertex indices, counter-clockwise seen from outside (as in SMPL).
        camera: the view.
        cull: skip triangles that face away; correct for closed meshes.

    Returns:
        Raster of `face` (H, W) int32, -1 where nothing is visible; `barycentric` (H, W, 3) float32, perspective correct;
        `depth` (H, W) float32 metres along z, inf where nothing is visible.
    """
    points, triangles = mesh(vertices, faces)
    seen = fragments(points + np.asarray(camera.translation, np.float32), triangles, camera, cull)
    shape = (camera.height, camera.width)
    face = np.full(shape, -1, np.int32)
    barycentric = np.zeros((*shape, 3), np.float32)
    depth = np.full(shape, np.inf, np.float32)
    face.reshape(-1)[seen.pixel] = seen.face
    barycentric.reshape(-1, 3)[seen.pixel] = seen.barycentric
    depth.reshape(-1)[seen.pixel] = seen.depth
    return Raster(face, barycentric, depth)


def mesh(vertices: ArrayLike, faces: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Vertices (V, 3) float32 and faces (F, 3) intp. Raises ValueError if the arrays are not a mesh."""
    points, triangles = np.asarray(vertices, np.float32), np.asarray(faces)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"vertices must be (V, 3), found {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("vertices must be finite; found NaN or infinity")
    if triangles.ndim != 2 or triangles.shape[1] != 3 or triangles.dtype.kind not in "iu":
        raise ValueError(f"faces must be integers (F, 3), found {triangles.dtype} {triangles.shape}")
    if triangles.size and not 0 <= triangles.min() <= triangles.max() < len(points):
        raise ValueError(
            f"faces must be vertex indices in [0, {len(points)}); found {triangles.min()} to {triangles.max()}"
        )
    return points, triangles.astype(np.intp, copy=False)


def fragments(points: NDArray[np.float32], faces: NDArray[np.intp], camera: Camera, cull: bool) -> Fragments:
    """Visible pixels of points (V, 3) that already include the camera's translation."""
    z = points[:, 2]
    ahead = z > _NEAR
    inverse = np.float32(1) / np.where(ahead, z, np.float32(1))
    x = points[:, 0] * inverse * np.float32(camera.focal) + np.float32(camera.center[0])
    y = points[:, 1] * inverse * np.float32(camera.focal) + np.float32(camera.center[1])

    a, b, c = faces.T
    xa, ya, xb, yb, xc, yc = x[a], y[a], x[b], y[b], x[c], y[c]
    # Twice the signed area. With y down, it is negative for triangles that face the viewer.
    area = (xb - xa) * (yc - ya) - (xc - xa) * (yb - ya)
    left = np.ceil(np.minimum(np.minimum(xa, xb), xc) - 0.5).clip(0, camera.width)
    right = np.floor(np.maximum(np.maximum(xa, xb), xc) - 0.5).clip(-1, camera.width - 1)
    top = np.ceil(np.minimum(np.minimum(ya, yb), yc) - 0.5).clip(0, camera.height)
    bottom = np.floor(np.maximum(np.maximum(ya, yb), yc) - 0.5).clip(-1, camera.height - 1)
    keep = (area < 0 if cull else area != 0) & (right >= left) & (bottom >= top)
    if not ahead.all():
        keep &= ahead[a] & ahead[b] & ahead[c]
    (kept,) = np.nonzero(keep)
    best = np.zeros(camera.width * camera.height, np.int64)
    pieces: list[Fragments] = []
    columns = (right[kept] - left[kept] + 1).astype(np.int64)
    pairs = columns * (bottom[kept] - top[kept] + 1).astype(np.int64)
    start = 0
    while start < len(kept):
        # As many triangles as fit in the budget, and at least one.
        stop = start + max(1, int(np.searchsorted(np.cumsum(pairs[start:]), _PAIRS_AT_ONCE, "right")))
        face, count = kept[start:stop], pairs[start:stop]
        owner = np.repeat(np.arange(len(face)), count)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        down, along = np.divmod(within, columns[start:stop][owner])
        px = left[face].astype(np.int64)[owner] + along
        py = top[face].astype(np.int64)[owner] + down
        i, j, k = faces[face].T
        scale = np.float32(1) / area[face]
        # Positions relative to the third corner keep float32 edge functions exact to a small part of a pixel.
        dx = px.astype(np.float32) + np.float32(0.5) - x[k][owner]
        dy = py.astype(np.float32) + np.float32(0.5) - y[k][owner]
        wi = ((y[j] - y[k]) * scale)[owner] * dx + ((x[k] - x[j]) * scale)[owner] * dy
        wj = ((y[k] - y[i]) * scale)[owner] * dx + ((x[i] - x[k]) * scale)[owner] * dy
        wk = np.float32(1) - wi - wj
        (inside,) = np.nonzero((wi >= -1e-5) & (wj >= -1e-5) & (wk >= -1e-5))
        owner = owner[inside]
        corner = np.stack([i, j, k], 1)[owner]
        weight = np.stack([wi[inside], wj[inside], wk[inside]], 1) * inverse[corner]
        nearness = weight.sum(1)
        pieces.append(
            Fragments(
                px[inside] + py[inside] * camera.width,
                face[owner],
                weight / nearness[:, None],
                np.float32(1) / nearness,
            )
        )
        start = stop
    if not pieces:
        empty = np.zeros(0, np.intp)
        return Fragments(empty, empty, np.zeros((0, 3), np.float32), np.zeros(0, np.float32))
    every = pieces[0] if len(pieces) == 1 else Fragments(*(np.concatenate(p) for p in zip(*pieces)))
    # The bits of positive floats sort like the floats: the largest key is the nearest fragment, or the later face on a tie.
    key = (np.float32(1) / every.depth).view(np.int32).astype(np.int64) << 32 | np.arange(1, len(every.depth) + 1)
    np.maximum.at(best, every.pixel, key)
    (pixel,) = np.nonzero(best)
    winner = (best[pixel] & 0xFFFFFFFF) - 1
    return Fragments(pixel, every.face[winner], every.barycentric[winner], every.depth[winner])


def vertex_normals(points: NDArray[np.float32], faces: NDArray[Any]) -> NDArray[np.float32]:
    """Area-weighted unit normals (V, 3) float32, outward, of vertices (V, 3) and faces (F, 3). A vertex whose faces all have zero area gets
    (0, 1, 0).
    """
    a, b, c = (points[faces[:, k]].T.astype(np.float64) for k in range(3))  # tiny edges underflow in float32
    u, v = b - a, c - a
    flat = faces.T.reshape(-1)
    normal = np.empty((3, len(points)))
    for k in range(3):
        m, n = (k + 1) % 3, (k + 2) % 3
        normal[k] = np.bincount(flat, np.tile(u[m] * v[n] - u[n] * v[m], 3), len(points))
    length = np.sqrt((normal * normal).sum(0))
    none = length <= 1e-150  # squares below vanish in float64
    normal[:, none], length[none] = [[0.0], [1.0], [0.0]], 1.0
    return (normal / length).T.astype(np.float32)


def interpolate(
    values: NDArray[np.float32], corners: NDArray[np.intp], barycentric: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Interpolates values (V, C) at N points, given by their triangles' corners (N, 3) and weights (N, 3); returns (C, N)."""
    out = values[corners[:, 0]] * barycentric[:, :1]
    out += values[corners[:, 1]] * barycentric[:, 1:2]
    out += values[corners[:, 2]] * barycentric[:, 2:]
    return np.ascontiguousarray(out.T)
