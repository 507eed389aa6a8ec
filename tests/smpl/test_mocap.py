"""Motion capture: clips as their files mean them, and bodies whose limbs point where the clips' do."""

import re

import numpy as np
import pytest

from smpl_jax import PoseFileError, io
from smpl_jax.body import joints
from smpl_jax.mocap import read_amc, read_bvh, read_clip, retarget
from smpl_jax.pose import JOINTS

from ..motion_files import tree, write_bvh

LIMBS = (("hip", "knee"), ("knee", "ankle"), ("shoulder", "elbow"), ("elbow", "wrist"))
FLEXED = {
    "LeftLeg": (0, 90, 0),
    "RightUpLeg": (0, -60, 0),
    "LeftForeArm": (0, 0, -90),
    "RightArm": (80, 0, 0),
    "Hips": (0, 0, 30),
}


def positions(pose):
    """(T, J, 3) of the default body by joint name."""
    body = io.load_body()
    places = np.asarray(joints(body, pose.rotations, None, pose.translation))
    return {name: places[:, i] for i, name in enumerate(body.joint_names)}


def angle(a, b):
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))


def test_channels_multiply_in_the_order_of_the_file(tmp_path):
    """Against scipy's Euler angles, in every order."""
    rotation = pytest.importorskip("scipy.spatial.transform").Rotation
    for order in ("ZXY", "XYZ", "ZYX", "YXZ"):
        clip = read_bvh(write_bvh(tmp_path / "a.bvh", {"Hips": (30, 40, 50)}, order=order))
        np.testing.assert_allclose(
            clip.rotations[0, 0], rotation.from_euler(order, (30, 40, 50), degrees=True).as_matrix(), atol=1e-12
        )
        np.testing.assert_array_equal(clip.translation[0], (1, 90, 2))
        assert clip.rate == pytest.approx(100) and len(clip) == 1


def test_positions_follow_from_the_rotations(tmp_path):
    clip = read_bvh(
        write_bvh(tmp_path / "a.bvh", {"LeftLeg": (0, 90, 0)})
    )  # the left knee bent: the shin points backwards
    at = dict(zip(clip.names, clip.positions[0]))
    np.testing.assert_allclose(at["LeftLeg"], (10, 42, 2), atol=1e-9)
    np.testing.assert_allclose(at["LeftFoot"], (10, 42, -38), atol=1e-9)
    np.testing.assert_allclose(at["LeftToeBase"], (10, 29, -43), atol=1e-9)
    assert "LeftHand end" in at


@pytest.mark.parametrize(
    "turn", [np.eye(3), np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]), np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])]
)
@pytest.mark.parametrize("prefix", ["", "mixamorig:"])
def test_limbs_point_where_the_clip_s_do_whatever_its_axes(turn, prefix, tmp_path):
    """y up, z up and facing -y, x... : rotations are about the file's axes, so only a body that rests is written in turned axes."""
    path = write_bvh(tmp_path / "a.bvh", {prefix + "Head": (0, 1, 0)}, rows=tree(prefix), turn=turn)
    pose = retarget(read_bvh(path))
    assert (pose.frame, pose.shape, pose.num_joints) == ("model", (1,), JOINTS["smpl"])
    at = positions(pose)
    for side, left in (("left", 1.0), ("right", -1.0)):
        assert angle(at[f"{side}_ankle"] - at[f"{side}_hip"], np.array([0, -1.0, 0])) < 2
        assert angle(at[f"{side}_wrist"] - at[f"{side}_shoulder"], np.array([left, 0, 0])) < 0.1
        assert angle(at[f"{side}_foot"] - at[f"{side}_ankle"], np.array([0, -5.0, 13])) < 10


