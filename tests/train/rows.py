"""A data set that counts how many of its rows were taken."""

from collections.abc import Sequence

from chatpose_jax.data.example import Example
from smpl_jax.pose import unmeasured


class Rows(Sequence):
    """Held-out rows without end, nearly: their number, their kinds by index, and how many were taken."""

    def __init__(self, size, kind):
        self.size, self.kind, self.taken = size, kind, 0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        self.taken += 1
        kind = self.kind(index)
        poses = unmeasured((int(kind != "instruction"),))
        return Example(f"row-{index}", kind, [{"role": "user", "content": "Who?"}], poses)
