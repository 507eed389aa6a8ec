"""Work for ``test_pool``. As a program it starts two processes, which leave their ids in a folder and sleep."""

import os
import signal
import sys
import time
from pathlib import Path

from chatpose_jax.data.pool import share
from chatpose_jax.errors import UserError


class Square:
    def __call__(self, job, tick):
        if job == "x":
            raise UserError("no number")
        if job == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if job == 60:
            time.sleep(job)
        tick(job)
        return job * job


class Sleep:
    def __call__(self, job, tick):
        (Path(job) / str(os.getpid())).touch()
        time.sleep(60)


if __name__ == "__main__":
    try:
        list(share(Sleep(), [sys.argv[1]] * 2, 2))
    except KeyboardInterrupt:
        sys.exit(130)
