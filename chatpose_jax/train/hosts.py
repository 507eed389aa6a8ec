"""Runs of several processes: how they find each other, stop together, and stop when one is lost."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from chatpose_jax.errors import UserError
from chatpose_jax.storage import Location

HEARTBEAT_SECONDS = 20
"""After this much silence JAX counts a process as lost and ends the others. With JAX's default, 100, a broken job would cost more."""

MEETING_SECONDS = 1800
"""How much longer one process may take than another to read its data."""

LOST = 75
"""Exit status of a process that lost another one (EX_TEMPFAIL of sysexits.h). Start all of them again: the run resumes."""

STOPPED = 143
"""Exit status of a run that a signal stopped, after everything was saved (128 + SIGTERM)."""

FAILED = 1
"""Exit status after a fault of the file system, or a crash. The same command resumes the run."""

TRANSIENT = frozenset(
    getattr(errno, name)
    for name in [
        "EIO",
        "ENOSPC",
        "EDQUOT",
        "ESTALE",
        "ETIMEDOUT",
        "EAGAIN",
        "EBUSY",
        "ENOLCK",
        "ENOTCONN",
        "ECONNRESET",
    ]
)
"""Errors of a disk or its network. A wrong path or setting never causes them."""

_DENIED = {"PERMISSION_DENIED": errno.EACCES, "UNAUTHENTICATED": errno.EACCES, "NOT_FOUND": errno.ENOENT}


class Fault(OSError):
    """The file system failed during a run. The run can resume from its last checkpoint. ``status`` is the exit status."""

    status = FAILED


@dataclasses.dataclass(frozen=True)
class Hosts:
    """How the processes of a run find each other.

    coordinator: HOST:PORT of process 0, reachable from all processes. num_processes: their number. process_id: the number of this one.
    Where all three are None, JAX asks the cluster (Cloud TPU, SLURM, MPI).
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def find_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environ: Mapping[str, str] = os.environ,
    dev: Path = Path("/dev"),
) -> Hosts | None:
    """How the processes find each other, from the flags or else from the environment; None for a run of one process.

    The first source found is used: flags; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which the manifests in ``launch/``
    set; a SLURM step of several tasks; a TPU slice on GKE (TPU_WORKER_HOSTNAMES) or a Cloud TPU VM.
    Raises UserError if only some of the three are given, or if they contradict each other.
    """
    flags = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    if any(value is not None for value in flags.values()):
        return _explicit(flags)
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if any(environ.get(name) for name in names[1:]):
        return _explicit({name: environ.get(name) or None for name in names})
    # Inside `sbatch` but outside `srun`, SLURM_NTASKS counts tasks that were not started.
    if int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return Hosts()
    if "," in environ.get("TPU_WORKER_HOSTNAMES", "") or environ.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return Hosts()
    chips = any(dev.glob("accel[0-9]*")) or any(dev.glob("vfio/[0-9]*"))
    if chips and importlib.util.find_spec("libtpu") and "TPU_SKIP_MDS_QUERY" not in environ:
        return Hosts()
    return None


def _explicit(given: Mapping[str, Any]) -> Hosts:
    if missing := [name for name, value in given.items() if value is None]:
        said = ", ".join(name for name in given if name not in missing)
        raise UserError(f"{said} without {' and '.join(missing)}: a run of several processes needs all three")
    (coordinator, *numbers), (_, *names) = given.values(), given
    try:
        count, index = (int(number) for number in numbers)
    except ValueError:
        raise UserError(f"{' and '.join(names)} must be numbers, found {', '.join(map(repr, numbers))}") from None
    if not 0 <= index < count:
        raise UserError(f"{names[1]} must be at least 0 and less than {names[0]}, found {index} of {count}")
    if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"{next(iter(given))}: expected HOST:PORT, found {coordinator!r}")
    return Hosts(coordinator, count, index)


def connect(hosts: Hosts | None, *, heartbeat: int = HEARTBEAT_SECONDS) -> None:
    """Joins the other processes. Call it before the first use of any device. ``None`` means a run of one process.

    heartbeat: seconds of silence after which a process counts as lost.

    Raises UserError if joining cannot begin: the cluster is unknown, or the coordinator's port is in use. If the other processes never come,
    JAX aborts this one after five minutes, in C++, with status 134; Python cannot turn that into an error message.
    """
    if hosts is None:
        return
    if hosts.coordinator is not None and hosts.process_id == 0 and not os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        _demand_free(hosts.coordinator)
    try:
        jax.distributed.initialize(
            **_arguments(hosts), heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=heartbeat
        )
    except (RuntimeError, ValueError) as error:
        where = hosts.coordinator or "the cluster"
        raise UserError(
            f"the processes of this run did not find each other through {where}: {' '.join(str(error).split())[:300]}"
        ) from error


def _demand_free(address: str) -> None:
    """Raises UserError if the port of process 0 is in use. Without this check JAX often ends in a segmentation fault."""
    port = int(address.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except (OSError, OverflowError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise UserError(f"process 0 cannot listen on port {port}, as {address} says: {why}") from error


def _arguments(hosts: Hosts) -> dict[str, Any]:
    if hosts.coordinator is None:
        return {}
    return {
        "coordinator_address": hosts.coordinator,
        "num_processes": hosts.num_processes,
        "process_id": hosts.process_id,
        "cluster_detection_method": "deactivate",
    }


def primary() -> bool:
    """Whether this is process 0. Only process 0 prints, and writes files that are not sharded."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints, in process 0 only."""
    if primary():
        print(text, flush=True)


