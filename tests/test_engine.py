"""Many answers on one cache: each is what its conversation gets alone, however they come, stay and leave."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from chatpose_jax import engine as engines
from chatpose_jax.chat import ChatPose, check_settings
from chatpose_jax.engine import Engine
from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import init_params, unstack_layers
from chatpose_jax.models.config import HeadConfig, preset
from chatpose_jax.models.sharding import make_mesh, shardings
from chatpose_jax.processing.processor import tiny_processor

from .numerics import EPS, MARGIN

CONFIG = preset("tiny").replace(lora=None, scan_layers=False, head=HeadConfig("tests.model.toy_heads:Looking"))


def stacked():
    """A random model never ends and hardly ever shows a pose: both are raised a little, so that answers vary."""
    params = init_params(CONFIG.replace(scan_layers=True), jax.random.key(0))
    head = params["decoder"]["lm_head"]
    head["added"] = head["added"].at[:, 0].multiply(3.0)
    head["kernel"] = head["kernel"].at[:, CONFIG.eos_token_id].multiply(2.5)
    return params


@pytest.fixture(scope="module")
def params():
    return unstack_layers(stacked())


def make(params, slots, **settings):
    model = ChatPose(CONFIG, params, tiny_processor(CONFIG))
    model.engine = Engine(CONFIG, params, model.engine.tail.tolist(), slots=slots, **settings)
    return model


def user(text, image=None):
    content = [{"type": "text", "text": text}]
    if image is not None:
        pixels = np.random.default_rng(image).integers(0, 255, (64, 64, 3), np.uint8)
        content.insert(0, {"type": "image", "image": pixels})
    return {"role": "user", "content": content}


def ask(model, messages, tell=None, **settings):
    return model.engine.submit(model.request(messages, **check_settings(**settings)), tell)


def assert_same(found, expected):
    assert found.text == expected.text and found.finish_reason == expected.finish_reason
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert len(found.poses) == len(expected.poses)
    for x, y in zip(found.poses, expected.poses):
        np.testing.assert_allclose(x.matrices, y.matrices, atol=10 * MARGIN * EPS)


QUESTIONS = [
    ([user("One?")], {"max_new_tokens": 9}),
    ([user("Two, with an image, and a good deal longer, so that it is read in pieces?", 2)], {"max_new_tokens": 12, "force_pose": True}),
    ([user("Three?")], {"max_new_tokens": 3}),
    ([user("Four?")], {"max_new_tokens": 14, "temperature": 1.0, "seed": 4}),
    ([user("Five?", 5)], {"max_new_tokens": 6, "temperature": 1.0, "top_p": 0.7, "seed": 5, "force_pose": True}),
    ([user("Six?")], {"max_new_tokens": 20, "force_pose": True}),
]  # fmt: skip


def test_answers_that_come_and_go_are_what_each_gets_alone(params, monkeypatch):
    """More questions than rows, some with images, sampled or greedy, of all lengths, and a second turn of each."""
    monkeypatch.setattr(engines, "CHUNKS_OF_CPUS", (16, 32))
    model, alone = make(params, slots=3), make(params, slots=1)
    told = {}
    histories = [messages for messages, _ in QUESTIONS]
    for _turn in range(2):
        answers = []
        for number, (messages, (_, settings)) in enumerate(zip(histories, QUESTIONS)):
            answers.append(
                ask(model, messages, lambda answer: told.setdefault(answer, []).append(len(answer.tokens)), **settings)
            )
            if number % 2:
                model.engine.step()  # others are under way already
        model.engine.finish(answers)
        assert model.engine.idle
        following = []
        for messages, answer, (_, settings) in zip(histories, answers, QUESTIONS):
            alone.forget()
            assert_same(model.reply(answer), alone.chat(messages, **settings))
            assert told[answer] == sorted(told[answer]) and told[answer][-1] == len(answer.tokens)
            following.append([*messages, model.reply(answer).message, user("And then?")])
        histories = following


def test_a_prompt_that_begins_as_another_copies_its_row(params, monkeypatch):
    """Several answers to one question read it once, and look at its image once; a question after the same words reads only its own."""
    model, alone = make(params, slots=3), make(params, slots=1)
    question, seen, see = user("A long question about this image, please?", 7), [], engines.see
    monkeypatch.setattr(engines, "see", lambda *args, **settings: seen.append(1) or see(*args, **settings))
    settings = [{"max_new_tokens": 6, "temperature": 1.0, "seed": seed, "force_pose": True} for seed in range(3)]
    answers = [ask(model, [question], **each) for each in settings]
    model.engine.finish(answers)
    whole = len(answers[0].request.ids) - 1
    assert [answer.reused for answer in answers] == [0, whole, whole] and len(seen) == 1
    for answer, each in zip(answers, settings):
        alone.forget()
        assert_same(model.reply(answer), alone.chat([question], **each))
    other = [{"role": "user", "content": [*question["content"][:1], {"type": "text", "text": "Something else"}]}]
    beside = [ask(model, [question], max_new_tokens=6), ask(model, other, max_new_tokens=6)]
    model.engine.finish(beside)
    assert beside[1].reused >= CONFIG.image_tokens
    alone.forget()
    assert_same(model.reply(beside[1]), alone.chat(other, max_new_tokens=6))


def test_once_warm_nothing_is_compiled(params, monkeypatch):
    monkeypatch.setattr(
        engines, "CAPACITIES", (128, 256)
    )  # and 640: the cache also grows and shrinks by two steps at once
    model, compiled = make(params, slots=3, capacity=512), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    model.engine.warm(samples=4)
    assert compiled
    compiled.clear()
    turns = [user("a", 8), {"role": "assistant", "content": "It is <POSE>."}, user("b", 9)]
    long = [user("word " * 180)], {"max_new_tokens": 3}
    cases = [*3 * [([user("a")], {"max_new_tokens": 1})], long, *QUESTIONS, long, (turns, {"max_new_tokens": 5})]
    for messages, settings in cases:
        answers = [ask(model, messages, **settings), ask(model, messages, **settings), ask(model, [user("Gone")])]
        model.engine.step()
        model.engine.cancel(answers[-1])
        model.engine.finish(answers)
    assert not compiled


def test_several_conversations_go_on_where_they_were(params):
    model = make(params, slots=3)
    histories = [[user(f"Question {name}, which nobody else asks?")] for name in "abc"]
    lengths = [0] * 3
    for turn in range(3):
        for place, messages in enumerate(histories):
            answer = ask(model, messages, max_new_tokens=4)
            model.engine.finish([answer])
            assert answer.reused > lengths[place] - 4 if turn else answer.reused < 40
            lengths[place] = len(answer.request.ids) + len(answer.tokens)
            histories[place] = [*messages, model.reply(answer).message, user("More?")]


def test_a_long_prompt_does_not_stop_the_others(params, monkeypatch):
    monkeypatch.setattr(engines, "CHUNKS_OF_CPUS", (16,))
    model = make(params, slots=2)
    first = model.engine.submit(
        model.request([user("Short?")], every=1, **check_settings(max_new_tokens=40, temperature=1.0, seed=1))
    )
    while not first.tokens:
        model.engine.step()
    long = ask(model, [user("word " * 150)], max_new_tokens=2)
    before, steps = len(first.tokens), 0
    while not long.tokens and not first.done:
        model.engine.step()
        steps += 1
        assert len(first.tokens) == before + steps
    assert steps > 8
    model.engine.finish([first, long])


def test_a_short_question_is_read_before_a_long_prompt_which_is_read_all_the_same(params, monkeypatch):
    monkeypatch.setattr(engines, "CHUNKS_OF_CPUS", (16,))
    model = make(params, slots=2)
    long = ask(model, [user("word " * 150)], max_new_tokens=2)
    for _ in range(3):
        model.engine.step()
    pieces, steps = len(long.request.ids) // 16, 0
    for number in range(200):
        request = model.request([user(f"Short {number}?")], every=0, **check_settings(max_new_tokens=1))
        short = model.engine.submit(request)
        while not short.done and not long.done:
            model.engine.step()
            steps += 1
        if not number:
            own = -(-(len(request.ids) - 1) // 16)
            assert short.done and not long.tokens and steps == own < engines.TURNS  # as if it were alone
        if long.done:
            break
    assert pieces < steps <= engines.TURNS * pieces
    model.engine.finish([long, short])


def test_prompts_of_like_length_are_read_in_one_program(params, monkeypatch):
    model, alone, shapes, read = make(params, slots=5), make(params, slots=1), [], engines.read

    def spy(*args, **settings):
        shapes.append(args[3].shape)
        return read(*args, **settings)

    monkeypatch.setattr(engines, "read", spy)
    questions = [[user(f"{name} is asked?", number)] for number, name in enumerate("abcde")]
    replies = model.chat(questions, max_new_tokens=6)
    assert {rows for rows, _ in shapes} == {4, 1} and len(shapes) <= 4
    for question, reply in zip(questions, replies):
        alone.forget()
        assert_same(reply, alone.chat(question, max_new_tokens=6))


def test_the_cache_is_as_long_as_its_conversations_need(params):
    model, alone = make(params, slots=2), make(params, slots=1)
    least, most = engines.CAPACITIES[0], 1152  # the context, and room for a padded piece
    turns = [([user("Short?")], least), ([user("word " * 150)], most), ([user("Short again?")], most)]
    turns += [([user(f"Short, number {number}?")], None) for number in range(2)] + [([user("Short?")], least)]
    for messages, expected in turns:
        answer = ask(model, messages, max_new_tokens=5)
        model.engine.finish([answer])
        assert expected in (None, model.engine._state.cache.capacity)
        alone.forget()
        assert_same(model.reply(answer), alone.chat(messages, max_new_tokens=5))


def test_many_short_answers_leave_a_long_one_its_place(params):
    model, alone = make(params, slots=2), make(params, slots=1)
    question, settings = [user("Long? " * 30)], {"max_new_tokens": 220, "temperature": 1.0, "seed": 3}
    long = ask(model, question, **settings)
    for number in range(2 * model.engine.slots + 2):
        short = ask(model, [user(f"Short {number}?")], max_new_tokens=1)
        while not short.done:
            model.engine.step()
    assert not long.done
    model.engine.finish([long])
    assert_same(model.reply(long), alone.chat(question, **settings))


@pytest.mark.parametrize("more", [-1, 1])  # the answer has no place, or the prompt has none
def test_nothing_is_written_beyond_the_cache(params, monkeypatch, more):
    model = make(params, 1)
    model.chat([user("One?")], max_new_tokens=4)
    monkeypatch.setattr(Engine, "_reserve", lambda *_: None)
    request = model.request([user("Two?")], **check_settings(max_new_tokens=32))
    long = np.resize(request.ids[-4:], model.engine._state.cache.capacity + more)
    with pytest.raises(RuntimeError, match="places"):
        model.engine.finish([model.engine.submit(dataclasses.replace(request, ids=long, keys=long.astype(np.int64)))])


def test_the_cache_of_who_went_away_is_freed(params):
    model = make(params, slots=1)
    stream = model.stream([user("Tell me more")], max_new_tokens=50)
    next(stream)
    stream.close()
    model.forget()
    assert model.engine._state is None and model.engine.idle
    stream = model.stream([user("Tell me more")], max_new_tokens=50)
    next(stream)
    stream.close()
    model.chat([[user("One?")], [user("Two?")]], max_new_tokens=2)
    assert model.engine.slots == 2


def test_one_question_takes_no_rows_from_an_engine_that_was_given_several(params):
    model = make(params, slots=3)
    model.chat([user("One?")], max_new_tokens=2)
    model.chat([[user(f"{number}?")] for number in range(4)], max_new_tokens=2)
    assert model.engine.slots == 4
    model.chat([user("One?")], max_new_tokens=2)
    assert model.engine.slots == 3


def test_ctrl_c_in_one_thread_is_no_wrong_answer_in_another(params, monkeypatch):
    model, decode = make(params, slots=2), engines.decode
    other = ask(model, [user("y")], max_new_tokens=6)

    def interrupted(*args, **settings):
        decode(*args, **settings)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(engines, "decode", interrupted)
        model.chat([user("x")], max_new_tokens=6)
    with pytest.raises(UserError, match="interrupted"):
        model.engine.finish([other])
    model.chat([user("x")], max_new_tokens=6)


def test_an_answer_that_is_read_along_comes_as_often_as_eyes_need(params, monkeypatch):
    model, told = make(params, slots=1), []
    request = model.request([user("Tell?")], every=0, **check_settings(max_new_tokens=100, temperature=1.0, seed=3))
    monkeypatch.setattr(engines, "PACE", 1e9)
    answer = model.engine.submit(request, lambda answer: told.append(len(answer.tokens)))
    model.engine.finish([answer])
    steps = np.diff([0, *told])
    assert steps[0] == 1 and set(steps[1:-1]) <= {engines.STEPS} and len(told) > 2


def test_who_goes_away_frees_the_row_and_leaves_what_was_read(params):
    model = make(params, slots=1)
    told = []
    gone = ask(model, [user("Tell me more")], told.append, max_new_tokens=50, temperature=1.0, seed=3)
    waits = ask(model, [user("And me?")], max_new_tokens=4)
    never = ask(model, [user("Never mind")], max_new_tokens=4)
    for _ in range(3):
        model.engine.step()
    assert gone.tokens and model.engine.waiting == 2
    model.engine.cancel(gone)
    model.engine.cancel(never)
    model.engine.finish([waits])
    assert gone.done and never.done and not never.tokens and model.engine.idle and told[-1] is gone
    assert_same(model.reply(waits), make(params, slots=1).chat([user("And me?")], max_new_tokens=4))


def test_an_answer_that_is_done_or_cancelled_has_forgotten_who_listens(params):
    model = make(params, slots=1)
    requests = [model.request([user(text)], every=0, **check_settings(max_new_tokens=1)) for text in ("One", "Two")]
    heard = []
    first, second = (model.engine.submit(request, heard.append) for request in requests)
    model.engine.cancel(second)
    assert second.tell is None and first.tell is not None
    model.engine.finish([first])
    assert heard == [first] and first.tell is None


def test_threads_share_the_work(params):
    model, expected, found = make(params, slots=2), {}, {}
    alone = make(params, slots=1)
    for name in range(6):
        expected[name] = alone.chat([user(f"Thread {name}?")], max_new_tokens=8)

    def run(name):
        found[name] = model.chat([user(f"Thread {name}?")], max_new_tokens=8)

    threads = [threading.Thread(target=run, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(found) == list(range(6))
    for name, reply in found.items():
        assert_same(reply, expected[name])


def test_an_answer_that_fails_harms_no_other(params):
    """A row whose logits are not finite ends; a failure of the machine ends all, and the engine goes on."""
    model = make(params, slots=2)
    broken = ask(model, [user("x")], max_new_tokens=6)
    good = ask(model, [user("y")], max_new_tokens=6)
    model.engine.step()
    rows = model.engine._state.rows
    finite = rows.finite.at[0].set(False)
    model.engine._state = dataclasses.replace(model.engine._state, rows=dataclasses.replace(rows, finite=finite))
    with pytest.raises(UserError, match="NaN or infinities"):
        model.engine.finish([broken])
    model.engine.finish([good])
    assert_same(model.reply(good), make(params, slots=1).chat([user("y")], max_new_tokens=6))
    lost = ask(model, [user("z")], max_new_tokens=6)
    decode, engines.decode = engines.decode, None
    try:
        with pytest.raises(TypeError):
            model.engine.finish([lost])
    finally:
        engines.decode = decode
    assert_same(model.chat([user("y")], max_new_tokens=6), model.reply(good))


def test_over_a_mesh_it_answers_the_same(params):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = make_mesh(2, 1, 2, devices=jax.devices()[:4])
    whole = stacked()
    spread = unstack_layers(jax.device_put(whole, shardings(whole, mesh)))
    model, alone = make(spread, slots=2), make(params, slots=1)
    answers = [ask(model, messages, **settings) for messages, settings in QUESTIONS[:3]]
    model.engine.finish(answers)
    for answer, (messages, settings) in zip(answers, QUESTIONS):
        assert_same(model.reply(answer), alone.chat(messages, **settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"max_new_tokens": 60}, "the context is 64"), ({"max_new_tokens": 1, "force_pose": True}, "leaves no room for a pose")],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_at_once(params, settings, words):
    model = make(params, slots=1, capacity=64)
    with pytest.raises(UserError, match=words):
        ask(model, [user("x")], **settings)
    assert model.engine.idle
