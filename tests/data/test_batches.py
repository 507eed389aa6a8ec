"""Rows become arrays of few shapes, in an order that is a function of the seed; a resumed loader goes on exactly."""

import dataclasses
import errno
import itertools
import json
import tracemalloc

import jax
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from chatpose_jax.data.batches import BatchLoader
from chatpose_jax.data.collate import collate, encode_example, pack
from chatpose_jax.data.example import NO_POSES, Example, LazyImage
from chatpose_jax.data.mixture import Mixture
from chatpose_jax.data.sizes import measure
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import IGNORE, tiny_processor
from smpl_jax.frames import turn
from smpl_jax.pose import Pose

POSE_ID = 1024
CACHE = 1 << 30
PADDED = [[[34], [27], [11], [39]], [[40], [30], [7], [19]]]
PACKED = [[[15, 17, 43], [33, 31, 21, 25]], [[8, 42, 36, 2, 23, 30, 24, 12], [-53, -41, -7, -1]]]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(preset("tiny"))


def poses(count: int, seed: int, joints: int = 24, **more) -> Pose:
    rng = np.random.default_rng(seed)
    rotations = Rotation.random(count * joints, random_state=rng).as_matrix() if count else np.zeros((0, 3, 3))
    return Pose(rotations.reshape(count, joints, 3, 3).astype(np.float32), **{"frame": "camera", **more})


def example(
    index: int, images: int = 0, answers: tuple[str, ...] = ("Sure, it is <POSE>.",), words: int = 0
) -> Example:
    rng = np.random.default_rng(index)
    messages = []
    for number, answer in enumerate(answers):
        parts = [{"type": "text", "text": "Show " + "me " * words + f"row {index}."}]
        if number == 0:
            parts = [
                {"type": "image", "image": rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)} for _ in range(images)
            ] + parts
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    count = sum(answer.count("<POSE>") for answer in answers)
    kind = "image" if images else "text" if count else "instruction"
    return Example(f"row-{index}", kind, messages, poses(count, index))


@pytest.fixture(scope="module")
def dataset() -> list[Example]:
    """Three kinds, many lengths: 53 rows, so that no group fills its last batch."""
    kinds = [
        {},
        {"images": 1},
        {"answers": ("No.",)},
        {"answers": ("<POSE>", "Or <POSE>.")},
    ]
    return [example(i, words=i * 7 % 40, **kinds[i % 4]) for i in range(53)]


def names(batch, processor) -> list[str]:
    """The rows of a batch that weigh something, told by their text."""
    rows = [
        ids[mask]
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"])
        if (labels != IGNORE).any()
    ]
    return [processor.decode(ids).split("row ")[1].split(".")[0] for ids in rows]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_pose_index_is_the_position_that_predicts_the_pose(processor):
    rows = [
        encode_example(processor, example(i, answers=answers), 256)
        for i, answers in enumerate([("<POSE>",), ("It is <POSE> or <POSE>.", "No, <POSE>."), ("None.",)])
    ]
    batch = collate(rows, 128, max_images=0, max_poses=4, pad_id=0)
    assert batch["pose_mask"].sum(1).tolist() == [1, 3, 0]
    row, slot = np.nonzero(batch["pose_mask"])
    assert (batch["input_ids"][row, batch["pose_index"][row, slot] + 1] == POSE_ID).all()
    assert np.count_nonzero(batch["input_ids"] == POSE_ID) == 4
    np.testing.assert_array_equal(batch["poses"].rotations[1, :3], poses(3, 1).rotations)
    np.testing.assert_array_equal(
        batch["poses"].rotations[~batch["pose_mask"]], np.broadcast_to(np.eye(3), (8, 24, 3, 3))
    )


