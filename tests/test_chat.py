"""The Python API on a tiny random model whose answers are rigged: text, poses, history, cache reuse, batches, errors."""

import base64
import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import chatpose_jax
from chatpose_jax.chat import ChatPose, Stream
from chatpose_jax.engine import Engine
from chatpose_jax.errors import UserError
from chatpose_jax.generate import Sampling, generate
from chatpose_jax.models.chatpose import abstract_params, bind, init_params, stack_layers, unstack_layers
from chatpose_jax.models.config import HeadConfig, preset
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.weights.save import save_folder
from smpl_jax import PosedBody, load_body
from tests.numerics import EPS, MARGIN, agree, rounded

CONFIG = preset("tiny").replace(lora=None, scan_layers=False)


@pytest.fixture(scope="module")
def params():
    params = unstack_layers(init_params(CONFIG.replace(scan_layers=True), jax.random.key(0)))
    # A random model never ends and hardly ever shows a pose: raise both a little, so that answers vary.
    head = params["decoder"]["lm_head"]
    head["added"] = head["added"].at[:, 0].multiply(3.0)
    head["kernel"] = head["kernel"].at[:, CONFIG.eos_token_id].multiply(2.5)
    return params


@pytest.fixture
def model(params):
    return ChatPose(CONFIG, params, tiny_processor(CONFIG))


def make_image(seed):
    return np.random.default_rng(seed).integers(0, 255, (80, 100, 3), dtype=np.uint8)


def user(text, *images):
    return {
        "role": "user",
        "content": [{"type": "image", "image": i} for i in images] + [{"type": "text", "text": text}],
    }


def fresh(model):
    return ChatPose(model.config, model.params, model.processor, model.body)


def assert_same(a, b):
    assert a.text == b.text
    np.testing.assert_array_equal(a.ids, b.ids)
    assert len(a.poses) == len(b.poses)
    for x, y in zip(a.poses, b.poses):
        # A fresh head makes 6D vectors near the identity's, where orthogonalising magnifies nothing: 2e-5 is ten times the bound of geometry.
        np.testing.assert_allclose(x.matrices, y.matrices, atol=10 * MARGIN * EPS)


def test_every_pose_token_has_its_pose(model):
    replies = [model.chat([user(f"Person {i}?")], max_new_tokens=24) for i in range(8)]
    for reply in replies:
        assert len(reply.poses) == reply.text.count("<POSE>") == int((reply.ids == CONFIG.pose_token_id).sum())
    assert sum(len(reply.poses) for reply in replies) > 0
    assert {reply.finish_reason for reply in replies} <= {"stop", "length"}


def test_force_pose_gives_one_pose_where_none_is_offered(params):
    silent = {**params, "decoder": {**params["decoder"], "lm_head": dict(params["decoder"]["lm_head"])}}
    head = silent["decoder"]["lm_head"]
    head["added"] = head["added"] * 0  # the logit of a pose is 0, never the highest
    model = ChatPose(CONFIG, silent, tiny_processor(CONFIG))
    assert model.chat([user("Hello?")], max_new_tokens=16).poses == []
    reply = model.chat([user("Hello?")], max_new_tokens=16, force_pose=True)
    assert len(reply.poses) == 1
    assert reply.text.endswith("<POSE>.")
    assert reply.finish_reason == "stop"


@pytest.mark.parametrize("force_pose", [False, True])
def test_an_answer_ends_at_any_of_its_ends(model, force_pose):
    """Here another end is a token of the answer that the model gives without it."""
    question = [user("Tell me more")]
    whole = model.chat(question, max_new_tokens=20)
    place = next(n for n, id in enumerate(whole.ids) if n > 1 and id not in [*whole.ids[:n], CONFIG.pose_token_id])
    ending = ChatPose(
        CONFIG.replace(other_eos_token_ids=(3, int(whole.ids[place]))), model.params, model.processor, model.body
    )
    reply = ending.chat(question, max_new_tokens=20, force_pose=force_pose)
    forced = ending.engine.tail.tolist()[:-1] if force_pose and CONFIG.pose_token_id not in whole.ids[:place] else []
    assert reply.ids.tolist() == [*whole.ids[:place], *forced]
    assert reply.finish_reason == "stop"
    stream = fresh(ending).stream(question, max_new_tokens=20, force_pose=force_pose)
    assert "".join(stream) == reply.text
    assert [*reply.message["ids"]] == reply.ids.tolist()
    with pytest.raises(UserError, match="other_eos_token_ids must be ids of the vocabulary of 1026 rows"):
        CONFIG.replace(other_eos_token_ids=(1026,))


