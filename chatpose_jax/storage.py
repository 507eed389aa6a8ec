"""Files and folders on a disk, or in an object store: ``gs://`` (Google Cloud Storage) and ``s3://`` (S3). No other module asks which of them a
path is on, except where a store works another way.

A path on a disk is a ``pathlib.Path``, an address in a store an ``epath.Path``, which has the same methods. A store has neither renames nor appends
nor folders. What takes their place:

- An object appears whole or not at all (``write_bytes``, ``writing``).
- A folder counts as complete when the small object that is written last is there, such as ``config.json`` of a model folder. Readers look for it
  first.
- ``locks.only_writer`` writes an object under the condition that there is none.

All clients repeat requests that fail on the way (503, connections that break), for half a minute up to a quarter of an hour: fsspec's file systems,
which ``epath`` uses, and TensorStore. That is right in the middle of a run, and too long for an address that is wrong. So ``reachable`` asks first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

# One program for all users: with TensorFlow installed, epath would read and write through it. Must stand before epath looks.
os.environ.setdefault("EPATH_USE_TF", "0")

import fsspec
from etils import epath

from chatpose_jax.errors import UserError
from smpl_jax._files import write_whole

Location: TypeAlias = Path | epath.Path

_AT_ONCE = 32
"""Ranges that are read at the same time."""
_CLIENTS = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests"}
_PART = 32 << 20
"""Size in bytes of the parts in which a large object is sent: so much of it is in memory."""
_PATIENCE = 45.0
"""Seconds that a store has for the first answer to this process. gcsfs repeats a request for 31 to 37, and then says what is wrong."""
_SILENCE = 5.0
"""Seconds after which a warning says that this is waited for."""
_ANSWERED: set[str] = set()
"""The buckets that have answered this process."""


@dataclasses.dataclass(frozen=True)
class _Store:
    """A kind of object store. driver: TensorStore's name of it. endpoints: variables that name another server than the maker's. options: defaults of
    its file system in fsspec.
    """

    title: str
    driver: str
    package: str
    extra: str
    endpoints: tuple[str, ...]
    options: dict[str, Any]


# Listings are never kept: other processes, Orbax and TensorStore write to the same folders.
_STORES = {
    "gs": _Store(
        "Google Cloud Storage", "gcs", "gcsfs", "gcs", ("STORAGE_EMULATOR_HOST",), {"use_listings_cache": False}
    ),
    "s3": _Store(
        "S3",
        "s3",
        "s3fs",
        "s3",
        ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        {"use_listings_cache": False, "config_kwargs": {"retries": {"max_attempts": 10}}},
    ),
}
for _scheme, _store in _STORES.items():
    fsspec.config.conf[_scheme] = _store.options | fsspec.config.conf.get(_scheme, {})


# It would print a traceback for every request that a bucket refuses, besides the error that is raised.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def location(text: str | os.PathLike[str]) -> Location:
    """The path that a user writes: an address of a store as an ``epath.Path``, anything else as a ``pathlib.Path``.

    Raises UserError for an unknown scheme, an address without a bucket or with parts that an address does not have, and a missing package.
    """
    text = os.fspath(text)
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", text, re.DOTALL)
    if match is None or (match[2] == "/" and match[1] not in _STORES):
        return Path(text)
    scheme, slashes, rest = match.groups()
    if scheme not in _STORES or slashes != "//":
        known = ", ".join(f"{name}://BUCKET/FOLDER" for name in _STORES)
        raise UserError(
            f"{scheme}:{slashes}…: not an address that this program knows; expected a path on a disk, {known}"
        )
    bucket = rest.split("/")[0]
    # The text may contain a password, so it is not printed.
    if not bucket or "@" in bucket or ":" in bucket or re.search(r"[?#]", rest) or ".." in rest.split("/"):
        raise UserError(
            f"{scheme}://…: expected {scheme}://BUCKET/FOLDER, without user, '?', '#' and '..'; credentials come from the environment"
        )
    store = _STORES[scheme]
    if importlib.util.find_spec(store.package) is None:
        raise UserError(
            f"{text}: {store.title} needs the package {store.package}, which is not installed: pip install '.[{store.extra}]' in the checkout"
        )
    if scheme == "gs" and (emulator := os.environ.get("STORAGE_EMULATOR_HOST")):
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
    return epath.Path(text)


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address in an object store."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in _STORES))


def absolute(path: Location) -> Location:
    """The path with the current folder before it. Use it instead of ``resolve``, which takes an address for the name of a file."""
    return path if is_bucket(path) else path.resolve()


def write_bytes(path: Location, data: bytes | str) -> None:
    """Writes a small file, whole or not at all, with its folder; synced on a disk. Text becomes UTF-8."""
    raw = data.encode() if isinstance(data, str) else data
    if is_bucket(path):
        _files(path).pipe_file(str(path), raw)
        return

    def fill(file: IO[bytes]) -> None:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())

    write_whole(path, fill)


@contextlib.contextmanager
def writing(path: Location) -> Iterator[IO[bytes]]:
    """Context manager: opens a large file, with its folder, to write it once from front to back. In a store it is sent in parts and appears at
    the end of the block, or not at all if the block raises. On a disk it is synced; a block that raises leaves a part of it.
    """
    if not is_bucket(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        return
    sent = _files(path).open(str(path), "wb", block_size=_PART)
    try:
        yield sent
    except BaseException:
        sent.closed = True  # otherwise it would be completed when it is closed or collected
        with contextlib.suppress(Exception):
            sent.discard()
        raise
    sent.close()


def size(path: Location) -> int:
    """Bytes of a file. Raises FileNotFoundError, which names it."""
    found = path.stat()
    return found.st_size if isinstance(found, os.stat_result) else found.length


def read_ranges(ranges: Sequence[tuple[Location, int, int]]) -> list[bytes]:
    """Bytes of objects of one store, each range given as (object, start, end), several read at the same time. Fewer where an object is shorter.

    Raises FileNotFoundError, which names the object, and OSError where the store does not answer.
    """
    if not ranges:
        return []
    paths, starts, ends = (list(column) for column in zip(*ranges))
    found = _files(paths[0]).cat_ranges(list(map(str, paths)), starts, ends, batch_size=_AT_ONCE, on_error="return")
    for path, data in zip(paths, found):
        if isinstance(data, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        if isinstance(data, BaseException):
            raise OSError(errno.EIO, f"cannot be read: {data or type(data).__name__}", str(path)) from data
    return found


def remove_tree(path: Location) -> None:
    """Removes a folder and all that is in it. It may be gone already, or go meanwhile."""
    if not is_bucket(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    files = _files(path)
    for _ in range(5):  # what others remove at the same time ends a round early
        with contextlib.suppress(FileNotFoundError):
            files.rm(str(path), recursive=True)
        if not files.exists(str(path)):
            return
    raise OSError(f"{path}: cannot be removed while others write into it")


def copy_tree(source: Location, target: Location) -> None:
    """Copies a folder, file by file in the order of ``tree``."""
    if not is_bucket(source) and not is_bucket(target):
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    for name in tree(source):
        if is_bucket(source) and is_bucket(target) and _scheme_of(source) == _scheme_of(target):
            _files(source).cp_file(str(source / name), str(target / name))
            continue
        with (source / name).open("rb") as file, writing(target / name) as out:
            shutil.copyfileobj(file, out, _PART)


def tree(path: Location) -> list[str]:
    """The files in a folder and in its folders, as sorted relative names with ``/``."""
    if not is_bucket(path):
        return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    inside = str(path).split("://", 1)[1] + "/"
    return sorted(name.removeprefix(inside) for name in _files(path).find(str(path)) if not name.endswith("/"))


@contextlib.contextmanager
def local(path: Location) -> Iterator[Path]:
    """Context manager around code that reads small files on a disk only: yields the folder itself, or a temporary copy of one in a store."""
    if not is_bucket(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as temporary:
        copy_tree(path, Path(temporary))
        yield Path(temporary)


@contextlib.contextmanager
def staged(path: Location) -> Iterator[Path]:
    """Context manager around code that writes small files on a disk only: yields the folder itself, or a temporary one, whose files are copied into
    the store at the end of the block.
    """
    if not is_bucket(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
        copy_tree(Path(temporary), path)


@contextlib.contextmanager
def reachable(path: Location) -> Iterator[None]:
    """Context manager around the first requests to a store. What its client raises, such as for missing credentials, becomes one UserError. So does a
    bucket that gives this process no first answer within ``_PATIENCE`` seconds. FileNotFoundError passes unchanged, as from a disk.
    """
    try:
        if is_bucket(path):
            _demand_answer(path)
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        if not is_bucket(path) or not (isinstance(error, OSError) or type(error).__module__.split(".")[0] in _CLIENTS):
            raise
        said = re.sub(r"\?\S+", "", " ".join(str(getattr(error, "strerror", None) or error).split()))
        raise UserError(
            f"{path}: the store cannot be reached or refuses this ({type(error).__name__}: {said:.300}); see to the network, the name of the "
            "bucket, its permissions, and the credentials in the environment"
        ) from None


def _demand_answer(path: Location) -> None:
    """Raises TimeoutError if a bucket does not answer; what else its client raises, except that there is no such object."""
    bucket = "/".join(str(path).split("/")[:3])
    if bucket in _ANSWERED:
        return
    raised: list[Exception] = []
    done = threading.Event()

    def ask() -> None:
        try:
            _files(path, first=True).info(str(path))
        except FileNotFoundError:
            pass
        except Exception as error:
            raised.append(error)
        done.set()

    # In a thread, because looking for credentials may also wait for a network, and has no limit of its own.
    threading.Thread(target=ask, daemon=True).start()
    if not done.wait(_SILENCE):
        warnings.warn(f"{path}: the store does not answer; waiting up to {_PATIENCE:g} seconds", stacklevel=5)
        if not done.wait(_PATIENCE - _SILENCE):
            endpoint = next((name for name in _STORES[_scheme_of(path)].endpoints if os.environ.get(name)), "")
            where = f" from the server that {endpoint} names" if endpoint else ""
            raise TimeoutError(errno.ETIMEDOUT, f"no answer{where} within {_PATIENCE:g} seconds", str(path))
    if raised:
        raise raised[0]
    _ANSWERED.add(bucket)


def kvstore(path: Location) -> dict[str, Any]:
    """TensorStore's specification of a folder, as JSON values. An endpoint of S3 in the environment is included."""
    if not is_bucket(path):
        return {"driver": "file", "path": f"{path.resolve()}/"}
    scheme, rest = str(path).split("://", 1)
    bucket, _, key = rest.partition("/")
    spec: dict[str, Any] = {"driver": _STORES[scheme].driver, "bucket": bucket, "path": f"{key}/" if key else ""}
    if scheme == "s3":
        endpoint = next(filter(None, map(os.environ.get, _STORES[scheme].endpoints)), None)
        if endpoint:
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
            spec |= {"endpoint": endpoint, "aws_region": region}
        if os.environ.get("AWS_ACCESS_KEY_ID"):
            # Otherwise it complains about each file of credentials that it does not find.
            spec["aws_credentials"] = {"type": "environment"}
    return spec


def _scheme_of(path: Location) -> str:
    return str(path).split("://", 1)[0]


def _files(path: Location, first: bool = False) -> Any:
    """The file system of a store. first: one that gives up in time to say why."""
    scheme = _scheme_of(path)
    if scheme == "s3" and first:
        settings = fsspec.config.conf[scheme].get("config_kwargs", {})
        return fsspec.filesystem(scheme, config_kwargs={**settings, "retries": {"max_attempts": 5}})
    return fsspec.filesystem(scheme)
