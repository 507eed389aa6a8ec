"""BEDLAM's npz and images: bodies rendered here, stored upright or turned as in its closeup scenes."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

import smpl_jax
from chatpose_jax import named
from chatpose_jax.data.datasets import DATA_SETS
from chatpose_jax.data.reader import Skipped
from chatpose_jax.data.readers import crop
from chatpose_jax.data.readers.bedlam import Bedlam
from chatpose_jax.data.record import from_bytes, to_bytes
from chatpose_jax.errors import UserError
from smpl_jax.pose import Pose
from smpl_jax.raster import Camera
from smpl_jax.render import render_mesh

WIDE = (128, 72)
SCENES = {"20221010_3_1000_batch01hand_6fps": False, "20221011_1_250_batch01hand_closeup_suburb_a_6fps": True}


@pytest.fixture(scope="module")
def body():
    return smpl_jax.load_body()


@pytest.fixture(scope="module")
def rendered(body):
    """Labels of two people in two images for each scene, and the images as stored. SMPL's version: 72 numbers."""
    found = {}
    for scene, turned in SCENES.items():
        width, height = WIDE[::-1] if turned else WIDE
        labels, images = [], {}
        for person in range(2):
            for frame in (0, 5):
                rng = np.random.default_rng([person, frame, turned])
                vectors = rng.normal(size=(24, 3)) * 0.2
                vectors[0] = [np.pi - 0.2, 0.3, 0.1 * frame]
                pose = Pose(
                    crop.to_matrices(vectors), "camera", translation=np.array([0.25 * person, 0.1, 4.0], np.float32)
                )
                camera = Camera(width, height, 90.0, (width / 2, height / 2))
                arguments = smpl_jax.for_body(pose, body)
                name = f"seq_00000{person}/seq_00000{person}_{frame:04d}.png"
                image = render_mesh(
                    smpl_jax.vertices(body, **arguments),
                    body.faces,
                    frame="camera",
                    camera=camera,
                    background=(0, 0, 0),
                    colors=(1, 0, 0),
                )
                images[name] = np.rot90(image, 1) if turned else image  # stored anticlockwise
                points = camera.project(np.asarray(smpl_jax.joints(body, **arguments)))
                middle, span = (points.max(0) + points.min(0)) / 2, np.ptp(points, axis=0).max() * 1.2
                world = np.eye(4)
                world[:3, 3] = [0.0, 0.0, 3.5]  # a part of the translation is here
                labels.append(
                    {
                        "imgname": name,
                        "center": middle.astype(float),
                        "scale": float(span / 200),
                        "pose_cam": vectors.ravel(),
                        "shape": np.zeros(10),
                        "trans_cam": np.asarray(pose.translation, float) - world[:3, 3],
                        "cam_ext": world,
                        "cam_int": np.array([[90, 0, width / 2], [0, 90, height / 2], [0, 0, 1.0]]),
                        "gtkps": points,
                        "gender": "f",
                        "sub": f"rp_aliyah_posed_00{person}",
                        "motion_info": np.array({"label": "walk"}, dtype=object),
                        "proj_verts": np.zeros((437, 2)),
                    }
                )
        found[scene] = labels, images
    return found


def write(source, rendered, labels="training_labels/all_npz_12_training", images="training_images", **changes):
    (source / labels).mkdir(parents=True, exist_ok=True)
    for scene, (rows, pictures) in rendered.items():
        arrays = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        arrays |= changes
        np.savez(
            source / labels / f"{scene}.npz", **{name: array for name, array in arrays.items() if array is not None}
        )
        for name, pixels in pictures.items():
            path = source / images / scene / "png" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return source


def read(source, **options):
    reader = Bedlam(source, **options)
    return [item for part in reader.parts("train") for item in reader.read("train", part)]


def test_records_show_what_they_say(tmp_path, rendered, body):
    """The pose with its translation, seen by the camera of the crop, is where the image shows the body and where the keypoints are."""
    records = read(write(tmp_path, rendered))
    assert len(records) == 8 and all(not isinstance(r, Skipped) for r in records)
    for record in records:
        smpl_jax.check(record.poses)
        pixels = np.asarray(Image.open(io.BytesIO(record.images[0])), float)
        assert pixels.shape == (256, 256, 3)
        assert record.poses.shape_space == "SMPL" and record.poses.betas.tolist() == [[0] * 10]
        average = record.poses.replace(betas=None, shape_space=None)  # the body drawn here has betas of its own
        joints = np.asarray(smpl_jax.joints(body, **smpl_jax.for_body(average, body)))[0]
        seen = joints @ record.extras["cam_int"].T
        seen = seen[:, :2] / seen[:, 2:]
        np.testing.assert_allclose(seen, record.extras["keypoints_2d"], atol=0.05)
        inner = seen[[0, 3, 6, 9, 1, 2, 4, 5, 16, 17]].astype(int)
        assert (pixels[inner[:, 1], inner[:, 0], 0] > 80).mean() > 0.9  # red: the body
        assert pixels[[0, 0, -1, -1], [0, -1, 0, -1]].max() < 60
        # upright: the head is above the pelvis, and the head above the feet in the image
        assert seen[15, 1] < seen[0, 1] < seen[7, 1]
        assert record.poses.measured.tolist() == [[joint < 22 for joint in range(24)]]
        assert to_bytes(from_bytes(to_bytes(record))) == to_bytes(record)
        assert record.extras["gender"] == "f" and record.extras["sub"].startswith("rp_")
    sizes = [tuple(r.extras["image_size"].tolist()) for r in records]
    assert sizes == [WIDE] * 4 + [WIDE[::-1]] * 4
    assert records[0].key == "20221010_3_1000_batch01hand_6fps/seq_000000/seq_000000_0000.png#0"
    assert {r.group for r in records} == {
        f"{scene.removesuffix('_6fps')}/seq_00000{n}" for scene in SCENES for n in range(2)
    }
    assert len({r.key for r in records}) == 8