def test_later_turns_reuse_the_cache_and_change_nothing(model, monkeypatch):
    answers, submit = [], Engine.submit

    def spy(engine, request, *args):
        answers.append(submit(engine, request, *args))
        return answers[-1]

    monkeypatch.setattr(Engine, "submit", spy)
    messages = []
    for turn, question in enumerate(
        [user("Who is this?", make_image(0)), user("And this?", make_image(1)), user("Why?")]
    ):
        messages.append(question)
        reply = model.chat(messages, max_new_tokens=12, force_pose=turn == 1)
        assert_same(reply, fresh(model).chat(messages, max_new_tokens=12, force_pose=turn == 1))
        messages.append(reply.message)
    assert not any(answer.reused for answer in answers[1::2])
    kept = answers[0::2]
    assert kept[1].reused > CONFIG.vision.num_patches, "the first image was computed again"
    assert len(kept[2].request.ids) - kept[2].reused < 20


def test_another_image_is_not_taken_for_the_first(model):
    model.chat([user("Who is this?", make_image(0))], max_new_tokens=4)
    again = model.chat([user("Who is this?", make_image(1))], max_new_tokens=12)
    assert_same(again, fresh(model).chat([user("Who is this?", make_image(1))], max_new_tokens=12))


def test_a_batch_equals_its_rows_in_both_turns(model):
    conversations = [
        [user("One?")],
        [user("Two, with an image?", make_image(2))],
        [user("Three, which is a longer question than the others?")],
    ]
    for _ in range(2):
        replies = model.chat(conversations, max_new_tokens=10, force_pose=True)
        for conversation, reply in zip(conversations, replies):
            assert_same(reply, fresh(model).chat(conversation, max_new_tokens=10, force_pose=True))
        conversations = [[*c, r.message, user("And then?")] for c, r in zip(conversations, replies)]


def test_stream_yields_the_text(model):
    question, settings = [user("Tell me more")], {"max_new_tokens": 20, "force_pose": True}
    stream = model.stream(question, **settings)
    with pytest.raises(UserError, match="the answer is not complete"):
        _ = stream.reply
    text = "".join(stream)
    assert text.strip() == stream.reply.text.strip()
    assert_same(stream.reply, fresh(model).chat(question, **settings))
    assert list(stream) == []
    assert stream.reply.text.strip() == text.strip(), "reading on past the end loses nothing"

    def pieces():
        return (yield from model.stream(question, **settings))  # the value of a generator, as before

    generator, seen = pieces(), []
    while True:
        try:
            seen.append(next(generator))
        except StopIteration as end:
            assert_same(end.value, stream.reply)
            break
    assert "".join(seen) == text


def test_a_stream_that_nobody_reads_on_keeps_nobody_from_an_answer(model):
    question = [user("Tell me more")]
    stream = model.stream(question, max_new_tokens=20)
    begun = next(stream)
    other = [user("And another one?")]
    assert_same(model.chat(other, max_new_tokens=8), fresh(model).chat(other, max_new_tokens=8))
    assert "".join(model.stream(other, max_new_tokens=8)).strip() == model.chat(other, max_new_tokens=8).text.strip()
    assert begun + "".join(stream) == stream.reply.text
    assert_same(stream.reply, fresh(model).chat(question, max_new_tokens=20))
    stream = model.stream(question, max_new_tokens=20)
    next(stream)
    stream.close()
    assert model.engine.active == 1 and model.chat(question, max_new_tokens=2) and model.engine.idle
    assert list(stream) == []
    with pytest.raises(UserError, match="the answer is not complete"):
        _ = stream.reply
    for _ in model.stream(question, max_new_tokens=20):
        break
    model.chat(question, max_new_tokens=2)
    with model.stream(question, max_new_tokens=20) as stream:
        next(stream)
    assert_same(model.chat(question, max_new_tokens=8), fresh(model).chat(question, max_new_tokens=8))