def test_shapes_and_dtypes(processor):
    rows = [encode_example(processor, example(i, images), 512) for i, images in enumerate((2, 0, 1))]
    batch = collate(rows, 256, max_images=3, max_poses=2, pad_id=0)
    held = batch.pop("poses")
    assert (held.frame, held.shape, held.shape_space) == ("camera", (3, 2), None)
    arrays = {name: value for name, value in vars(held).items() if name not in ("frame", "shape_space")}
    assert {name: (value.shape[2:], value.dtype.name) for name, value in arrays.items()} == {
        "rotations": ((24, 3, 3), "float32"),
        "betas": ((10,), "float32"),
        "translation": ((3,), "float32"),
        "measured": ((24,), "bool"),
        "has_betas": ((), "bool"),
        "has_translation": ((), "bool"),
    }
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "input_ids": ((3, 256), "int32"),
        "attention_mask": ((3, 256), "bool"),
        "labels": ((3, 256), "int32"),
        "pixel_values": ((3, 3, 64, 64, 3), "float32"),
        "pose_index": ((3, 2), "int32"),
        "pose_mask": ((3, 2), "bool"),
    }
    filled = [[bool(batch["pixel_values"][row, image].any()) for image in range(3)] for row in range(3)]
    assert filled == [[True, True, False], [False, False, False], [True, False, False]]
    lengths = batch["attention_mask"].sum(1)
    assert lengths.tolist() == [len(row["input_ids"]) for row in rows]
    padding = ~batch["attention_mask"]
    assert (batch["input_ids"][padding] == 0).all()
    assert (batch["labels"][padding] == IGNORE).all()
    assert "pixel_values" not in collate(rows[1:2], 256, max_images=0, max_poses=1, pad_id=0)


@pytest.mark.parametrize(("limits", "error"), [((10, 2, 2), "tokens"), ((256, 1, 2), "images"), ((256, 2, 0), "poses")])
def test_collate_refuses_what_does_not_fit(processor, limits, error):
    row = encode_example(processor, example(0, images=2), 512)
    with pytest.raises(UserError, match=rf"a row has \d+ {error}, more than"):
        collate([row], limits[0], max_images=limits[1], max_poses=limits[2], pad_id=0)


def test_truncation_drops_poses_with_their_targets(processor):
    long = example(3, answers=("It is <POSE>.", "Now <POSE>.", "Then <POSE>."))
    full = encode_example(processor, long, 512)
    for kept in range(3):
        row = encode_example(processor, long, int(full["pose_positions"][kept]))
        np.testing.assert_array_equal(row["pose_positions"], full["pose_positions"][:kept])
        np.testing.assert_array_equal(row["poses"].rotations, poses(3, 3).rotations[:kept])


def test_poses_come_in_the_camera_frame_with_the_joints_of_the_head(processor):
    """A row of SMPL-X in a frame of its own, with sixteen betas, and one of the shared joints that measures the trunk alone."""
    full = poses(1, 0, 55, frame="z-up", betas=np.arange(16.0)[None])
    part = poses(1, 1, 22, measured=np.arange(22)[None] < 4, translation=np.ones((1, 3)))
    rows = [dataclasses.replace(example(i), poses=given) for i, given in enumerate((full, part))]
    encoded = [encode_example(processor, row, 256) for row in rows]
    batch, packed = (
        collate(given, 512, max_images=0, max_poses=3, pad_id=0)["poses"] for given in (encoded, [pack(encoded)])
    )
    rotations = full.rotations.copy()
    rotations[:, 0] = turn("z-up", "camera") @ rotations[:, 0]
    np.testing.assert_allclose(batch.rotations[0, 0, :22], rotations[0, :22], atol=1e-6)
    np.testing.assert_array_equal(batch.rotations[1, 0, :22], part.rotations[0])
    assert batch.measured[0].sum(-1).tolist() == [22, 0, 0]
    assert batch.measured[1, 0].tolist() == [True] * 4 + [False] * 20
    assert batch.has_translation[:, 0].tolist() == [False, True] and (batch.translation[1, 0] == 1).all()
    assert not batch.has_betas.any(), "SMPL-X's betas say nothing of SMPL's shape"
    assert all(np.array_equal(x[0, :2], y[:, 0]) for x, y in zip(jax.tree.leaves(packed), jax.tree.leaves(batch)))
    there = encode_example(processor, rows[0], 256, family="smplx")["poses"]
    assert there.num_joints == 55 and there.has_betas.all() and there.betas.tolist() == [list(range(10))]


