"""Predictions of other programs: files as SPIN, HMR2 and entrants of 3DPW's challenge write them, found by image, person, box, frame or id."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from chatpose_jax.data.readers.humans4d_eval import H36MVal, ThreeDPWTest
from chatpose_jax.data.readers.rpe import RpeRefined
from chatpose_jax.data.readers.threedpw import ThreeDPW
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.system import ABOUT, Answer, Question
from chatpose_jax.evaluation.systems.predictions import DAMAGED, MISSING, Predictions
from smpl_jax.keypoints import KEYPOINT_SETS
from smpl_jax.pose import Pose

from ..data.readers import humans4d_eval_files, rpe_files, threedpw_files

IMAGES = (
    "imageFiles/walk_00/image_00000.jpg",
    "imageFiles/bus_01/image_00000.jpg",
    "imageFiles/bus_01/image_00001.jpg",
)


def turns(*shape, seed=0):
    """Axis-angle (*shape, 3) in radians, and the matrices by SciPy."""
    angles = np.random.default_rng(seed).normal(0, 0.5, (*shape, 3))
    return angles, Rotation.from_rotvec(angles.reshape(-1, 3)).as_matrix().reshape(*shape, 3, 3)


def asked(key, group="", **about):
    return Question(key, group, "image", [{"role": "user", "content": "?"}], about)


def questions(reader, split="test"):
    """Of all records of a reader."""
    records = [record for part in reader.parts(split) for record in reader.read(split, part)]
    return [asked(r.key, r.group, **{name: r.extras[name] for name in ABOUT if name in r.extras}) for r in records]


def one(system, question):
    (answer,) = system.answer([question])
    return answer


def is_pose(answer, matrices, frame="camera"):
    assert answer.pose.frame == frame and not answer.notes and not answer.joints
    np.testing.assert_allclose(answer.pose.rotations, matrices, atol=1e-6)
    return True


def saved(tmp_path, name="file.npz", **arrays):
    if name.endswith(".npz"):
        np.savez(tmp_path / name, **arrays)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(arrays))
    return str(tmp_path / name)


def test_spins_results_are_in_the_order_of_its_data_set(tmp_path):
    """SPIN's eval.py writes pose, betas, camera and pred_joints without names; NaN is a joint without rotation."""
    humans4d_eval_files.write_3dpw(tmp_path)
    rows = questions(ThreeDPWTest(tmp_path))
    with np.load(tmp_path / "hmr2_evaluation_data/3dpw_test.npz") as data:
        order = {name: data[name] for name in ("imgname", "center", "gender")} | {"scale": data["scale"] / 200}
    names = saved(tmp_path, "3dpw_test.npz", **order)
    angles, matrices = turns(12, 24)
    angles[3, 7], matrices[3, 7] = np.nan, np.eye(3)
    angles[5, 2, 1] = np.inf
    results = saved(
        tmp_path,
        "spin.npz",
        pose=angles.reshape(12, 72),
        betas=np.ones((12, 10)),
        camera=np.zeros((12, 3)),
        pred_joints=np.zeros((12, 17, 3)),
    )
    system = Predictions(path=results, names=names, name="SPIN")
    assert system.name == "SPIN" and Predictions(path=results, names=names).name == "spin"
    found = dict(zip([question.key for question in rows], system.answer(rows)))
    keys = [f"imageFiles/{s}/image_{f:05d}.jpg#{p}" for s in ("walk_00", "bus_01") for p in (0, 1) for f in range(3)]
    assert sorted(found) == sorted(keys)
    for row, key in enumerate(keys):
        if row == 5:
            assert found[key].pose is None and found[key].notes == {DAMAGED: True}
        else:
            assert is_pose(found[key], matrices[row])
            np.testing.assert_array_equal(found[key].pose.betas, np.ones(10))
    with pytest.raises(UserError, match=r"names 11 rows, and .* has 12 predictions"):
        Predictions(path=results, names=saved(tmp_path, "short.npz", imgname=order["imgname"][:11]))
    with pytest.raises(UserError, match="nothing says which rows its 12 predictions belong to"):
        Predictions(path=results)