def test_a_stream_may_end_in_another_thread(model):
    stream = model.stream([user("Tell me more")], max_new_tokens=6)
    next(stream)
    thread = threading.Thread(target=list, args=(stream,))
    thread.start()
    thread.join()
    assert isinstance(stream.reply.text, str)
    assert isinstance(model.chat([user("x")], max_new_tokens=2).text, str)


def test_sampling_repeats_by_seed(model):
    settings = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9}
    texts = [model.chat([user("Hm?")], seed=seed, **settings).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_images_as_path_array_pil_and_openai_are_the_same(model, tmp_path):
    Image.fromarray(make_image(3)).save(tmp_path / "p.png")
    uri = "data:image/png;base64," + base64.b64encode((tmp_path / "p.png").read_bytes()).decode()
    openai = [{"type": "image_url", "image_url": {"url": uri, "detail": "low"}}, {"type": "text", "text": "This?"}]
    sources = [make_image(3), Image.fromarray(make_image(3)), tmp_path / "p.png", str(tmp_path / "p.png")]
    questions = [*(user("This?", source) for source in sources), {"role": "user", "content": openai}]
    replies = [model.chat([question], max_new_tokens=6) for question in questions]
    for reply in replies[1:]:
        assert_same(reply, replies[0])


def test_load_gives_the_model_that_was_saved(params, model, tmp_path):
    stacked = CONFIG.replace(scan_layers=True)
    save_folder(tmp_path / "m", stacked, stack_layers(params), processor=model.processor)
    loaded = chatpose_jax.load(tmp_path / "m")
    question = [user("Who is this?", make_image(0))]
    assert_same(
        loaded.chat(question, max_new_tokens=8, force_pose=True),
        model.chat(question, max_new_tokens=8, force_pose=True),
    )
    half = chatpose_jax.load(tmp_path / "m", dtype="bfloat16")
    assert half.params["decoder"]["lm_head"]["kernel"].dtype == "bfloat16"
    assert half.chat(question, max_new_tokens=4, force_pose=False).finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "multiplies, memory, expected", [(True, 1 << 40, "bfloat16"), (False, 1 << 40, "float32"), (False, 0, "bfloat16")]
)
def test_a_bfloat16_folder_is_float32_where_that_is_faster_and_fits(
    params, model, tmp_path, monkeypatch, multiplies, memory, expected
):
    half = CONFIG.replace(scan_layers=True, dtype="bfloat16", param_dtype="bfloat16")
    stored = jax.tree.map(lambda x, like: x.astype(like.dtype), stack_layers(params), abstract_params(half))
    save_folder(tmp_path / "m", half, stored, processor=model.processor)
    monkeypatch.setattr("chatpose_jax.models.arithmetic._multiplies_bfloat16", lambda cpuinfo: multiplies)
    monkeypatch.setattr("chatpose_jax.chat.available_memory", lambda: memory)
    loaded = chatpose_jax.load(tmp_path / "m")
    assert loaded.config.dtype == loaded.config.param_dtype == expected
    found, kernel = loaded.params["decoder"]["lm_head"]["kernel"], stored["decoder"]["lm_head"]["kernel"]
    assert found.dtype == expected and (found == kernel).all()


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "message"),
        ([{"role": "robot", "content": "x"}], "role"),
        ([user("x"), user("y")], "user"),
        ([user("x", "nowhere.png")], r"nowhere\.png"),
        ([user("x", "https://example.org/a.png")], r"content\[0\].*never fetched; download it"),
        ([user("word " * 1200)], "context"),
    ],
)
def test_bad_messages_are_one_clear_error(model, messages, words):
    with pytest.raises(UserError, match=words):
        model.chat(messages)


def test_an_error_leaves_the_conversation_usable(model):
    with pytest.raises(UserError):
        model.chat([user("x", "nowhere.png")])
    assert isinstance(model.chat([user("x")], max_new_tokens=4).text, str)


