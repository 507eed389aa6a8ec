"""Orbax on buckets. It knows ``gs://`` itself; ``s3://`` is taught here.

On a bucket nothing can be renamed, so Orbax makes a folder complete by its last object.
It takes a folder without that for unfinished, and removes it.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from orbax.checkpoint import options
from orbax.checkpoint._src.serialization import tensorstore_utils

from chatpose_jax.storage import Location, is_bucket, kvstore, location

COMMIT = "commit_success.txt"
"""Orbax's last object in a complete folder on a bucket."""


def orbax_options(folder: Location) -> dict[str, Any]:
    """The keyword arguments of ``orbax.checkpoint.CheckpointManagerOptions`` and ``Checkpointer`` for this folder. Call it before either."""
    if not is_bucket(folder):
        return {}
    if str(folder).startswith("s3://"):
        _teach_s3()
    return {"atomicity_options": options.AtomicityOptions(mode=options.AtomicityMode.COMMIT_FILE)}


@functools.cache
def _teach_s3() -> None:
    """Replaces the one function of Orbax that makes TensorStore's description of an address: for ``s3://`` it is that of ``gs://`` with another
    driver.
    """
    known = tensorstore_utils.build_kvstore_tspec

    @functools.wraps(known)
    def build_kvstore_tspec(directory: str, *args: Any, **options: Any) -> dict[str, Any]:
        address = os.fspath(directory)
        if not address.startswith("s3://"):
            return known(directory, *args, **options)
        return _with_s3(known(f"gs://{address.removeprefix('s3://')}", *args, **options))  # type: ignore[no-any-return]

    tensorstore_utils.build_kvstore_tspec = build_kvstore_tspec


def _with_s3(spec: Any) -> Any:
    if not isinstance(spec, dict):
        return spec
    if str(spec.get("driver")).startswith("gcs"):
        return {**kvstore(location(f"s3://{spec['bucket']}")), "path": spec["path"]}
    return {name: _with_s3(value) for name, value in spec.items()}
