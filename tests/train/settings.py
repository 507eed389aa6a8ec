"""Settings of a short LoRA run on few rows."""

from chatpose_jax.train.run_config import load_config

LORA = (
    "model.lora={'rank':2,'alpha':4.0,'dropout':0.0,'targets':('q_proj','v_proj')}", "train.steps=2", "train.batch_size=2",
    "data.sources.synthetic.train_size=8", "train.eval_every=0", "data.buckets=1", "data.sources.synthetic.tasks={'image': 1}",
)  # fmt: skip


def lora(*settings):
    return load_config("tiny", LORA + settings)
