"""Captions: expected phrases of known poses, mirrored words, bounds of length and vocabulary."""

import re

import numpy as np
import pytest

from chatpose_jax.data.synthetic import captions, skeleton
from chatpose_jax.data.synthetic.families import COLUMN, POSTURES, from_angles, sample_poses
from chatpose_jax.data.synthetic.posecodes import CODES, KINDS, encode
from chatpose_jax.errors import UserError

T_POSE = np.broadcast_to(np.eye(3), (24, 3, 3))
FLIPPED = {"left": "right", "right": "left"}


@pytest.fixture(scope="module")
def poses():
    return sample_poses(400, seed=11)


@pytest.fixture(scope="module")
def texts(poses):
    rng = np.random.default_rng(0)
    codes = encode(poses.rotations, rng)
    return [captions.caption(codes, i, rng, family=str(f)) for i, f in enumerate(poses.family)]


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def test_t_pose():
    for seed in range(8):
        text = captions.describe(T_POSE, "short", seed)
        assert re.search(r"stand", text)
        assert re.search(r"[Bb]oth arms (are held|stretch) out to the sides", text)


def test_one_arm_raised():
    angles = np.zeros((1, len(COLUMN)))
    angles[0, COLUMN["left_elevation"]] = 168
    angles[0, COLUMN["right_elevation"]] = 10
    pose = from_angles(angles, np.array(["stand"]), np.array([["up", "down"]])).rotations
    text = captions.describe(pose[0], "short")
    assert re.search(r"left arm (is raised overhead|reaches up above the head)", text)
    assert re.search(r"right arm (hangs down|is down)", text)
    mirrored = captions.describe(skeleton.mirror(pose)[0], "short")
    assert re.search(r"right arm (is raised overhead|reaches up above the head)", mirrored)


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        ("sit", r"\b(sits|sitting)\b.*\b(seat|chair)"),
        ("floor_sit", r"\b(sits|sitting) on the (floor|ground)"),
        ("kneel", r"both knees"),
        ("half_kneel", r"(kneels on|down on) the (left|right) knee"),
        ("squat", r"squat"),
        ("crawl", r"hands and knees|all fours"),
        ("supine", r"on the back|face up"),
        ("side", r"on the (left|right) side"),
        ("bend", r"bend|bent over"),
        ("one_leg", r"on the (left|right) leg"),
        ("kick", r"kick"),
    ],
)
def test_posture_is_told_from_the_joints_alone(family, pattern):
    rotations = sample_poses(24, seed=5, family=family).rotations
    found = [bool(re.search(pattern, captions.describe(r, "short", seed))) for seed, r in enumerate(rotations)]
    assert np.mean(found) >= 0.8


def test_described_posture_agrees_with_the_family(poses):
    codes = encode(poses.rotations)
    assert np.mean(codes.posture == poses.family) > 0.9


def test_description_does_not_depend_on_the_heading(poses):
    pose = poses.rotations[0].astype(float)
    turned = pose.copy()
    turned[0] = skeleton.rotation("y", np.array(130.0)) @ pose[0]
    assert captions.describe(turned, seed=4) == captions.describe(pose, seed=4)


def test_codes_of_mirrored_poses_swap_left_and_right(poses):
    codes, mirrored = encode(poses.rotations), encode(skeleton.mirror(poses.rotations))
    for i, (kind, side) in enumerate(CODES):
        if side:
            expected = codes.categories[:, CODES.index((kind, FLIPPED[side]))]
            # float32 rotations: a value that lies on a threshold may fall on either side of it
            assert np.mean(mirrored.categories[:, i] == expected) > 0.99
        elif set(KINDS[kind].categories) == {"left", "", "right"}:
            assert np.mean(mirrored.categories[:, i] == 2 - codes.categories[:, i]) > 0.99
    swapped = mirrored.shapes[:, ::-1]
    assert np.mean(swapped == codes.shapes) > 0.99
    one_sided = np.isin(codes.posture, ["kick", "lunge", "half_kneel", "one_leg", "run", "step", "side"])
    assert all(FLIPPED[a] == b for a, b in zip(codes.lead[one_sided], mirrored.lead[one_sided]))


