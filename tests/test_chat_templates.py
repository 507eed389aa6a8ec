"""Chats with byte-level tokenizers, on tiny random models: later turns reuse the cache, also where a template writes past answers in another way."""

import dataclasses

import jax
import numpy as np
import pytest

from chatpose_jax.chat import ChatPose
from chatpose_jax.engine import Engine
from chatpose_jax.models.chatpose import init_params, unstack_layers
from chatpose_jax.models.config import preset
from chatpose_jax.processing.conversation import TEMPLATES
from chatpose_jax.processing.processor import ModelIds, Processor

from .byte_level import model_config, text_tokenizer


def random_model(kind, name):
    said, tiny = model_config(kind, name), preset("tiny")
    text = dataclasses.replace(tiny.text, vocab_size=said.text.vocab_size, base_vocab_size=said.text.base_vocab_size)
    ids = {key: getattr(said, key) for key in ("pose_token_id", "image_token_id", "bos_token_id", "eos_token_id")}
    config = tiny.replace(text=text, lora=None, scan_layers=False, **ids)
    params = unstack_layers(init_params(config.replace(scan_layers=True), jax.random.key(0)))
    return ChatPose(config, params, Processor(text_tokenizer(kind), ModelIds.of(config), name))


@pytest.mark.parametrize(("kind", "name"), [("smollm2", "chatml"), ("qwen", "qwen3")])
def test_later_turns_reuse_the_cache_and_change_nothing(kind, name, monkeypatch):
    model, answers, submit = random_model(kind, name), [], Engine.submit

    def watched(engine, request, *args):
        answers.append(submit(engine, request, *args))
        return answers[-1]

    monkeypatch.setattr(Engine, "submit", watched)
    messages, kept = [], 0
    for turn in range(2):
        messages.append({"role": "user", "content": f"Question {turn}: isn't it <|im_end|>?"})
        reply = model.chat(messages, max_new_tokens=12, force_pose=True)
        answer = answers.pop()
        fresh = ChatPose(model.config, model.params, model.processor, model.body).chat(
            messages, max_new_tokens=12, force_pose=True
        )
        assert not answers.pop().reused
        assert reply.text == fresh.text and reply.text.endswith(" It is <POSE>.")
        np.testing.assert_array_equal(reply.ids, fresh.ids)
        np.testing.assert_allclose(reply.poses[0].matrices, fresh.poses[0].matrices, atol=1e-5)
        if turn:  # all of the past, or all before the last answer
            past = TEMPLATES[name].past
            lost = 12 if past is None else 12 + len(model.processor.tokenizer.encode("\n\n")) + 2
            assert kept - lost <= answer.reused <= kept
            assert (answer.reused == kept) == (past is None)
        kept = len(answer.request.ids) + len(answer.tokens) - 1
        messages.append(reply.message)


def test_a_forced_answer_follows_a_space_or_stands_alone():
    model = random_model("smollm2", "chatml")
    room = len(model.engine.tail)
    for tokens in (room, room + 6):
        question = [{"role": "user", "content": "Hi"}]
        reply = model.chat(question, max_new_tokens=tokens, force_pose=True)
        stream = model.stream(question, max_new_tokens=tokens, force_pose=True)
        assert "".join(stream) == reply.text == stream.reply.text
        assert reply.text == "It is <POSE>." if tokens == room else reply.text.endswith(" It is <POSE>.")