def test_knees_and_elbows_bend_the_right_way_and_sides_stay(tmp_path):
    pose = retarget(read_bvh(write_bvh(tmp_path / "a.bvh", {"Head": (0, 1, 0)}, FLEXED)))
    at = {name: place[1] for name, place in positions(pose).items()}
    view = np.array([[np.cos(np.pi / 6), 0, -np.sin(np.pi / 6)], [0, 1, 0], [np.sin(np.pi / 6), 0, np.cos(np.pi / 6)]])
    at = {name: view @ place for name, place in at.items()}  # the turn of the hips taken back
    expected = {
        ("left_knee", "left_ankle"): (0, 0, -1),  # the shin goes back
        ("right_hip", "right_knee"): (0, -0.5, 0.75**0.5),  # the thigh goes forward
        ("left_elbow", "left_wrist"): (0, 0, 1),  # the forearm goes forward
        ("right_shoulder", "right_elbow"): (-np.cos(np.deg2rad(80)), -np.sin(np.deg2rad(80)), 0),  # the arm hangs
        ("left_shoulder", "left_elbow"): (1, 0, 0),
    }
    for (start, end), way in expected.items():
        assert angle(at[end] - at[start], np.array(way)) < 0.1, (start, end)
    measured = dict(zip(io.load_body().joint_names, pose.measured[0]))
    assert [name for name, known in measured.items() if not known] == ["left_hand", "right_hand"]
    rotations = np.asarray(pose.rotations, float)
    np.testing.assert_allclose(
        rotations @ rotations.swapaxes(-1, -2), np.broadcast_to(np.eye(3), rotations.shape), atol=1e-6
    )
    # Legs of the clip are 80 cm, its hips 90 cm high; the body's stand as high above the ground for its own legs.
    places = positions(pose)
    legs = sum(
        np.linalg.norm(places[a][0] - places[b][0]) for a, b in (("left_hip", "left_knee"), ("left_knee", "left_ankle"))
    )
    np.testing.assert_allclose(places["pelvis"][0, 1], 90 / 80 * legs, rtol=1e-3)


def test_a_clip_in_a_mirror_gives_the_pose_in_a_mirror(tmp_path):
    """Twists of arms too, which no direction of a bone shows."""
    flip, frame = (
        np.array([-1.0, 1, 1]),
        {**FLEXED, "LeftArm": (-40, 20, 30), "RightHand": (10, 50, 5), "Spine1": (9, 8, 7)},
    )
    swapped = {n.replace("Left", "X").replace("Right", "Left").replace("X", "Right"): a for n, a in frame.items()}
    mirrored = {name: (-z, x, -y) for name, (z, x, y) in swapped.items()}
    ours, theirs = retarget(read_bvh(write_bvh(tmp_path / "a.bvh", frame, mirrored))).rotations
    names = io.load_body().joint_names
    other = [names.index(n.replace("left", "x").replace("right", "left").replace("x", "right")) for n in names]
    np.testing.assert_allclose(theirs, ours[other] * np.outer(flip, flip), atol=1e-5)


def test_what_a_skeleton_lacks_is_not_measured(tmp_path):
    lacking = ("Head", "Neck", "LeftToeBase", "RightToeBase", "Spine2")
    rows = [(n, "Spine1" if p == "Spine2" else p, o) for n, p, o in tree() if n not in lacking]
    pose = retarget(read_bvh(write_bvh(tmp_path / "a.bvh", {"Hips": (0, 20, 0)}, rows=rows)))
    missing = [name for name, known in zip(io.load_body().joint_names, pose.measured[0]) if not known]
    assert missing == ["spine3", "left_foot", "right_foot", "neck", "head", "left_hand", "right_hand"]
    np.testing.assert_allclose(pose.rotations[0, 9], np.eye(3), atol=1e-6)


def test_a_rest_pose_that_a_converter_put_first_is_not_trusted(tmp_path):
    assert read_bvh(write_bvh(tmp_path / "a.bvh", {}, {"Hips": (0, 1, 0)})).trusted.tolist() == [False, True]
    assert read_bvh(write_bvh(tmp_path / "a.bvh", {"Hips": (0, 1, 0)}, {})).trusted.tolist() == [True, True]