def test_rows_of_several_shape_spaces_have_one_structure(processor):
    rows = [
        dataclasses.replace(example(0), poses=poses(1, 0, betas=np.ones((1, 10)), shape_space=s)) for s in ("SMPL", "a")
    ]
    encoded = [encode_example(processor, row, 256) for row in rows]
    assert jax.tree.structure(encoded[0]["poses"]) == jax.tree.structure(encoded[1]["poses"])
    assert pack(encoded)["poses"].has_betas.all()
    strange = dataclasses.replace(rows[0], poses=rows[0].poses.replace(shape_space="SMPL-X"))
    assert not encode_example(processor, strange, 256)["poses"].has_betas.any(), "SMPL-X's betas are not SMPL's"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"poses": poses(2, 0)}, r"'row-0': its answers hold 1 <POSE>, but it has 2 poses"),
        ({"poses": NO_POSES}, r"'row-0': its answers hold 1 <POSE>, but it has 0 poses"),
        ({"poses": poses(1, 0).rotations}, r"'row-0': poses: .*found ndarray; Pose\(rotations, \"camera\"\) makes one"),
        ({"poses": poses(1, 0)[0]}, r"'row-0': poses: expected a Pose of batch shape \(P,\).*found \(\)"),
        ({"poses": poses(1, 0, 23)}, r"'row-0': poses: .*22 \(shared\), 24 \(smpl\).*found 23"),
        ({"poses": poses(1, 0, frame="sky")}, r"'row-0': poses: frame must be one of .*'sky'"),
        ({"poses": Pose(np.full((1, 24, 3, 3), np.nan), "camera")}, r"'row-0': poses: .*finite"),
        ({"poses": Pose(np.zeros((1, 24, 3, 3)), "camera")}, r"'row-0': poses: .*joint 0 of pose 0 is not one"),
        (
            {"poses": poses(1, 0, frame="z-up", translation=np.zeros((1, 3)))},
            r"'row-0': poses: .*pelvis, so the body is needed",
        ),
        ({"messages": [{"role": "user", "content": ""}]}, r"'row-0': messages\[0\]: empty content"),
    ],
)
def test_malformed_example_is_named(processor, change, error):
    good = example(0)
    with pytest.raises(UserError, match=error):
        encode_example(processor, Example(**{**vars(good), **change}), 256)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            KeyError("scan 7"),
            UserError,
            r"^row 3 of mine: messages\[0\].content\[0\]: .*LazyImage.*: KeyError: 'scan 7'$",
        ),
        (OSError(errno.EIO, "I/O error"), OSError, r"I/O error \(messages\[0\].*\(row 3 of mine: OSError\)$"),
    ],
)
def test_an_error_in_a_lazy_image_names_the_row(processor, error, kind, words):
    def make():
        raise error

    content = [{"type": "image", "image": LazyImage(make)}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "!"}]
    row = Example("a", "image", messages).at("row 3 of mine")
    with pytest.raises(kind, match=words) as caught:
        encode_example(processor, row, 256)
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)


@pytest.mark.parametrize("cache", [0, CACHE])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_counts_once_an_epoch(processor, dataset, cache, shuffle):
    loader = BatchLoader(dataset, processor, 4, epochs=1, cache=cache, shuffle=shuffle)
    batches = list(loader)
    assert len(batches) == len(loader)
    seen = [name for batch in batches for name in names(batch, processor)]
    assert sorted(seen, key=int) == [str(i) for i in range(53)]
    assert sum(batch["pose_mask"].sum() for batch in batches) == sum(len(row.poses) for row in dataset)


def test_shapes_are_few_and_known(processor, dataset):
    loader = BatchLoader(dataset, processor, 4, epochs=2, buckets=2)
    found = {(b["input_ids"].shape[1], b["pixel_values"].shape[1] if "pixel_values" in b else 0) for b in loader}
    assert found == {(shape.length, shape.images) for shape in loader.shapes}
    assert len(found) <= 4
    assert {batch["input_ids"].shape[0] for batch in loader} <= {4}


