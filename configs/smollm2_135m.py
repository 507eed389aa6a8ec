"""SmolLM2-135M-Instruct becomes a ChatPose that talks, in about 90 minutes on two CPU cores by estimate: ``chatpose pretrained``, docs/pretrained.md.

Any other base works too; larger ones want a smaller rate, and bfloat16 on a GPU.
"""

from chatpose_jax.train.run_config import run_config


def get_config():
    config = run_config(model="smollm2_135m")  # sizes and ids are those of the base, whichever it is

    config.model.lora.rank = 16
    config.model.lora.alpha = 32.0
    config.model.lora.dropout = 0.0
    config.model.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config.model.dtype = config.model.param_dtype = "bfloat16"

    # The poses lie in the states of all words of the untouched base; "mlp" reads only the last one (docs/pretrained.md).
    config.model.head.name = "queries"
    config.model.head.options = (("hidden", 256), ("heads", 8), ("standardise", True), ("recency", True))

    # Descriptions alone would teach it to answer everything with a pose, and one turn alone to forget that there are more.
    poses = {"text": 8, "asked": 5, "text_short": 1, "situation": 1, "figure": 2, "text_turns": 2, "words": 1}
    config.data.sources = (
        (
            "joined",
            1.0,
            {
                "of": (("synthetic", 5.0, {"tasks": poses, "train_size": 40000}), ("jsonlines", 1.0)),
                "parts": (1, 2),
                "train_size": 8000,
            },
        ),
    )
    config.data.packing = True  # all rows of one shape: nothing is padded, and one program is compiled

    config.train.steps = 500
    config.train.batch_size = 3
    config.train.accumulate = 1
    config.train.max_length = 256
    config.train.learning_rate = 3e-4
    config.train.warmup_steps = 40
    config.train.b2 = 0.99
    config.train.lambda_pose = 3.0
    config.train.pose_loss = (("matrices", 1.0), ("joints", 1.0))
    # The head starts from nothing and learns by Muon, at a rate of its own; the adapters are AdamW's.
    config.train.optimizer = "muon"
    config.train.trainable = (
        ("decoder/layers/.*/lora_[ab]", 1.0),
        ("pose_head/.*", 3.0),
        ("decoder/(embed_tokens|lm_head)/added", 3.0, 0.0, "pose"),
        (".*", None),
    )
    config.train.head_start.batches = 700
    config.train.head_start.steps = 1500
    config.train.head_start.rate = 5.0
    config.train.mesh.fsdp = 1
    config.train.remat = "none"
    config.train.save_every = 100
    config.train.eval_every = 0
    return config