ASF = """# a leg of CMU's, and a bone of one hinge
:version 1.10
:name TEST
:units
  mass 1.0
  length 0.45
  angle deg
:documentation
  none
:root
  order TX TY TZ RX RY RZ
  axis XYZ
  position 0 0 0
  orientation 0 0 0
:bonedata
  begin
    id 1
    name lfemur
    direction 0.34202 -0.939693 0
    length 7.5
    axis 0 0 20 XYZ
    dof rx ry rz
    limits (-160.0 20.0)
           (-70.0 70.0)
           (-60.0 70.0)
  end
  begin
    id 2
    name ltibia
    direction 0.34202 -0.939693 0
    length 7.2
    axis 0 0 20 XYZ
    dof rx
    limits (-10.0 170.0)
  end
:hierarchy
  begin
    root lfemur
    lfemur ltibia
  end
"""
AMC = """#!OML:ASF
:FULLY-SPECIFIED
:DEGREES
1
root 1 17 2 0 90 0
lfemur -30 0 0
ltibia 90
2
root 1 17 2 0 90 0
lfemur 30 10 5
ltibia 190
3
root 1 17 2 0 90 0
lfemur 0 0 0
ltibia 1
"""


def write_amc(folder, asf=ASF, amc=AMC):
    (folder / "02.asf").write_text(asf)
    (folder / "02_01.amc").write_text(amc.replace("\n", "\r\n"))
    return folder / "02_01.amc"


def test_angles_of_acclaim_turn_about_the_axes_of_each_bone(tmp_path):
    clip = read_clip(write_amc(tmp_path))
    inch = 0.0254 / 0.45
    assert clip.names == ("root", "lfemur", "ltibia", "ltibia end") and clip.rate == 120
    np.testing.assert_allclose(clip.translation[0], np.array([1, 17, 2]) * inch)
    # A femur's own x axis is its hinge, turned by 20 degrees; a yaw of 90 takes x to -z.
    hinge = np.array([np.cos(np.deg2rad(20)), np.sin(np.deg2rad(20)), 0])
    yaw = np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    femur, tibia = np.diff(clip.positions[0], axis=0)[1:] / inch
    along = np.array([0.34202, -0.939693, 0])
    expected = np.cos(np.deg2rad(30)) * along - np.sin(np.deg2rad(30)) * np.cross(hinge, along)
    np.testing.assert_allclose(femur, 7.5 * yaw @ expected, atol=1e-4)
    assert angle(femur, tibia) == pytest.approx(90, abs=1e-3)
    assert tibia @ (yaw @ hinge) == pytest.approx(0, abs=1e-4)
    # The second frame bends the knee beyond 170 + 15 degrees, in the third the thigh was not captured.
    assert clip.trusted.tolist() == [True, False, False]


BAD_ASF = {
    "a length that changes": (("dof rx\n", "dof rx l\n"), "expected dof of rx, ry and rz"),
    "another order": (("dof rx ry rz", "dof rz ry rx"), "in the order of its axis, xyz"),
    "no number": (("length 7.5", "length long"), "expected finite numbers, found 'long'"),
    "not finite": (("length 7.5", "length nan"), "expected finite numbers, found 'nan'"),
    "no direction": (("direction 0.34202 -0.939693 0\n    length 7.2", "length 7.2"), "bone 'ltibia' has no direction"),
    "a bone twice": (("name ltibia", "name lfemur"), "bones with unique names; found 'lfemur'"),
    "a circle": (("root lfemur\n", "ltibia lfemur\n"), "is not connected to the root"),
    "a bone of nobody": (("lfemur ltibia\n  end", "lfemur rtibia\n  end"), "'rtibia' is not a bone"),
    "few limits": (("(-70.0 70.0)", ""), "limits for rx ry rz; found 4 numbers"),
    "cut off": ((ASF[ASF.index("  end\n:hierarchy") :], ":hierarchy\n"), "its last bone has no end"),
    "another section": ((":documentation", ":forces"), ":forces is not supported"),
    "no section": ((":hierarchy", ":documentation"), "has no :hierarchy"),
    "units": (("angle deg", "angle turns"), "an angle of deg or rad"),
}
BAD_AMC = {
    "radians are followed, but not this": ((":FULLY-SPECIFIED", ":SAMPLES"), "found :SAMPLES"),
    "a value less": (("lfemur 30 10 5", "lfemur 30 10"), "line 10: expected 3 values of lfemur"),
    "another skeleton's": (
        ("lfemur 30 10 5", "rfemur 30 10 5"),
        "expected a bone of the skeleton with degrees of freedom",
    ),
    "a bone left out": (("ltibia 190\n", ""), "frame 2 has no ltibia"),
    "a bone twice": (("ltibia 190\n", "ltibia 190\nltibia 2\n"), "frame 2 has two ltibia"),
    "no number": (("ltibia 190", "ltibia x"), "ltibia: expected finite numbers, found 'x'"),
    "empty": ((AMC, "# nothing\n"), "found no frame"),
}


