"""One of several processes that train the small model of the tests: started by ``test_processes``.

python -m tests.train.worker FOLDER STEPS DATA TENSOR SLICES PAUSE COORDINATOR COUNT INDEX
"""

import dataclasses
import sys
import time
from pathlib import Path

import jax

from chatpose_jax.models.chatpose import fake_batch, init_params
from chatpose_jax.models.sharding import make_mesh
from chatpose_jax.train import feed, hosts
from chatpose_jax.train.config import MeshConfig
from chatpose_jax.train.trainer import Interrupted, train
from tests.train.test_step import CONFIG, SETTINGS


class Rows:
    """This process's rows of global batches that are a function of the step."""

    def __init__(self, rows, pause):
        self.step, self.rows, self.pause = 0, rows, pause

    def __iter__(self):
        while True:
            self.step += 1
            time.sleep(self.pause)
            batch = fake_batch(CONFIG, batch=8, length=16, seed=self.step)
            yield batch if self.rows is None else jax.tree.map(lambda x: x[self.rows], batch)

    def state(self):
        return {"step": self.step}

    def restore(self, state):
        self.step = state["step"]


def main(
    out: Path, steps: int, data: int, tensor: int, slices: int, pause: float, coordinator: str, count: int, index: int
) -> int:
    if count > 1:
        hosts.connect(hosts.find_processes(coordinator, count, index))
    mesh_config = MeshConfig(data=data, fsdp=1, tensor=tensor, slices=slices)
    settings = dataclasses.replace(
        SETTINGS, steps=steps, batch_size=4, accumulate=2, log_every=1, save_every=4, mesh=mesh_config
    )
    mesh = make_mesh(data, 1, tensor, slices)
    params = init_params(CONFIG, jax.random.key(0), mesh)
    rows = feed.local_rows(mesh, settings.batch_size, settings.accumulate)
    try:
        with hosts.together(out):
            train(CONFIG, settings, params, Rows(rows, pause), out, mesh=mesh, progress=False)
    except Interrupted as stop:
        print(stop, flush=True)
        return hosts.STOPPED
    return 0


if __name__ == "__main__":
    folder, *numbers, seconds, address, processes, rank = sys.argv[1:]
    status = main(Path(folder), *map(int, numbers), float(seconds), address, int(processes), int(rank))
    sys.exit(status)
