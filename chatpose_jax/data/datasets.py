"""The data sets that ``chatpose data prepare`` reads, by name."""

from __future__ import annotations

DATA_SETS: dict[str, str] = {
    "cmu": "chatpose_jax.data.readers.mocap:Cmu",
    "bvh": "chatpose_jax.data.readers.mocap:Bvh",
    "posefix": "chatpose_jax.data.readers.posefix:PoseFix",
    "posescript": "chatpose_jax.data.readers.posescript:PoseScript",
    "spg": "chatpose_jax.data.readers.spg:Spg",
}
"""name -> ``package.module:Class`` of its ``Reader``. The name is also that of the source of ``data.sources`` that reads the prepared folder."""
