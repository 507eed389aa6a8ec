"""Body models of the SMPL family as pure functions on a frozen pytree.

SMPL (Loper et al., SIGGRAPH Asia 2015), SMPL-H and SMPL-X have different arrays but the same formula:

    vertices = skinning(template + shape directions · betas + pose directions · (R - I),  kinematic tree,  weights)

:func:`joints` does not compute the mesh and is up to a hundred times faster than :func:`vertices` and :func:`forward`,
which do. :func:`vertices` of ``body.subset(ids)`` computes only the chosen vertices.

Frames: the body at rest is in the frame of its file (SMPL's: y up, facing +z, metres, the pelvis not at the origin). The
rotation of joint 0 rotates it about the pelvis into the caller's frame; ``translation`` is added last.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache, partial
from itertools import pairwise
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

_HIGHEST = jax.lax.Precision.HIGHEST  # accelerators otherwise multiply in bfloat16: millimetres of error
_CPU_CHUNK = 64  # bodies; beyond this the skinning product of a batch leaves the caches (measured, docs/body.md)

Chunk = int | None | Literal["auto"]

SHAPE_SPACES = {"smpl": "SMPL", "smplh": "SMPL", "smplx": "SMPL-X"}
"""Shape spaces by the name of the body. SMPL-H has the betas of SMPL. Any other body has a shape space of its own name."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["template", "bases", "weights", "joint_template", "joint_shapedirs", "faces", "regressors"],
    meta_fields=["name", "parents", "joint_names", "vertex_ids", "num_betas", "num_expression"],
)
@dataclasses.dataclass(frozen=True)
class BodyModel:
    """A body model: arrays (pytree leaves) and their static description.

    Letters: V vertices, F faces, J joints, S = ``num_betas + num_expression`` shape directions, P = 9 (J - 1) pose
    directions. Vertex arrays are component-major (x, y, z planes), so that blending and skinning are one matrix product
    each.
    """

    template: jax.Array  # (3, V) rest vertices
    bases: jax.Array  # (S + P, 3, V) shape, expression, then pose directions
    weights: jax.Array  # (J, V) skinning weights
    joint_template: jax.Array  # (J, 3) rest joints
    joint_shapedirs: jax.Array  # (S, J, 3) shape directions of the rest joints
    faces: jax.Array  # (F, 3) int32, counter-clockwise seen from outside
    regressors: dict[str, jax.Array]  # name -> (K, V): further keypoints as weighted sums of vertices

    name: str  # "smpl", "smplh", "smplx", or the file's own name
    parents: tuple[int, ...]  # -1 for the root; a parent always precedes its children
    joint_names: tuple[str, ...]
    vertex_ids: tuple[tuple[str, int], ...]  # named vertices of the file
    num_betas: int
    num_expression: int

    def __repr__(self) -> str:
        count = next(iter(np.shape(self.template)[::-1]), "?")  # JAX may replace arrays by other objects
        return f"BodyModel({self.name!r}, {count} vertices, {self.num_joints} joints, {self.num_betas} betas)"

    @property
    def num_joints(self) -> int:
        return len(self.parents)

    @property
    def num_vertices(self) -> int:
        return self.template.shape[-1]

    @property
    def shape_space(self) -> str:
        """The shape space of its betas: "SMPL", "SMPL-X", or the body's own name. Betas of one mean another shape in another."""
        return SHAPE_SPACES.get(self.name, self.name)

    @property
    def fingerprint(self) -> str:
        """Tells bodies of one name apart, such as SMPL's three genders: 8 hex digits of a hash of template, bases and weights."""
        digest = hashlib.blake2b(digest_size=4)
        for array in (self.template, self.bases, self.weights):
            digest.update(np.ascontiguousarray(array, np.float32).data)
        return digest.hexdigest()

    @property
    def dtype(self) -> jnp.dtype:
        return self.template.dtype

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Joints grouped by their depth in the kinematic tree, root first."""
        return _levels(self.parents)

    def vertex_id(self, name: str) -> int:
        """Index of a named vertex. Raises a ValueError that lists the known names if there is none."""
        ids = dict(self.vertex_ids)
        if name not in ids:
            raise ValueError(
                f"body {self.name!r} has no vertex named {name!r}; its named vertices are {', '.join(sorted(ids)) or 'none'}. "
                f"To name one: body.with_keypoints(vertex_ids={{{name!r}: number}})"
            )
        return ids[name]

    def with_keypoints(
        self, *, vertex_ids: Mapping[str, int] | None = None, regressors: Mapping[str, ArrayLike] | None = None
    ) -> "BodyModel":
        """The same body with further named vertices and regressors. A name that exists already is replaced.

        SMPL's own files have neither. Vertex numbers and weights depend on the mesh, so they come with the file or from
        the caller. ``save_body_npz`` stores them in a file (``vertex_id_names``, ``vertex_ids``, ``regressor_<name>``).

        Args:
            vertex_ids: name to vertex number.
            regressors: name to (K, V) weights, as :func:`regress` takes them.

        Raises:
            ValueError: a number is out of range, or a regressor does not fit the mesh.
        """
        ids, further = dict(self.vertex_ids), dict(self.regressors)
        for name, number in (vertex_ids or {}).items():
            if not isinstance(number, int | np.integer) or not 0 <= number < self.num_vertices:
                raise ValueError(f"vertex {name!r} must be a number in [0, {self.num_vertices}); found {number!r}")
            ids[str(name)] = int(number)
        for name, weights in (regressors or {}).items():
            further[name] = jnp.asarray(weights, self.dtype)
            if further[name].ndim != 2 or further[name].shape[1] != self.num_vertices:
                raise ValueError(
                    f"regressor {name!r} must have shape (K, {self.num_vertices}); found {further[name].shape}"
                )
        return dataclasses.replace(self, vertex_ids=tuple(ids.items()), regressors=dict(sorted(further.items())))

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, np.ndarray],
        *,
        num_betas: int | None = 10,
        num_expression: int | None = 10,
        dtype: DTypeLike = jnp.float32,
    ) -> "BodyModel":
        """Builds a body from the arrays that :func:`smpl_jax.io.load_body_arrays` returns.

        Args:
            arrays: ``v_template (V, 3)``, ``shapedirs (V, 3, N)``, ``expressiondirs (V, 3, E)``,
                ``posedirs (V, 3, P)``, ``J_regressor (J, V)``, ``weights (V, J)``, ``f (F, 3)``, ``parents (J,)``,
                ``model_name ()``, ``joint_names (J,)``, and optionally ``vertex_id_names`` with ``vertex_ids``, and any
                ``regressor_<name> (K, V)``.
            num_betas: number of shape directions to keep; ``None`` keeps all.
            num_expression: number of expression directions to keep, if the body has any; ``None`` keeps all.
            dtype: dtype of every floating-point leaf. float64 needs ``jax_enable_x64``.

        Raises:
            ValueError: the file has fewer shape directions than ``num_betas``.
        """
        available = arrays["shapedirs"].shape[-1]
        num_betas = available if num_betas is None else num_betas
        if not 0 <= num_betas <= available:
            raise ValueError(
                f"num_betas must be in [0, {available}], the number of shape directions of the body file, or None for all; "
                f"found {num_betas}"
            )
        expression = arrays["expressiondirs"][..., :num_expression]
        template = np.asarray(arrays["v_template"], np.float64)
        shape = np.concatenate([arrays["shapedirs"][..., :num_betas], expression], axis=-1).astype(np.float64)
        regressor = np.asarray(arrays["J_regressor"], np.float64)

        def leaf(x: np.ndarray) -> jax.Array:
            return jnp.asarray(np.ascontiguousarray(x), dtype)

        return cls(
            template=leaf(template.T),
            bases=leaf(np.concatenate([shape, arrays["posedirs"]], axis=-1).transpose(2, 1, 0)),
            weights=leaf(arrays["weights"].T),
            joint_template=leaf(regressor @ template),
            joint_shapedirs=leaf(np.einsum("jv,vcs->sjc", regressor, shape, optimize=True)),
            faces=jnp.asarray(arrays["f"], jnp.int32),
            regressors={
                k.removeprefix("regressor_"): leaf(v) for k, v in sorted(arrays.items()) if k.startswith("regressor_")
            },
            name=str(arrays["model_name"]),
            parents=tuple(int(p) for p in arrays["parents"]),
            joint_names=tuple(str(n) for n in arrays["joint_names"]),
            vertex_ids=tuple(
                (str(n), int(i))
                for n, i in zip(arrays.get("vertex_id_names", ()), arrays.get("vertex_ids", ()), strict=True)
            ),
            num_betas=num_betas,
            num_expression=expression.shape[-1],
        )

    def subset(self, vertex_ids: ArrayLike) -> "BodyModel":
        """The same body with only the given vertices, in the given order; joints are unchanged.

        Faces, named vertices and regressors are kept if all their vertices are in the subset. A subset takes less time to
        pose, in proportion to its number of vertices.

        Args:
            vertex_ids: (N,) integers, without repeats; concrete, not traced.

        Raises:
            ValueError: ids repeat, are out of range or are not a vector of integers.
        """
        ids = np.asarray(vertex_ids)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or len(np.unique(ids)) != len(ids):
            raise ValueError(
                f"vertex_ids must be a vector of integers without repeats; got {ids.dtype} of shape {ids.shape}"
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_vertices:
            raise ValueError(f"vertex_ids must lie in [0, {self.num_vertices}); got {ids.min()} to {ids.max()}")
        new_index = np.full(self.num_vertices, -1, np.int32)
        new_index[ids] = np.arange(len(ids))
        faces = new_index[np.asarray(self.faces)]
        outside = new_index < 0
        return dataclasses.replace(
            self,
            template=self.template[:, ids],
            bases=self.bases[..., ids],
            weights=self.weights[:, ids],
            faces=jnp.asarray(faces[(faces >= 0).all(axis=-1)]),
            regressors={k: r[:, ids] for k, r in self.regressors.items() if not np.asarray(r)[:, outside].any()},
            vertex_ids=tuple((n, int(new_index[i])) for n, i in self.vertex_ids if not outside[i]),
        )


class BodyOutput(NamedTuple):
    """A posed body."""

    vertices: jax.Array  # (..., V, 3)
    joints: jax.Array  # (..., J, 3)

    def __repr__(self) -> str:
        return f"BodyOutput(vertices {np.shape(self.vertices)}, joints {np.shape(self.joints)})"


def joints(
    body: BodyModel,
    rotations: ArrayLike,
    betas: ArrayLike | None = None,
    translation: ArrayLike | None = None,
    *,
    expression: ArrayLike | None = None,
) -> jax.Array:
    """Positions of the kinematic joints, without computing any vertex.

    Args:
        body: the model.
        rotations: (..., J, 3, 3), each relative to its parent; joint 0 is the global orientation.
        betas: (..., n) shape coefficients, n <= ``body.num_betas``; missing ones are 0.
        translation: (..., 3) metres, added last.
        expression: (..., n) expression coefficients (SMPL-X), n <= ``body.num_expression``.

    Returns:
        (..., J, 3) metres, in ``body.dtype``. Leading shapes broadcast.

    Raises:
        ValueError: a shape does not fit the model.
    """
    inputs, batch = _inputs(body, rotations, betas, translation, expression)
    positions = _joints(body, inputs)
    return positions.reshape(*batch, *positions.shape[1:])


def chain(body: BodyModel, rotations: ArrayLike, betas: ArrayLike | None = None) -> tuple[jax.Array, jax.Array]:
    """The kinematic chain: rotations (..., J, 3, 3) of all joints from rest, in the frame of the root rotation, and positions (..., J, 3) in metres.
    Arguments and errors as :func:`joints`.
    """
    inputs, batch = _inputs(body, rotations, betas, None, None)
    turned, positions = _kinematics(body, inputs.rotations, _rest_joints(body, inputs.shape))
    return turned.reshape(*batch, *turned.shape[1:]), positions.reshape(*batch, *positions.shape[1:])


def vertices(
    body: BodyModel,
    rotations: ArrayLike,
    betas: ArrayLike | None = None,
    translation: ArrayLike | None = None,
    *,
    expression: ArrayLike | None = None,
    chunk: Chunk = "auto",
) -> jax.Array:
    """Vertices of the posed body, (..., V, 3) metres; arguments as :func:`forward`."""
    return forward(body, rotations, betas, translation, expression=expression, chunk=chunk).vertices


def forward(
    body: BodyModel,
    rotations: ArrayLike,
    betas: ArrayLike | None = None,
    translation: ArrayLike | None = None,
    *,
    expression: ArrayLike | None = None,
    chunk: Chunk = "auto",
) -> BodyOutput:
    """Vertices and joints of the posed body; arguments as :func:`joints`, and

    Args:
        chunk: bodies computed at a time, to stay in the caches and to bound memory; ``None`` computes all at once.
            ``"auto"`` is 64 on CPU and ``None`` elsewhere.
    """
    inputs, batch = _inputs(body, rotations, betas, translation, expression)
    if chunk == "auto":
        chunk = _CPU_CHUNK if jax.default_backend() == "cpu" else None
    elif chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be a positive number of bodies, None or 'auto'; got {chunk}")
    output = _forward(body, inputs, chunk=chunk)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), output)


def pelvis(body: BodyModel, betas: ArrayLike | None = None) -> jax.Array:
    """Joint 0 of the body at rest, (..., 3) metres. The rotation of the root rotates the body about this point.

    betas: (..., n) shape coefficients, n <= ``body.num_betas``.
    """
    shape = _coefficients(body, "betas", betas, body.num_betas)
    directions = body.joint_shapedirs[: body.num_betas, 0]
    return body.joint_template[0] + jnp.einsum("...s,sc->...c", shape, directions, precision=_HIGHEST)


def regress(body: BodyModel, vertices: ArrayLike, name: str) -> jax.Array:
    """Keypoints (..., K, 3) from vertices (..., V, 3) by one of ``body.regressors``. Raises a ValueError that lists
    the known names if there is none.
    """
    if name not in body.regressors:
        raise ValueError(
            f"body {body.name!r} has no regressor {name!r}; its regressors are {', '.join(body.regressors) or 'none'}. "
            f"To add one: body.with_keypoints(regressors={{{name!r}: weights (K, {body.num_vertices})}})"
        )
    return jnp.einsum("kv,...vc->...kc", body.regressors[name], jnp.asarray(vertices), precision=_HIGHEST)


@lru_cache
def _levels(parents: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    depth: list[int] = []
    for parent in parents:
        depth.append(0 if parent < 0 else depth[parent] + 1)
    return tuple(tuple(j for j, d in enumerate(depth) if d == level) for level in range(max(depth) + 1))


class _Inputs(NamedTuple):
    """Checked arguments in the body's dtype, flattened to one batch axis B."""

    rotations: jax.Array  # (B, J, 3, 3)
    shape: jax.Array  # (B, S)
    translation: jax.Array | None  # (B, 3)


