"""Runs ``chatpose`` in processes that are forked from this one, which has imported what they need, so that each starts in a moment.

Reads tasks from the standard input, one JSON object a line: the arguments ``argv``, ``env``, the file ``log`` for what is printed; and optional
``kill_at``, the number of the file operation before which the process kills itself, and ``largest``, the limit of a file in bytes. Writes two lines
for each: the process's id, and its exit code. The number of file operations is the last line of the log.
"""

import json
import os
import resource
import signal
import sys

from chatpose_jax.cli import data, data_prepare, main
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor

EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def run(task):
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(task["env"])
    if largest := task.get("largest"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    operations = 0

    def watch(event, arguments):
        nonlocal operations
        writes = event == "open" and arguments[2] is not None and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in EVENTS or writes:
            operations += 1
            if operations == task.get("kill_at"):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    code = main.main(task["argv"])
    print(operations, flush=True)
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    tiny_processor(preset("tiny"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("ready", data.__name__, data_prepare.__name__, flush=True)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            run(json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
