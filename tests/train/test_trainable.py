"""The table of what trains: assignment, counts, errors."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import LoRAConfig, preset
from chatpose_jax.train.trainable import (
    EVERYTHING,
    HEAD,
    PAPER,
    PROJECTOR,
    Rule,
    assign,
    describe_trainable,
    flatten,
    masks,
    merge,
    split,
    unflatten,
)


def count(flat):
    return sum(int(np.prod(leaf.shape)) for leaf in flat.values())


def test_the_papers_table_on_13b_without_allocating_it():
    trainable, frozen = split(abstract_params(preset("chatpose_13b")), PAPER)
    lora = {path: leaf for path, leaf in trainable.items() if "/lora_" in path}
    assert count(lora) == 40 * 2 * 2 * 5120 * 128 == 104_857_600
    assert count({path: leaf for path, leaf in trainable.items() if path.startswith("pose_head/")}) == 26_956_944
    assert count(trainable) == 104_857_600 + 26_956_944 + 2 * 5120
    assert all("q_proj" in path or "v_proj" in path for path in lora)
    assert not any(path.startswith("vision/") for path in trainable)
    assert "decoder/lm_head/kernel" in frozen
    assert "131,824,784 of 13,470,065,808 parameters train" in describe_trainable(
        abstract_params(preset("chatpose_13b")), PAPER
    )


def test_the_ready_tables_on_13b_without_allocating_it():
    config = preset("chatpose_13b")
    head, rows, papers = 26_956_944, 2 * 5120, 104_857_600
    projector = (1024 + 1) * 5120 + (5120 + 1) * 5120
    seven = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    everywhere = config.replace(lora=LoRAConfig(targets=seven))
    assert count(split(abstract_params(config), HEAD)[0]) == head
    assert count(split(abstract_params(config), PROJECTOR)[0]) == papers + head + rows + projector
    assert (
        count(split(abstract_params(everywhere), PAPER)[0]) == 40 * 128 * (8 * 5120 + 3 * (5120 + 13824)) + head + rows
    )
    assert not split(abstract_params(config), EVERYTHING)[1]
    slow = assign(abstract_params(config), PROJECTOR)
    assert (slow["projector/fc1/kernel"].lr, slow["pose_head/fc1/kernel"].lr) == (0.1, 1.0)
    groups = (Rule("pose_head/.*", 0.5), Rule(".*lora_a", 1.0), Rule(".*lora_b", 16.0), Rule(".*", None))
    assert {row.lr for row in assign(abstract_params(config), groups).values()} == {0.5, 1.0, 16.0, None}


def test_a_padded_vocabulary_trains_no_more_than_the_pose_tokens_rows():
    config = preset("chatpose_13b")
    padded = config.replace(text=dataclasses.replace(config.text, vocab_size=32064), pose_token_id=32002)
    text = describe_trainable(abstract_params(padded), PAPER)
    assert re.search(r"added \(of pose\) +2 +10,240 ", text) and "131,824,784 of" in text
    every = (*(rule._replace(tokens="all") for rule in PAPER),)
    assert re.search(r"added +2 +655,360 ", describe_trainable(abstract_params(padded), every))


def test_a_tied_model_has_one_mask():
    tied = preset("tiny").replace(text=dataclasses.replace(preset("tiny").text, tied=True))
    found = masks(abstract_params(tied), PAPER, 0)
    assert {path: mask.tolist() for path, mask in found.items()} == {"decoder/embed_tokens/added": [[True], [False]]}
    assert len(masks(abstract_params(preset("tiny")), PAPER, 0)) == 2


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_kernels_must_be_frozen(kind):
    config = preset("tiny").replace(quantize=kind)
    assert not any(path.endswith("kernel") for path in split(abstract_params(config), PAPER)[0] if "layers" in path)
    with pytest.raises(
        UserError, match=rf"attn/\w+/(kernel is {kind}|group_scale is a scale of codes) and cannot train"
    ):
        assign(abstract_params(config), EVERYTHING)
    with pytest.raises(UserError, match=r"decoder/layers/attn/\w+/(kernel|group)_scale is a scale of codes and cannot"):
        assign(abstract_params(config), (Rule(".*scale", 1.0), Rule(".*", None)))


def test_split_and_merge_are_inverse():
    params = abstract_params(preset("tiny"))
    again = merge(*split(params, PAPER))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert jax.tree.structure(unflatten(flatten(params))) == jax.tree.structure(params)


def test_the_first_row_that_matches_decides():
    rows = assign(abstract_params(preset("tiny")), (Rule("pose_head/.*", 0.5, 0.1), *EVERYTHING))
    assert rows["pose_head/fc1/kernel"] == Rule("pose_head/.*", 0.5, 0.1)
    assert rows["projector/fc1/kernel"].weight_decay == 0.01
    assert rows["projector/fc1/bias"].weight_decay == 0


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ((Rule("pose_head/.*", 1.0),), "no row matches"),
        ((Rule("pose_heads/.*", 1.0), Rule(".*", None)), "matches no parameter"),
        ((Rule("(", 1.0),), "not a valid regular expression"),
        ((Rule("pose_head/.*", 1.0, tokens="pose"), Rule(".*", None)), "pose_head/.* has no rows of tokens"),
        ((Rule(".*", None),), "nothing would train"),
    ],
)
def test_a_wrong_table_is_one_clear_error(rules, words):
    with pytest.raises(UserError, match=words):
        assign(abstract_params(preset("tiny")), rules)


def test_a_pattern_must_match_the_whole_path():
    with pytest.raises(UserError, match="matches no parameter"):
        assign(abstract_params(preset("tiny")), (Rule("pose_head", 1.0), Rule(".*", None)))


def test_rows_about_parts_that_a_model_lacks_match_nothing():
    """The projector of a model without tower, the LM head of a tied one; a misspelt row stays an error."""
    tiny = preset("tiny")
    blind = tiny.replace(vision=None, text=dataclasses.replace(tiny.text, tied=True))
    params = abstract_params(blind)
    assert not [path for path in flatten(params) if path.startswith(("vision", "projector", "decoder/lm_head"))]
    head = Rule("decoder/lm_head/added", 1.0)
    assigned = assign(params, (head, Rule("vision/layers/.*", 0.1), *PROJECTOR))
    assert {path for path, row in assigned.items() if row.lr is not None} == {
        path for path in flatten(params) if re.search(r"lora_|pose_head|added", path)
    }
    assert re.search(r"projector/\.\* +0 +0 ", describe_trainable(params, PROJECTOR))
    assert list(masks(params, PAPER, 0)) == ["decoder/embed_tokens/added"]
    for pattern in ("projecter/.*", "vision/class_embeding"):
        with pytest.raises(UserError, match="matches no parameter"):
            assign(params, (Rule(pattern, 1.0), *PAPER))
