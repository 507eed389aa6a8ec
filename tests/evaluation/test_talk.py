"""What tells whether a model still talks."""

import jax
import numpy as np
import optax
import pytest

from chatpose_jax.chat import ChatPose, Reply
from chatpose_jax.data import talk as questions
from chatpose_jax.evaluation import talk
from chatpose_jax.models.chatpose import bind, init_params, unstack_layers
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor

CONFIG = preset("tiny").replace(vision=None, lora=None)


@pytest.fixture(scope="module")
def model():
    params = unstack_layers(init_params(CONFIG, jax.random.key(0)))
    config = CONFIG.replace(scan_layers=False)
    return ChatPose(config, params, tiny_processor(config))


def likelihood(model, ids, first):
    logits = model_logits(model, ids)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits[:-1], np.asarray(ids[1:]))
    return np.asarray(nll)[first - 1 :]


def model_logits(model, ids):
    bound = bind(model.config, model.params)
    return bound.logits(bound(np.asarray([ids])).hidden)[0]


def test_perplexity_of_plain_text_is_the_mean_over_all_tokens(model):
    texts = ["A person kneels.", "The cat sat on the mat and looked at a person who squats."]
    rows = [[CONFIG.bos_token_id, *model.processor.tokenizer.encode(text)] for text in texts]
    expected = np.exp(np.concatenate([likelihood(model, row, 1) for row in rows]).mean())
    assert talk.text_perplexity(model, texts) == pytest.approx(expected, rel=1e-4)


def test_perplexity_of_answers_counts_their_words_alone(model):
    ids = np.array([*model.processor.tokenizer.encode("It is a cat"), CONFIG.pose_token_id], np.int32)
    reply = Reply("", [], ids, "stop", [])
    encoded = model.processor.encode(
        [{"role": "user", "content": "What?"}, {"role": "assistant", "ids": ids[:-1].tolist()}],
        add_generation_prompt=False,
    )
    row = encoded.input_ids[:-1] if encoded.input_ids[-1] == CONFIG.eos_token_id else encoded.input_ids
    expected = np.exp(likelihood(model, row.tolist(), len(row) - len(ids) + 1).mean())
    assert talk.answer_perplexity(model, ["What?"], [reply]) == pytest.approx(expected, rel=1e-4)


def test_answers_keep_the_order_of_their_questions(model):
    asked = ["A longer question than the others, is it not?", "Who?", "What is it?"]
    together = talk.answer_alone(model, asked, max_new_tokens=6, batch_size=2)
    for question, reply in zip(asked, together):
        alone = model.chat([{"role": "user", "content": question}], max_new_tokens=6)
        assert reply.ids.tolist() == alone.ids.tolist()


def test_repetition():
    assert talk.repetition("one two three four five") == 0
    assert talk.repetition("a b c d " * 4) == pytest.approx(1 - 4 / 13)
    assert talk.repetition("too short") == 0


def test_decisions_count_both_ways(model, monkeypatch):
    given = {"show": [object()], "show not": [], "talk": [], "talk not": [object()], "talk too": []}
    monkeypatch.setattr(
        talk,
        "answer_alone",
        lambda _, asked, **__: [Reply("", given[question], np.empty(0), "stop", []) for question in asked],
    )
    found = talk.decisions(model, ["show", "show not"], ["talk", "talk not", "talk too"])
    assert (found["given"], found["asked"], found["kept"], found["words"]) == (1, 2, 2, 3)
    assert (found["missed"], found["unasked"]) == (["show not"], ["talk not"])


def test_no_question_of_the_tests_is_practised():
    practised = {text.lower() for text in questions.texts("questions")}
    tested = [text.lower() for name in ("held_out", "ask_pose", "ask_words") for text in questions.texts(name)]
    assert len(set(tested)) == len(tested) == 250
    assert not practised & set(tested)
