"""PoseScript's pose generator (ECCV 2022), with the released recipe.

PoseScript must be prepared first (docs/data-sets.md). The paper trains on automatic captions (text.captions=automatic), and then from that
network on those of people (text.captions=human, --init, train.learning_rate=1e-5). Its words start as GloVe's vectors:
--set text.vectors=glove.840B.300d.txt.
"""

from chatpose_jax.posescript.config import posescript_config


def get_config():
    config = posescript_config("pose_vae")
    config.data.sources = (("posescript", 1.0),)
    config.train.epochs = 2000
    config.train.learning_rate = 1e-4
    config.train.weight_decay = 1e-4
    return config