def meet(where: str) -> None:
    """Waits until every process is here. Processes take different times to read data, and the timeout of a collective operation may be shorter
    than that (30 s in gloo).
    """
    multihost.get_barrier_sync_fn()(key=where, timeout_ms=1000 * MEETING_SECONDS)


def all_gather(value: np.ndarray) -> np.ndarray:
    """Stacks the values of all processes, which have the same shape, on a new first axis. Call ``meet`` first if they may be far apart in time."""
    return np.asarray(multihost_utils.process_allgather(value))


@contextmanager
def announced(said: Callable[[], str]) -> Iterator[None]:
    """Prints ``said()`` as soon as a Ctrl-C or SIGTERM arrives within the block. Python's own handler runs only when the main thread leaves C++,
    where compilation may keep it for tens of seconds.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    try:
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    except ValueError:  # not the main thread; only that one receives signals
        before = None

    def listen() -> None:
        while number := reader.recv(1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                print(f"\n{said()}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        if before is not None:
            signal.set_wakeup_fd(before)
        writer.close()  # ends the thread
        thread.join()
        reader.close()


class Stop:
    """The first SIGTERM or Ctrl-C asks the run to stop; the second one ends it.

    With several processes, a signal to any of them stops all, after the same step. They agree through JAX's preemption service, which
    handles SIGTERM itself.
    """

    def __init__(self) -> None:
        self.asked = False
        self._heard = 0

    def after(self, step: int) -> bool:
        """Whether this step is the last. Every process calls it after every step."""
        if jax.process_count() > 1:
            self.asked = self.asked or multihost_utils.reached_preemption_sync_point(step)
        return self.asked

    def _signal(self, signum: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        if jax.process_count() > 1:  # turn a Ctrl-C into the preemption service's SIGTERM; the next Ctrl-C interrupts
            signal.signal(signum, signal.default_int_handler)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.asked = True

    def _said(self) -> str:
        self._heard += 1
        if self._heard > 1:
            return "ending now; saved checkpoints remain"
        return "stopping after the step under way, then saving (what is being compiled is finished first); again: end without saving"

    @contextmanager
    def listen(self) -> Iterator[Stop]:
        """Handles signals within the block. Does nothing outside the main thread, because only that one receives signals."""
        signals = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        try:
            before = {number: signal.signal(number, self._signal) for number in signals}
        except ValueError:
            before = {}
        try:
            with announced(self._said):
                yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def restartable(folder: Location, *, starting: bool = False) -> Iterator[None]:
    """Raises errors of the file system as ``Fault``: once the disk or the bucket works again, the run can resume.

    starting: paths may still be wrong, so only the errors in ``TRANSIENT`` count. Later every OSError counts.
    """
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        found, cause = _os_error(error)
        if cause is None or cause.errno is None or (cause.errno not in TRANSIENT and found is not error):
            raise
        where = f"{cause.filename}: " if cause.filename else ""
        what = cause.strerror or " ".join(str(cause).split())
        if starting and cause.errno not in TRANSIENT:
            if cause is error or isinstance(error, UserError):
                raise
            raise UserError(f"{folder}: {what}") from error
        raise Fault(
            f"{where}{what}; mend that: the same command goes on from the last checkpoint in {folder}"
        ) from error


def _os_error(error: BaseException | None) -> tuple[BaseException | None, OSError | None]:
    """The first exception among an exception and its causes that means that a disk or a bucket failed, as it is and as an OSError."""
    while error is not None:
        if found := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore has the number in its message only
            return error, OSError(int(found[1]), os.strerror(int(found[1])))
        if (number := _of_a_store(error)) is not None:  # some of these are OSErrors with numbers of their own
            return error, OSError(number, f"{' '.join(str(error).split(' [tensorstore_spec=')[0].split()):.300}")
        if isinstance(error, OSError):
            return error, error
        error = error.__cause__ or error.__context__
    return None, None


def _of_a_store(error: BaseException) -> int | None:
    """The error number for an exception of a bucket's client (TensorStore, gcsfs, s3fs and what they use); None for any other exception."""
    text, kind = str(error), f"{type(error).__module__}.{type(error).__name__}"
    if isinstance(error, ValueError):  # TensorStore's
        words = re.search(r"\b(PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND)\b|retry attempts failed", text)
        return None if words is None else _DENIED.get(words[1], errno.ETIMEDOUT)
    if not kind.startswith(("gcsfs.", "aiohttp.", "botocore.", "aiobotocore.", "google.", "requests.", "urllib3.")):
        return None
    if getattr(error, "code", None) in (401, 403) or re.search("Credential|Auth|Refresh|Forbidden", kind):
        return errno.EACCES
    return errno.ENOENT if getattr(error, "code", None) == 404 else errno.ETIMEDOUT


@contextmanager
def together(folder: Location) -> Iterator[None]:
    """Ends a process of several whose collective operation failed, with one line and exit status ``LOST``: another process is gone, and a normal
    exit would wait for it forever.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        _give_up(folder, error)


def _give_up(folder: Location, error: Exception) -> NoReturn:
    first = str(error).strip().splitlines()[0][:300]
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} lost another one: {first}\n"
        f"Start all of them again with the same command, any number of processes: the run resumes from {folder}.",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    os._exit(LOST)