def test_order_is_the_seeds(processor, dataset):
    one, two, other = (list(BatchLoader(dataset, processor, 4, epochs=2, seed=seed)) for seed in (1, 1, 2))
    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    assert not all(same(a, b) for a, b in zip(one, other))
    half = len(one) // 2
    assert not all(same(a, b) for a, b in zip(one[:half], one[half:])), "epochs repeat the same order"


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("stop", [0, 1, 13, 20])
def test_resume_is_exact(processor, dataset, prefetch, stop):
    """Also across the edge of an epoch, and with batches prepared ahead that were never handed out."""
    straight = list(itertools.islice(BatchLoader(dataset, processor, 4), stop + 5))
    first = BatchLoader(dataset, processor, 4, prefetch=prefetch)
    assert all(same(a, b) for a, b in zip(itertools.islice(first, stop), straight))
    saved = json.loads(json.dumps(first.state()))
    second = BatchLoader(dataset, processor, 4, prefetch=prefetch)
    second.restore(saved)
    rest = list(itertools.islice(second, 5))
    assert all(same(a, b) for a, b in zip(rest, straight[stop:], strict=True))


@pytest.mark.parametrize("prefetch", [1, 2, 50])
def test_prefetch_ends_with_the_last_epoch(processor, dataset, prefetch):
    plain = list(BatchLoader(dataset, processor, 4, epochs=1))
    ahead = BatchLoader(dataset, processor, 4, epochs=1, prefetch=prefetch)
    assert all(same(a, b) for a, b in zip(plain, ahead, strict=True))
    assert list(ahead) == []


def test_a_run_in_an_earlier_order_is_refused(processor, dataset):
    """The first order was drawn with NumPy's generator; states of then do not name an order."""
    state = BatchLoader(dataset, processor, 4).state()
    before = {name: value for name, value in state.items() if name != "order"}
    with pytest.raises(UserError, match=r"version 1 of the order of rows.*has version 2.*start a new run"):
        BatchLoader(dataset, processor, 4).restore(before)


def test_the_order_is_that_of_the_runs_that_exist(processor, dataset):
    """A change of these numbers needs a new ``batches.ORDER``, else runs resume with other batches."""
    padded, packed = (
        BatchLoader(dataset, processor, 4),
        BatchLoader(dataset, processor, 2, packing=True, max_length=400),
    )
    assert [padded.rows_of(step)[1] for step in (0, 20)] == PADDED
    assert [packed.rows_of(step)[1] for step in (0, 20)] == PACKED


def test_state_of_other_data_is_refused(processor, dataset):
    state = BatchLoader(dataset, processor, 4).state()
    for loader in (
        BatchLoader(dataset, processor, 2),
        BatchLoader(dataset, processor, 4, seed=1),
        BatchLoader(dataset[:-1], processor, 4),
        BatchLoader(dataset, processor, 4, packing=True, max_length=400),
        BatchLoader([*dataset[:-1], dataset[0]], processor, 4),
    ):
        with pytest.raises(UserError, match="resume with the same data settings"):
            loader.restore(state)


@pytest.mark.parametrize("packing", [False, True])
def test_processes_make_their_rows_of_the_global_batch(processor, dataset, packing):
    whole = BatchLoader(dataset, processor, 4, packing=packing, max_length=400)
    parts = [
        BatchLoader(dataset, processor, 4, rows=rows, packing=packing, max_length=400) for rows in ([0, 1], [3], [0, 2])
    ]
    for step in range(5):
        batch = whole.batch(step)
        for part in parts:
            assert same(part.batch(step), {name: value[part.rows] for name, value in batch.items()})


def test_cached_images_are_the_same(processor, dataset):
    cached, plain = (BatchLoader(dataset, processor, 4, cache=cache) for cache in (CACHE, 0))
    assert all(same(cached.batch(step), plain.batch(step)) for step in range(len(plain)))


class Counting(list):
    """Rows by index; remembers which were taken."""

    def __init__(self, rows):
        super().__init__(rows)
        self.taken = []

    def __getitem__(self, index):
        self.taken.append(index)
        return super().__getitem__(index)


