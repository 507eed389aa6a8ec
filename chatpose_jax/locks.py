"""One writer of a folder at a time, by a lock that ends with the process that holds it."""

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
    """Somebody else has the lock."""


@contextlib.contextmanager
def only_writer(path: str | Path, lock: Path) -> Iterator[None]:
    """While the block runs no other process, and no other block of this one, holds ``lock`` in such a block.

    The lock is the kernel's (``flock``): it ends with the process, however that ends, and a file that a killed process
    leaves behind stops nobody. It holds between machines where the file system passes it on (NFS does; some mounts keep
    locks to themselves). Of a run of several processes one alone should take it.

    Args:
        path: what is guarded, for the error.
        lock: the file that is locked: made, with its folder, if it is missing; removed in the end.

    Raises:
        Locked: somebody else holds it, with the host and the process.
        UserError: the file cannot be made.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _take(path, lock)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        # Removed while it is held: whoever opened it meanwhile finds another file under its name, and opens again.
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _take(path: str | Path, lock: Path) -> int:
    while True:
        # No link is followed: of a stranger's folder it would say which file of ours is written over.
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
    """Whether the open file still stands under the lock's name: its last holder removes it."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False


def _myself() -> str:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()}, since {since},"
