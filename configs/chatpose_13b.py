"""The paper's ChatPose: LLaVA-1.5-13B, LoRA r 128 on q and v, the pose head, the new token's rows (the defaults of TrainConfig).

The data sets must be prepared first (docs/prepared-data.md, "The paper's mixture"). Without them: --set data.sources=synthetic.
"""

from chatpose_jax.train.run_config import run_config


def get_config():
    config = run_config(model="chatpose_13b")
    # Text, instructions and images as 1 : 1 : 2. How the paper divides the images is not published. These are divided as 4D-Humans divides
    # the same four in its own training (hmr2/configs_hydra/data/mix_all.yaml): 0.1 : 0.1 : 0.1 : 0.02.
    config.data.sources = (
        ("posescript", 1.0),
        ("llava", 1.0),
        ("h36m", 0.625),
        ("coco", 0.625),
        ("mpii", 0.625),
        ("mpi_inf_3dhp", 0.125),
    )
    return config