@partial(jax.jit, static_argnames="chunk")
def _forward(body: BodyModel, inputs: _Inputs, chunk: int | None) -> BodyOutput:
    size = len(inputs.rotations)
    if size == 0:  # a reshape with -1 fails for an empty array
        empty = partial(jnp.zeros, dtype=body.dtype)
        return BodyOutput(empty((0, body.num_vertices, 3)), empty((0, body.num_joints, 3)))
    if chunk is None or size <= chunk:
        return _pose(body, inputs)
    count = -(-size // chunk)
    chunk = -(-size // count)  # equal shares, so that at most count - 1 bodies of padding are computed
    padding = count * chunk - size

    def split(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(count, chunk, *x.shape[1:])

    # Without the checkpoint the backward pass would keep every chunk's skinning matrices: 12 numbers a vertex.
    pose = jax.checkpoint(partial(_pose, body))
    output = jax.lax.map(pose, jax.tree.map(split, inputs))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], output)


@jax.jit
def _joints(body: BodyModel, inputs: _Inputs) -> jax.Array:
    positions = _kinematics(body, inputs.rotations, _rest_joints(body, inputs.shape))[1]
    return positions if inputs.translation is None else positions + inputs.translation[:, None]


def _pose(body: BodyModel, inputs: _Inputs) -> BodyOutput:
    rotations, shape, translation = inputs
    size = len(rotations)
    rest = _rest_joints(body, shape)
    orientation, positions = _kinematics(body, rotations, rest)
    from_rest = positions - jnp.einsum("bjik,bjk->bji", orientation, rest, precision=_HIGHEST)

    pose = (rotations[:, 1:] - jnp.eye(3, dtype=body.dtype)).reshape(size, -1)
    coefficients = jnp.concatenate([shape, pose], axis=-1)
    blend = jnp.matmul(coefficients, body.bases.reshape(len(body.bases), -1), precision=_HIGHEST)
    shaped = body.template + blend.reshape(size, 3, -1)

    transforms = jnp.concatenate([orientation, from_rest[..., None]], axis=-1)  # (B, J, 3, 4)
    skin = jnp.matmul(transforms.transpose(0, 2, 3, 1).reshape(size * 12, -1), body.weights, precision=_HIGHEST)
    # Written out by component for a fast gradient. The gradient of a broadcast product is a sum over three rows, which
    # XLA does not vectorise on CPU. The gradient of a slice is a padding; that of a split, used here, is a concatenation.
    t = [row[:, 0] for row in jax.lax.split(skin.reshape(size, 12, -1), [1] * 12, axis=1)]
    x, y, z = (plane[:, 0] for plane in jax.lax.split(shaped, [1] * 3, axis=1))
    posed = jnp.stack([t[i] * x + t[i + 1] * y + t[i + 2] * z + t[i + 3] for i in (0, 4, 8)], axis=1)
    if translation is not None:
        posed, positions = posed + translation[:, :, None], positions + translation[:, None]
    return BodyOutput(posed.swapaxes(-1, -2), positions)


def _rest_joints(body: BodyModel, shape: jax.Array) -> jax.Array:
    """Rest joints (B, J, 3): linear in the shape, so the mesh is not needed."""
    return body.joint_template + jnp.einsum("bs,sjc->bjc", shape, body.joint_shapedirs, precision=_HIGHEST)


def _kinematics(body: BodyModel, rotations: jax.Array, rest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Global orientation (B, J, 3, 3) and position (B, J, 3) of every joint, one level of the tree at a time."""
    levels = body.levels
    parents = np.array(body.parents)
    offsets = rest - jnp.where((parents >= 0)[:, None], rest[:, parents], 0)
    local = jnp.concatenate([rotations, offsets[..., None]], axis=-1)  # (B, J, 3, 4)
    done = [local[:, levels[0]]]
    for above, level in pairwise(levels):
        parent = done[-1][:, [above.index(body.parents[j]) for j in level]]
        moved = jnp.matmul(parent[..., :3], local[:, level], precision=_HIGHEST)
        done.append(moved.at[..., 3].add(parent[..., 3]))
    order = np.argsort(np.concatenate(levels))
    everything = jnp.concatenate(done, axis=1)[:, order]
    return everything[..., :3], everything[..., 3]


def _inputs(
    body: BodyModel,
    rotations: ArrayLike,
    betas: ArrayLike | None,
    translation: ArrayLike | None,
    expression: ArrayLike | None,
) -> tuple[_Inputs, tuple[int, ...]]:
    """Checks, broadcasts and flattens the arguments; returns them with their batch shape."""
    rotations = jnp.asarray(rotations, body.dtype)
    if rotations.shape[-3:] != (body.num_joints, 3, 3):
        hint = "; smpl_jax.for_body converts a pose of another family" if rotations.shape[-2:] == (3, 3) else ""
        if rotations.shape[-2:] == (body.num_joints, 3) or rotations.shape[-1:] == (3 * body.num_joints,):
            hint = f"; smpl_jax.axis_angle_to_matrix converts axis-angle (..., {body.num_joints}, 3)"
        raise ValueError(
            f"rotations of body {body.name!r} must have shape (..., {body.num_joints}, 3, 3); "
            f"got {rotations.shape}{hint}"
        )
    shape = [
        _coefficients(body, "betas", betas, body.num_betas),
        _coefficients(body, "expression", expression, body.num_expression),
    ]
    if translation is not None:
        translation = jnp.asarray(translation, body.dtype)
        if translation.shape[-1:] != (3,):
            raise ValueError(f"translation must have shape (..., 3); got {translation.shape}")
    leading = [
        rotations.shape[:-3],
        *(s.shape[:-1] for s in shape),
        *([] if translation is None else [translation.shape[:-1]]),
    ]
    try:
        batch = np.broadcast_shapes(*leading)
    except ValueError:
        raise ValueError(
            f"leading shapes of rotations, betas, expression and translation do not broadcast: {leading}"
        ) from None

    def flat(x: jax.Array, trailing: int) -> jax.Array:
        tail = x.shape[x.ndim - trailing :]
        return jnp.broadcast_to(x, (*batch, *tail)).reshape(math.prod(batch), *tail)

    joined = jnp.concatenate([flat(s, 1) for s in shape], axis=-1)
    return _Inputs(flat(rotations, 3), joined, None if translation is None else flat(translation, 1)), batch


def _coefficients(body: BodyModel, what: str, given: ArrayLike | None, count: int) -> jax.Array:
    """Coefficients padded with zeros to (..., count)."""
    values = jnp.zeros(count, body.dtype) if given is None else jnp.asarray(given, body.dtype)
    if values.ndim == 0 or values.shape[-1] > count:
        raise ValueError(f"{what} of body {body.name!r} must have shape (..., n) with n <= {count}; got {values.shape}")
    return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, count - values.shape[-1])])
