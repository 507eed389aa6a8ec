"""The data sets that ``chatpose data prepare`` reads, by name."""

from __future__ import annotations

DATA_SETS: dict[str, str] = {
    "3dpw": "chatpose_jax.data.readers.threedpw:ThreeDPW",
    "3dpw_test": "chatpose_jax.data.readers.humans4d_eval:ThreeDPWTest",
    "cmu": "chatpose_jax.data.readers.mocap:Cmu",
    "bvh": "chatpose_jax.data.readers.mocap:Bvh",
    "bedlam": "chatpose_jax.data.readers.bedlam:Bedlam",
    "coco": "chatpose_jax.data.readers.humans4d:Coco",
    "coco_vitpose": "chatpose_jax.data.readers.humans4d:CocoVitpose",
    "cotpose": "chatpose_jax.data.readers.cotpose:CotPose",
    "h36m": "chatpose_jax.data.readers.humans4d:H36M",
    "h36m_val_p2": "chatpose_jax.data.readers.humans4d_eval:H36MVal",
    "mpi_inf_3dhp": "chatpose_jax.data.readers.humans4d:MpiInf3dhp",
    "jsonlines": "chatpose_jax.data.readers.jsonlines:JsonLines",
    "llava": "chatpose_jax.data.readers.llava:Llava",
    "llava_bench": "chatpose_jax.data.readers.llava_bench:LlavaBench",
    "mpii": "chatpose_jax.data.readers.humans4d:Mpii",
    "posefix": "chatpose_jax.data.readers.posefix:PoseFix",
    "posellava": "chatpose_jax.data.readers.posellava:PoseLlava",
    "posescript": "chatpose_jax.data.readers.posescript:PoseScript",
    "rpe": "chatpose_jax.data.readers.rpe:Rpe",
    "rpe_refined": "chatpose_jax.data.readers.rpe:RpeRefined",
    "spg": "chatpose_jax.data.readers.spg:Spg",
}
"""name -> ``package.module:Class`` of its ``Reader``. The name is also that of the source of ``data.sources`` that reads the prepared folder."""
