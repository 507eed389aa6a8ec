"""Drawn rows: the body lies over the person of the image, and words and faults are on the sheet."""

import io

import numpy as np
import pytest
from PIL import Image

from chatpose_jax.data import sheet
from chatpose_jax.data.example import Example
from chatpose_jax.data.record import Record
from chatpose_jax.data.synthetic.families import sample_poses
from smpl_jax import joints, load_body, vertices
from smpl_jax.pose import Pose, mirror_pose, to_family, to_frame, unmeasured
from smpl_jax.raster import Camera
from smpl_jax.render import render_mesh
from tests.data.given_reader import write

SIZE = 128


@pytest.fixture(scope="module")
def person():
    """A body before black: image, pose, joints in pixels of the image as extras have them, the camera, and where the body is."""
    body = load_body()
    pose = to_frame(Pose(sample_poses(1, seed=4, family="lunge").rotations.astype(np.float32)[0], "model"), "camera")
    where = np.array([0.1, 0.05, 9.0])
    camera = Camera(SIZE, SIZE, 600.0, (60.0, 70.0), tuple(where))
    pixels = render_mesh(
        vertices(body, pose.rotations),
        body.faces,
        frame="camera",
        camera=camera,
        background=(0, 0, 0),
        colors=(1, 1, 1),
    )
    flat = camera.project(np.asarray(joints(body, pose.rotations))) - 0.5
    return pixels, pose, flat, camera, where


def keypoints(flat, count=44):
    found = np.zeros((count, 3))
    for point, joint in sheet._KEYPOINTS.items():
        if point < count:
            found[point] = [*flat[joint], 0.8]
    return found


def overlap(pixels, found):
    """Intersection over union of the body in the image and the one that is drawn over it."""
    drawn = render_mesh(
        found.vertices, load_body().faces, frame="camera", camera=found.camera, background=(0, 0, 0), colors=(1, 1, 1)
    )
    a, b = pixels.max(-1) > 30, drawn.max(-1) > 30
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("count", [25, 44])
def test_the_body_is_fitted_to_keypoints(person, count):
    pixels, pose, flat, _, _ = person
    found = sheet.view(pose, {"keypoints_2d": keypoints(flat, count)}, (SIZE, SIZE))
    assert overlap(pixels, found) > 0.93
    np.testing.assert_allclose(
        found.camera.project(np.asarray(joints(load_body(), pose.rotations))), flat + 0.5, atol=2
    )
    other = sheet.view(mirror_pose(pose), {"keypoints_2d": keypoints(flat, count)}, (SIZE, SIZE))
    assert overlap(pixels, other) < 0.8  # a wrong pose is seen to be wrong
    same = sheet.view(pose, {"joint_img": flat}, (SIZE, SIZE))
    assert overlap(pixels, same) > 0.93
    for family in ("model", "z-up"):
        same = sheet.view(to_frame(pose, family), {"keypoints_2d": keypoints(flat, count)}, (SIZE, SIZE))
        np.testing.assert_allclose(same.vertices, found.vertices, atol=1e-5)


@pytest.mark.parametrize("family", ["smpl", "smplx"])
def test_the_body_is_where_the_camera_sees_it(person, family):
    pixels, pose, _, camera, where = person
    pelvis = np.asarray(load_body().joint_template)[0] + where
    moved = to_family(pose, family).replace(translation=(pelvis - sheet._PELVIS[family]).astype(np.float32))
    intrinsics = np.array(
        [[camera.focal, 0, camera.center[0] - 0.5], [0, camera.focal, camera.center[1] - 0.5], [0, 0, 1]]
    )
    found = sheet.view(moved, {"cam_int": intrinsics}, (SIZE, SIZE))
    assert overlap(pixels, found) > 0.99
    other = {"cam_int": intrinsics, "trans_cam": moved.translation}  # as readers give those of another body
    assert overlap(pixels, sheet.view(to_family(pose, family), other, (SIZE, SIZE))) > 0.99
    there = np.asarray(joints(load_body(), pose.rotations)) + where
    found = sheet.view(to_family(pose, family), {"cam_int": intrinsics, "joint_cam": there}, (SIZE, SIZE))
    assert overlap(pixels, found) > 0.99
    behind = {"cam_int": intrinsics, "joint_cam": there - [0, 0, 20]}
    assert sheet.view(moved, behind, (SIZE, SIZE)) is None


