"""Body files: reads every published variant, writes one.

Nothing in a file is ever executed: pickles are read with an allow-list (:mod:`smpl_jax.unpickle`), npz members without
numpy's pickle support, and sizes are checked before memory is allocated. Neither chumpy nor scipy is needed.

Layout of an ``.npz`` body file, as :func:`save_body_npz` writes it:

* ``v_template (V, 3)``, ``shapedirs (V, 3, N)``, ``posedirs (V, 3, 9 (J - 1))``, ``weights (V, J)``,
  ``J_regressor (J, V)``, ``f (F, 3)``, ``kintree_table (2, J)`` (parents, then joint numbers): SMPL's names and shapes;
* any floating-point array may be stored as integers with ``<name>_scale`` (float, broadcastable): the value is
  their product;
* ``J_regressor`` and ``regressor_<name> (K, V)`` may be stored as CSR triples ``<name>_data``, ``<name>_indices``,
  ``<name>_indptr``;
* optionally ``model_name ()``, ``joint_names (J,)``, ``vertex_id_names (n,)`` with ``vertex_ids (n,)``,
  ``expressiondirs (V, 3, E)``;
* optionally, under the names of SMPL-H and SMPL-X, ``hands_components{l,r} (C, 45)`` and ``hands_mean{l,r} (45,)``, and
  ``lmk_faces_idx (L,)`` with ``lmk_bary_coords (L, 3)``, which become the regressor ``face_landmarks``.
"""

import importlib.resources
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from smpl_jax.body import BodyModel
from smpl_jax.errors import BodyFileError
from smpl_jax.pose import JOINTS, Family
from smpl_jax.unpickle import (
    ForbiddenGlobal,
    PickledArray,
    PickledObject,
    RestrictedUnpickler,
    numpy_table,
    pickled_objects,
    sealed,
)

