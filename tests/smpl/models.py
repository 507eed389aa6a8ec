"""Random body models in the formats of the real files, made by the tests: the real ones are licensed and not ours to
ship.
"""

import io
import pickle
import struct

import numpy as np

SMPL_PARENTS = [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21]


def _fingers(left_wrist: int, right_wrist: int, first: int) -> list[int]:
    return [
        w if k % 3 == 0 else first + 15 * s + k - 1 for s, w in enumerate((left_wrist, right_wrist)) for k in range(15)
    ]


PARENTS = {
    "smpl": SMPL_PARENTS,
    "smplh": [*SMPL_PARENTS[:22], *_fingers(20, 21, 22)],
    "smplx": [*SMPL_PARENTS[:22], 15, 15, 15, *_fingers(20, 21, 25)],
}


def random_arrays(
    kind: str = "smpl", num_vertices: int = 200, num_shapes: int = 10, seed: int = 0
) -> dict[str, np.ndarray]:
    """What a body file holds, float64, of a body's scale: metres, directions of centimetres, four weights a vertex."""
    rng = np.random.default_rng(seed)
    parents = PARENTS[kind]
    joints = len(parents)
    weights = np.zeros((num_vertices, joints))
    for _ in range(4):
        weights[np.arange(num_vertices), rng.integers(0, joints, num_vertices)] += rng.uniform(0.1, 1, num_vertices)
    regressor = np.zeros((joints, num_vertices))
    for row in regressor:
        row[rng.integers(0, num_vertices, 12)] = rng.uniform(0.1, 1, 12)
    return {
        "v_template": rng.normal((0, -0.2, 0.03), 0.4, (num_vertices, 3)),
        "shapedirs": rng.normal(0, 0.01, (num_vertices, 3, num_shapes)),
        "posedirs": rng.normal(0, 0.002, (num_vertices, 3, 9 * (joints - 1))),
        "J_regressor": regressor / regressor.sum(1, keepdims=True),
        "weights": weights / weights.sum(1, keepdims=True),
        "f": rng.integers(0, num_vertices, (2 * num_vertices - 4, 3)).astype(np.uint32),
        "kintree_table": np.stack([np.array(parents, np.int64), np.arange(joints)]),
    }


def random_rotations(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """(..., 3, 3) float32, uniform."""
    q = np.linalg.qr(rng.normal(size=(*shape, 3, 3)))[0]
    return (q * np.linalg.det(q)[..., None, None]).astype(np.float32)


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes what Python 2 wrote: byte strings for bytes and text alike, binary (protocol 2) or escaped (protocol 0)."""

    dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]

    def save_string(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        if self.proto:
            self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        else:
            self.write(pickle.STRING + repr(data)[1:].encode() + b"\n")
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def python2_pickle(content: object, protocol: int) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol).dump(content)
    renamed = buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    return renamed.replace(b"scipy.sparse._csc", b"scipy.sparse.csc")
