"""Motion capture as records: key poses, captions, splits without leaks, what is left out and why."""

import itertools

import numpy as np
import pytest

from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.reader import Skipped
from chatpose_jax.data.readers.amass import file_name
from chatpose_jax.data.readers.mocap import INDEX, TASKS, Bvh, Cmu, key_poses, read_index, subject
from chatpose_jax.data.record import Record, from_bytes, to_bytes
from chatpose_jax.data.synthetic import skeleton
from chatpose_jax.data.synthetic.families import sample_poses
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from smpl_jax.pose import check, to_frame
from tests.motion_files import write_acclaim, write_bvh

DOWN = {"lhumerus": (0, 0, -80), "rhumerus": (0, 0, 80)}
SPLITS = ("train", "val", "test")


def raised(degrees, **more):
    """Arms at the sides, the left thigh forward by some degrees."""
    return {**DOWN, "lfemur": (-degrees, 0.1, 0), **more}


def wave(frames=40):
    return [raised(2.0 * i, root=(0, 3.0 * i, 0)) for i in range(frames)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips as CMU gives them, and of two other people as BVH."""
    root = tmp_path_factory.mktemp("clips")
    write_acclaim(root / "cmu", {name: wave() for name in ("02_01", "02_02", "02_10", "35_01", "144_30")})
    for person, turn in itertools.product("ab", (30, 60)):
        (root / person).mkdir(exist_ok=True)
        frames = [{}, *({"Hips": (0, turn, 0), "LeftArm": (-2 * i, 0, 0)} for i in range(30))]
        write_bvh(root / person / f"{person}{turn}.bvh", *frames, order="ZYX", seconds=str(1 / 30))
    listed = "02_01\twalk\r\n02_02\tUnknown\r\n35_01\tLeftTurn   CleanedGRS\r\na30\traise an arm\r\n"
    (root / INDEX).write_bytes(f"Graphics Lab\r\n  “Unknown”.\r\n\r\nSubject #2 (various)\r\n\r\n{listed}".encode())
    return root


def records(reader, splits=SPLITS):
    return {r.key: r for s in splits for part in reader.parts(s) for r in reader.read(s, part) if isinstance(r, Record)}


def test_records_of_acclaim_and_bvh(folder):
    found = records(Cmu(folder, variants=3))
    assert {record.group for record in found.values()} == {
        "CMU/02/02_01_poses.npz", "CMU/02/02_02_poses.npz", "CMU/02/02_10_poses.npz", "CMU/35/35_01_poses.npz",
        "CMU/144/144_30_poses.npz", "a/a30", "a/a60", "b/b30", "b/b60",
    }  # fmt: skip
    assert file_name("CMU/02/02_01_stageii.npz") == "CMU/02/02_01_poses.npz"  # what the readers of AMASS write
    assert "cmu/02_01" in {record.group for record in records(Bvh(folder)).values()}
    processor = tiny_processor(preset("tiny"))
    for record in found.values():
        assert record.kind == "text" and len(record.conversations) == 3 and record.poses.frame == "model"
        check(record.poses)
        assert record.poses.measured.tolist() == [[True] * 22 + [False] * 2] and record.poses.betas is None
        root = record.poses.rotations[0, 0]
        np.testing.assert_allclose(root[:, 2], (0, 0, 1), atol=1e-4)  # these clips turn about the vertical only
        camera = to_frame(record.poses, "camera").rotations[0, 0]
        assert camera[1, 1] < -0.99 and camera[2, 2] < -0.99  # upright, facing the camera
        again = from_bytes(to_bytes(record))
        assert to_bytes(again) == to_bytes(record)
    encoded = encode_example(processor, next(iter(found.values())).example(2), 200)
    assert len(encoded["input_ids"]) > 10
    extras = dict(found["cmu/02_01.amc#0"].extras)
    assert len(extras.pop("caption").split(". ")) > 1  # of a pose, so the same for all of its questions
    assert extras == {"frame": 0, "subject": "02", "description": "walk"}
    assert found["cmu/35_01.amc#0"].extras["description"] == "Left Turn"
    assert found["cmu/02_02.amc#0"].extras["description"] == ""
    assert next(r for k, r in found.items() if k.startswith("a/a30")).extras["subject"] == "a"


def test_a_record_depends_on_nothing_but_its_clip_and_the_seed(folder):
    reader = Cmu(folder, variants=2)
    whole = records(reader)
    split = reader.splits["cmu/02_10.amc"]
    alone = [r for r in Cmu(folder, variants=2).read(split, "cmu/02_10.amc") if isinstance(r, Record)]
    assert [to_bytes(r) for r in alone] == [to_bytes(whole[r.key]) for r in alone]
    other = records(Cmu(folder, variants=2, seed=1))
    assert list(other) == list(whole)  # the seed changes words, not poses
    assert any(other[key].conversations != whole[key].conversations for key in whole)
    more = records(Cmu(folder, variants=3))
    assert all(more[key].conversations[:2] == whole[key].conversations for key in whole)


def test_levels_of_detail(folder):
    """Each task alone; what a pose cannot be asked by is drawn from the others, or the pose is left out."""
    asked = {task: records(Cmu(folder, tasks={task: 1})) for task in TASKS}
    key = "cmu/02_01.amc#0"
    words = {task: str(found[key].conversations[0][0]["content"]) for task, found in asked.items() if key in found}
    captions = {task: len(text.split()) for task, text in words.items()}
    assert captions["summary"] < captions["short"] < captions["detailed"]
    assert "arms" in words["short"] and "arms" not in words["summary"] and "walk" in words["motion"]
    assert "guards a palace" in words["situation"]
    described = {"CMU/02/02_01_poses.npz", "CMU/35/35_01_poses.npz", "a/a30"}
    assert {record.group for record in asked["motion"].values()} == described
    lost = [item.reason for item in Cmu(folder, tasks={"motion": 1}).read("train", "b/b60.bvh") if item]
    assert set(lost) == {
        "poses that suit none of the tasks",
        "frames near a key pose",
        "frames that the clip shows to be wrong",
    }
    assert any("middle of this: raise an arm" in str(r.conversations) or "motion: raise an arm" in str(r.conversations)
               or "during this: raise an arm" in str(r.conversations) for r in asked["situation"].values())  # fmt: skip
    both = records(Cmu(folder, tasks={"motion": 1, "short": 1e-9}))
    assert len(both) == len(asked["short"])


def test_key_poses_are_apart_and_cover_the_clip():
    poses = sample_poses(300, 3).rotations
    joints, _ = skeleton.forward_kinematics(poses)
    apart = np.linalg.norm(joints[:, None] - joints[None], axis=-1).mean(-1)
    for spacing in (0.1, 0.2, 0.3):
        chosen = key_poses(poses, spacing)
        assert (np.diff(chosen) > 0).all()
        assert apart[:, chosen].min(1).max() <= spacing
        assert (apart[np.ix_(chosen, chosen)] + np.eye(len(chosen))).min() > spacing
    assert len(key_poses(poses, 0)) == 300 and len(key_poses(poses, 100.0)) == 1 and not len(key_poses(poses[:0], 0.1))


def test_frames_that_are_wrong_are_left_out(folder, tmp_path):
    first = next(Bvh(folder).read("train", "a/a30.bvh"))
    assert first == Skipped("a/a30.bvh#0", "frames that the clip shows to be wrong")  # an inserted rest pose
    frames = [raised(10, lhumerus=(0, 0, 0)) if i in (4, 8) else raised(2.0 * i) for i in range(20)]
    write_acclaim(tmp_path, {f"0{i}_01": frames for i in range(1, 4)})
    items = list(Cmu(tmp_path, folds=3, rate=120, spacing=0).read("train", "01_01.amc"))
    assert len(items) == 20
    assert [i for i, item in enumerate(items) if isinstance(item, Skipped)] == [4, 8]  # an arm that was not captured
    assert len(list(Cmu(tmp_path, folds=3, rate=30).read("train", "01_01.amc"))) == 5


def test_a_broken_clip_is_one_broken_item(folder, tmp_path):
    write_acclaim(tmp_path, {f"0{i}_01": wave(3) for i in range(1, 4)})
    (tmp_path / "02_01.amc").write_text("#!OML:ASF\n:FULLY-SPECIFIED\n1\nroot 1 2\n")
    (tmp_path / "03.asf").unlink()
    reader = Cmu(tmp_path, folds=3)
    for clip, words in (("02_01.amc", "expected 6 values of root"), ("03_01.amc", "asf")):
        (item,) = reader.read("train", clip)
        assert isinstance(item, Skipped) and item.key == clip and item.broken and words in item.detail
        assert (
            clip in item.detail and str(tmp_path) not in item.detail
        )  # a prepared folder is the same wherever its source was


def test_no_clip_is_in_two_splits(folder):
    reader = Cmu(folder)
    parts = [reader.parts(split) for split in SPLITS]
    assert sorted(itertools.chain(*parts)) == reader.clips and len(reader.clips) == 9
    tested = [Cmu(folder, fold=fold).parts("test") for fold in range(5)]
    assert sorted(itertools.chain(*tested)) == reader.clips and all(tested)
    assert reader.parts("val") == Cmu(folder, fold=1).parts("test")
    assert Cmu(folder, seed=9).splits == reader.splits


def test_subjects_stay_together(folder, tmp_path):
    reader = Cmu(folder, by="subject")  # 02, 35, 144, a, b
    found = {split: {subject(clip) for clip in reader.parts(split)} for split in SPLITS}
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == 5
    assert [len(found[split]) for split in SPLITS] == [3, 1, 1]
    assert [subject(c) for c in ("02_01.amc", "x/144_30_jump.bvh", "ann/run.bvh", "run.bvh")] == [
        "02",
        "144",
        "ann",
        ".",
    ]
    write_acclaim(tmp_path, {"02_01": wave(2), "02_02": wave(2), "03_01": wave(2)})
    with pytest.raises(UserError, match=r"2 subjects cannot be cut into 3 folds.*choose by=clip"):
        Cmu(tmp_path, by="subject", folds=3)
    with pytest.raises(UserError, match=r"3 clips cannot be cut into 5 folds.*choose fewer folds \(at least 3\)"):
        Cmu(tmp_path)
    write_bvh(tmp_path / "02_01.bvh", {})  # the same recording in two formats
    both = Cmu(tmp_path, folds=3)
    assert both.splits["02_01.bvh"] == both.splits["02_01.amc"]


def test_files_that_are_added_move_few_others(tmp_path):
    for number in range(100):
        (tmp_path / f"01_{number:02}.bvh").touch()
    before = Cmu(tmp_path, folds=10).splits
    for number in range(3):
        (tmp_path / f"02_{number:02}.bvh").touch()
    after = Cmu(tmp_path, folds=10).splits
    assert sum(before[clip] != after[clip] for clip in before) <= 9  # three at each of three borders


def test_the_index_of_clips(tmp_path):
    path = tmp_path / INDEX
    assert read_index(path, ["02_01.amc"]) == {}
    rows = {
        "02_01": "walk", "02_03": "run/jog", "18_03": "A pulls B; B resists (2 subjects - subject A)", "23_01": "B sits (subjects - subject B)",
        "74_09": "Unknown", "78_01": "LeftTightTurn         CleanedGRS", "78_33": "RightDrive (left then right)    Cleaned GRS",
        "90_10": "90_10.amc", "122_01": "clean", "123_03": "19.5lb", "69_70": "squat, pick up object.", "144_05": "Front_Kicking001",
        "91_54": "180", "91_53": "180 degree jump",
    }  # fmt: skip
    lines = "\n".join(f"{name}\t{words}" for name, words in rows.items())
    path.write_text(f"Carnegie-Mellon\n  v1.00\n\n\nSubject #2 (various)\n\n{lines}\n", encoding="utf-8")
    assert read_index(path, ["x/02_01.amc"]) == {
        "02_01": "walk", "02_03": "run/jog", "18_03": "A pulls B; B resists (the person is A)", "23_01": "B sits (the person is B)",
        "78_01": "Left Tight Turn", "78_33": "Right Drive (left then right)", "69_70": "squat, pick up object", "144_05": "Front Kicking",
        "91_53": "180 degree jump",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"describes none of the 1 clips, such as 05_09\.amc"):
        read_index(path, ["05_09.amc"])


def test_folders_and_options_that_do_not_do(folder, tmp_path):
    with pytest.raises(UserError) as error:
        Cmu(tmp_path / "nowhere")
    for words in (
        "nowhere",
        "*.amc not found",
        "02.asf",
        "http://mocap.cs.cmu.edu",
        "free for all uses",
        "--source",
    ):
        assert words in str(error.value)
    for options, words in (
        ({"fold": 5}, "fold < folds"), ({"folds": 2}, "folds"), ({"rate": 0.0}, "rate > 0"), ({"spacing": -0.1}, "spacing >= 0"),
        ({"tasks": {"detail": 1}}, "there is no 'detail'; did you mean"), ({"tasks": {"short": 0}}, "nor all 0"), ({"variants": 0}, "variants"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            Cmu(folder, **options)


def test_real_clips(shared_data):
    """Captions say what the clips show, and key poses are a fraction of the frames."""
    reader = Cmu(shared_data, tasks={"detailed": 1})
    assert len(reader.clips) == 15 and [len(reader.parts(split)) for split in SPLITS] == [9, 3, 3]

    def read(clip):
        items = list(reader.read(reader.splits[clip], clip))
        return [item for item in items if isinstance(item, Record)], items

    walk, items = read("cmu/02_01.amc")
    words = " ".join(record.conversations[0][0]["content"] for record in walk)
    assert words.count("walk") + words.count("step") > len(walk) / 2
    assert 8 < len(walk) < 25 and len(items) == 86
    wave, _ = read("bvh/wave_hello.bvh")
    assert any("right arm" in str(r.conversations) and "hand at shoulder height" in str(r.conversations) for r in wave)
    _, items = read("cmu/03_02.amc")
    assert (
        sum(item.reason == "frames that the clip shows to be wrong" for item in items if isinstance(item, Skipped))
        == 13
    )