MAX_BYTES = 2**30
"""Maximum unpacked size of a compressed file; the largest published body (SMPL-X in float64) takes a quarter of it."""
BOUNDED_PACKING = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""The packing of npz members that are read: NumPy writes no other, and ``zipfile`` unpacks the others without a bound."""

# fmt: off
_BODY_JOINTS = [
    "pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle", "right_ankle",
    "spine3", "left_foot", "right_foot", "neck", "left_collar", "right_collar", "head", "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow", "left_wrist", "right_wrist",
]
# fmt: on
_FINGERS = [
    f"{side}_{finger}{i}"
    for side in ("left", "right")
    for finger in ("index", "middle", "pinky", "ring", "thumb")
    for i in (1, 2, 3)
]
_JOINT_NAMES: dict[Family, list[str]] = {
    "smpl": [*_BODY_JOINTS, "left_hand", "right_hand"],
    "smplh": [*_BODY_JOINTS, *_FINGERS],
    "smplx": [*_BODY_JOINTS, "jaw", "left_eye_smplhf", "right_eye_smplhf", *_FINGERS],
}
_FAMILY = {JOINTS[name]: (name, names) for name, names in _JOINT_NAMES.items()}

_REQUIRED = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "f", "kintree_table")
_HANDS = ("hands_componentsl", "hands_componentsr", "hands_meanl", "hands_meanr")
_LANDMARKS = ("lmk_faces_idx", "lmk_bary_coords")
_OPTIONAL = ("expressiondirs", "model_name", "joint_names", "vertex_id_names", "vertex_ids", *_HANDS, *_LANDMARKS)
_FLOATING = ("v_template", "shapedirs", "expressiondirs", "posedirs", "J_regressor", "weights")
_CSR = ("data", "indices", "indptr")


def load_body(
    path: str | os.PathLike[str] | None = None,
    *,
    num_betas: int | None = 10,
    num_expression: int | None = 10,
    dtype: DTypeLike = jnp.float32,
) -> BodyModel:
    """Loads a body model. SMPL, SMPL-H and SMPL-X are detected from the contents of the file.

    Args:
        path: an official ``.pkl`` or ``.npz`` (any variant), or a file of :func:`save_body_npz`. ``None`` is the
            default body of the package; it is read once.
        num_betas: shape directions to keep; ``None`` keeps all. Fewer are faster.
        num_expression: expression directions to keep (SMPL-X); ``None`` keeps all.
        dtype: dtype of the floating-point arrays; float64 needs ``jax_enable_x64``.

    Raises:
        BodyFileError: the file is missing, cut off, malformed or hostile; see :func:`load_body_arrays`.
        ValueError: the file has fewer shape directions than ``num_betas``.
    """
    if path is None:
        return _default_body(num_betas, num_expression, np.dtype(dtype))
    return BodyModel.from_arrays(
        load_body_arrays(path), num_betas=num_betas, num_expression=num_expression, dtype=dtype
    )


@lru_cache(maxsize=4)
def _default_body(num_betas: int | None, num_expression: int | None, dtype: np.dtype) -> BodyModel:
    return BodyModel.from_arrays(load_body_arrays(), num_betas=num_betas, num_expression=num_expression, dtype=dtype)


def load_body_arrays(path: str | os.PathLike[str] | None = None) -> dict[str, np.ndarray]:
    """Reads a body file of any variant into plain arrays of one layout.

    Args:
        path: as for :func:`load_body`.

    Returns:
        ``v_template (V, 3)``, ``shapedirs (V, 3, N)``, ``expressiondirs (V, 3, E)`` (E = 0 except for SMPL-X),
        ``posedirs (V, 3, 9 (J - 1))``, ``J_regressor (J, V)``, ``weights (V, J)`` in the file's own
        precision; ``f (F, 3)`` and ``parents (J,)`` int32 (-1 for the root);
        ``model_name ()`` and ``joint_names (J,)`` text; if the file has them, ``vertex_id_names (n,)`` with
        ``vertex_ids (n,)``, each ``regressor_<name> (K, V)``, dense, and ``hands_components{l,r} (C, 45)`` with
        ``hands_mean{l,r} (45,)``.

    Raises:
        BodyFileError: the file is missing or cut off, its arrays are inconsistent or too large, or it is a pickle that
            would run code. The code was not run.
    """
    if path is None:
        resource = importlib.resources.files("smpl_jax") / "default_body" / "body.npz"
        if not resource.is_file():
            raise BodyFileError(
                "the default body (smpl_jax/default_body/body.npz) is missing from this installation; "
                "reinstall the package"
            )
        with resource.open("rb") as file:
            return _read(file, "the default body")
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read(file, str(path))
    except OSError as error:
        reason = "it is a folder" if path.is_dir() else (error.strerror or str(error))
        raise BodyFileError(
            f"cannot read body file {path}: {reason}; expected a .npz or .pkl file in SMPL's format"
        ) from None


def _read(file: IO[bytes], where: str) -> dict[str, np.ndarray]:
    magic = file.read(4)
    file.seek(0)
    reader = _read_npz if magic == b"PK\x03\x04" else _read_pickle
    try:
        return _canonical(reader(file, where), where)
    except BodyFileError:
        raise
    except ForbiddenGlobal as error:
        raise BodyFileError(
            f"{where} tries to run {error.name}, which no official body file does. Nothing was run. "
            "Download the file again from its official source"
        ) from None
    except (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise BodyFileError(
            f"{where} is cut off or not a body file ({error}); expected a .npz or .pkl file in SMPL's format"
        ) from None
    except MemoryError:
        raise BodyFileError(
            f"{where} needs more memory than is available; expected a .npz or .pkl file in SMPL's format"
        ) from None
    except Exception as error:  # a malformed pickle can fail in any of the opcodes' Python operations
        raise BodyFileError(
            f"{where} is malformed ({type(error).__name__}: {error}); expected a .npz or .pkl file in SMPL's format"
        ) from error


# members of both containers ------------------------------------------------------------------------------------------


def _wanted(name: str) -> bool:
    """The members that a body needs. Real files have more (SMPL-X's npz even has pickled dictionaries); the rest is not read."""
    stem = name.removesuffix("_scale")
    for part in _CSR:
        stem = stem.removesuffix(f"_{part}")
    return stem in _REQUIRED or stem in _OPTIONAL or stem.startswith("regressor_")


def _read_pickle(file: IO[bytes], where: str) -> dict[str, Any]:
    content = RestrictedUnpickler(file, _table()).load()
    if not isinstance(content, dict):
        raise BodyFileError(f"{where}: expected a dictionary of arrays, found {type(content).__name__}")
    return {
        k: _plain(v, where)
        for key, v in content.items()
        if _wanted(k := key.decode("latin1") if isinstance(key, bytes) else str(key))
    }


def _read_npz(file: IO[bytes], where: str) -> dict[str, Any]:
    members = {}
    with zipfile.ZipFile(file) as archive:
        wanted = {name: i for i in archive.infolist() if _wanted(name := i.filename.removesuffix(".npy"))}
        total = sum(info.file_size for info in wanted.values())
        if total > MAX_BYTES:
            raise BodyFileError(f"{where} would unpack to {total:,} bytes; the limit is {MAX_BYTES:,}")
        for name, info in wanted.items():
            if info.compress_type not in BOUNDED_PACKING:
                raise BodyFileError(f"{name!r} in {where} is packed in a way that NumPy does not write")
            with archive.open(info) as member:
                members[name] = _read_npy(member, info.file_size, f"{name!r} in {where}")
    return members


def _read_npy(file: IO[bytes], size: int, where: str) -> Any:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise BodyFileError(f"{where} is a .npy of version {version}; expected 1.0 or 2.0")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        # "Cleaned" files store a scipy matrix this way. numpy would use its unrestricted unpickler; this code does not.
        return _plain(RestrictedUnpickler(file, _table()).load(), where)
    promised = math.prod(shape) * dtype.itemsize
    if any(n < 0 for n in shape) or file.tell() + promised != size:
        raise BodyFileError(
            f"{where}: expected {promised:,} bytes ({dtype} of shape {shape}), found {size - file.tell():,}"
        )
    return np.frombuffer(file.read(promised), dtype).reshape(shape, order="F" if fortran else "C")


def _table() -> dict[str, Any]:
    """The names that an official body pickle may use. The table is made anew for each file."""
    sparse = [
        f"scipy.sparse.{m}{k}.{k}_{t}" for k in ("csc", "csr", "coo") for m in ("", "_") for t in ("matrix", "array")
    ]
    # The state of a chumpy node contains a set, which does not affect its values.
    sets = ("__builtin__.set", "builtins.set")
    table = numpy_table() | pickled_objects([*sparse, *sets, "chumpy.ch.Ch", "chumpy.reordering.Select"])
    table |= {f"{m}._reconstructor": sealed(_reconstructor) for m in ("copy_reg", "copyreg")}
    table |= {f"{m}.object": "object" for m in ("__builtin__", "builtins")}  # only ever an argument of `_reconstructor`
    return table


def _reconstructor(cls: Any, base: Any, state: Any) -> PickledObject:
    if not (isinstance(cls, type) and issubclass(cls, PickledObject)):
        raise pickle.UnpicklingError("the pickle reconstructs something other than a chumpy or scipy array")
    return cls()


class _Sparse:
    """A sparse matrix before it is made dense: its shape must first be checked against the body's."""

    def __init__(self, kind: str, state: Mapping[str, Any], where: str):
        def vector(name: str) -> np.ndarray:
            return np.asarray(_plain(state[name], where)).ravel()

        shape = _plain(state["_shape"] if "_shape" in state else state["shape"], where)
        self.shape = tuple(int(n) for n in shape)
        self.data = vector("data")
        if kind == "coo":
            coords = state.get("coords")
            row, col = (
                (vector("row"), vector("col")) if coords is None else (np.asarray(_plain(c, where)) for c in coords)
            )
        else:
            minor, indptr = vector("indices"), vector("indptr")
            if indptr[0] != 0 or indptr[-1] != len(minor) or (np.diff(indptr) < 0).any():
                raise BodyFileError(
                    f"{where}: the sparse matrix has {len(minor)} indices, and its indptr does not fit them"
                )
            major = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
            row, col = (major, minor) if kind == "csr" else (minor, major)
        self.row, self.col = row, col

    def dense(self, shape: tuple[int, ...], where: str) -> np.ndarray:
        """The dense matrix. ``shape`` must already be checked."""
        if self.shape != shape or not len(self.row) == len(self.col) == len(self.data):
            raise BodyFileError(
                f"{where}: the sparse matrix has shape {self.shape}, {len(self.data)} entries; expected {shape}"
            )
        if len(self.data) and (
            min(self.row.min(), self.col.min()) < 0 or self.row.max() >= shape[0] or self.col.max() >= shape[1]
        ):
            raise BodyFileError(f"{where}: the sparse matrix has entries outside its shape {shape}")
        if math.prod(shape) * self.data.itemsize > MAX_BYTES:
            raise BodyFileError(f"{where}: the sparse matrix of shape {shape} is too large for a body")
        out = np.zeros(shape, self.data.dtype)
        np.add.at(out, (self.row, self.col), self.data)  # repeated entries of a sparse matrix add up
        return out


def _plain(value: Any, where: str) -> Any:
    """A value of either container as an ndarray, text or :class:`_Sparse`."""
    if isinstance(value, PickledArray):
        if isinstance(value.value, list):  # an object array: a body file has only single wrapped values
            if len(value.value) != 1:
                raise BodyFileError(f"{where}: expected numbers, found an array of {len(value.value)} Python objects")
            return _plain(value.value[0], where)
        return value.value
    if isinstance(value, PickledObject):
        state = value.state
        if not isinstance(state, dict):
            raise BodyFileError(f"{where}: the pickled {value.name} has no state")
        module, _, name = value.name.rpartition(".")
        if module.startswith("scipy"):
            return _Sparse(name[:3], state, where)
        if name == "Select":  # chumpy's lazy indexing: a part of another array, reshaped
            source, index = _plain(state["a"], where), _plain(state["idxs"], where)
            return np.asarray(source).ravel()[np.asarray(index)].reshape(state["preferred_shape"])
        return _plain(state["x"], where)
    return value


# one layout for all variants -----------------------------------------------------------------------------------------


def _canonical(raw: dict[str, Any], where: str) -> dict[str, np.ndarray]:
    for name in [n.removesuffix("_indptr") for n in raw if n.endswith("_indptr")]:
        triple = {part: raw.pop(f"{name}_{part}", None) for part in _CSR}
        if any(v is None for v in triple.values()):
            raise BodyFileError(
                f"{where}: {name} is stored sparse and lacks one of {', '.join(f'{name}_{p}' for p in _CSR)}"
            )
        scale = raw.pop(f"{name}_data_scale", None)
        if scale is not None:
            triple["data"] = triple["data"] * np.asarray(scale)
        vertices = len(raw["v_template"]) if "v_template" in raw else 0
        raw[name] = _Sparse("csr", triple | {"shape": (len(triple["indptr"]) - 1, vertices)}, where)
    missing = [name for name in _REQUIRED if name not in raw]
    if missing:
        raise BodyFileError(f"{where} is not a body file: it lacks {', '.join(missing)}")

    parents = _parents(raw["kintree_table"], where)
    num_joints, num_vertices = len(parents), len(raw["v_template"])
    pose_dims = 9 * (num_joints - 1)
    shapes: dict[str, tuple[int, ...]] = {
        "v_template": (num_vertices, 3),
        "shapedirs": (num_vertices, 3, -1),
        "expressiondirs": (num_vertices, 3, -1),
        "posedirs": (num_vertices, 3, pose_dims),
        "J_regressor": (num_joints, num_vertices),
        "weights": (num_vertices, num_joints),
    }
    shapes |= {name: (-1, 45) if "components" in name else (45,) for name in _HANDS}
    raw["posedirs"] = _posedirs(raw["posedirs"], shapes["posedirs"])
    shapes |= {
        name: (-1, num_vertices) for name in raw if name.startswith("regressor_") and not name.endswith("_scale")
    }
    out = {name: _numbers(raw, name, shape, where) for name, shape in shapes.items() if name in raw}
    if raw["weights"].dtype.kind in "iu":  # after rounding to integers the sums are not exactly 1
        out["weights"] = out["weights"] / out["weights"].sum(axis=1, keepdims=True)
    out["f"] = _indices(raw["f"], "f", (-1, 3), num_vertices, where)
    if any(name in raw for name in _LANDMARKS):
        out["regressor_face_landmarks"] = _landmarks(raw, out["f"], num_vertices, where)
    out["parents"] = parents

    name, joint_names = _FAMILY.get(num_joints, ("body", [f"joint{i}" for i in range(num_joints)]))
    out["model_name"] = np.asarray(raw.get("model_name", name)).astype(str)
    out["joint_names"] = np.asarray(raw.get("joint_names", joint_names)).astype(str)
    if out["model_name"].shape != () or out["joint_names"].shape != (num_joints,):
        raise BodyFileError(f"{where}: model_name must be a string, and joint_names must be {num_joints} strings")
    if "vertex_ids" in raw or "vertex_id_names" in raw:
        out["vertex_id_names"] = np.asarray(raw.get("vertex_id_names", [])).astype(str)
        out["vertex_ids"] = _indices(
            raw.get("vertex_ids", np.zeros(0, int)), "vertex_ids", out["vertex_id_names"].shape, num_vertices, where
        )
    if "expressiondirs" not in out:
        out["shapedirs"], out["expressiondirs"] = _split_expression(out["shapedirs"], num_joints)
    return out


def _parents(table: Any, where: str) -> np.ndarray:
    table = np.asarray(table)
    if table.ndim != 2 or len(table) != 2 or not 1 <= table.shape[1] <= 1024 or table.dtype.kind not in "iuf":
        raise BodyFileError(
            f"{where}: kintree_table must have shape (2, 1 to 1024); got {table.dtype} of shape {table.shape}"
        )
    # The root's parent is written as -1, or as 4294967295 or 2^64 - 1 if the table is unsigned.
    parents = table[0].astype(np.uint64 if table.dtype.kind == "u" else np.int64).astype(np.int64).astype(np.int32)
    parents[0] = -1
    if not all(0 <= p < j for j, p in enumerate(parents.tolist()) if j):
        raise BodyFileError(
            f"{where}: kintree_table must list every joint after its parent; parents are {parents.tolist()}"
        )
    return parents


def _posedirs(array: Any, shape: tuple[int, ...]) -> Any:
    """Reshapes pose directions. Files also store them flattened, (3V, P), or flattened and transposed, (P, 3V)."""
    vertices, _, pose_dims = shape
    if getattr(array, "shape", None) == (pose_dims, 3 * vertices):
        array = array.T
    return array.reshape(shape) if getattr(array, "shape", None) == (3 * vertices, pose_dims) else array


def _landmarks(raw: Mapping[str, Any], faces: np.ndarray, num_vertices: int, where: str) -> np.ndarray:
    """Points on triangles, given by (L,) faces and (L, 3) weights of their corners, as a regressor (L, V)."""
    if missing := [name for name in _LANDMARKS if name not in raw]:
        raise BodyFileError(f"{where}: landmarks need {' and '.join(_LANDMARKS)}; {missing[0]} is missing")
    triangles = faces[_indices(raw["lmk_faces_idx"], "lmk_faces_idx", (-1,), len(faces), where)]
    weights = _numbers(raw, "lmk_bary_coords", triangles.shape, where)
    if len(triangles) * num_vertices * weights.itemsize > MAX_BYTES:
        raise BodyFileError(f"{where}: {len(triangles)} landmarks on {num_vertices} vertices are too many for a body")
    out = np.zeros((len(triangles), num_vertices), weights.dtype)
    np.add.at(out, (np.arange(len(triangles))[:, None], triangles), weights)
    return out


def _split_expression(shapedirs: np.ndarray, num_joints: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits shape and expression directions. SMPL-X has both in one array: 300 + 100, or 10 + 10 in the small release."""
    count = shapedirs.shape[-1]
    betas = count if num_joints != JOINTS["smplx"] else 300 if count >= 400 else min(count, 10)
    return shapedirs[..., :betas], shapedirs[..., betas:]


def _numbers(raw: Mapping[str, Any], name: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """A floating-point array of the given shape (-1: any), dequantised and checked."""
    value = raw[name]
    actual = getattr(value, "shape", None)
    if actual is None or len(actual) != len(shape) or any(n not in (-1, m) for n, m in zip(shape, actual)):
        expected = ", ".join("any" if n < 0 else str(n) for n in shape)
        raise BodyFileError(f"{where}: {name} must have shape ({expected}); got {actual}")
    if isinstance(value, _Sparse):
        value = value.dense(actual, f"{where}: {name}")
    if value.dtype.kind not in "iuf":
        raise BodyFileError(f"{where}: {name} must contain numbers; got {value.dtype}")
    scale = raw.get(f"{name}_scale")
    if scale is not None:
        value = value.astype(np.float32) * np.broadcast_to(np.asarray(scale, np.float32), value.shape)
    elif value.dtype.kind in "iu":
        raise BodyFileError(f"{where}: {name} contains integers, which need a {name}_scale")
    if not np.isfinite(value).all():
        raise BodyFileError(f"{where}: {name} must be finite numbers; found NaN or infinity")
    return value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))


def _indices(array: Any, name: str, shape: tuple[int, ...], limit: int, where: str) -> np.ndarray:
    array = np.asarray(array)
    if (
        array.dtype.kind not in "iu"
        or array.ndim != len(shape)
        or any(n not in (-1, m) for n, m in zip(shape, array.shape))
    ):
        expected = ", ".join("any" if n < 0 else str(n) for n in shape)
        raise BodyFileError(
            f"{where}: {name} must contain integers of shape ({expected}); got {array.dtype} of shape {array.shape}"
        )
    if array.size and (int(array.min()) < 0 or int(array.max()) >= limit):
        raise BodyFileError(f"{where}: {name} must lie in [0, {limit}); got {array.min()} to {array.max()}")
    return array.astype(np.int32)


# writing -------------------------------------------------------------------------------------------------------------


def save_body_npz(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], *, quantize: Mapping[str, DTypeLike] | None = None
) -> None:
    """Writes a compressed body file that :func:`load_body` reads back. The same input gives the same bytes.

    Args:
        path: the file to write; no suffix is added.
        arrays: in the layout of :func:`load_body_arrays`. Regressors are stored sparse if that is smaller.
        quantize: array name to the integer type to which it is rounded. Blend shapes have one scale for each entry of
            the last axis, any other array has one scale. Rounding errors are at most half a scale.

    Raises:
        BodyFileError: the arrays are not a body.
    """
    raw = {name: np.asarray(value) for name, value in arrays.items() if name != "parents"}
    parents = np.asarray(arrays["parents"])
    raw["kintree_table"] = np.stack([parents, np.arange(len(parents))]).astype(np.int32)
    _canonical(dict(raw), f"the arrays for {os.fspath(path)}")
    members: dict[str, np.ndarray] = {}
    for name in sorted(raw):
        value = raw[name]
        if name == "J_regressor" or name.startswith("regressor_"):
            members |= dict(_sparse_members(name, value))
        elif quantize and name in quantize:
            members |= dict(_quantized_members(name, value, np.dtype(quantize[name])))
        else:
            members[name] = value
    with open(path, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **members)


def _sparse_members(name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    row, col = np.nonzero(value)
    if 2 * len(row) >= value.size:
        yield name, value
        return
    yield f"{name}_data", value[row, col]
    yield f"{name}_indices", col.astype(np.int32)
    yield f"{name}_indptr", np.searchsorted(row, np.arange(len(value) + 1)).astype(np.int32)


def _quantized_members(name: str, value: np.ndarray, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    axes = (0, 1) if value.ndim == 3 else None
    largest = np.abs(value).max(axis=axes, initial=0)
    scale = np.where(largest > 0, largest, 1) / np.iinfo(dtype).max
    yield name, np.rint(value / scale).astype(dtype)
    yield f"{name}_scale", scale.astype(np.float32)
