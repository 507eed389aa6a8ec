"""A lock that allows one writer of a folder at a time, and that is released when its process ends."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.storage import Location, is_bucket, kvstore, location, reachable

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

_REFRESH = 10.0
"""Seconds between two writes of a lock in an object store by its holder."""
_ABANDONED = 45.0
"""Seconds without such a write after which another process takes the lock over."""


class Locked(UserError):
    """Another process, or another block of this one, holds the lock."""


class Held:
    """A lock that is held."""

    def check(self) -> None:
        """Raises Locked if another process may have taken the lock over: in an object store, after ``_ABANDONED`` seconds in which this one did not
        reach it. Long runs call it before they write.
        """


@contextlib.contextmanager
def only_writer(path: str | os.PathLike[str], lock: Location) -> Iterator[Held]:
    """Context manager that holds an exclusive lock on the file ``lock``. In a run of several processes, one process takes it for all.

    On a disk it is a ``flock``. The kernel releases the lock when the process ends, even if it is killed; a lock file that a killed process leaves
    behind blocks nobody. The lock works between machines where the file system supports that (NFS does; some mounts lock locally only).

    In an object store it is an object that names the process. It is written only if there is none, and written again every 10 seconds. A killed
    process leaves it behind. A process of the same machine sees at once that the holder is gone. Any other watches the object for 45 seconds, and
    takes it over if it did not change. No two clocks are compared.

    Args:
        path: what the lock guards, for the error message.
        lock: the lock file. It is created, with its folder, if missing, and removed at the end.

    Raises:
        Locked: the lock is held; the message names the host and the process.
        UserError: the file cannot be created.
    """
    if is_bucket(lock):
        with _Lease(path, lock).held() as lease:
            yield lease
        return
    lock = Path(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _take(path, lock)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        yield Held()
    finally:
        # Remove the file while the lock is held. Another process that has opened it meanwhile sees in `_is_named` that it is gone, and opens again.
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _take(path: str | os.PathLike[str], lock: Path) -> int:
    while True:
        # Do not follow a symbolic link: a link in a stranger's folder could make us overwrite a file of the user's.
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 500).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise Locked(
                f"{path}: {holder} is writing it; wait for its end, end it, or choose another folder "
                f"(where its machine is gone and an NFS server still keeps the lock: delete {lock})"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            warnings.warn(
                f"{path}: this file system has no locks; see to it that one process alone writes", stacklevel=4
            )
        if _is_named(descriptor, lock):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _myself().encode())
            return descriptor
        os.close(descriptor)


def _is_named(descriptor: int, lock: Path) -> bool:
    """Whether the open file is still the one under the lock's name; the last holder removes it."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False


def _myself() -> str:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()}, since {since},"