def test_people_of_an_image_are_told_apart_by_box_before_order(tmp_path):
    humans4d_eval_files.write_3dpw(
        tmp_path, center=np.tile(np.repeat([[30.0, 30], [60.0, 40]], 3, 0), (2, 1)), scale=np.full(12, 20.0)
    )
    rows = questions(ThreeDPWTest(tmp_path))
    with np.load(tmp_path / "hmr2_evaluation_data/3dpw_test.npz") as data:
        names, center = data["imgname"], data["center"]
    angles, matrices = turns(12, 24)
    for boxes in (
        {"center": center[::-1], "scale": np.full(12, 0.1)},
        {"center": center[::-1], "scale": np.full((12, 2), 20.0)},
        {"box_center": center[::-1], "box_size": np.full(12, 22.0)},
        {"bbox": np.concatenate([center[::-1] - 10, np.full((12, 2), 20.0)], 1)},
        {"boxes": np.concatenate([center[::-1] - 10, center[::-1] + 10], 1)},
    ):
        system = Predictions(path=saved(tmp_path, poses=angles[::-1], imgname=names[::-1], **boxes))
        order = {f"{name}#{n % 6 // 3}": n for n, name in enumerate(names)}
        for question, answer in zip(rows, system.answer(rows)):
            assert is_pose(answer, matrices[order[question.key]])
    far = Predictions(path=saved(tmp_path, poses=angles, imgname=names, bbox=np.tile([500.0, 500, 5, 5], (12, 1))))
    assert all(answer.notes == {MISSING: True} for answer in far.answer(rows))


def test_boxes_of_zeros_are_no_boxes(tmp_path):
    """As in the file of Human3.6M that the tests write: ``bbox`` is a placeholder, ``center`` and ``scale`` are the box."""
    arrays = humans4d_eval_files.write_h36m(tmp_path)
    assert not arrays["bbox"].any()
    angles, matrices = turns(3, 24)
    system = Predictions(
        path=saved(tmp_path, pose=angles.reshape(3, 72), betas=np.zeros((3, 10))),
        names=str(tmp_path / "h36m_val_p2.npz"),
    )
    for question in questions(H36MVal(tmp_path)):
        row = arrays["imgname"].tolist().index(question.key.rpartition("#")[0].encode())
        assert is_pose(one(system, question), matrices[row])


def test_without_boxes_the_order_or_the_number_of_the_person_counts(tmp_path):
    _, matrices = turns(3, 24)
    names = [IMAGES[1], IMAGES[0], IMAGES[1]]
    system = Predictions(path=saved(tmp_path, matrices=matrices, imgname=np.array(names)))
    assert is_pose(one(system, asked(f"{IMAGES[1]}#0")), matrices[0])
    assert is_pose(one(system, asked(f"{IMAGES[1]}#1")), matrices[2])
    assert is_pose(one(system, asked("walk_00/image_00000.jpg#0")), matrices[1])
    for key in (f"{IMAGES[1]}#2", f"{IMAGES[2]}#0", "bus_02/image_00000.jpg#0"):
        assert one(system, asked(key)).notes == {MISSING: True} and one(system, asked(key)).pose is None
    numbered = Predictions(path=saved(tmp_path, matrices=matrices, imgname=np.array(names), personid=[1, 0, 0]))
    assert is_pose(one(numbered, asked(f"{IMAGES[1]}#0")), matrices[2])
    assert is_pose(one(numbered, asked(f"{IMAGES[1]}#1", actor=1, frame=0)), matrices[0])
    with pytest.raises(UserError, match="count the people of a sequence"):
        system.answer([asked(f"{IMAGES[1]}#1", actor=1, frame=0)])


def test_hmr2s_output_in_its_forms(tmp_path):
    """Its model gives pred_smpl_params with global_orient (B, 1, 3, 3), body_pose (B, 23, 3, 3) and betas (B, 10)."""
    _, matrices = turns(3, 24)
    matrices = matrices.astype(np.float32)
    smpl = {"global_orient": matrices[:, :1], "body_pose": matrices[:, 1:], "betas": np.full((3, 10), 0.5, np.float32)}
    beside = {"pred_cam_t": np.zeros((3, 3)), "pred_vertices": np.zeros((3, 5, 3))}
    people = [
        {
            "pred_smpl_params": {name: array[n] for name, array in smpl.items()},
            "img_path": IMAGES[n],
            "pred_cam_t": np.zeros(3),
        }
        for n in range(3)
    ]
    by_image = {IMAGES[n]: [{name: array[n] for name, array in smpl.items()}] for n in range(3)}
    files = {
        "nested.npz": {"pred_smpl_params": smpl, "imgname": np.array(IMAGES), **beside},
        "flat.npz": {**smpl, "imgname": np.array([name.encode() for name in IMAGES]), **beside},
        "nested.pkl": {"pred_smpl_params": smpl, "image_path": list(IMAGES), **beside},
        "people.pkl": people,
        "images.pickle": by_image,
        "single.p": {image: each[0] for image, each in by_image.items()},
    }
    for name, contents in files.items():
        if name.endswith(".npz"):
            np.savez(tmp_path / name, **contents)
        else:
            (tmp_path / name).write_bytes(pickle.dumps(contents, 2))
        system = Predictions(path=str(tmp_path / name))
        for row, image in enumerate(IMAGES):
            answer = one(system, asked(f"{image}#0"))
            assert is_pose(answer, matrices[row]), name
            np.testing.assert_array_equal(answer.pose.betas, np.full(10, 0.5))


