import numpy as np
import pytest

from chatpose_jax.data.record import Record, from_bytes, seeded, to_bytes
from chatpose_jax.errors import UserError
from smpl_jax.pose import Pose, unmeasured


def record() -> Record:
    poses = unmeasured((2,), "smplh", "z-up").replace(betas=np.zeros((2, 16), np.float32), shape_space="SMPL")
    talk = (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which poses?"}]},
        {"role": "assistant", "content": "<POSE> and <POSE>."},
    )
    extras = {
        "joints": np.arange(6, dtype=">f8").reshape(2, 3),
        "gender": "f",
        "frame_rate": np.float64(60),
        "texts": ("a", "b"),
    }
    return Record("a/1", "image", (talk, talk), (b"jpeg",), poses, "a", extras)


def test_bytes_give_the_record_back() -> None:
    found = from_bytes(to_bytes(record()))
    assert to_bytes(found) == to_bytes(record())
    assert (
        found.poses.frame == "z-up"
        and found.poses.shape_space == "SMPL"
        and found.poses.measured.dtype == bool
        and found.poses.betas.shape == (2, 16)
    )
    np.testing.assert_array_equal(found.extras["joints"], record().extras["joints"])
    assert found.extras["gender"] == "f" and found.extras["frame_rate"] == 60
    assert found.extras["texts"] == ("a", "b")


def test_rows_are_its_conversations() -> None:
    row = record().example(1)
    row.check()
    assert row.id == "a/1:1" and row.messages[0]["content"][0] == {"type": "image", "image": b"jpeg"}
    assert row.extras["gender"] == "f" and isinstance(row.poses, Pose)


@pytest.mark.parametrize("data", [b"", b"\xc1", to_bytes(record())[:-9], b"\x01", b"\x80"])
def test_other_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(UserError, match="record of a prepared data set"):
        from_bytes(data)


def test_draws_depend_on_seed_and_names_alone() -> None:
    first = seeded(0, "a", 1).integers(1 << 30, size=4)
    np.testing.assert_array_equal(first, seeded(0, "a", 1).integers(1 << 30, size=4))
    assert not np.array_equal(first, seeded(1, "a", 1).integers(1 << 30, size=4))
    assert not np.array_equal(first, seeded(0, "a", 2).integers(1 << 30, size=4))