def test_the_cache_keeps_what_fits(processor, dataset):
    def encoded(cache, epochs=3):
        rows = Counting(dataset)
        list(BatchLoader(rows, processor, 4, epochs=epochs, cache=cache))
        return len(rows.taken) - len(dataset)  # each is measured once

    everything, nothing = encoded(CACHE), encoded(0)
    assert everything == len(dataset)
    assert nothing == 3 * encoded(0, epochs=1) >= 3 * len(dataset)
    assert everything < encoded(300_000) < nothing
    kept = BatchLoader(dataset, processor, 4, epochs=1, cache=300_000)
    list(kept)
    size = sum(leaf.nbytes for row in kept._cache.values() for leaf in jax.tree.leaves(row))
    assert 100_000 < size <= 300_000


@pytest.mark.parametrize("packing", [False, True])
def test_no_image_is_opened_before_its_batch_and_none_of_other_processes(processor, dataset, packing):
    """A set of any size starts at once, and takes the memory of the batches on their way."""
    drawn = []

    def lazy(index):
        row = dataset[index]
        if row.kind != "image":
            return row
        question, answer = row.messages
        part, text = question["content"]
        shown = LazyImage(lambda: drawn.append(index) or part["image"])
        content = [{"type": "image", "image": shown}, text]
        return dataclasses.replace(row, messages=[{**question, "content": content}, answer])

    rows = [lazy(index) for index in range(len(dataset))]
    plain = BatchLoader(dataset, processor, 4, packing=packing, max_length=400)
    loader = BatchLoader(rows, processor, 4, packing=packing, max_length=400, rows=[1, 3])
    assert drawn == []
    for step in range(6):
        drawn.clear()
        batch = loader.batch(step)
        mine = {max(number, ~number) for numbers in loader.rows_of(step)[1] for number in numbers}
        assert set(drawn) == {index for index in mine if dataset[index].kind == "image"}
        assert same(batch, {name: value[[1, 3]] for name, value in plain.batch(step).items()})


def test_rows_are_measured_as_they_are_encoded(processor, dataset):
    """Cut ones too: images and poses behind the cut are not counted."""
    for length in (40, 90, 100, 400):
        encoded = [encode_example(processor, row, length) for row in dataset]
        expected = [(len(row["input_ids"]), len(row["images"]), len(row["pose_positions"])) for row in encoded]
        np.testing.assert_array_equal(measure(dataset, processor, length), expected)


def test_known_sizes_are_not_measured_again(processor, dataset):
    rows = Counting(dataset)
    loader = BatchLoader(rows, processor, 4, sizes=measure(dataset, processor, 1024))
    assert rows.taken == []
    assert loader.state() == BatchLoader(dataset, processor, 4).state()


@pytest.mark.parametrize("options", [{"threads": 3}, {"threads": 2, "epochs": 1}])
def test_grain_reads_ahead_what_would_come_anyway(processor, dataset, options):
    plain = BatchLoader(dataset, processor, 4, epochs=options.get("epochs"))
    ahead = BatchLoader(dataset, processor, 4, prefetch=4, **options)
    for loader in (plain, ahead):
        loader.restore({**loader.state(), "step": 5})
    found = list(itertools.islice(ahead, 12))
    assert all(same(a, b) for a, b in zip(itertools.islice(plain, 12), found, strict=True))
    assert ahead.state() == plain.state()


@pytest.mark.slow
def test_grains_processes_read_ahead_what_would_come_anyway(processor, dataset):
    plain, ahead = BatchLoader(dataset, processor, 4), BatchLoader(dataset, processor, 4, prefetch=2, workers=2)
    assert all(same(a, b) for a, b in zip(itertools.islice(plain, 6), itertools.islice(ahead, 6), strict=True))


@pytest.mark.parametrize("packing", [False, True])
def test_a_million_rows_are_planned_with_six_bytes_each(processor, packing):
    """One number to sort the rows, and one for the size of each. Epochs add nothing."""

    class Rows:
        def __len__(self):
            return 1_000_000

    rng = np.random.default_rng(0)
    sizes = np.stack([rng.integers(30, 600, 1_000_000), np.zeros(1_000_000, int), np.ones(1_000_000, int)], axis=1)
    tracemalloc.start()
    try:
        loader = BatchLoader(Rows(), processor, 16, sizes=sizes, packing=packing)
        loader.rows_of(0)
        kept, peak = tracemalloc.get_traced_memory()
        later = [loader.rows_of(epoch * len(loader)) for epoch in (1, 2, 70)]
        assert tracemalloc.get_traced_memory()[0] < kept + 500_000
    finally:
        tracemalloc.stop()
    assert 6e6 <= kept < 6.5e6
    assert peak < 20e6, "temporary arrays"
    assert len({str(packs) for _, packs in later}) == 3