def test_all_people_of_an_image_answer_a_row_of_rpe(tmp_path):
    rpe_files.write_refined(tmp_path)
    rows = questions(RpeRefined(tmp_path))
    names = [name.removeprefix("3DPW/") for name in rpe_files.IMAGES]
    assert [row.about["image"] for row in rows[:3]] == [names[0], names[1], names[0]]
    angles, matrices = turns(3, 24)
    angles[2] = np.nan
    boxes = np.array([[10.0, 5, 20, 40], [50, 5, 20, 40], [0, 0, 9, 9]])
    path = saved(tmp_path, poses=angles[[0, 1, 2]], imgname=np.array([names[0], names[0], names[0]]), bbox=boxes)
    found = Predictions(path=path).answer(rows)
    assert found[1].notes == {MISSING: True}
    answer = found[0]
    np.testing.assert_allclose(answer.boxes, boxes)
    np.testing.assert_allclose(answer.pose.rotations[:2], matrices[:2], atol=1e-6)
    again = Answer.from_json(json.loads(json.dumps(answer.to_json())))
    np.testing.assert_allclose(again.pose.rotations, answer.pose.rotations, atol=1e-6)
    with pytest.raises(UserError, match="give boxes"):
        Predictions(path=saved(tmp_path, poses=angles[:2], imgname=np.array(names[:1] * 2))).answer(rows)


def submission(people=2, frames=4, seed=0, **changes):
    rng = np.random.default_rng(seed)
    return {
        "jointPositions": rng.normal(size=(people, frames, 24, 3)),
        "orientations": Rotation.random(people * frames * 9, random_state=seed)
        .as_matrix()
        .reshape(people, frames, 9, 3, 3),
        **changes,
    }


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_submissions_to_3dpws_challenge_give_positions_by_sequence_actor_and_frame(tmp_path, form):
    threedpw_files.write(tmp_path, threedpw_files.sequence())
    threedpw_files.write(tmp_path, threedpw_files.sequence(seed=1))
    rows = questions(ThreeDPW(tmp_path))
    assert len(rows) == 16
    found = submission(frames=3)
    found["jointPositions"][1, 2, 4, 0] = np.nan
    files = {"test/street_00.pkl": threedpw_files.python2(found), "train/other.pkl": pickle.dumps(submission())}
    path = tmp_path / ("entry.zip" if form == "zip" else "entry")
    if form == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in {**files, "__MACOSX/test/._street_00.pkl": b"x", "readme.txt": b"x"}.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True)
            (path / name).write_bytes(data)
    answers = dict(
        zip(
            [(row.group, row.about["actor"], row.about["frame"]) for row in rows],
            Predictions(path=str(path)).answer(rows),
        )
    )
    for (group, actor, frame), answer in answers.items():
        assert answer.pose is None
        if group == "street_01" or frame == 3:
            assert answer.notes == {MISSING: True} and not answer.joints
        elif (actor, frame) == (1, 2):
            assert answer.notes == {DAMAGED: True} and not answer.joints
        else:
            assert sorted(answer.joints) == ["orientations9", "smpl24"] and not answer.notes
            np.testing.assert_array_equal(answer.joints["smpl24"], found["jointPositions"][actor, frame])
            np.testing.assert_array_equal(
                answer.joints["orientations9"].reshape(9, 3, 3), found["orientations"][actor, frame]
            )
    with pytest.raises(UserError, match="fit the data set 3dpw"):
        Predictions(path=str(path)).answer([asked(f"{IMAGES[0]}#0", "walk_00")])


