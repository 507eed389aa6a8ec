"""Sets of keypoints: where they are on a body, and what a body that lacks them says."""

import jax
import numpy as np
import pytest

import smpl_jax
from smpl_jax import BodyModel, load_body
from smpl_jax.keypoints import KEYPOINT_SETS, SMPL_VERTICES, keypoint_set, keypoint_twins, locate

from .models import random_arrays, random_rotations

SIZES = {"coco17": 17, "coco18": 18, "openpose25": 25, "smpl24": 24, "h36m17": 17, "lsp14": 14, "humans44": 44}
# SPIN's and 4D-Humans' map of OpenPose's points to the joints of smplx: 24 kinematic joints, then nose, eyes, ears and feet.
OPENPOSE_IN_SMPLX = [24, 12, 17, 19, 21, 16, 18, 20, 0, 2, 5, 8, 1, 4, 7, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34]
# SPIN's choice of the 14 LSP points among the 17 rows of J_regressor_h36m.npy.
LSP_IN_H36M = [6, 5, 4, 1, 2, 3, 16, 15, 14, 11, 12, 13, 8, 10]


@pytest.fixture(scope="module")
def body() -> BodyModel:
    return load_body()


def with_regressors(body: BodyModel, *, swapped: bool = False) -> BodyModel:
    """The default body with regressors in the layout of SPIN's and 4D-Humans' files: each row a few vertices around the joint."""
    regress = np.asarray(smpl_jax.load_body_arrays()["J_regressor"])

    def rows(names: str) -> np.ndarray:
        return np.stack([regress[body.joint_names.index(name)] for name in names.split()])

    left, right = "left_hip left_knee left_ankle", "right_hip right_knee right_ankle"
    arms = "left_shoulder left_elbow left_wrist right_shoulder right_elbow right_wrist"
    legs = f"{right} {left}" if swapped else f"{left} {right}"
    lsp = "right_ankle right_knee right_hip left_hip left_knee left_ankle right_wrist right_elbow right_shoulder"
    lsp += " left_shoulder left_elbow left_wrist neck head pelvis neck spine2 neck head"
    return body.with_keypoints(
        regressors={"h36m": rows(f"pelvis {legs} spine2 neck neck head {arms}"), "j19": rows(lsp)}
    )


@pytest.mark.parametrize("name", SIZES)
def test_sets_have_the_known_sizes_and_pair_left_with_right(body: BodyModel, name: str) -> None:
    points, twins = keypoint_set(name), keypoint_twins(name)
    assert len(points) == SIZES[name] and len({point.name for point in points}) == SIZES[name]
    assert KEYPOINT_SETS.keys() == SIZES.keys()
    assert (twins[twins] == np.arange(len(points))).all()
    for point, twin in zip(points, twins):
        assert ("left" in point.name) == ("right" in points[twin].name)
    # On a body at rest the left side has x > 0.
    located = locate(body, name, near=True, missing="mask")
    rest = np.asarray(located(np.tile(np.eye(3), (24, 1, 1))))
    for point, place, known in zip(points, rest, located.known):
        if known:
            assert np.sign(np.round(place[0], 2)) == ("left" in point.name) - ("right" in point.name), point.name


def test_openpose_points_are_those_of_smplx(body: BodyModel) -> None:
    """Against smplx's keywords: the layer appends nose, eyes, ears and feet to the joints, in smplx's order."""
    layer = smpl_jax.create(None)
    rng = np.random.default_rng(0)
    rotations = random_rotations(rng, 3, 24)
    betas = rng.normal(size=(3, 10)).astype(np.float32)
    expected = layer(
        betas=betas, global_orient=rotations[:, :1], body_pose=rotations[:, 1:], pose2rot=False
    ).joints  # fmt: skip
    located = locate(body, "openpose25")
    assert located.part.num_vertices == 11
    np.testing.assert_allclose(located(rotations, betas), expected[:, OPENPOSE_IN_SMPLX], atol=2e-6)


def test_lsp_points_are_rows_of_the_regressor(body: BodyModel) -> None:
    full = with_regressors(body)
    rotations = random_rotations(np.random.default_rng(1), 2, 24)
    vertices = smpl_jax.vertices(full, rotations, translation=np.ones(3))
    expected = smpl_jax.regress(full, vertices, "h36m")
    located = locate(full, "lsp14")
    assert located.exact.all()
    points = jax.jit(lambda located, rotations: located(rotations, translation=np.ones(3)))(located, rotations)
    np.testing.assert_allclose(points, expected[:, LSP_IN_H36M], atol=2e-6)
    with pytest.raises(ValueError, match="left and right change places"):
        locate(with_regressors(body, swapped=True), "lsp14")
    assert [point.source for point in keypoint_set("humans44")[25:]] == [f"j19[{row}]" for row in range(19)]
    assert locate(full, "humans44").exact.all()


def test_a_body_without_the_points_says_so(body: BodyModel) -> None:
    with pytest.raises(ValueError, match=r"lacks points of lsp14: right_ankle \(h36m\[6\]\).*near=True"):
        locate(body, "lsp14")
    near = locate(body, "lsp14", near=True)
    assert near.known.all() and not near.exact.any() and near.sources[0] == "right_ankle"
    masked = locate(body, "humans44", missing="mask")
    assert masked.known.tolist() == [True] * 25 + [False] * 19
    assert not np.asarray(masked(np.tile(np.eye(3), (24, 1, 1))))[25:].any()
    bare = BodyModel.from_arrays(
        smpl_jax.load_body_arrays() | {"vertex_id_names": np.array([], str), "vertex_ids": np.array([], int)}
    )
    with pytest.raises(ValueError, match="nose"):
        locate(bare, "coco17")
    assert locate(bare, "coco17", missing="mask").known.sum() == 12
    with pytest.raises(ValueError, match=r"coco17 \(17\)"):
        locate(body, "coco19")
    with pytest.raises(ValueError, match="missing must be"):
        locate(body, "coco17", missing="ignore")  # type: ignore[arg-type]
    assert locate(bare.with_keypoints(vertex_ids=SMPL_VERTICES), "openpose25").known.all()


def test_a_body_of_another_tree_has_none_of_them() -> None:
    arrays = random_arrays(num_vertices=30)
    names = {"joint_names": np.array([f"j{i}" for i in range(24)]), "model_name": np.array("strange")}
    arrays["parents"] = arrays["kintree_table"][0]
    strange = BodyModel.from_arrays(arrays | {"expressiondirs": np.zeros((30, 3, 0))} | names)
    with pytest.raises(ValueError, match="lacks points of smpl24"):
        locate(strange, "smpl24", missing="mask")
