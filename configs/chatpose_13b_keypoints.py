"""LLaVA*-S of ChatPose's paper: LLaVA-1.5-13B learns from the same images to write 2D keypoints as text; it has no use for its pose head.

The data sets must be prepared first (docs/prepared-data.md, "The paper's mixture").
"""

from chatpose_jax.train.run_config import run_config


def get_config():
    config = run_config(model="chatpose_13b")
    # The images and their shares are those of chatpose_13b. Rows of text alone have no keypoints.
    config.data.sources = (
        ("llava", 1.0),
        ("keypoints", 0.625, {"of": "h36m"}),
        ("keypoints", 0.625, {"of": "coco"}),
        ("keypoints", 0.625, {"of": "mpii"}),
        ("keypoints", 0.125, {"of": "mpi_inf_3dhp"}),
    )
    return config
