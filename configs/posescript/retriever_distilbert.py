"""PoseScript's later retriever: a transformer over frozen DistilBERT, with the released recipe for automatic captions.

For captions of people, from that network: --init FOLDER --set text.captions=human --set train.batch_size=32 --set train.epochs=200.
DistilBERT: --set text.distilbert=FOLDER.
"""

from chatpose_jax.posescript.config import posescript_config


def get_config():
    config = posescript_config("retriever")
    config.data.sources = (("posescript", 1.0),)
    config.model.text.encoder = "distilbert"
    config.train.batch_size = 512
    config.train.epochs = 1000
    return config