def test_no_camera_no_overlay(person):
    _, pose, flat, _, _ = person
    few = keypoints(flat)
    few[4:, 2] = 0
    for extras in (
        {},
        {"box": np.array([1.0, 2, 3])},
        {"cam_int": np.eye(3)},
        {"keypoints_2d": few},
        {"keypoints_2d": flat},
    ):
        assert sheet.overlay(Image.new("RGB", (SIZE, SIZE)), pose, extras) is None


def test_what_was_not_measured_is_violet(person):
    _, pose, _, _, _ = person

    def violet(pose):
        front, _ = sheet.body_views(pose, 96)
        red, green, blue = front.astype(int).reshape(-1, 3).T
        return ((blue > green + 40) & (red > green + 15)).sum()

    assert violet(pose) == 0
    assert violet(pose.replace(measured=np.arange(24) < 22)) > 5
    assert violet(unmeasured((1,))[0]) > 500
    assert violet(to_family(pose.replace(measured=None), "smplx")) > 5  # it has fingers, which were not measured
    fingers = to_family(pose, "smplx")
    assert violet(fingers.replace(measured=np.ones(55, bool))) == 0


def talk(words, images=0):
    parts = [*[{"type": "image"}] * images, {"type": "text", "text": words}]
    return ({"role": "user", "content": parts}, {"role": "assistant", "content": "<POSE>"})


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def test_a_sheet_has_every_kind_and_says_what_is_damaged(person, tmp_path):
    pixels, pose, flat, _, _ = person
    batch = Pose(pose.rotations[None], "camera")
    good = Record("good", "image", (talk("Who?", 1),), (jpeg(pixels),), batch, extras={"keypoints_2d": keypoints(flat)})
    cut = Record("cut", "image", (talk("Who?", 1),), (jpeg(pixels)[:900],), batch)
    words = Record("words", "text", (talk("What a " + "very " * 500 + "long text."),), poses=batch)
    folder = write(tmp_path / "a", train=[words], val=[good, cut])
    file = sheet.save_sheet(tmp_path / "sheet.png", [folder], 3)
    with Image.open(file) as image:
        assert image.format == "PNG" and image.width > 1400
        heights = image.height
    assert heights > 2.5 * sheet.CELL
    next((folder / "val").glob("*.array_record")).unlink()
    (folder / "train" / "index.npy").write_bytes(b"")
    assert sheet.save_sheet(file, [folder], 3) == file  # the faults are in the image
    with Image.open(file) as image:
        assert image.height < heights


def test_long_rows_are_cut_or_shown_whole(person):
    _, pose, _, _, _ = person
    pixels = np.zeros((20, 60, 3), np.uint8)
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": pixels}] * 3 + [{"type": "text", "text": "word " * 900}],
        },
        {"role": "assistant", "content": "<POSE>" * 4},
    ]
    example = Example("x", "image", messages, Pose(np.stack([pose.rotations] * 4), "camera"))
    some, everything = (sheet.draw(example, "x", whole=whole) for whole in (False, True))
    assert (some.height, some.width) < (everything.height, everything.width) and some.height < 1.3 * sheet.CELL
    assert everything.width - some.width == 5 * (sheet.CELL + sheet.GAP)  # an image and two poses more


def test_a_pose_that_nobody_measured_is_not_drawn():
    messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "<POSE>"}]
    drawn = sheet.draw(Example("x", "text", messages, unmeasured((1,))), "x")
    assert drawn.width < sheet.WORDS + sheet.CELL


def test_no_word_is_lost_between_lines():
    text = "Some words, " * 30 + "x" * 300 + " and an end"
    lines = sheet._wrap(text, 200)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(sheet._font(sheet._SIZE).getlength(line) <= 200 for line in lines)