def test_mirrored_captions_swap_left_and_right():
    poses = sample_poses(60, seed=2, family="kick")
    for rotations, reflected in zip(poses.rotations, skeleton.mirror(poses.rotations)):
        lead = re.search(r"(left|right)", captions.describe(rotations, "short", seed=1, family="kick")).group()
        assert (
            re.search(r"(left|right)", captions.describe(reflected, "short", seed=1, family="kick")).group()
            == (FLIPPED[lead])
        )


def test_same_seed_same_caption_and_variety(poses):
    rotations = poses.rotations[7]
    assert captions.describe(rotations, seed=1) == captions.describe(rotations, seed=1)
    assert len({captions.describe(rotations, seed=s) for s in range(12)}) > 6


def test_length_and_vocabulary_are_bounded(texts):
    lengths = [len(t.split()) for t in texts]
    assert max(lengths) <= captions.MAX_WORDS and 25 < np.mean(lengths) < 60
    assert 100 < len({w for t in texts for w in words(t)}) < 300
    assert len(set(texts)) > 0.99 * len(texts)


def test_sentences_are_well_formed(texts):
    for text in texts:
        assert text.endswith(".") and "  " not in text and "{" not in text
        assert all(s.strip()[0].isupper() for s in text.split(". "))


def test_rare_codes_are_always_said():
    angles = np.zeros((1, len(COLUMN)))
    for side in ("left", "right"):
        angles[0, COLUMN[f"{side}_elevation"]] = 10
    angles[0, COLUMN["trunk_bend"]] = 28
    pose = from_angles(angles, np.array(["stand"]), np.array([["down", "down"]])).rotations[0]
    assert all("trunk bends to the left" in captions.describe(pose, seed=s) for s in range(20))


def test_trivial_codes_are_never_said(texts):
    shares = captions.reference_statistics().overall
    assert shares["elbow", "straight"] > captions.TRIVIAL
    assert not any(re.search(r"elbows? (is |are )?straight", t) for t in texts)


def test_short_captions_are_shorter_and_name_both_arms(poses):
    for i in range(40):
        short = captions.describe(poses.rotations[i], "short", i)
        assert "arm" in short or "hand" in short or "elbow" in short
        assert len(short.split()) <= len(captions.describe(poses.rotations[i], "detailed", i).split())


def test_captions_tell_poses_apart(poses, texts):
    """The pose whose caption shares most words is much nearer than a random one."""
    bags = [set(zip(words(t), words(t)[1:], words(t)[2:])) for t in texts]
    joints = poses.joints - poses.joints[:, :1]
    near, random = [], []
    for i in range(100):
        score = [len(bags[i] & bags[j]) / len(bags[i] | bags[j]) if i != j else -1 for j in range(len(bags))]
        distance = np.linalg.norm(joints - joints[i], axis=-1).mean(1)
        near.append(distance[int(np.argmax(score))])
        random.append(np.delete(distance, i).mean())
    assert np.mean(near) < 0.65 * np.mean(random)


def test_every_posture_has_words():
    assert set(POSTURES) <= set(captions.POSTURES)


def test_wrong_shape_is_told():
    with pytest.raises(UserError, match=r"\(24, 3, 3\), and was given \(22, 3, 3\)"):
        captions.describe(np.zeros((22, 3, 3)))


def test_any_pose_can_be_described():
    matrices = np.random.default_rng(0).normal(size=(60, 24, 3, 3))
    rotations, _ = np.linalg.qr(matrices)
    rotations *= np.linalg.det(rotations)[..., None, None]
    for seed, pose in enumerate(rotations):
        text = captions.describe(pose, seed=seed)
        assert 8 < len(text.split()) <= captions.MAX_WORDS and text.endswith(".")