def test_a_submission_may_have_one_of_its_two_parts(tmp_path):
    for name in ("jointPositions", "orientations"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.pkl").write_bytes(pickle.dumps({name: submission()[name].tolist()}))
        (answer,) = Predictions(path=str(folder)).answer([asked("a/image_00000.jpg#0", "a", actor=0, frame=1)])
        assert len(answer.joints) == 1


def test_positions_alone_answer_under_the_name_of_their_set(tmp_path):
    points = np.random.default_rng(0).normal(size=(3, 44, 3))
    points[2] = np.nan
    names = np.array(IMAGES)
    system = Predictions(path=saved(tmp_path, pred_keypoints_3d=points, imgname=names))
    answer = one(system, asked(f"{IMAGES[0]}#0"))
    assert answer.pose is None
    np.testing.assert_array_equal(answer.joints["humans44"], points[0])
    assert one(system, asked(f"{IMAGES[2]}#0")).notes == {DAMAGED: True}
    spin = Predictions(path=saved(tmp_path, pred_joints=points[:, :17], imgname=names))  # rows 1 to 3 are the left leg
    found = one(spin, asked(f"{IMAGES[0]}#0")).joints["h36m17"]
    left = [point.name for point in KEYPOINT_SETS["h36m17"]].index("left_hip")
    np.testing.assert_array_equal(found[left : left + 3], points[0, 1:4])
    np.testing.assert_array_equal(found[11:], points[0, 11:17])
    with pytest.raises(UserError, match="expected metres"):
        Predictions(path=saved(tmp_path, pred_joints=1000 * points[:, :17], imgname=names))
    with pytest.raises(UserError, match="matrices"):
        Predictions(path=saved(tmp_path, pred_joints=points[:, :17], matrices=np.zeros((3, 5, 3, 3)), imgname=names))


def test_answers_of_an_earlier_run_are_used_again(tmp_path):
    _, matrices = turns(24)
    kept = {"a/1": Answer("yes", Pose(matrices.astype(np.float32), "camera")), "a/2": Answer("no")}
    lines = [json.dumps({"key": key, **answer.to_json()}) for key, answer in kept.items()]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines) + "\n")
    for path in (tmp_path, tmp_path / "answers.jsonl"):
        first, second, third = Predictions(path=str(path)).answer([asked("a/1"), asked("a/2"), asked("a/3")])
        assert first.text == "yes" and is_pose(first, matrices) and second.text == "no"
        assert third.notes == {MISSING: True}
    for line in (lines[0], '{"key": "b"}', "[1]", "{"):
        (tmp_path / "answers.jsonl").write_text("\n".join([*lines, line]))
        with pytest.raises(UserError, match=r"answers\.jsonl"):
            Predictions(path=str(tmp_path))


def test_rows_by_id_and_in_the_order_of_a_text_file(tmp_path):
    angles, matrices = turns(2, 24)
    system = Predictions(path=saved(tmp_path, axis_angle=angles, key=np.array(["x", "y"])))
    assert is_pose(one(system, asked("y")), matrices[1]) and one(system, asked("z")).notes == {MISSING: True}
    (tmp_path / "ids.txt").write_text("p\nq\n")
    np.save(tmp_path / "poses.npy", angles)
    system = Predictions(path=str(tmp_path / "poses.npy"), names=str(tmp_path / "ids.txt"), frame="model")
    assert is_pose(one(system, asked("q")), matrices[1], "model")
    with pytest.raises(UserError, match="the id 'x' of a row is there twice"):
        Predictions(path=saved(tmp_path, axis_angle=angles, key=np.array(["x", "x"])))


def test_predictions_of_other_rows_are_an_error(tmp_path):
    angles, _ = turns(2, 24)
    system = Predictions(path=saved(tmp_path, axis_angle=angles, key=np.array(["a0", "a1"])))
    system.check_questions([asked("x"), asked("a1")])
    with pytest.raises(UserError, match=r"none of the 2 keys, such as 'a0', fits a row .* 3 rows have ids such as 'x'"):
        system.check_questions([asked("x"), asked("y"), asked("z")])
    system = Predictions(path=saved(tmp_path, axis_angle=angles, imgname=np.array(["s/0.jpg", "s/1.jpg"])))
    with pytest.raises(UserError, match=r"none of the 2 images, such as 's/0\.jpg'"):
        system.check_questions([asked("t/0.jpg#0")])