def test_weights_that_are_no_numbers_are_an_error(params):
    """In the decoder, and in the pose head alone; the streamed answer too."""
    broken = {
        **params,
        "decoder": {**params["decoder"], "norm": {"scale": params["decoder"]["norm"]["scale"].at[0].set(np.nan)}},
    }
    model = ChatPose(CONFIG, broken, tiny_processor(CONFIG))
    for _ in range(2):
        with pytest.raises(UserError, match="NaN or infinities"):
            model.chat([user("x")], max_new_tokens=4)
        with pytest.raises(UserError, match="NaN or infinities"):
            next(model.stream([user("x")], max_new_tokens=4))
    head = {
        **params["pose_head"],
        "fc2": {**params["pose_head"]["fc2"], "bias": params["pose_head"]["fc2"]["bias"].at[0].set(np.nan)},
    }
    model = ChatPose(CONFIG, {**params, "pose_head": head}, tiny_processor(CONFIG))
    with pytest.raises(UserError, match="weights of the pose head"):
        model.chat([user("x")], max_new_tokens=8, force_pose=True)


def test_bad_folders():
    with pytest.raises(UserError, match="no such folder"):
        chatpose_jax.load("nowhere")
    with pytest.raises(UserError, match="a file; expected a model folder"):
        chatpose_jax.load(__file__)


BAD_SETTINGS = [
    ("max_new_tokens", value, "a whole number of at least 1") for value in (0, -1, 8.5, True, None, "8", [8], np.float32(8))
] + [
    ("temperature", value, r"0 \(greedy\) or between 1e-6 and 1e6") for value in (-1.0, np.nan, np.inf, 1e-30, 1e30, True, None, "1", [1.0], 1j)
] + [
    ("top_p", value, "between 1e-6 and 1") for value in (0.0, 1.5, -0.1, np.nan, True, None, "0.5", np.ones(2))
] + [
    ("seed", value, r"a whole number in \[0, 4294967295\]") for value in (None, 1.5, -1, 2**32, True, "1", np.bool_(True))
] + [
    ("force_pose", value, "True or False") for value in (None, 1, "yes", np.ones(2, bool))
] + [
    ("samples", value, "a whole number of at least 1") for value in (0, 1.5, True, None, "2")
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "words"), BAD_SETTINGS)
def test_a_bad_setting_is_one_clear_error_at_once(model, name, value, words):
    with pytest.raises(UserError, match=f"^{name} must be {words}, found ") as raised:
        model.chat([user("x")], **{name: value})
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=f"^{name} must be {words}, found "):
        model.stream([user("x")], **{name: value})


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None, "2"])
def test_pieces_of_no_tokens_are_refused(model, every):
    with pytest.raises(UserError, match=r"^every must be a whole number of at least 1, found "):
        model.stream([user("x")], every=every)


def test_numbers_of_numpy_and_jax_are_numbers(model):
    plain = model.chat([user("Hm?")], max_new_tokens=9, temperature=0.5, top_p=0.5, seed=3)
    others = {
        "max_new_tokens": np.int64(9),
        "temperature": np.float32(0.5),
        "top_p": jnp.float32(0.5),
        "seed": np.uint8(3),
    }
    assert_same(model.chat([user("Hm?")], **others, force_pose=np.bool_(False)), plain)
    assert Sampling(temperature=1, seed=jnp.int32(5)) == Sampling(temperature=1.0, seed=5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"folder": 3}, "folder must be a path, or None .*found int"),
        ({"dtype": "float8"}, "dtype must be float32, bfloat16, float16 or None, found 'float8'"),
        ({"dtype": np.float32}, "dtype must be float32, .*found <class"),
        ({"body": 3}, "body must be a path, .* found int"),
        ({"head": 3}, "head must be 'package.module:Class', the class or None, found int"),
        ({"mesh": "all"}, "mesh must be a jax.sharding.Mesh or None, found str"),
        ({"dtpe": "float32"}, "no option 'dtpe'; did you mean dtype"),
        ({"visoin": "clip"}, "no option 'visoin'; did you mean vision"),
    ],
)
def test_load_checks_its_arguments(options, words):
    with pytest.raises(UserError, match=words):
        chatpose_jax.load(**{"folder": "nowhere", **options})


