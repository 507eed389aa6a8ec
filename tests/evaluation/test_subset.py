"""Subsets depend on ids alone, and are read row by row."""

import numpy as np
import pytest

from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.subset import Chained, draw_rows, listed_rows, with_poses
from smpl_jax.pose import unmeasured


class Rows:
    """Rows that are made when they are taken."""

    def __init__(self, names, poses=1):
        self.names, self.poses, self.taken = names, poses, []

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        self.taken.append(index)
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<POSE>"}]
        return Example(self.names[index], "text", messages, unmeasured((self.poses if index % 3 else 0,)))


NAMES = [f"clip/{number:04}" for number in range(1000)]


def test_drawn_by_id_alone():
    found = draw_rows(Rows(NAMES), 200)
    ids = [row.id for row in found]
    assert len(ids) == 200 and ids == sorted(ids), "in the order of the rows"
    assert {row.id for row in draw_rows(Rows(NAMES[::-1]), 200)} == set(ids), "whatever their order"
    assert len({row.id for row in draw_rows(Rows([*NAMES, "another"]), 200)} - set(ids)) <= 1
    assert {row.id for row in draw_rows(Rows(NAMES), 50)} < set(ids)
    numbers = np.array([int(name[-4:]) for name in ids])
    assert 440 < numbers.mean() < 560, "spread over the set"
    assert len(draw_rows(Rows(NAMES[:5]), 200)) == 5


def test_a_list_of_ids(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_text("clip/0007\nclip/0003\n\n")
    rows = Rows(NAMES)
    found = listed_rows(rows, file)
    rows.taken.clear()
    assert [row.id for row in found] == ["clip/0003", "clip/0007"]
    assert found[1].id == "clip/0007" and [row.id for row in found[1:]] == ["clip/0007"]
    assert set(rows.taken) == {3, 7}
    for text, said in (
        (
            "clip/0007\nclip/7\n",
            r"1 of 2 ids are in no row, such as 'clip/7'; the 1000 rows have ids such as 'clip/0000'",
        ),
        ("clip/0007\nclip/0007\n", "'clip/0007' is listed twice"),
        ("\n", "lists no id"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            listed_rows(Rows(NAMES), file)
    with pytest.raises(UserError, match="expected a number, or a file"):
        listed_rows(Rows(NAMES), tmp_path / "nowhere")


def test_rows_with_poses():
    assert [row.id[-1] for row in with_poses(Rows(NAMES[:7]))] == ["1", "2", "4", "5"]
    rows = Rows(NAMES[:7])
    rows.entries = np.array([(2,), (0,), (0,), (1,), (0,), (0,), (0,)], [("poses", np.int32)])
    assert with_poses(rows).numbers == [0, 3] and rows.taken == [], "from the index alone"


def test_splits_one_after_the_other():
    parts = [Rows(NAMES[:3]), Rows([]), Rows(NAMES[3:4]), Rows(NAMES[4:7])]
    rows = Chained(parts)
    assert len(rows) == 7 and [row.id for row in rows] == NAMES[:7] == [row.id for row in rows[:]]
    assert parts[3].taken == [0, 1, 2, 0, 1, 2]
    for beyond in (7, -1):
        with pytest.raises(IndexError):
            rows[beyond]
    assert len(Chained([Rows([])])) == 0