def test_predictions_in_degrees_are_an_error(tmp_path):
    angles, _ = turns(2, 24)
    path = saved(tmp_path, axis_angle=np.rad2deg(angles), key=np.array(["x", "y"]))
    largest = np.linalg.norm(np.rad2deg(angles), axis=-1).max()
    with pytest.raises(UserError, match=rf"file\.npz: .* radians, found one of {largest:.3g}, probably in degrees"):
        Predictions(path=path)


def test_a_file_that_says_its_frame_keeps_it(tmp_path):
    angles, matrices = turns(2, 24)
    path = saved(tmp_path, axis_angle=angles, key=np.array(["x", "y"]), frame="z-up")
    assert is_pose(one(Predictions(path=path), asked("x")), matrices[0], "z-up")


def test_names_of_images_that_could_mean_another_are_refused(tmp_path):
    angles, _ = turns(2, 24)

    def system(*names):
        return Predictions(path=saved(tmp_path, poses=angles, imgname=np.array(names)))

    with pytest.raises(UserError, match="differ in more than their last two parts"):
        system("train/a/1.jpg", "test/a/1.jpg")
    with pytest.raises(UserError, match="name images with their folder"):
        system("1.jpg", "2.jpg").answer([asked("a/1.jpg#0")])
    with pytest.raises(UserError, match="several folders have an image"):
        system("a/1.jpg", "b/1.jpg").answer([asked("1.jpg#0")])
    assert one(system("x/a/1.jpg", "b/2.jpg"), asked("1.jpg#0")).pose is not None
    with pytest.raises(UserError, match="names no image"):
        system("a/1.jpg", "b/1.jpg").answer([asked("12")])


def test_what_answers_depend_on_is_the_contents_and_not_the_place(tmp_path):
    angles, _ = turns(2, 24)
    found = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        found.append(Predictions(path=saved(tmp_path / place, poses=angles, key=np.array(["x", "y"]))).settings)
    assert found[0] == found[1] and str(tmp_path) not in json.dumps(found)
    changed = Predictions(path=saved(tmp_path, poses=angles + 1e-3, key=np.array(["x", "y"]))).settings
    assert changed != found[0]


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_files_of_strangers_run_nothing_and_are_one_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = {
        "evil.pkl": pickle.dumps({"pose": Evil()}),
        "cut.pkl": pickle.dumps(submission())[:50],
        "list.pkl": pickle.dumps([]),
        "text.pkl": pickle.dumps("poses"),
        "none.pkl": pickle.dumps({"imgname": ["a/1.jpg"]}),
        "mixed.pkl": pickle.dumps([{"pose": np.zeros(72)}, {"poses": np.zeros(72)}]),
        "cut.npz": b"PK\x03\x04 nothing",
        "cut.npy": b"\x93NUMPY",
        "cut.zip": b"PK\x03\x04 nothing",
        "odd.bin": b"",
    }
    for name, data in bad.items():
        Path(name).write_bytes(data)
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            Predictions(path=name)
    entries = (
        {"x": 1},
        submission(jointPositions=np.zeros((2, 4, 72))),
        {"orientations": [[1], [1, 2]]},
        3,
        {"jointPositions": Evil()},
    )
    for number, found in enumerate(entries):
        folder = Path(f"entry{number}")
        folder.mkdir()
        (folder / "s.pkl").write_bytes(pickle.dumps(found))
        with pytest.raises(UserError, match=r"s\.pkl"):
            Predictions(path=str(folder))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/s.pkl", pickle.dumps(submission()))
        archive.writestr("b/s.pkl", pickle.dumps(submission()))
    Path("twice.zip").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="twice"):
        Predictions(path="twice.zip")
    Path("empty").mkdir()
    for words in ({"path": "empty"}, {"path": "nowhere"}, {"path": "twice.zip", "frame": "up"}):
        with pytest.raises(UserError):
            Predictions(**words)
    assert not Path("ran").exists()


def test_many_predictions_take_seconds(tmp_path):
    import time

    angles, _ = turns(20_000, 24)
    names = np.array([f"s/{n // 2:05d}.jpg" for n in range(20_000)])
    system = Predictions(path=saved(tmp_path, poses=angles.astype(np.float32), imgname=names))
    start = time.perf_counter()
    found = system.answer([asked(f"s/{n // 2:05d}.jpg#{n % 2}") for n in range(20_000)])
    assert all(answer.pose is not None for answer in found)
    assert time.perf_counter() - start < 10
