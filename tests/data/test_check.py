"""``chatpose data check``: each fault is found in a folder that has it, and not in one that has none."""

import hashlib
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from chatpose_jax.cli.main import main
from chatpose_jax.data import prepare as preparing
from chatpose_jax.data import store
from chatpose_jax.data.check import KINDS, check_folders, constant, joint_name
from chatpose_jax.data.record import Record, to_bytes
from chatpose_jax.data.scan import Joints, body_hashes, head_directions, joint_hashes
from chatpose_jax.data.synthetic.families import sample_poses
from chatpose_jax.data.synthetic.skeleton import rotation
from smpl_jax.frames import turn
from smpl_jax.pose import JOINTS, Pose, to_family
from tests.data.given_reader import write

BODIES = sample_poses(120, seed=3).rotations.astype(np.float32)  # upright, in the frame "model"
BODIES[:, 10:12] = rotation(
    "x", np.random.default_rng(0).uniform(0, 30, (120, 2))
)  # sampled bodies do not bend the toes
HANDS = np.arange(24)[None] < 22


def photo(seed=0, size=(40, 30)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def row(number, rotations=None, *, group=None, images=(), measured=HANDS, key=None, words=None, **more):
    """A record of one pose, which is another one for each number."""
    body = BODIES[number] if rotations is None else rotations
    question = words or f"Row {number}, please."
    parts = [{"type": "image"}, {"type": "text", "text": question}] if images else question
    talk = ({"role": "user", "content": parts}, {"role": "assistant", "content": "It is <POSE>."})
    pose = Pose(body[None], "model", measured=measured)
    kind = "image" if images else "text"
    return Record(
        key or f"row {number}", kind, (talk,), images, pose, f"clip {number}" if group is None else group, more
    )


def found(*folders, **options):
    """The findings, as (kind, text)."""
    return [(finding["kind"], finding["text"]) for finding in check_folders(folders, **options)["findings"]]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "clean"
    rows = [row(n, images=(photo(n),) if n % 2 else ()) for n in range(40)]
    return write(folder, train=rows[:30], val=rows[30:])


def test_a_clean_folder(clean, tmp_path, capsys):
    assert main(["data", "check", str(clean), "--samples", "0", "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "train: 30 rows (15 text, 15 image) of 30 records in 30 groups; 4 files" in said
    assert "heads above the pelvis in 100.0%" in said and "40 × 30 (15)" in said and "nothing was found" in said
    assert "not measured: left_hand 100%, right_hand 100%" in said
    report = json.loads((tmp_path / "out" / "check.json").read_text())
    assert report["findings"] == []
    train = report["folders"][str(clean)]["splits"]["train"]
    assert train["images"]["count"] == train["images"]["decoded"] == 15
    assert sum(count for *_, count in train["tokens"]["bins"]) == 30
    assert report == check_folders([clean], workers=2)


def test_damage(clean, tmp_path, capsys):
    copy = shutil.copytree(clean, tmp_path / "copy")
    shard, cut, gone = sorted((copy / "train").glob("*.array_record"))[:3]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-5])
    gone.unlink()
    index = copy / "val" / "index.npy"
    index.write_bytes(index.read_bytes()[:-1] + b"\x09")
    texts = found(copy)
    assert [kind for kind, _ in texts] == ["damaged"] * 4
    for (_, text), word in zip(texts, ("SHA-256", "bytes instead of", "not found", "index.npy: its SHA-256")):
        assert word in text
    assert main(["data", "check", str(copy), "--samples", "0", "--quiet", "--workers", "1"]) == 1
    assert capsys.readouterr().out.startswith(f"! damaged: {copy} train: {shard}: its SHA-256 differs")
    assert main(["data", "check", str(copy), "--samples", "0", "--quiet", "--workers", "1", "--allow", "damaged"]) == 0


def test_an_index_of_other_records(clean, tmp_path):
    copy = shutil.copytree(clean, tmp_path / "copy")
    file = copy / "train" / "index.npy"
    index = np.load(file)
    index["kind"][3] = 2
    index["poses"][:2] = 7
    np.save(file, index)
    description = json.loads((copy / "dataset.json").read_text())
    description["splits"]["train"]["index"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (copy / "dataset.json").write_bytes(store.to_json(description))
    assert found(copy) == [
        ("index", "kind of 1 rows is not that of their records"),
        ("index", "poses of 2 rows is not that of their records"),
    ]


def test_records_that_training_refuses(tmp_path, monkeypatch):
    """Of a folder from a stranger: it may hold anything."""
    monkeypatch.setattr(preparing.ShardWriter, "_packed", lambda self, record: (to_bytes(record), []))
    good = vars(row(0))
    nan = np.full((24, 3, 3), np.nan, np.float32)
    bad = [
        {"kind": "video"},
        {"poses": Pose(nan[None], "model")},
        {"poses": Pose(nan[None, :7], "model")},
        {"conversations": ([{"role": "user"}],)},
        {"conversations": (({"role": "user", "content": [{"type": "image"}]},),)},
        {"conversations": 7},
        {"group": 7},
        {"extras": {"first_group": 8}},
    ]
    rows = [row(1), *(Record(**{**good, **change}) for change in bad)]
    ((kind, text), *_) = found(write(tmp_path / "a", train=rows))
    assert kind == "damaged" and text.startswith("8 records cannot be trained on: ") and text.endswith("and 3 more")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.pop("splits"), "it has no splits"),
        (lambda found: found["about"].pop("title"), "about has no title"),
        (lambda found: found["splits"]["val"].pop("rows"), "val has no rows"),
        (lambda found: found["splits"]["val"]["index"].update(bytes="7"), "index of val has no bytes"),
        (lambda found: found["splits"]["train"]["shards"][1].update(file="../x"), "is outside of the folder: '../x'"),
        (lambda found: found["splits"]["train"]["shards"].append(3), "a shard of train has no file"),
    ],
)
def test_a_damaged_description(clean, tmp_path, capsys, change, words):
    description = json.loads((clean / "dataset.json").read_text())
    change(description)
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    for command in ("check", "show"):
        assert main(["data", command, str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


@pytest.mark.parametrize("words", [["nothing"], [], ["clean", "clean"]])
def test_bad_input(clean, tmp_path, capsys, words):
    folders = [str(clean if word == "clean" else tmp_path / word) for word in words]
    if not folders:
        (tmp_path / "dataset.json").write_text("{]")
        folders = [str(tmp_path)]
    assert main(["data", "check", *folders]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize(
    ("frame", "before", "words"),
    [
        ("model", np.eye(3), None),
        ("camera", turn("model", "camera"), None),
        ("z-up", turn("model", "z-up"), None),
        ("camera", np.eye(3), "point to +y, which is up in 'model': the reader should say frame='model'"),
        ("camera", turn("model", "z-up"), "point to +z, which is up in 'z-up': the reader should say frame='z-up'"),
        ("model", rotation("x", 180.0), "point to -y, which is up in 'camera'"),
        ("z-up", turn("model", "z-up") @ rotation("x", 180.0), "point to -z: they are upside down"),
        ("camera", rotation("z", 90.0), "point to -x: they lie on the side; images that are stored turned by 90°"),
    ],
)
def test_frames(tmp_path, frame, before, words):
    rows = []
    for number in range(30):
        record = row(number)
        rotations = record.poses.rotations.copy()
        rotations[:, 0] = before @ rotations[:, 0]
        rows.append(row(number, rotations[0].astype(np.float32)))
    rows = [Record(**{**vars(r), "poses": r.poses.replace(frame=frame)}) for r in rows]
    texts = found(write(tmp_path / "many", train=rows))
    assert [kind for kind, _ in texts] == (["frame"] if words else [])
    assert not words or words in texts[0][1]
    assert found(write(tmp_path / "few", train=rows[:10])) == []  # too few to judge


def test_poses_that_nobody_measured_are_not_judged(tmp_path):
    lying = np.tile(rotation("x", 90.0), (24, 1, 1)).astype(np.float32)
    folder = write(tmp_path / "a", test=[row(n, lying, measured=HANDS & False, words=f"{n}") for n in range(30)])
    assert found(folder) == []


def test_heads_are_where_the_body_has_them():
    from smpl_jax import joints
    from smpl_jax.io import load_body

    body = load_body()
    places = np.asarray(joints(body, BODIES[:8]))
    wanted = places[:, body.joint_names.index("head")] - places[:, 0]
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(head_directions(BODIES[:8]), wanted, atol=1e-5)


def test_filler_values(tmp_path):
    def rows(share, measured):
        for number in range(40):
            body = BODIES[number].copy()
            body[10] = rotation("x", 5.0 if number < share * 40 else 6.0 + number).astype(np.float32)
            yield row(number, body, measured=measured)

    (finding,) = found(write(tmp_path / "a", train=[*rows(0.95, HANDS)]))
    assert finding[0] == "filler" and finding[1].startswith("left_foot (joint 10) has the same rotation in 95% of")
    assert found(write(tmp_path / "b", train=[*rows(0.85, HANDS)])) == []
    assert found(write(tmp_path / "c", train=[*rows(0.95, HANDS & (np.arange(24) != 10))])) == []


def test_constant_joints_are_counted_exactly_enough():
    # values that come late, in sets of all sizes: what most poses have is never lost
    rng = np.random.default_rng(0)
    total = Joints(np.zeros(24, np.int64))
    for size in (3, 64, 64, 7):
        bodies = np.tile(rotation("y", rng.uniform(0, 90, (size, 1))), (1, 24, 1, 1)).astype(np.float32)
        bodies[rng.random(size) < 0.95, 5] = np.eye(3)
        some = Joints(np.zeros(24, np.int64))
        some.add([Pose(bodies, "model")], np.ones((size, 24), bool), joint_hashes(bodies))
        total.merge(some)
    assert [joint for joint, _ in constant(total)] == [5] and total.poses == 138


def test_joint_names():
    from smpl_jax.io import load_body

    assert [joint_name(24, joint) for joint in range(24)] == list(load_body().joint_names)[:24]
    assert [joint_name(52, joint) for joint in (21, 22, 24, 36, 37, 51)] == [
        "right_wrist", "left_index1", "left_index3", "left_thumb3", "right_index1", "right_thumb3",
    ]  # fmt: skip
    assert [joint_name(55, joint) for joint in (22, 24, 25, 54)] == ["jaw", "right_eye", "left_index1", "right_thumb3"]


def test_matrices_that_are_no_rotations(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "as_trained", lambda poses: poses)
    bent = BODIES[1].copy()
    bent[4] *= 1.1
    folder = write(tmp_path / "a", train=[row(0), row(1, bent), row(2)])
    assert found(folder) == [("rotations", "1 matrices are no rotations: row 1: joint 4")]


def test_images(tmp_path):
    good, half = photo(1), photo(2, (200, 200))
    rows = [row(0, images=(good,)), row(1, images=(half[: len(half) // 2],)), row(2, images=(b"no image",))]
    folder = write(tmp_path / "a", train=rows)
    ((kind, text),) = found(folder)
    assert kind == "images" and text.startswith("2 images cannot be decoded: row 1: ") and "row 2" in text
    ((_, text),) = found(folder, decode=0.0)  # the header of the cut one is whole
    assert text.startswith("1 images cannot be decoded: row 2")


def test_duplicates_and_leaks_in_a_folder(tmp_path):
    rows = [row(0), row(1, images=(photo(1),)), row(1, images=(photo(1),), key="again"), row(2, key="row 0")]
    # of val: the group of row 0, the image of row 1, the pose of row 2 turned about the vertical, and a row of its own
    turned = BODIES[2].copy()
    turned[0] = (rotation("y", 70.0) @ turned[0]).astype(np.float32)
    val = [row(10, group="clip 0"), row(11, images=(photo(1),)), row(12, turned), row(13)]
    (same, keys, leak) = found(write(tmp_path / "a", train=rows, val=val))
    assert same[0] == keys[0] == "duplicates" and leak[0] == "leakage"
    assert same[1].startswith("1 rows (25.00%) are equal") and same[1].endswith("e.g. 'row 1' and 'again'")
    assert keys[1].startswith("1 records have the key of another")
    assert leak[1].startswith("both have 1 group, 1 image, 1 pose (in 1 and 1 records), e.g. 'clip 0'. ")
    assert "is split by items and not by group" in leak[1]
    twice = Record(**{**vars(row(5)), "conversations": row(5).conversations * 2})
    assert found(write(tmp_path / "c", train=[twice, row(6)])) == []  # variants that were drawn alike
    (poses,) = found(write(tmp_path / "b", train=rows[:1], val=[row(0, group="other", words="Another.", key="x")]))
    assert "both have 1 pose" in poses[1] and "copies under other names, or rest poses" in poses[1]


def test_leaks_between_folders(tmp_path):
    a = write(tmp_path / "a", train=[row(0), row(1)], test=[row(2)])
    b = write(
        tmp_path / "b", train=[row(2, words="x", key="x")], test=[row(20, first_group="clip 1"), row(0, words="y")]
    )
    texts = check_folders([a, b])["findings"]
    assert [finding["where"] for finding in texts] == [f"{a} train and {b} test", f"{a} test and {b} train"]
    assert texts[0]["text"].startswith("both have 2 groups, 1 pose (in 2 and 2 records)")
    assert "'clip 1'" in texts[0]["text"] and "prepared with different splits" in texts[0]["text"]
    assert found(a) == found(b) == []


def test_poses_of_other_families_and_frames_are_the_same():
    body, all_joints = BODIES[:3], np.ones((3, 24), bool)
    wanted = body_hashes(body, HANDS.repeat(3, 0))
    for family in JOINTS:
        other = to_family(Pose(body, "model", measured=all_joints), family)
        np.testing.assert_array_equal(body_hashes(other.rotations, other.measured), wanted)
    assert len(set(wanted.tolist())) == 3 and body_hashes(body, ~all_joints).tolist() == [0, 0, 0]
    moved = body.copy()
    moved[:, 7] = moved[:, 7] @ rotation("x", 1.0)
    assert not set(body_hashes(moved, all_joints).tolist()) & set(wanted.tolist())


def test_every_kind_of_finding_is_tested():
    with open(__file__) as file:
        text = file.read()
    assert all(f'"{kind}"' in text for kind in KINDS)
