"""The retriever of PoseScript's paper (ECCV 2022): a GRU over word vectors, with the released recipe.

PoseScript must be prepared first (docs/data-sets.md). The paper trains on automatic captions (text.captions=automatic), and then from that
network on those of people (text.captions=human, --init). Its words start as GloVe's vectors: --set text.vectors=glove.840B.300d.txt.
"""

from chatpose_jax.posescript.config import posescript_config


def get_config():
    config = posescript_config("retriever")
    config.data.sources = (("posescript", 1.0),)
    config.loss.directions = "t2p"
    return config
