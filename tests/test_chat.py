"""The Python API on a tiny random model whose answers are rigged: text, poses, history, cache reuse, batches, errors."""

import base64

import jax
import numpy as np
import pytest
from PIL import Image

import chatpose_jax
from chatpose_jax.chat import ChatPose, Pose
from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import create, unstack_layers
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.weights.folder import save_folder
from smpl_jax import io

CONFIG = preset("tiny").replace(lora=None, scan_layers=False)


@pytest.fixture(scope="module")
def params():
    params = unstack_layers(create(CONFIG.replace(scan_layers=True), jax.random.key(0)))
    # A random model never ends and hardly ever shows a pose: raise both a little, so that answers vary.
    head = params["decoder"]["lm_head"]
    head["added"] = head["added"].at[:, 0].multiply(3.0)
    head["kernel"] = head["kernel"].at[:, CONFIG.eos_token_id].multiply(2.5)
    return params


@pytest.fixture
def model(params):
    return ChatPose(CONFIG, params, tiny_processor(CONFIG))


def picture(seed):
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
        np.testing.assert_allclose(x.matrices, y.matrices, atol=2e-5)


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


def test_later_turns_reuse_the_cache_and_change_nothing(model, monkeypatch):
    import chatpose_jax.chat as chat

    lengths = []
    original = chat.generate_stream

    def spy(config, params, prompts, *args, **kwargs):
        lengths.append([len(prompt) for prompt in prompts])
        return (yield from original(config, params, prompts, *args, **kwargs))

    monkeypatch.setattr(chat, "generate_stream", spy)
    messages = []
    for turn, question in enumerate([user("Who is this?", picture(0)), user("And this?", picture(1)), user("Why?")]):
        messages.append(question)
        reply = model.chat(messages, max_new_tokens=12, force_pose=turn == 1)
        assert_same(reply, fresh(model).chat(messages, max_new_tokens=12, force_pose=turn == 1))
        messages.append(reply.message)
    kept, whole = lengths[0::2], lengths[1::2]
    assert kept[0] == whole[0]
    assert kept[1][0] < whole[1][0] - CONFIG.vision.num_patches, "the first picture was computed again"
    assert kept[2][0] < 20


def test_another_picture_is_not_taken_for_the_first(model):
    model.chat([user("Who is this?", picture(0))], max_new_tokens=4)
    again = model.chat([user("Who is this?", picture(1))], max_new_tokens=12)
    assert_same(again, fresh(model).chat([user("Who is this?", picture(1))], max_new_tokens=12))


def test_a_batch_equals_its_rows_in_both_turns(model):
    conversations = [
        [user("One?")],
        [user("Two, with a picture?", picture(2))],
        [user("Three, which is a longer question than the others?")],
    ]
    for _ in range(2):
        replies = model.chat(conversations, max_new_tokens=10, force_pose=True)
        for conversation, reply in zip(conversations, replies):
            assert_same(reply, fresh(model).chat(conversation, max_new_tokens=10, force_pose=True))
        conversations = [[*c, r.message, user("And then?")] for c, r in zip(conversations, replies)]


def test_stream_yields_the_text(model):
    stream = model.stream([user("Tell me more")], max_new_tokens=20, force_pose=True)
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            reply = end.value
            break
    assert "".join(pieces).strip() == reply.text.strip()
    assert_same(reply, fresh(model).chat([user("Tell me more")], max_new_tokens=20, force_pose=True))


def test_sampling_repeats_by_seed(model):
    settings = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9}
    texts = [model.chat([user("Hm?")], seed=seed, **settings).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_images_as_path_array_pil_and_openai_are_the_same(model, tmp_path):
    Image.fromarray(picture(3)).save(tmp_path / "p.png")
    uri = "data:image/png;base64," + base64.b64encode((tmp_path / "p.png").read_bytes()).decode()
    openai = [{"type": "image_url", "image_url": {"url": uri, "detail": "low"}}, {"type": "text", "text": "This?"}]
    sources = [picture(3), Image.fromarray(picture(3)), tmp_path / "p.png", str(tmp_path / "p.png")]
    questions = [*(user("This?", source) for source in sources), {"role": "user", "content": openai}]
    replies = [model.chat([question], max_new_tokens=6) for question in questions]
    for reply in replies[1:]:
        assert_same(reply, replies[0])


def test_a_pose_knows_its_body(tmp_path):
    matrices = np.tile(np.eye(3, dtype=np.float32), (24, 1, 1))
    matrices[0] = np.diag([1, -1, -1])
    pose = Pose(matrices, io.load_body())
    np.testing.assert_allclose(np.abs(pose.axis_angle[0]), [np.pi, 0, 0], atol=1e-5)
    np.testing.assert_allclose(pose.rotation_6d[1], [1, 0, 0, 0, 1, 0])
    head, foot = (pose.body.joint_names.index(name) for name in ("head", "left_foot"))
    assert pose.joints[head, 1] < pose.joints[foot, 1], "y points down: an upright head has the smaller y"
    assert pose.vertices.shape == (6890, 3)
    assert pose.render(64).shape == (64, 64, 3)
    for suffix in (".glb", ".obj", ".npz", ".png"):
        assert pose.save(tmp_path / f"pose{suffix}").stat().st_size > 1000
    assert b'"skins"' in (tmp_path / "pose.glb").read_bytes()
    assert b'"skins"' not in pose.save(tmp_path / "static.glb", skinned=False).read_bytes()
    saved = np.load(tmp_path / "pose.npz", allow_pickle=False)
    np.testing.assert_array_equal(saved["matrices"], matrices)
    assert "camera" in str(saved["frame"])
    with pytest.raises(UserError, match="saved as"):
        pose.save(tmp_path / "pose.fbx")


def test_load_gives_the_model_that_was_saved(params, model, tmp_path):
    from chatpose_jax.models.chatpose import stack_layers

    stacked = CONFIG.replace(scan_layers=True)
    save_folder(tmp_path / "m", stacked, stack_layers(params), processor=model.processor)
    loaded = chatpose_jax.load(tmp_path / "m")
    question = [user("Who is this?", picture(0))]
    assert_same(
        loaded.chat(question, max_new_tokens=8, force_pose=True),
        model.chat(question, max_new_tokens=8, force_pose=True),
    )
    half = chatpose_jax.load(tmp_path / "m", dtype="bfloat16")
    assert half.params["decoder"]["lm_head"]["kernel"].dtype == "bfloat16"
    assert half.chat(question, max_new_tokens=4, force_pose=False).finish_reason in ("stop", "length")


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


def test_bad_settings(model):
    with pytest.raises(UserError, match="no such folder"):
        chatpose_jax.load("nowhere")
    with pytest.raises(UserError, match="a file; expected a model folder"):
        chatpose_jax.load(__file__)
    for setting, words in (
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ):
        with pytest.raises(UserError, match=words):
            model.chat([user("x")], **setting)
