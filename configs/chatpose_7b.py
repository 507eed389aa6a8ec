"""The paper's recipe on LLaVA-1.5-7B."""

from chatpose_jax.train.run_config import run_config


def get_config():
    config = run_config(model="chatpose_7b")
    config.data.sources = (  # as in chatpose_13b
        ("posescript", 1.0),
        ("llava", 1.0),
        ("h36m", 0.625),
        ("coco", 0.625),
        ("mpii", 0.625),
        ("mpi_inf_3dhp", 0.125),
    )
    return config
