"""Log-probabilities of given answers."""

import dataclasses

import jax
import numpy as np
import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.likelihood import first_layers, likelihoods
from chatpose_jax.models.chatpose import bind, init_params, unstack_layers
from chatpose_jax.models.config import HeadConfig, preset

TINY = preset("tiny").replace(lora=None, scan_layers=False)


@pytest.mark.parametrize("head", ["mlp", "queries"])
@pytest.mark.parametrize("scan", [False, True])
def test_the_shared_question_changes_nothing(head, scan):
    """Each answer has the log-probability of one run over question and answer, whatever runs beside it."""
    config = TINY.replace(head=HeadConfig(head), scan_layers=scan)
    params = init_params(config.replace(scan_layers=True), jax.random.key(0))
    params = params if scan else unstack_layers(params)
    random = np.random.default_rng(0)
    question = random.integers(3, 1000, 21).tolist()
    answers = [random.integers(3, 1000, size).tolist() for size in (1, 4, 9, 2, 7)]
    found = likelihoods(config, params, question, answers, batch=2)
    ids = np.array(
        [[*question, *answer, *[0] * (9 - len(answer))] for answer in answers]
    )  # what follows an answer cannot change it
    model = bind(config, params)
    hidden = jax.jit(lambda params: bind(config, params)(ids).hidden)(params)
    logs = jax.nn.log_softmax(model.logits(hidden))
    for row, answer, got in zip(logs, answers, found.log_probabilities, strict=True):
        expected = sum(float(row[len(question) - 1 + place, token]) for place, token in enumerate(answer))
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(found.states, hidden[0, : len(question)], atol=1e-4)


def test_the_first_layers_are_a_model():
    params = unstack_layers(init_params(TINY.replace(scan_layers=True), jax.random.key(0)))
    config, kept = first_layers(TINY, params, 1)
    assert config.text == dataclasses.replace(TINY.text, num_layers=1)
    states = likelihoods(config, kept, [5, 6, 7], []).states
    assert states.shape == (3, 128) and not np.allclose(states, likelihoods(TINY, params, [5, 6, 7], []).states)
    with pytest.raises(UserError, match="1 to 2"):
        first_layers(TINY, params, 3)


def test_bad_input_is_one_error():
    params = unstack_layers(init_params(TINY.replace(scan_layers=True), jax.random.key(0)))
    with pytest.raises(UserError, match="at least one token"):
        likelihoods(TINY, params, [5], [[6], []])
    with pytest.raises(UserError, match="context holds 1024"):
        likelihoods(TINY, params, [5] * 1020, [[6] * 5])
    params["decoder"]["norm"]["scale"] = params["decoder"]["norm"]["scale"] * np.nan
    with pytest.raises(UserError, match="NaN"):
        likelihoods(TINY, params, [5], [[6]])