def test_packs_hold_every_row_once_and_leave_little_room(processor, dataset):
    padded = BatchLoader(dataset, processor, 4, epochs=1, max_length=320, buckets=1)
    packed = BatchLoader(dataset, processor, 4, epochs=1, max_length=320, packing=True)
    batches = list(packed)
    assert len(batches) == len(packed) < len(padded)
    assert {(b["input_ids"].shape[1], "pixel_values" in b) for b in batches} == {
        (shape.length, shape.images > 0) for shape in packed.shapes
    }
    seen = []
    for batch in batches:
        for ids, segments, labels in zip(batch["input_ids"], batch["segment_ids"], batch["labels"]):
            assert (np.diff(segments[segments > 0]) >= 0).all()
            for number in range(1, segments.max() + 1):
                if (labels[segments == number] != IGNORE).any():
                    seen.append(processor.decode(ids[segments == number]).split("row ")[1].split(".")[0])
        np.testing.assert_array_equal(batch["segment_ids"] > 0, batch["attention_mask"])
        row, slot = np.nonzero(batch["pose_mask"])
        assert (batch["input_ids"][row, batch["pose_index"][row, slot] + 1] == POSE_ID).all()
    assert sorted(seen, key=int) == [str(i) for i in range(53)]
    assert sum(batch["pose_mask"].sum() for batch in batches) == sum(len(row.poses) for row in dataset)


def test_a_pack_predicts_nothing_across_its_borders(processor):
    rows = [encode_example(processor, example(i), 256) for i in range(3)]
    rows[1] = {**rows[1], "labels": rows[1]["input_ids"].copy()}  # a row whose first token has a label
    packed = pack(rows)
    first = np.flatnonzero(np.diff(packed["segment_ids"], prepend=0))
    assert (packed["labels"][first] == IGNORE).all()
    assert (
        np.count_nonzero(packed["labels"] != IGNORE) == sum(np.count_nonzero(r["labels"] != IGNORE) for r in rows) - 1
    )


def test_packs_resume_across_epochs_of_different_length(processor, dataset):
    rows = Mixture([dataset[:30], dataset[30:]], [1, 3])

    def loader():
        return BatchLoader(rows, processor, 1, max_length=170, packing=True)

    first = loader()
    lengths = {first._count(epoch) for epoch in range(12)}
    assert len(lengths) > 1, "else this shows nothing"
    stop = sum(first._count(epoch) for epoch in range(3)) + 1
    taken = loader()
    for _ in itertools.islice(taken, stop):
        pass
    second = loader()
    second.restore(json.loads(json.dumps(taken.state())))
    assert second.state()["epoch"] == 3
    assert all(same(batch, first.batch(stop + i)) for i, batch in enumerate(itertools.islice(second, 4)))


def test_broken_row_is_raised_through_the_thread(processor, dataset):
    bad = Example(
        "bad",
        "image",
        [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}, {"role": "assistant", "content": "A"}],
        poses(0, 0),
    )
    with pytest.raises(UserError, match=r"example 'bad': .*no image file at 'gone.png'"):
        list(BatchLoader([*dataset, bad], processor, 4, epochs=1, prefetch=2))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dataset": []}, "data set is empty"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"rows": [1, 4]}, "rows 1 to 4 of a batch of 4"),
        ({"max_length": 8.5}, "max_length must be a whole number"),
        ({"prefetch": -1}, "prefetch must be a whole number"),
        ({"threads": None}, "threads must be a whole number"),
        ({"epochs": 0}, "epochs must be a whole number"),
        ({"packing": "yes"}, "packing must be True or False"),
        ({"lengths": (16,)}, "hold no row of"),
    ],
)
def test_settings_are_checked(processor, dataset, options, error):
    with pytest.raises(UserError, match=error):
        BatchLoader(**{"dataset": dataset, "processor": processor, "batch_size": 4, **options})