def test_a_model_is_made_of_its_parts(params):
    processor = tiny_processor(CONFIG)
    for name, parts in {
        "config": (None, params, processor),
        "params": (CONFIG, None, processor),
        "processor": (CONFIG, params, "tiny"),
        "body": (CONFIG, params, processor, "body.npz"),
    }.items():
        with pytest.raises(UserError, match=f"^{name} must be "):
            ChatPose(*parts)


@pytest.mark.parametrize(
    ("prompts", "images", "settings", "words"),
    [
        ([], None, {}, "prompts must be at least one array of ids"),
        ([[]], None, {}, "none may be empty"),
        ([[5]], None, {"stream_every": 0}, "stream_every must be a whole number of at least 1"),
        ([[5]], None, {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ([[5]], None, {"sampling": {"seed": 1}}, "sampling must be a chatpose_jax.generate.Sampling, found dict"),
        ([[5]], [], {}, "one list for each of 1 prompts"),
        ([[5]], [[np.zeros((1, 1, 3), np.float32)]], {}, "prompt 0 has 0 image placeholders and 1 images"),
        ([[CONFIG.image_token_id] * CONFIG.vision.num_patches], None, {}, "and 0 images"),
        ([[CONFIG.image_token_id] * CONFIG.vision.num_patches], [[np.zeros((1, 1, 3))]], {}, r"found \(1, 1, 3\) in row 0"),
    ],
)  # fmt: skip
def test_generation_checks_its_arguments(params, prompts, images, settings, words):
    with pytest.raises(UserError, match=words):
        generate(CONFIG, params, prompts, images, **settings)


def test_the_model_in_a_folder_of_a_training_is_found(params, model, tmp_path):
    from chatpose_jax.weights.export import export

    (tmp_path / "demo").mkdir()
    with pytest.raises(UserError, match="demo: not a model folder"):
        chatpose_jax.load(tmp_path / "demo")
    folder = save_folder(
        tmp_path / "demo/model", CONFIG.replace(scan_layers=True), stack_layers(params), processor=model.processor
    )
    question = [user("Who is this?")]
    assert_same(
        chatpose_jax.load(tmp_path / "demo").chat(question, max_new_tokens=4), model.chat(question, max_new_tokens=4)
    )
    with pytest.raises(UserError, match=f"demo: not a model folder.*; give {folder} instead"):
        export(tmp_path / "demo", tmp_path / "out", "transformers")


def test_an_answer_is_one_line(model):
    reply = model.chat([user("Hello?")], max_new_tokens=16, force_pose=True)
    for value, words in (
        (reply, f"{len(reply.poses)} poses, "),
        (reply.poses[0], "PosedBody(pose=Pose(rotations=float32 (24, 3, 3), frame='camera', "),
        (model, "body 'chatpose-default'"),
        (model.body, "6890 vertices"),
        (model.processor.encode([user("x", make_image(0))]), "images=[float32 (64, 64, 3)]"),
        (model.stream([user("x")]), "Stream"),
    ):
        text = repr(value)
        assert words in text
        assert "\n" not in text
        assert len(text) < 700


def test_stream_is_public():
    assert chatpose_jax.Stream is Stream


def with_head(params, name):
    """The same model with one of ``tests.model.toy_heads``, and that head's fresh weights."""
    config = CONFIG.replace(head=HeadConfig(f"tests.model.toy_heads:{name}"))
    head = init_params(config.replace(scan_layers=True), jax.random.key(1))["pose_head"]
    return ChatPose(config, {**params, "pose_head": head}, tiny_processor(config))


@functools.partial(jax.jit, static_argnums=0)
def poses_of_one_pass(config, params, ids, mask, pixels, index):
    model = bind(config, params)
    hidden = model(ids, attention_mask=mask, pixel_values=pixels).hidden
    return model.poses(model.states(hidden, index), jax.random.key(0)).rotations[0]


def check_against_one_pass(model, messages, reply):
    """A reply's poses are those of one forward pass over prompt, images and answer; padded, so that it is compiled once or twice."""
    prompt = model.processor.encode(messages)
    places = np.flatnonzero(reply.ids == model.config.pose_token_id) + len(prompt.input_ids)
    whole = np.concatenate([prompt.input_ids, reply.ids])
    ids, index = np.zeros((1, 256), np.int32), np.zeros((1, 16), np.int32)
    ids[0, : len(whole)], index[0, : len(places)] = whole, places - 1
    mask = np.arange(256)[None] < len(whole)
    pixels = np.stack(prompt.images)[None] if prompt.images else None
    stacked = model.config.replace(scan_layers=True)
    expected = rounded(
        lambda params: poses_of_one_pass(stacked, params, ids, mask, pixels, index), stack_layers(model.params)
    )
    agree(expected[: len(places)], [pose.matrices for pose in reply.poses])


def test_a_head_that_reads_the_conversation_sees_all_of_it(params):
    """In a batch of two lengths, in a later turn that reuses the cache, and streamed: what one forward pass shows it."""
    model = with_head(params, "Looking")
    conversations = [
        [user("Who is this, and how do they stand?", make_image(4))],
        [user("One?")],
    ]
    for _ in range(2):
        replies = model.chat(conversations, max_new_tokens=10, force_pose=True)
        for messages, reply in zip(conversations, replies):
            check_against_one_pass(model, messages, reply)
        conversations = [[*c, r.message, user("And then?")] for c, r in zip(conversations, replies)]
    stream = fresh(model).stream(conversations[0], max_new_tokens=10, force_pose=True)
    "".join(stream)
    check_against_one_pass(model, conversations[0], stream.reply)
    shown = [user("Who is this, and how do they stand?", make_image(5)), *conversations[0][1:]]
    other = fresh(model).stream(shown, max_new_tokens=10, force_pose=True)
    "".join(other)
    with pytest.raises(AssertionError):  # so that the comparison can see another image
        check_against_one_pass(model, conversations[0], other.reply)


def test_samples_repeat_by_seed_and_the_first_is_always_the_same(params):
    model, question = with_head(params, "Drawing"), [user("Kneel.")]
    settings = {"max_new_tokens": 10, "force_pose": True}
    one, again, other = (model.chat(question, seed=seed, **settings) for seed in (1, 1, 2))
    assert one.text == other.text, "greedy text does not depend on the seed"
    assert_same(one, again)
    assert np.abs(one.poses[0].matrices - other.poses[0].matrices).max() > 1e-3
    stream = model.stream(question, seed=1, samples=3, **settings)
    "".join(stream)
    for reply in (model.chat(question, seed=1, samples=3, **settings), stream.reply):
        assert [len(drawn) for drawn in reply.samples] == [3] * len(reply.poses)
        assert_same(reply, one)
        for pose, drawn in zip(reply.poses, reply.samples):
            assert drawn[0] is pose
            assert np.abs(drawn[1].matrices - drawn[2].matrices).max() > 1e-3


def test_samples_of_a_head_that_draws_nothing_are_refused_at_once(model):
    reply = model.chat([user("Hi")], max_new_tokens=8, force_pose=True)
    assert reply.samples == [[pose] for pose in reply.poses]
    for ask in (model.chat, model.stream):
        with pytest.raises(UserError, match=r"^samples=2: the pose head 'mlp' does not draw samples"):
            ask([user("Hi")], samples=2)


def test_shape_and_place_that_a_head_gives_are_in_the_reply(params, tmp_path):
    reply = with_head(params, "Drawing").chat([user("Kneel.")], max_new_tokens=8, force_pose=True)
    pose = reply.poses[0]
    assert isinstance(pose, PosedBody)
    assert (pose.pose.betas.shape, pose.pose.translation.shape, pose.pose.frame) == ((10,), (3,), "camera")
    assert len(pose.to_json()["betas"]) == 10
    np.testing.assert_array_equal(np.load(pose.save(tmp_path / "pose.npz"))["betas"], pose.pose.betas)


def test_a_body_that_cannot_have_the_heads_shape_is_refused_before_it_answers(params):
    model, body = with_head(params, "Drawing"), load_body()
    few = dataclasses.replace(body, num_betas=4)
    with pytest.raises(
        UserError, match=r"the pose head '.*Drawing' needs another body: the pose has 10 betas.*loaded with 4"
    ):
        ChatPose(model.config, model.params, model.processor, few)
