"""Recall, R-precision and Fréchet distance on features of poses and texts.

Features are (N, D) of unit length, and row i of the texts belongs to row i of the poses. If the right item of a query has the same score as others,
the query counts as the chance of a hit with these items in random order. So a system that always gives the same pose gets the values of guessing.

Sources: naver/posescript, ``src/text2pose/{evaluate,fid}.py``; liyiheng23/UniPose, ``posegpt/models/metrics.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from chatpose_jax.settings import one_line

RECALLS = (5, 10, 20)
"""k of recall in ChatPose's Table 1. PoseScript's own tables have 1, 5, 10."""
GROUP, REPEATS, TOP = 32, 10, (1, 2, 3)
"""R-precision: the number of items in a group, of PoseScript's draws for each text, and the values of k."""
SAME = 1e-6
"""Scores that differ by at most this are equal, because features are float32."""
PRECISION_RULE = (
    f"whether the right pose is among the k of {GROUP} poses that are most similar to the text. PoseScript: by the mean rank over {REPEATS} draws of "
    f"{GROUP - 1} other poses; UniPose: in shuffled groups of {GROUP}, without the last, incomplete group"
)
_BLOCK = 2**23  # scores at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """Where N queries find the right item in the gallery.

    before: (N,) items with a higher score. equal: (N,) items with the same score, the right one among them. found: (N,) bool; a query that does
    not exist, or whose item does not, is a miss.
    """

    before: np.ndarray
    equal: np.ndarray
    found: np.ndarray

    __repr__ = one_line

    def hits(self, k: int) -> np.ndarray:
        """(N,) float64: 1 where the right item is among the first k, 0 where it is not, the chance of a hit where equal scores decide."""
        return np.where(self.found, np.clip((k - self.before) / np.maximum(self.equal, 1), 0, 1), 0.0)

    @property
    def ranks(self) -> np.ndarray:
        """(N,) float64, the mean rank of the right item, counted from 1; NaN where the query or its item does not exist."""
        return np.where(self.found, self.before + (self.equal + 1) / 2, np.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
    """N pairs of text and pose, compared with each other.

    p2t: poses are the queries and texts the gallery; t2p: the other way round. posescript, unipose: (3, N) float64, hits of R-precision at 1, 2, 3;
    NaN for pairs that do not count.
    """

    p2t: Places
    t2p: Places
    posescript: np.ndarray
    unipose: np.ndarray

    __repr__ = one_line


def compare(
    texts: np.ndarray,
    poses: np.ndarray,
    *,
    with_text: np.ndarray | None = None,
    with_pose: np.ndarray | None = None,
    seed: int = 0,
) -> Compared:
    """Recall and R-precision of N pairs.

    R-precision retrieves the pose of a text, by two rules. PoseScript: 31 other poses are drawn for each text, ten times; the rank of the right pose,
    counted from 0, is averaged over the draws, and it is a hit if that is below k. UniPose: all pairs are shuffled and cut into groups of 32, each of
    which is a gallery; the last pairs, fewer than 32, do not count. With fewer than 32 pairs, both are NaN.

    Args:
        texts, poses: (N, D) features.
        with_text, with_pose: (N,) bool, the texts and poses that exist; by default all. One that does not exist is in no gallery, and its pair is a
            miss.
        seed: of the draws.
    """
    count = len(texts)
    has_text, has_pose = (np.ones(count, bool) if each is None else each for each in (with_text, with_pose))
    whole = has_text & has_pose
    own = np.einsum("nd,nd->n", texts, poses)
    before, reached = np.zeros((2, count), np.int64), np.zeros((2, count), np.int64)
    mean_ranks, rng = np.full(count, np.nan), np.random.default_rng(seed)
    step = max(1, _BLOCK // max(count, 1))
    for start in range(0, count, step):
        rows = np.arange(start, min(start + step, count))
        scores, right = texts[rows] @ poses.T, own[rows, None]
        present = has_text[rows, None]
        before[0] += ((scores > own + SAME) & present).sum(0)
        reached[0] += ((scores >= own - SAME) & present).sum(0)
        before[1, rows] = ((scores > right + SAME) & has_pose).sum(1)
        reached[1, rows] = ((scores >= right - SAME) & has_pose).sum(1)
        if count >= GROUP:
            drawn = _others(rng, rows, count)
            theirs, there = np.take_along_axis(scores, drawn, 1), has_pose[drawn]
            higher, equal = (theirs > right + SAME) & there, (np.abs(theirs - right) <= SAME) & there
            mean_ranks[rows] = (higher.sum(1) + equal.sum(1) / 2) / REPEATS
    p2t, t2p = (Places(before[i], reached[i] - before[i], whole) for i in (0, 1))
    below = np.stack([mean_ranks < k for k in TOP]).astype(np.float64)
    posescript = np.where(whole, below, 0.0) if count >= GROUP else np.full((len(TOP), count), np.nan)
    return Compared(p2t, t2p, posescript, _in_groups(texts, poses, has_pose, whole, seed))


def _others(rng: np.random.Generator, rows: np.ndarray, count: int) -> np.ndarray:
    """(R, 310): for each of some rows, ten draws of 31 different others of ``count`` rows (Floyd's sampling, all rows at once)."""
    drawn = np.empty((len(rows), REPEATS, GROUP - 1), np.int64)
    for place, last in enumerate(range(count - GROUP, count - 1)):
        pick = rng.integers(0, last + 1, drawn.shape[:2])
        taken = (drawn[..., :place] == pick[..., None]).any(-1)
        drawn[..., place] = np.where(taken, last, pick)
    flat = drawn.reshape(len(rows), -1)
    return flat + (flat >= rows[:, None])


def _in_groups(texts: np.ndarray, poses: np.ndarray, has_pose: np.ndarray, whole: np.ndarray, seed: int) -> np.ndarray:
    """(3, N) hits of UniPose's R-precision."""
    found = np.full((len(TOP), len(texts)), np.nan)
    order = np.random.default_rng(seed).permutation(len(texts))
    groups = order[: len(order) // GROUP * GROUP].reshape(-1, GROUP)
    scores = texts[groups] @ poses[groups].swapaxes(1, 2)
    right = np.einsum("gii->gi", scores)[..., None]
    there = has_pose[groups][:, None]
    before = ((scores > right + SAME) & there).sum(-1)
    equal = ((scores >= right - SAME) & there).sum(-1) - before
    places = Places(before, equal, whole[groups])
    found[:, groups] = np.stack([places.hits(k) for k in TOP])
    return found


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The Fréchet distance of two sets of features, (N, D) and (M, D), taken as normal distributions: |μ₁ − μ₂|² + Tr(C₁ + C₂ − 2 (C₁ C₂)^½).

    Tr (C₁ C₂)^½ is the sum of the singular values of C₁^½ C₂^½. This needs no square root of an asymmetric matrix, and works as well for singular
    covariances, of fewer samples than features. NaN for fewer than two samples. Computed in float64.
    """
    if min(len(first), len(second)) < 2:
        return float("nan")
    (mean1, root1), (mean2, root2) = _moments(first), _moments(second)
    shared = np.linalg.svd(root1 @ root2, compute_uv=False).sum()
    distance = ((mean1 - mean2) ** 2).sum() + (root1**2).sum() + (root2**2).sum() - 2 * shared
    return max(float(distance), 0.0)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the square root of the covariance, which is symmetric."""
    found = np.asarray(features, np.float64)
    values, vectors = np.linalg.eigh(np.cov(found, rowvar=False).reshape(found.shape[1], -1))
    return found.mean(0), vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def recall_columns(found: Compared, recalls: Sequence[int] = RECALLS) -> dict[str, np.ndarray]:
    """(N,) percent for each column of a table: ``R^P2T@k``, ``R^T2P@k``, and R-precision by the name of its rule."""
    ways = {"P2T": found.p2t, "T2P": found.t2p}
    columns = {f"R^{way}@{k}": places.hits(k) for way, places in ways.items() for k in recalls}
    for rule, hits in (("PoseScript", found.posescript), ("UniPose", found.unipose)):
        columns |= {f"R-precision@{k} ({rule})": hits[i] for i, k in enumerate(TOP)}
    return {name: 100 * values for name, values in columns.items()}