@pytest.mark.parametrize("name", BAD_ASF)
def test_a_malformed_skeleton_is_refused(name, tmp_path):
    (old, new), words = BAD_ASF[name]
    assert old in ASF
    refused(lambda: read_amc(write_amc(tmp_path, asf=ASF.replace(old, new))), words, "02.asf")


@pytest.mark.parametrize("name", BAD_AMC)
def test_a_malformed_motion_is_refused(name, tmp_path):
    (old, new), words = BAD_AMC[name]
    assert old in AMC
    refused(lambda: read_amc(write_amc(tmp_path, amc=AMC.replace(old, new))), words, "02_01.amc")


BAD_BVH = {
    "not one": (r"HIERARCHY", "HIERARCHIE", "expected BVH"),
    "frames missing": (r"Frames: 1", "Frames: 2", "expected 2 frames of 69 values; found 69"),
    "a number too many": (r"\n$", " 7\n", "found 70 values"),
    "no number": (r"Frame Time: 0.01\n1", "Frame Time: 0.01\none", "expected finite numbers, found 'one'"),
    "not finite": (r"Frame Time: 0.01\n1", "Frame Time: 0.01\ninf", "found 'inf'"),
    "a huge number of frames": (r"Frames: 1", "Frames: 1e300", "expected 1e300 frames"),
    "no time": (r"Frame Time: 0.01", "Frame Time: 0", "a time between"),
    "a channel of another kind": (r"3 Zrotation", "3 Zscale", "expected up to six of"),
    "a wrong count": (r"CHANNELS 3 Z", "CHANNELS 9 Z", "expected up to six of"),
    "a brace too few": (r"\}\s*MOTION", "MOTION", "cut off: 1 braces are open"),
    "cut off in a joint": (r"OFFSET 0.0 10.0 0.0[\s\S]*$", "OFFSET 1 MOTION", "the hierarchy is cut off after"),
    "a name twice": (r"RightHand", "LeftHand", "a unique name for each joint; found 'LeftHand'"),
    "two roots": (r"JOINT Spine ", "ROOT Spine ", "expected one ROOT"),
    "no offset": (r"OFFSET 0.0 12.0 0.0", "", "has no OFFSET"),
    "other words": (r"OFFSET 0.0 12.0 0.0", "SCALE 1", "found 'SCALE'"),
}


@pytest.mark.parametrize("name", BAD_BVH)
def test_a_malformed_bvh_is_refused(name, tmp_path):
    old, new, words = BAD_BVH[name]
    path = write_bvh(tmp_path / "a.bvh", {"Hips": (0, 1, 0)})
    text, count = re.subn(old, new, path.read_text(), count=1)
    assert count
    path.write_text(text)
    refused(lambda: read_bvh(path), words, "a.bvh")


def refused(read, words, file):
    with pytest.raises(PoseFileError, match=re.escape(words)) as caught:
        read()
    assert file in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_other_files_are_refused(tmp_path, monkeypatch):
    refused(lambda: read_clip(tmp_path / "a.bvh"), "no such file", "a.bvh")
    refused(lambda: read_clip(tmp_path / "a.fbx"), "expected a motion file that ends in .bvh or .amc", "a.fbx")
    (tmp_path / "05_01.amc").write_text(AMC)
    refused(lambda: read_clip(tmp_path / "05_01.amc"), "no skeleton in the same folder; expected an .asf", "05.asf")
    (tmp_path / "a.bvh").write_bytes(b"HIERARCHY\0")
    refused(lambda: read_clip(tmp_path / "a.bvh"), "expected a text file", "a.bvh")
    monkeypatch.setattr("smpl_jax.mocap.clip.MAX_BYTES", 8)
    refused(lambda: read_clip(tmp_path / "a.bvh"), "at most 8 bytes", "a.bvh")


