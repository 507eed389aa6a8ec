"""Poses of answers, kept for a while under an id that nobody can guess."""

from __future__ import annotations

import collections
import secrets
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from smpl_jax import render
from smpl_jax.posed import PosedBody

KINDS = {
    "glb": "model/gltf-binary",
    "obj": "model/obj",
    "npz": "application/octet-stream",
    "png": "image/png",
}
"""Files of a pose, and their types."""


class PoseStore:
    """The newest ``most`` poses, each for ``seconds``. share: whether meshes of a licensed body may leave the server."""

    def __init__(self, *, most: int = 1000, seconds: float = 3600, share: bool = True):
        self.most, self.seconds, self.share = most, seconds, share
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
        path = Path(folder) / f"pose.{kind}"
        if kind == "png":
            render.save_png(path, pose.render(768))
        else:
            pose.save(path)
        return path.read_bytes()


def to_json(names: list[str], samples: list[PosedBody]) -> dict[str, Any]:
    """A pose as an answer shows it: angles in radians, joints in metres relative to nothing but the frame; the first of its samples, and all of
    them if there are several, each with the id of its files. parents: of each joint, -1 for the root.
    """
    pose, body = samples[0].pose, samples[0].body
    shown: dict[str, Any] = {"id": names[0], "object": "pose", "frame": pose.frame, "body": body.name}
    shown |= _arrays(samples[0]) | {"joint_names": list(body.joint_names), "parents": list(body.parents)}
    if len(samples) > 1:
        shown["samples"] = [{"id": name, **_arrays(each)} for name, each in zip(names, samples, strict=True)]
    return shown


def _arrays(posed: PosedBody) -> dict[str, Any]:
    betas = {} if posed.pose.betas is None else {"betas": _rounded(posed.pose.betas)}
    return {"axis_angle": _rounded(posed.axis_angle), "joints": _rounded(posed.joints), **betas}


def _rounded(array: Any) -> Any:
    """Numbers that JSON holds in few characters: a micrometre, and less than a ten-thousandth of a degree."""
    return np.round(np.asarray(array, np.float64), 6).tolist()
