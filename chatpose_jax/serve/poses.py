"""Poses of answers, kept for a while under an id that nobody can guess."""

from __future__ import annotations

import collections
import secrets
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smpl_jax.posed import PosedBody

KINDS = {
    "glb": "model/gltf-binary",
    "obj": "model/obj",
    "npz": "application/octet-stream",
    "png": "image/png",
}
"""Files of a pose, and their types."""
MESHES = ("glb", "obj")
"""Those that hold the body's mesh."""


class PoseStore:
    """The newest ``most`` poses, each for ``seconds``."""

    def __init__(self, *, most: int = 1000, seconds: float = 3600):
        self.most, self.seconds = most, seconds
        self._held: collections.OrderedDict[str, tuple[float, PosedBody]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def put(self, pose: PosedBody) -> str:
        """The id of a pose from now on."""
        name, now = f"pose-{secrets.token_urlsafe(16)}", time.monotonic()
        with self._lock:
            self._held[name] = (now, pose)
            while len(self._held) > self.most or next(iter(self._held.values()))[0] < now - self.seconds:
                self._held.popitem(last=False)
        return name

    def get(self, name: str) -> PosedBody | None:
        with self._lock:
            found = self._held.get(name)
        return None if found is None or found[0] < time.monotonic() - self.seconds else found[1]


def file_of(pose: PosedBody, kind: str) -> bytes:
    """A file of a pose; kind: one of ``KINDS``."""
    with tempfile.TemporaryDirectory() as folder:
        return pose.save(Path(folder) / f"pose.{kind}").read_bytes()


def pose_json(names: Sequence[str], samples: Sequence[PosedBody]) -> dict[str, Any]:
    """A pose as an answer shows it: ``PosedBody.to_json`` with the frame's plain name, the parent of each joint (-1 of the root), and all its samples
    if there are several. names: the ids of the samples' files.
    """
    parents = {"parents": list(samples[0].body.parents)}
    shown = [
        {"id": name, **each.to_json(), "frame": each.pose.frame} for name, each in zip(names, samples, strict=True)
    ]
    return {"object": "pose", **shown[0], **parents, **({"samples": shown} if len(shown) > 1 else {})}