class _Lease(Held):
    """A lock in an object store. Every write has a condition: that the object is still the one that was read or written last."""

    def __init__(self, path: str | os.PathLike[str], lock: Location):
        self.path, self.lock, self.key = path, lock, lock.name.encode()
        self.holder = {
            "who": _myself(),
            "token": uuid.uuid4().hex,
            "machine": _machine(),
            "process": os.getpid(),
            "born": _born(os.getpid()),
        }
        self.generation, self.taken_by = b"", ""
        self.written = 0.0  # when the last write of the lock that succeeded was sent
        self.mutex, self.ended = threading.Lock(), threading.Event()

    @contextlib.contextmanager
    def held(self) -> Iterator[_Lease]:
        import tensorstore as ts

        try:
            with reachable(location(self.path)):
                self.store = ts.KvStore.open(kvstore(self.lock.parent)).result()
            self._take()
        except (ValueError, OSError) as error:
            if isinstance(error, UserError):
                raise
            said = str(error).split(" [")[0][:300]
            hint = "; is there such a bucket?" if said.startswith("NOT_FOUND") else ""
            raise UserError(f"{self.path}: cannot be written ({said}{hint})") from None
        refreshing = threading.Thread(target=self._keep, daemon=True)
        refreshing.start()
        try:
            yield self
        finally:
            self.ended.set()
            refreshing.join()
            with contextlib.suppress(ValueError, OSError):  # it counts as abandoned soon
                if not self.taken_by:
                    self.store.write(self.key, None, if_equal=self.generation).result()

    def check(self) -> None:
        with self.mutex:
            # A write that was long under way says little of now, so it is followed by another.
            while not self.taken_by and _now() - self.written > _ABANDONED / 2 and self._write():
                pass
            if self.taken_by:
                raise Locked(
                    f"{self.path}: {self.taken_by} has begun to write it, because this process did not reach its lock for "
                    f"{_ABANDONED:g} seconds; end one of the two"
                )
            if (since := _now() - self.written) > _ABANDONED:
                raise Locked(
                    f"{self.path}: this process has not reached its lock, {self.lock}, for {since:.0f} seconds, so another one may have begun to "
                    "write it; see to the network and the store"
                )

    def _take(self) -> None:
        seen, since, refused = None, 0.0, 0
        while True:
            found = self.store.read(self.key).result()
            generation = found.stamp.generation
            holder = {} if found.state == "missing" else _holder(found.value)
            if holder.get("token") == self.holder["token"]:  # written, but the answer was lost
                self.generation = generation
                return
            here = bool(holder) and holder.get("machine") == self.holder["machine"] != ""
            alive = here and holder.get("born") == _born(holder.get("process"))
            if alive or (seen is not None and seen != generation and found.state != "missing"):
                raise Locked(
                    f"{self.path}: {holder.get('who', 'another process')} is writing it; wait for its end, end it, or choose another folder"
                )
            abandoned = seen == generation and _now() - since > _ABANDONED
            if found.state == "missing" or here or abandoned:
                self.written = _now()
                written = self.store.write(self.key, self._text(), if_equal=generation).result()
                if written.generation:
                    self.generation = written.generation
                    return
                seen, refused = None, refused + 1  # another process was faster, or the answer was lost
                if refused == 20:  # S3 says the same of a bucket that does not exist
                    raise OSError("the store takes no object there; is there such a bucket?")
            else:
                if seen is None:
                    seen, since = generation, _now()
                    warnings.warn(
                        f"{self.path}: waiting up to {_ABANDONED:g} seconds to see whether {holder.get('who', 'another process')} still writes it",
                        stacklevel=6,
                    )
                time.sleep(_REFRESH / 10)

    def _text(self) -> bytes:
        # The number makes each version another one: S3 knows versions by their contents.
        return json.dumps(self.holder | {"number": time.monotonic_ns()}).encode()

    def _keep(self) -> None:
        while not self.ended.wait(_REFRESH) and not self.taken_by:
            with self.mutex:
                self._write()

    def _write(self) -> bool:
        """Writes the lock again, and returns whether that succeeded. What fails is tried again later; another holder is noted."""
        with contextlib.suppress(ValueError, OSError):
            begun = _now()  # others count from when the store has it, which is later
            written = self.store.write(self.key, self._text(), if_equal=self.generation).result()
            if not written.generation:
                found = self.store.read(self.key).result()
                holder = {} if found.state == "missing" else _holder(found.value)
                if holder.get("token") != self.holder["token"]:
                    self.taken_by = holder.get("who", "another process")
                    return False
                written = found.stamp
            self.generation, self.written = written.generation, begun
            return True
        return False


def _now() -> float:
    """Seconds, also those in which the machine slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _holder(raw: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(raw)
    except ValueError:
        holder = None
    return holder if isinstance(holder, dict) else {"who": "another program"}


def _machine() -> str:
    """A name of this machine since its last start, and of the container whose processes this process sees; "" where there is none."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(process: Any) -> str | None:
    """When a process of this machine began, in the kernel's ticks; None if there is no such process. Tells it from a later one of the same number."""
    try:
        status = Path(f"/proc/{int(process)}/stat").read_text()
    except (OSError, TypeError, ValueError):
        return None
    return None if (fields := status.rpartition(")")[2].split())[0] == "Z" else fields[19]