def test_several_people_in_an_image(tmp_path, rendered):
    scene = next(iter(SCENES))
    rows, images = rendered[scene]
    name = rows[0]["imgname"]
    together = {scene: ([{**row, "imgname": name} for row in rows], {name: images[name]})}
    records = read(write(tmp_path, together))
    assert [r.key.rpartition("#")[2] for r in records] == ["0", "1", "2", "3"]
    assert len({r.images for r in records}) == 4


@pytest.mark.parametrize(
    ("joints", "betas", "gender", "family"),
    [
        (55, 16, "female", "smplx"),
        (55, 16, None, "smplx"),
        (55, 16, "neutral", "smplx"),
        (55, 11, "female", "smplx"),
        (22, 10, "female", "shared"),
    ],
)
def test_smplx_and_bedlam2(tmp_path, rendered, joints, betas, gender, family):
    rng = np.random.default_rng(0)
    scene = next(iter(SCENES))
    pose, shape = rng.normal(size=(4, joints * 3)), rng.normal(size=(4, betas))
    genders = None if gender is None else np.array([gender] * 4)
    changes = {"pose_cam": pose, "shape": shape, "gender": genders, "sub": None, "motion_info": None}
    write(
        tmp_path,
        {scene: rendered[scene]},
        "labels2",
        "images2",
        **changes,
        imgname=np.array([row["imgname"].encode() for row in rendered[scene][0]]),
    )
    records = read(tmp_path, labels="labels2", images=str(tmp_path / "images2"), size=32, variants=2)
    for record in records:
        row = int(record.key.rpartition("#")[2])
        assert record.poses.family == family and record.poses.measured is None and len(record.conversations) == 2
        label = rendered[scene][0][row]
        translation = label["trans_cam"] + label["cam_ext"][:3, 3]
        if betas == 16 and gender != "neutral":  # those of another body train nothing
            assert record.poses.betas is record.poses.translation is record.poses.shape_space is None
            found = record.extras["betas"], record.extras["trans_cam"]
        else:
            assert record.poses.shape_space == "SMPL-X" and not {"betas", "trans_cam"} & set(record.extras)
            found = record.poses.betas[0], record.poses.translation[0]
        np.testing.assert_allclose(found[0], shape[row], rtol=1e-6)
        np.testing.assert_allclose(found[1], translation, rtol=1e-6)
        expected = smpl_jax.axis_angle_to_matrix(pose[row].reshape(-1, 3).astype(np.float32))
        np.testing.assert_allclose(record.poses.rotations[0], expected, atol=1e-6)
        assert "sub" not in record.extras and record.extras.get("gender") == gender


def test_damage(tmp_path, rendered):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "mark"), "w")

    scene = next(iter(SCENES))
    rows, images = rendered[scene]
    names = np.array(["../../../../secret.png", rows[1]["imgname"], "seq_9/absent.png", rows[3]["imgname"]])
    poses = np.array([row["pose_cam"] for row in rows])
    poses[1, 5] = np.nan
    wrong = {**images, rows[3]["imgname"]: images[rows[3]["imgname"]][:50]}
    objects = np.array([Hostile()] * 4, dtype=object)  # an array that is not read
    write(tmp_path, {scene: (rows, wrong)}, imgname=names, pose_cam=poses, motion_info=objects)
    Image.new("RGB", WIDE).save(tmp_path / "secret.png")
    items = read(tmp_path)
    assert len(items) == 4 and all(isinstance(item, Skipped) and item.broken for item in items)
    words = " ".join(item.detail for item in items)
    for part in (
        "inside",
        "pose_cam must be finite",
        "absent.png: cannot be read",
        "128 × 72 pixels, or of 72 × 128",
        "found 128 × 50",
    ):
        assert part in words
    write(tmp_path, {scene: (rows, images)}, gender=objects)
    with pytest.raises(UserError, match="gender: the pickle refers to"):
        read(tmp_path)
    assert not (tmp_path / "mark").exists()
    pickle.loads(pickle.dumps(Hostile()))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"cam_int": None}, r"a_6fps\.npz: expected an npz of BEDLAM; it has no cam_int"),
        ({"pose_cam": np.zeros((4, 70))}, r"a_6fps\.npz: pose_cam is float64 of shape \(4, 70\)"),
        ({"center": np.zeros((3, 2))}, "center is"),
        ({"gtkps": np.zeros((4, 5, 4))}, "gtkps is"),
        ({"imgname": np.arange(4)}, "imgname is"),
    ],
)
def test_another_npz_is_an_error(tmp_path, rendered, change, match):
    scene = [*SCENES][1]
    with pytest.raises(UserError, match=match):
        read(write(tmp_path, {scene: rendered[scene]}, **change))


def test_missing_files(tmp_path, rendered):
    reader = named.find("data", "bedlam", DATA_SETS)
    with pytest.raises(UserError, match=r"all_npz_12_training/\*\.npz not found.*bedlam\.is\.tue\.mpg\.de"):
        reader(tmp_path)
    source = write(tmp_path, rendered)
    (source / "training_labels/all_npz_12_training/agora-body.npz").write_bytes(b"")
    items = read(source)
    assert items[-1] == Skipped("agora-body", "a scene without images") and len(items) == 9
    (source / "training_images").rename(source / "elsewhere")
    with pytest.raises(UserError, match=r"png.* not found"):
        reader(source)
    assert reader(source, images="elsewhere").parts("test") == ()
