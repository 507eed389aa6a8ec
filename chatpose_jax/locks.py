"""A lock that allows one writer of a folder at a time, and that is released when its process ends."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from chatpose_jax.errors import UserError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Locked(UserError):
    """Another process, or another block of this one, holds the lock."""


@contextlib.contextmanager
def only_writer(path: str | Path, lock: Path) -> Iterator[None]:
    """Context manager that holds an exclusive lock (``flock``) on the file ``lock``.

    The kernel releases the lock when the process ends, even if it is killed; a lock file that a killed process leaves behind blocks nobody. The
    lock works between machines where the file system supports that (NFS does; some mounts lock locally only). In a run of several processes, one
    process takes it for all.

    Args:
        path: what the lock guards, for the error message.
        lock: the lock file. It is created, with its folder, if missing, and removed at the end.

    Raises:
        Locked: the lock is held; the message names the host and the process.
        UserError: the file cannot be created.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _take(path, lock)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        # Remove the file while the lock is held. Another process that has opened it meanwhile sees in `_is_named` that it is gone, and opens again.
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _take(path: str | Path, lock: Path) -> int:
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