def test_deep_hierarchies_do_not_run_out_of_stack(tmp_path):
    deep = "HIERARCHY ROOT r { OFFSET 0 0 0 CHANNELS 0 " + "JOINT j%d { OFFSET 0 1 0 " * 2000 % tuple(range(2000))
    (tmp_path / "a.bvh").write_text(deep + "MOTION")
    refused(lambda: read_bvh(tmp_path / "a.bvh"), "at most 1024 joints", "a.bvh")


def test_skeletons_that_cannot_be_aligned_are_refused(tmp_path):
    other = [(n.replace("UpLeg", "Thigh"), p.replace("UpLeg", "Thigh"), o) for n, p, o in tree()]
    refused(
        lambda: retarget(read_bvh(write_bvh(tmp_path / "a.bvh", {}, rows=other))),
        "those of motionbuilder, of which LeftUpLeg, RightUpLeg are missing",
        "a.bvh",
    )
    along = [
        (n, p, (0.01, np.linalg.norm(o), 0) if p else o) for n, p, o in tree()
    ]  # all bones along one axis, as some exporters have them
    refused(lambda: retarget(read_bvh(write_bvh(tmp_path / "a.bvh", {}, rows=along))), "a T-pose or an A-pose", "a.bvh")


CLIPS = ("cmu/02_01.amc", "cmu/02_04.amc", "cmu/03_02.amc", "bvh/dab.bvh", "bvh/wave_hello.bvh")


@pytest.mark.parametrize("name", CLIPS)
def test_real_clips(name, shared_data):
    """Bones of the body against those of the clip: limbs to 0.01 degrees, feet and trunk to 12 (their rest poses differ by so much), upright,
    knees that bend back only.
    """
    clip = read_clip(shared_data / name)
    pose = retarget(clip)
    at = positions(pose)
    words = {
        "hip": "femur",
        "knee": "tibia",
        "ankle": "foot",
        "shoulder": "humerus",
        "elbow": "radius",
        "wrist": "hand",
        "foot": "toes",
    }
    camel = {
        "hip": "UpLeg",
        "knee": "Leg",
        "ankle": "Foot",
        "shoulder": "Arm",
        "elbow": "ForeArm",
        "wrist": "Hand",
        "foot": "ToeBase",
    }
    acclaim = name.endswith("amc")
    # FAIR's files are z up and face -y.
    axes = np.eye(3) if acclaim else np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])

    def source(side, part):
        joint = f"{side[0]}{words[part]}" if acclaim else f"{side.title()}{camel[part]}"
        return clip.positions[:, clip.names.index(joint)] @ axes.T

    for side in ("left", "right"):
        for start, end in LIMBS:
            ours = at[f"{side}_{end}"] - at[f"{side}_{start}"]
            assert angle(ours, source(side, end) - source(side, start)).max() < 0.05, (side, start)
        assert angle(at[f"{side}_foot"] - at[f"{side}_ankle"], source(side, "foot") - source(side, "ankle")).max() < 12
        thigh, shin = (at[f"{side}_{b}"] - at[f"{side}_{a}"] for a, b in LIMBS[:2])
        across = at["left_hip"] - at["right_hip"]
        forward = np.cross(thigh, across)  # where a shin of a knee that bends the wrong way would point
        assert (angle(forward, shin) > 80).mean() > 0.95
    trunk = (
        source("left", "shoulder") + source("right", "shoulder") - source("left", "hip") - source("right", "hip")
    ) / 2
    ours = (at["left_shoulder"] + at["right_shoulder"] - at["left_hip"] - at["right_hip"]) / 2
    assert angle(ours, trunk).max() < 15
    assert np.median(angle(trunk, np.array([0, 1.0, 0]))) < 20  # upright
    assert clip.trusted[60:].all()
    assert name != "cmu/03_02.amc" or not clip.trusted[:50].any()  # its arms were not captured there
