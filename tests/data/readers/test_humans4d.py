"""4D-Humans' tars: fixtures in their real layout (webdataset keys, pickles of lists of dictionaries, 0-d object arrays)."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

import smpl_jax
from chatpose_jax import named
from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.datasets import DATA_SETS
from chatpose_jax.data.reader import Skipped
from chatpose_jax.data.readers import crop
from chatpose_jax.data.readers.humans4d import H36M, Coco, Humans4D, MpiInf3dhp
from chatpose_jax.data.readers.plausible import HISTOGRAM, THRESHOLDS, Plausible
from chatpose_jax.data.record import from_bytes, to_bytes
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor

SIZE = (64, 48)


def picture(seed=0, kind="JPEG"):
    # smooth, so that JPEG changes little
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    pixels = np.stack([x * 3, y * 4, (x + y + 30 * seed) % 256], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 98} if kind == "JPEG" else {}))
    return file.getvalue()


def person(seed=0, **changes):
    """As 4D-Humans stores one: float32 and float64 mixed, flags as 0-d arrays."""
    rng = np.random.default_rng(seed)
    pose = (rng.normal(size=72) * 0.2).astype(np.float32)
    pose[:3] = [np.pi - 0.1, 0.1, 0.0]
    points = np.concatenate([rng.uniform(5, 45, (44, 2)), rng.uniform(0.4, 1, (44, 1))], 1)
    return {
        "keypoints_2d": points.astype(np.float32),
        "keypoints_3d": np.concatenate([rng.normal(size=(44, 3)), np.ones((44, 1))], 1).astype(np.float32),
        "center": np.array([30.5, 22.0]),
        "scale": np.array([0.1, 0.2]),
        "body_pose": pose,
        "betas": rng.normal(size=10).astype(np.float32) * 0.5,
        "has_body_pose": np.array(1.0),
        "has_betas": np.array(1.0),
        "extra_info": {"fitting_loss": np.array({"reprojection_loss": 100.0}, dtype=object), "detection_npz_idx": 0},
        **changes,
    }


def write(source, reader, samples, tar="000000.tar"):
    path = source / "dataset_tars" / reader.folder / tar
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for key, files in samples:
            for suffix, contents in files.items():
                data = contents if isinstance(contents, bytes) else pickle.dumps(contents)
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return source


def sample(*people, image=None, suffix="jpg"):
    masks = io.BytesIO()
    np.savez_compressed(masks, masks=np.ones((len(people), *SIZE[::-1]), bool))
    return {suffix: image or picture(), "data.pyd": list(people), "detection.npz": masks.getvalue()}


def read(source, reader=Coco, **options):
    made = reader(source, **{"plausible": False, **options})
    return [item for part in made.parts("train") for item in made.read("train", part)]


def test_records(tmp_path):
    people = [person(0), person(1, scale=np.array(0.15), has_body_pose=True, has_betas=np.float32(1))]
    write(tmp_path, Coco, [("coco-train/COCO_train2014_000000000036", sample(*people))])
    write(
        tmp_path,
        Coco,
        [("coco-train/COCO_train2014_000000000049", sample(person(2), image=picture(1, "PNG"), suffix="png"))],
        "000001.tar",
    )
    records = read(tmp_path)
    assert [r.key for r in records] == [
        "000000.tar/coco-train/COCO_train2014_000000000036#0",
        "000000.tar/coco-train/COCO_train2014_000000000036#1",
        "000001.tar/coco-train/COCO_train2014_000000000049#0",
    ]
    assert [r.group for r in records] == ["000000000036", "000000000036", "000000000049"]
    for record, source in zip(records, [*people, person(2)]):
        smpl_jax.check(record.poses)
        assert record.poses.frame == "camera" and record.poses.shape == (1,)
        expected = smpl_jax.axis_angle_to_matrix(source["body_pose"].reshape(24, 3))
        np.testing.assert_allclose(record.poses.rotations[0], expected, atol=1e-6)
        np.testing.assert_array_equal(record.poses.betas, source["betas"][None])
        assert record.poses.measured.tolist() == [[j not in (22, 23) for j in range(24)]]
        image = Image.open(io.BytesIO(record.images[0]))
        assert image.format == "JPEG" and image.size == (256, 256)
        assert record.kind == "image" and len(record.conversations) == 1
    # pixels and keypoints: the middle of the box is in the middle of the crop; 40 pixels of the image are 256 of it
    pixels = np.asarray(Image.open(io.BytesIO(records[0].images[0])), float)
    x, y = 30.5 + (100 - 128) * 40 / 256, 22.0 + (150 - 128) * 40 / 256
    np.testing.assert_allclose(pixels[150, 100], [3 * x, 4 * y, x + y], atol=6)
    np.testing.assert_allclose(
        records[0].extras["keypoints_2d"][:, :2],
        (people[0]["keypoints_2d"][:, :2] - [30.5, 22.0]) * 256 / 40 + 128,
        atol=1e-3,
    )
    np.testing.assert_allclose(records[0].extras["keypoints_3d"], people[0]["keypoints_3d"])
    assert records[0].extras["box"].tolist() == [30.5, 22, 40] and records[0].extras["image_size"].tolist() == [64, 48]
    assert records[1].extras["box"][2] == 30
    assert to_bytes(from_bytes(to_bytes(records[0]))) == to_bytes(records[0])
    assert [to_bytes(r) for r in read(tmp_path)] == [to_bytes(r) for r in records]


def test_rows_can_be_trained_on(tmp_path):
    write(tmp_path, Coco, [("a/COCO_train2014_000000000036", sample(person()))])
    (record,) = read(tmp_path, variants=3)
    assert len(record.conversations) == 3 and len({str(c) for c in record.conversations}) > 1
    processor = tiny_processor(preset("tiny"))
    for n in range(3):
        example = record.example(n)
        example.check()
        encoded = encode_example(processor, example, max_length=2048)
        assert len(encoded["images"]) == 1 and encoded["poses"].measured.sum() == 22


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"has_body_pose": np.array(0.0), "body_pose": np.zeros(3)}, {}, "no pose"),
        ({"has_betas": np.array(0.0)}, {}, "no shape, or an extreme one"),
        ({"betas": np.array([3.5] + [0] * 9)}, {}, "no shape, or an extreme one"),
        ({"betas": np.array([3.5] + [0] * 9)}, {"max_beta": 0.0}, None),
        ({"has_betas": False}, {"need_shape": False}, None),
        (
            {"extra_info": {"fitting_loss": np.array({"reprojection_loss": np.float32(31000)}, object)}},
            {},
            "large reprojection loss",
        ),
        (
            {"extra_info": {"fitting_loss": np.array({"reprojection_loss": 31001.0}, object)}},
            {"max_reprojection": 0.0},
            None,
        ),
        (
            {"extra_info": {"fitting_loss": np.array({"reprojection_loss": np.nan}, object)}},
            {},
            "large reprojection loss",
        ),
        ({"extra_info": {"fitting_loss": np.array({}, object)}}, {}, None),
        ({"extra_info": {}}, {}, None),
        ({"keypoints_2d": np.full((44, 3), 0.29)}, {}, "too few keypoints"),
        ({"body_pose": np.zeros(72)}, {}, "no pose"),
        ({"keypoints_2d": np.full((44, 3), 0.29)}, {"min_confidence": 0.0}, None),
    ],
)
def test_filters(tmp_path, change, options, reason):
    write(tmp_path, Coco, [("a/COCO_train2014_000000000036", sample(person(**change)))])
    (item,) = read(tmp_path, **options)
    if reason:
        assert item == Skipped("000000.tar/a/COCO_train2014_000000000036#0", reason)
    else:
        assert item.poses.shape == (1,)
        if change.get("has_betas") is False:
            assert item.poses.betas is None


def test_a_fit_without_shape_has_none(tmp_path):
    write(tmp_path, Coco, [("a/COCO_train2014_000000000036", sample(person(betas=np.array([3.5] + [0] * 9))))])
    (record,) = read(tmp_path, need_shape=False)
    assert record.poses.betas is None


@pytest.mark.parametrize(("reader", "markers"), [(Coco, False), (H36M, True)])
def test_toes_count_where_they_were_seen(tmp_path, reader, markers):
    points = person()["keypoints_2d"]
    points[[19, 20, 22], 2] = 0.1
    write(tmp_path, reader, [("a/1", sample(person(keypoints_2d=points)))])
    (record,) = read(tmp_path, reader)
    assert record.poses.measured[0, [10, 11, 22, 23]].tolist() == [markers, True, False, False]
    assert record.extras["keypoints_2d"][[19, 23], 2].tolist() == [0, points[23, 2]]
    flipped = [
        r
        for r in read(tmp_path, reader, augment=30)
        if np.allclose(r.extras["keypoints_2d"][[22, 23, 25], 2], [0, 0, points[30, 2]])
    ]
    assert flipped and all(
        r.poses.measured[0, [10, 11, 22, 23]].tolist() == [True, markers, False, False] for r in flipped
    )


def test_augmented_copies(tmp_path):
    write(tmp_path, Coco, [("a/COCO_train2014_000000000036", sample(person()))])
    first, *copies = read(tmp_path, augment=6)
    assert to_bytes(first) == to_bytes(read(tmp_path)[0])
    assert [r.key for r in copies] == [f"{first.key}+{n}" for n in range(1, 7)]
    assert len({to_bytes(r) for r in copies}) == 6 and {r.group for r in copies} == {first.group}
    for record in copies:
        # The keypoints' move says what was done to the image. The root must have turned with it.
        before, after = first.extras["keypoints_2d"][:, :2], record.extras["keypoints_2d"][:, :2]
        options = {}
        for flip in (False, True):
            target = after[crop.TWINS] if flip else after
            linear, error, *_ = np.linalg.lstsq(np.c_[before, np.ones(44)], target, rcond=None)
            options[flip] = (error.max(), linear[:2].T)
        flip = options[True][0] < options[False][0]
        linear = options[flip][1]
        assert (np.linalg.det(linear) < 0) == flip
        turn = linear / np.sqrt(abs(np.linalg.det(linear))) @ np.diag([-1 if flip else 1, 1])
        pose = smpl_jax.mirror_pose(first.poses) if flip else first.poses
        np.testing.assert_allclose(record.poses.rotations[0, 0, :2], turn @ pose.rotations[0, 0, :2], atol=1e-5)
        np.testing.assert_allclose(record.poses.rotations[0, 1:], pose.rotations[0, 1:])


def test_groups():
    class Empty(Humans4D):
        def __init__(self):
            pass

    def group(reader, key):
        return type("R", (Empty,), {"group": reader.group})()._group(key)

    assert group(H36M, "h36m/S1_Directions_1_54138969_000001") == "S1_Directions_1"
    assert group(H36M, "S11_Walking_60457274_000001") == "S11_Walking"
    assert (
        group(MpiInf3dhp, "S4_Seq2_Cam0_001033")
        == group(MpiInf3dhp, "x/S4/Seq2/imageFrames/video_8/frame_000001")
        == "S4_Seq2"
    )
    assert group(Coco, "coco/COCO_train2014_000000000036") == "000000000036"
    assert group(Coco, "else/where") == "where"


def test_the_table_of_data_sets(tmp_path):
    for name in ("h36m", "mpi_inf_3dhp", "coco", "coco_vitpose", "mpii"):
        reader = named.find("data", name, DATA_SETS)
        assert issubclass(reader, Humans4D)
        with pytest.raises(UserError, match=rf"{reader.folder}/000000\.tar not found.*4D-Humans.*licence"):
            reader(tmp_path)
        write(tmp_path, reader, [("a/1", sample(person()))])
        with pytest.raises(UserError, match=r"amass_poses_hist100_SMPL\+H_G\.npy not found.*--set plausible=false"):
            reader(tmp_path)
        assert reader(tmp_path, plausible=False).parts("val") == ()


def test_damaged_items_are_reported_and_skipped(tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "mark"), "w")

    good = sample(person())
    samples = [
        ("a/1", {**good, "jpg": good["jpg"][:200]}),
        ("a/2", {**good, "jpg": b"no image"}),
        ("a/3", {**good, "data.pyd": [person(), Hostile()]}),
        ("a/4", {**good, "data.pyd": pickle.dumps([person()])[:-30]}),
        ("a/5", {**good, "data.pyd": person()}),
        ("a/6", {"data.pyd": [person()]}),
        ("a/7", {"jpg": picture()}),
        (
            "a/8",
            sample(
                person(),
                3,
                person(body_pose=np.full(72, np.nan)),
                person(center="here"),
                person(scale=np.zeros(2)),
                {},
                person(1),
            ),
        ),
        ("a/9", {**good, "data.pyd": []}),
    ]
    write(tmp_path, Coco, samples)
    items = read(tmp_path)
    assert all(item.broken and item.detail for item in items if isinstance(item, Skipped))
    names = [item.key.removeprefix("000000.tar/a/") for item in items if isinstance(item, Skipped)]
    assert names == ["1", "2", "3", "4", "5", "6", "7", "8#1", "8#2", "8#3", "8#4", "8#5"]
    assert [item.key[-3:] for item in items if not isinstance(item, Skipped)] == ["8#0", "8#6"]
    assert not (tmp_path / "mark").exists()
    words = " ".join(item.detail for item in items if isinstance(item, Skipped))
    for part in (
        "refers to",
        "found data.pyd",
        "found jpg",
        "found dict",
        "found int",
        "(72,)",
        "center must be numbers",
        "0 pixels",
        "has no",
    ):
        assert part in words


def test_a_cut_tar_is_an_error_after_its_whole_samples(tmp_path):
    write(tmp_path, Coco, [(f"a/{n}", sample(person(n))) for n in range(3)])
    path = tmp_path / "dataset_tars" / Coco.folder / "000000.tar"
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"a/2.data.pyd") + 1000])
    made, found = Coco(tmp_path, plausible=False), []
    with pytest.raises(UserError, match=r"000000\.tar: the tar is cut off or damaged"):
        for item in made.read("train", "000000.tar"):
            found.append(item.key)
    assert found == ["000000.tar/a/0#0", "000000.tar/a/1#0"]


def test_a_tar_of_something_else_is_an_error(tmp_path):
    write(tmp_path, Coco, [("a/1", {"txt": b"1"})])
    with pytest.raises(UserError, match=r"000000\.tar: expected files KEY\.jpg and KEY\.data\.pyd, found none"):
        read(tmp_path)


JUNK = (
    None,
    "x",
    b"x",
    3,
    -1.5,
    1e300,
    np.nan,
    [],
    [1, 2],
    {},
    {"a": 1},
    np.zeros(0),
    np.zeros((3, 3, 3)),
    np.array("x"),
    np.array({}, object),
)


@pytest.mark.parametrize("name", [*person(), "all"])
def test_whatever_a_person_holds(tmp_path, name):
    """Each field in turn is something else: a record, or a report; never another error."""
    changes = [{name: junk} for junk in JUNK] if name != "all" else [dict.fromkeys(person(), junk) for junk in JUNK]
    if name == "extra_info":
        changes += [{name: {"fitting_loss": junk}} for junk in JUNK]
        changes += [{name: {"fitting_loss": np.array({"reprojection_loss": junk}, object)}} for junk in JUNK]
    if name == "body_pose":
        changes += [{name: np.full(72, 180.0)}]
    write(tmp_path, Coco, [("a/1", sample(*(person(**change) for change in changes)))])
    items = read(tmp_path, size=16)
    assert len(items) == len(changes)
    for item in items:
        if isinstance(item, Skipped):
            assert item.detail or not item.broken
        else:
            smpl_jax.check(item.poses)
    assert any(isinstance(item, Skipped) for item in items)


def test_options(tmp_path):
    write(tmp_path, Coco, [("a/1", sample(person(scale=np.array([0.19, 0.2]))))])
    (record,) = read(tmp_path, tall=True, size=64)
    assert record.extras["box"][2] == pytest.approx(38 * 256 / 192)
    assert Image.open(io.BytesIO(record.images[0])).size == (64, 64)
    for options, match in (
        ({"size": 3}, "size"),
        ({"variants": 0}, "variants"),
        ({"augment": -1}, "augment"),
        ({"max_beta": -1.0}, "max_beta"),
    ):
        with pytest.raises(UserError, match=match):
            read(tmp_path, **options)


def test_smoothing_is_scipys(tmp_path):
    scipy = pytest.importorskip("scipy.ndimage")
    counts = np.random.default_rng(0).integers(0, 50, (21, 12, 12, 12)).astype(float)
    np.save(tmp_path / "h.npy", counts)
    expected = scipy.gaussian_filter(counts / counts.sum() / (2 * np.pi / 12) ** 3, sigma=2, mode="constant")
    np.testing.assert_allclose(Plausible.load(tmp_path / "h.npy").density, expected, rtol=1e-4)
    assert THRESHOLDS.shape == (21,)
    for array in (np.zeros((21, 4, 4, 4)), np.ones((20, 4, 4, 4)), np.ones((21, 4, 4, 5)), np.array(["x"])):
        np.save(tmp_path / "h.npy", array)
        with pytest.raises(UserError, match="expected counts"):
            Plausible.load(tmp_path / "h.npy")
    np.save(tmp_path / "h.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        Plausible.load(tmp_path / "h.npy")


def test_improbable_poses(tmp_path):
    """A histogram of poses near zero: an elbow bent backwards by 170 degrees is improbable; a turn by 2π more is the same turn."""
    rng = np.random.default_rng(0)
    counts = np.zeros((21, 40, 40, 40))
    for joint in range(21):
        vectors = rng.normal(size=(2000, 3)) * 0.1
        counts[joint] = np.histogramdd(vectors, 40, [(-np.pi, np.pi)] * 3)[0]
    np.save(tmp_path / HISTOGRAM, counts)
    usual, bent, around = (person(body_pose=np.eye(72)[0] * np.pi) for _ in range(3))
    bent["body_pose"][3 * 18 : 3 * 19] = [0, 2.9, 0]
    around["body_pose"][3 * 18 : 3 * 19] = [0, 2 * np.pi + 0.1, 0]
    write(tmp_path, Coco, [("a/1", sample(usual, bent, around))])
    made = Coco(tmp_path)
    items = [*made.read("train", "000000.tar")]
    assert [getattr(item, "reason", "") for item in items] == ["", "improbable pose", ""]
    assert "_plausible" in vars(made) and "_plausible" not in vars(pickle.loads(pickle.dumps(made)))
