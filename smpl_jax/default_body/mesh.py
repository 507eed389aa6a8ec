"""Meshes a signed distance with SMPL's 6 890 vertices and 13 776 faces, exactly symmetric.

Marching cubes mesh the half x >= 0 of the body, quadric edge collapses simplify it, and its mirror image completes it. A
closed mesh of genus 0 has V = F / 2 + 2, so SMPL's number of faces gives SMPL's number of vertices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

FACES = 13776


def half_surface(
    field: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    low: tuple[float, float, float],
    high: tuple[float, float, float],
    step: float,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Marching cubes of `field` on x >= 0; `low[0]` must be 0 so that the rim lies on the plane of symmetry.

    Returns:
        vertices (N, 3) float64 with the rim at exactly x = 0, faces (M, 3) counter-clockwise seen from outside.
    """
    from scipy.ndimage import binary_dilation
    from skimage.measure import marching_cubes

    coarse = 4
    counts = [int(np.ceil((b - a) / (step * coarse))) + 1 for a, b in zip(low, high)]
    axes = [a + step * coarse * np.arange(n) for a, n in zip(low, counts)]
    rough = field(np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).astype(np.float32)).reshape(counts)
    near = binary_dilation(np.abs(rough) < 2.5 * step * coarse, iterations=1)
    # Exact values only near the surface; elsewhere the coarse sign is enough.
    volume = rough.repeat(coarse, 0).repeat(coarse, 1).repeat(coarse, 2)
    (index,) = np.nonzero(near.repeat(coarse, 0).repeat(coarse, 1).repeat(coarse, 2).reshape(-1))
    points = np.stack(np.unravel_index(index, volume.shape), -1).astype(np.float32) * np.float32(step)
    flat = volume.reshape(-1)
    for chunk in np.array_split(np.arange(len(index)), max(1, len(index) // 200_000)):
        flat[index[chunk]] = field(points[chunk] + np.asarray(low, np.float32))
    vertices, faces, _, _ = marching_cubes(volume, 0.0, gradient_direction="descent")
    vertices = vertices.astype(np.float64) * step + np.asarray(low)
    vertices[np.abs(vertices[:, 0]) < 1e-7, 0] = 0.0
    return vertices, faces.astype(np.int64)


def largest_piece(
    vertices: NDArray[np.float64], faces: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(vertices)
    graph = coo_matrix((np.ones(len(faces) * 2), (faces[:, [0, 1]].ravel(), faces[:, [1, 2]].ravel())), (n, n))
    _, label = connected_components(graph, directed=False)
    keep = np.bincount(label[faces[:, 0]]).argmax()
    faces = faces[label[faces[:, 0]] == keep]
    used, faces = np.unique(faces, return_inverse=True)
    return vertices[used], faces.reshape(-1, 3)


class Magnifier:
    """An invertible map of space that enlarges head, hands and feet, so that simplification with one error bound leaves more triangles there.

    Along one axis, the part beyond a start is enlarged by a factor that grows to its full value over a short distance.
    Lengths across the axis, about a centre line, are enlarged by the same factor. The plane x = 0 maps to itself.
    """

    # axis, direction, start, way, factor, centre line of the two other coordinates
    _ZOOMS = (
        (1, 1, 1.48, 0.06, 5.5, (0.0, 0.0)),
        (0, 1, 0.67, 0.06, 5.5, (1.395, 0.0)),
        (1, -1, 0.10, 0.06, 2.0, (0.1, 0.05)),
    )

    def __init__(self) -> None:
        self._knots = np.linspace(-1.0, 6.0, 14001)

    def _table(
        self, direction: int, start: float, way: float, factor: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        s = (direction * (self._knots - start) / way).clip(0, 1)
        growth = 1 + (factor - 1) * s * s * (3 - 2 * s)
        steps = np.diff(self._knots) * (growth[1:] + growth[:-1]) / 2
        mapped = np.concatenate([[0.0], np.cumsum(steps)])
        return growth, mapped - np.interp(start, self._knots, mapped) + start

    def __call__(self, p: NDArray[np.float64]) -> NDArray[np.float64]:
        p = p.copy()
        for axis, direction, start, way, factor, center in self._ZOOMS:
            growth, mapped = self._table(direction, start, way, factor)
            g = np.interp(p[:, axis], self._knots, growth)
            for other, c in zip([k for k in range(3) if k != axis], center):
                p[:, other] = c + (p[:, other] - c) * g
            p[:, axis] = np.interp(p[:, axis], self._knots, mapped)
        return p

    def inverse(self, p: NDArray[np.float64]) -> NDArray[np.float64]:
        p = p.copy()
        for axis, direction, start, way, factor, center in reversed(self._ZOOMS):
            growth, mapped = self._table(direction, start, way, factor)
            p[:, axis] = np.interp(p[:, axis], mapped, self._knots)
            g = np.interp(p[:, axis], self._knots, growth)
            for other, c in zip([k for k in range(3) if k != axis], center):
                p[:, other] = c + (p[:, other] - c) / g
        return p


def detailed(vertices: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which vertices (V, 3), floor frame, belong to head, hands and feet."""
    return (vertices[:, 1] > 1.47) | (vertices[:, 1] < 0.09) | (np.abs(vertices[:, 0]) > 0.68)


def thin(
    vertices: NDArray[np.float64],
    faces: NDArray[np.int64],
    normals: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    count: int,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Simplifies to exactly `count` faces by quadric edge collapses, finer on head, hands and feet; the rim stays on x = 0.

    Limbs are nearly cylinders. Collapses would leave triangles as long as the limb there, which bend badly. A ripple of
    2 mm on trunk and limbs makes long edges costly; `relax` removes it afterwards.
    """
    import fast_simplification

    magnifier = Magnifier()
    ripple = 0.002 * np.sin(vertices * (2 * np.pi / 0.06) + [np.pi / 2, 0.3, 0.5]).prod(1)
    ripple *= ~detailed(vertices)
    uneven = vertices + normals(vertices.astype(np.float32)) * ripple[:, None]
    uneven[vertices[:, 0] == 0, 0] = 0.0
    large, triangles = magnifier(uneven), faces.astype(np.int32)
    # A collapse removes one face on the rim and two elsewhere, so a run can miss the count by one. Then the next value is tried.
    for pace in (2.5, 2.6, 2.7, 2.8, 2.9, 3.0, 3.2, 3.4, 3.6, 3.8):
        points, kept = fast_simplification.simplify(large, triangles, target_count=count, agg=pace)
        kept = kept.astype(np.int64)
        if len(kept) == count and manifold(mirror_mesh(points, kept)[1]):
            rim = points[:, 0] == 0
            points = magnifier.inverse(points.astype(np.float64))
            points[rim, 0] = 0.0
            return points, kept
    raise RuntimeError(f"no simplification gave a manifold of {count} faces; change the grid step")


def mirror_mesh(
    vertices: NDArray[np.float64], faces: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Closes a half at x >= 0 with its mirror image. Returns vertices, faces, and the index of each vertex's mirror image.

    Order: left half with its rim first, then the mirror images of the vertices off the rim.
    """
    n = len(vertices)
    off = np.nonzero(np.abs(vertices[:, 0]) > 1e-9)[0]
    twin = np.arange(n)
    twin[off] = n + np.arange(len(off))
    everything = np.concatenate([vertices, vertices[off] * [-1.0, 1.0, 1.0]])
    return everything, np.concatenate([faces, twin[faces][:, ::-1]]), np.concatenate([twin, off])


def manifold(faces: NDArray[np.int64]) -> bool:
    """Closed, each edge shared by two faces that run along it in opposite directions, Euler characteristic 2."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    directed = {(int(a), int(b)) for a, b in edges}
    if len(directed) != len(edges) or any((b, a) not in directed for a, b in directed):
        return False
    return len(np.unique(faces)) - len(edges) // 2 + len(faces) == 2


def neighbours(faces: NDArray[np.int64], count: int):
    """Row-normalised adjacency (count, count), scipy csr: averages each vertex's neighbours."""
    from scipy.sparse import coo_matrix, diags

    i, j = faces[:, [0, 1, 2]].ravel(), faces[:, [1, 2, 0]].ravel()
    a = coo_matrix((np.ones(2 * len(i)), (np.r_[i, j], np.r_[j, i])), (count, count)).tocsr()
    a.data[:] = 1.0
    return diags(1 / np.asarray(a.sum(1)).ravel()) @ a


def relax(
    vertices: NDArray[np.float64],
    faces: NDArray[np.int64],
    field: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    normals: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    rounds: int,
    amount: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Makes triangles more even: moves each vertex along the surface towards the mean of its neighbours, by the fraction
    `amount` (V,), and then projects it onto the zero of the field.
    """
    average = neighbours(faces, len(vertices))
    for _ in range(rounds):
        normal = normals(vertices.astype(np.float32)).astype(np.float64)
        move = average @ vertices - vertices
        move -= normal * (move * normal).sum(-1, keepdims=True)
        vertices = vertices + amount[:, None] * move
        for _ in range(2):
            p = vertices.astype(np.float32)
            vertices = vertices - normals(p) * field(p).clip(-0.004, 0.004)[:, None]
    return vertices
