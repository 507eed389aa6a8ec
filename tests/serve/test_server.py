"""The server over real sockets: what OpenAI's client and plain HTTP see."""

import dataclasses
import gc
import io
import json
import logging
import re
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

from chatpose_jax import engine as engines  # noqa: E402
from chatpose_jax.chat import ChatPose  # noqa: E402
from chatpose_jax.data.synthetic.captions import describe  # noqa: E402
from chatpose_jax.data.synthetic.families import sample_poses  # noqa: E402
from chatpose_jax.errors import UserError  # noqa: E402
from chatpose_jax.generate import decode  # noqa: E402
from chatpose_jax.models.chatpose import init_params, unstack_layers  # noqa: E402
from chatpose_jax.models.config import HeadConfig  # noqa: E402
from chatpose_jax.models.sharding import make_mesh, shardings  # noqa: E402
from chatpose_jax.planning.plan import trace_decoding  # noqa: E402
from chatpose_jax.processing.processor import tiny_processor  # noqa: E402
from chatpose_jax.serve import listen, worker  # noqa: E402
from chatpose_jax.serve.openai import Limits, pose_in_words  # noqa: E402
from chatpose_jax.serve.poses import PoseStore, pose_json  # noqa: E402
from smpl_jax import PosedBody, load_body  # noqa: E402
from smpl_jax.pose import Pose, to_frame  # noqa: E402

from ..test_engine import CONFIG, stacked  # noqa: E402
from .running import KEY, Running, data_url, picture, url_of, user  # noqa: E402

ROOT = Path(__file__).parents[2]
LONG = {"max_tokens": 300, "temperature": 1.0, "seed": 3}
"""An answer that is long enough to do something meanwhile."""


@pytest.fixture(scope="module")
def params():
    return unstack_layers(stacked())


@pytest.fixture(scope="module")
def running(params):
    with Running(params) as server:
        yield server.wait()


@pytest.fixture(scope="module")
def alone(params):
    return ChatPose(CONFIG, params, tiny_processor(CONFIG))


# --- answers


def test_an_answer_is_that_of_the_model_alone(running, alone):
    url, pixels = data_url(3)
    answer = running.ask(messages=user(picture(url), {"type": "text", "text": "Who?"}), max_tokens=12, force_pose=True)
    assert answer.status_code == 200
    found = answer.json()
    own = [{"type": "image", "image": pixels}, {"type": "text", "text": "Who?"}]
    expected = alone.chat([{"role": "user", "content": own}], max_new_tokens=12, force_pose=True)
    [choice] = found["choices"]
    assert choice["message"]["content"] == expected.text and choice["finish_reason"] == expected.finish_reason
    assert len(choice["message"]["poses"]) == len(expected.poses) > 0
    for shown, pose in zip(choice["message"]["poses"], expected.poses):
        np.testing.assert_allclose(shown["axis_angle"], pose.axis_angle, atol=1e-4)
        np.testing.assert_allclose(shown["joints"], pose.joints, atol=1e-4)
        assert shown["frame"] == "camera" and shown["body"] == "chatpose-default" and shown["object"] == "pose"
        assert shown["joint_names"] == list(alone.body.joint_names)
    usage = found["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    name = choice["message"]["poses"][0]["id"]
    for kind, begins in (("glb", b"glTF"), ("png", b"\x89PNG"), ("npz", b"PK"), ("obj", b"")):
        file = running.client.get(f"/v1/poses/{name}.{kind}")
        assert file.status_code == 200 and file.content.startswith(begins) and len(file.content) > 1000
    assert running.client.get(f"/v1/poses/{name}.exe").status_code == 404
    assert running.client.get("/v1/poses/pose-of-nobody.glb").json()["error"]["code"] == "pose_not_found"


def test_openais_client_streams_the_same(running):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{running.address}/v1", api_key=KEY)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Kneel?"}], "max_tokens": 12}
    whole = client.chat.completions.create(**asked, extra_body={"force_pose": True})
    text, poses, finish, usage = "", [], None, None
    options = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"force_pose": True}}
    for chunk in client.chat.completions.create(**asked, **options):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            poses += getattr(choice.delta, "poses", None) or []
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
    [choice] = whole.choices
    assert (text, finish) == (choice.message.content, choice.finish_reason)
    assert (usage.total_tokens, usage.completion_tokens) == (whole.usage.total_tokens, whole.usage.completion_tokens)
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1  # the same question again
    assert [pose["axis_angle"] for pose in poses] == [pose["axis_angle"] for pose in choice.message.poses]
    again = [*asked["messages"], choice.message, {"role": "user", "content": "More?"}]  # its extra fields come back
    assert client.chat.completions.create(model="tiny", messages=again, max_tokens=2).choices
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        client.chat.completions.create(**{**asked, "model": "gpt-9"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{running.address}/v1", api_key="wrong").models.list()


def test_a_pose_is_told_before_the_text_after_it(running):
    """As soon as its token is out: also where several tokens are told at once."""
    events = running.events(max_tokens=40, temperature=1.0, seed=1, force_pose=True)
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    shown = [delta for delta in deltas if "poses" in delta]
    assert shown and all(delta["content"].endswith("<POSE>") and len(delta["poses"]) == 1 for delta in shown)
    assert sum(delta.get("content", "").count("<POSE>") for delta in deltas) == len(shown)
    last = max(place for place, delta in enumerate(deltas) if "poses" in delta)
    assert "".join(delta.get("content", "") for delta in deltas[last + 1 :]).strip() == "."  # of the forced answer


def test_several_choices_differ_by_their_seeds_and_read_the_question_once(running):
    before = running.metrics()
    settings = {"n": 3, "temperature": 1.0, "max_tokens": 8, "seed": 5}
    messages = [{"role": "user", "content": "A question that nobody asked before, three times?"}]
    first, again = (running.ask(messages=messages, **settings).json() for _ in range(2))
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in again["choices"]] and len(set(texts)) > 1
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    lone = running.ask(messages=messages, temperature=1.0, max_tokens=8, seed=6).json()["choices"][0]["message"]
    assert lone["content"] == texts[1]
    events = running.events(messages=messages, stream_options={"include_usage": True}, **settings)
    streamed = ["", "", ""]
    for choice in (choice for event in events for choice in event["choices"]):
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts and events[-1]["usage"]["completion_tokens"] == again["usage"]["completion_tokens"]
    assert all(event["usage"] is None for event in events[:-1])
    counted = running.metrics()
    computed = 'chatpose_prompt_tokens_total{source="computed"}'
    prompt = first["usage"]["prompt_tokens"]
    assert counted[computed] - before[computed] <= prompt + 9  # the last token of each of the other 9 answers


def test_an_answer_stops_before_a_string(running):
    whole = running.ask(max_tokens=12).json()["choices"][0]["message"]["content"]
    word = whole[len(whole) // 2 :][:3]
    cut = running.ask(max_tokens=12, stop=[word, "never there"]).json()["choices"][0]
    assert cut["message"]["content"] == whole[: whole.find(word)] and cut["finish_reason"] == "stop"
    deltas = [event["choices"][0]["delta"].get("content", "") for event in running.events(max_tokens=12, stop=word)]
    assert "".join(deltas) == cut["message"]["content"]
    assert running.ask(max_tokens=3, stop="never there").json()["choices"][0]["finish_reason"] == "length"
    forced = {"max_tokens": 12, "force_pose": True}
    without = running.ask(**forced, stop="<POSE>").json()["choices"][0]
    assert without["message"]["poses"] == [] and "<POSE>" not in without["message"]["content"]
    with_it = running.ask(**forced, stop="never there").json()["choices"][0]["message"]
    assert len(with_it["poses"]) == with_it["content"].count("<POSE>") > 0


def test_a_conversation_is_not_read_again(running):
    messages = [{"role": "user", "content": "Tell me about someone who stands on one leg, please?"}]
    first = running.ask(messages=messages, max_tokens=4).json()
    messages = [*messages, first["choices"][0]["message"], {"role": "user", "content": "And then?"}]
    second = running.ask(messages=messages, max_tokens=4).json()["usage"]
    assert second["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] - 1


def test_a_conversation_goes_on_after_an_empty_answer(running):
    nothing = {"role": "assistant", "content": "", "refusal": None, "poses": []}
    messages = [{"role": "user", "content": "Hello?"}, nothing, {"role": "user", "content": "Are you there?"}]
    assert running.ask(messages=messages, max_tokens=4).status_code == 200


def test_names_of_control_tokens_are_ordinary_text(running, alone):
    """Whatever a user writes, in any role: it is as many ordinary tokens, and the answer is that of the model alone."""
    text = "".join(running.worker.model.processor.tokenizer.control) + "<POSE><image></s><s>[SEG]<im_start>"
    messages = [{"role": "system", "content": text}, {"role": "user", "content": text}]
    ids = alone.processor.encode(messages).input_ids.tolist()
    plain = alone.processor.encode([{**each, "content": "x"} for each in messages]).input_ids.tolist()
    control = alone.processor.tokenizer.control.values()
    assert all(ids.count(each) == plain.count(each) for each in {*control, CONFIG.pose_token_id, CONFIG.image_token_id})
    answer = running.ask(messages=messages, max_tokens=6).json()
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["message"]["content"] == alone.chat(messages, max_new_tokens=6).text


def test_a_pose_may_be_sent(running):
    pose = running.ask(max_tokens=12, force_pose=True).json()["choices"][0]["message"]["poses"][0]
    parts = [{"type": "pose", "pose": pose}, {"type": "text", "text": "What is this?"}]
    assert running.ask(messages=user(*parts), max_tokens=2).status_code == 200
    for wrong, param in (
        ({"axis_angle": [1, 2]}, "axis_angle"),
        ({"axis_angle": [[1e9] * 3] * 24}, "axis_angle[0][0]"),
        ({"frame": "camera"}, "axis_angle"),
        ({"axis_angle": [[0, 0, 0]] * 24, "frame": "upside down"}, "frame"),
    ):
        error = running.ask(messages=user({"type": "pose", "pose": wrong})).json()["error"]
        assert error["param"] == f"messages[0].content[0].pose.{param}"


def test_a_sent_pose_is_described_as_it_stands():
    """In whatever frame it comes; and the right way up."""
    rest = np.tile(np.eye(3, dtype=np.float32), (24, 1, 1))
    [lying] = sample_poses(1, 0, family="supine").rotations
    for rotations, word in ((rest, "stand"), (np.asarray(lying, np.float32), "lie|lying")):
        expected = describe(rotations)
        assert re.search(word, expected)
        for frame in ("model", "camera", "z-up"):
            pose = PosedBody(to_frame(Pose(rotations, "model"), frame), load_body())
            for named in (frame, pose.to_json()["frame"]):
                sent = {"axis_angle": pose.axis_angle.tolist(), "frame": named}
                assert pose_in_words(sent, "here") == expected
        without = {
            "axis_angle": PosedBody(to_frame(Pose(rotations, "model"), "camera"), load_body()).axis_angle.tolist()
        }
        assert pose_in_words(without, "here") == expected


def test_nothing_is_compiled_once_it_is_ready(running):
    before = running.metrics()["chatpose_compiled_programs"]
    url, _ = data_url(8)
    pose = {"type": "pose", "pose": {"axis_angle": [[0.1, 0.2, 0.3]] * 24, "frame": "model"}}
    for words in (1, 7, 40, 120):
        text = {"type": "text", "text": "word " * words}
        for parts in ([text], [picture(url), text], [picture(url), picture(data_url(words)[0]), pose, text]):
            answer = running.ask(messages=user(*parts), max_tokens=7, force_pose=True, temperature=words % 2)
            assert answer.status_code == 200, answer.text
    running.ask(n=4, temperature=1.0, max_tokens=5)
    found = []

    def ask(number):
        words = {"type": "text", "text": f"{number} " * (7 * number + 1)}
        shown = [picture(data_url(100 + number + i)[0]) for i in range(number % 3)]
        settings = {"max_tokens": 6 + number, "temperature": number % 2, "force_pose": True, "stream": number % 4 == 3}
        found.append(running.ask(messages=user(*shown, words), **settings).status_code)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 12
    assert running.metrics()["chatpose_compiled_programs"] == before > 0


@pytest.mark.slow
def test_samples_of_a_head_that_draws():
    config = CONFIG.replace(head=HeadConfig("gaussian"))
    params = unstack_layers(init_params(config.replace(scan_layers=True), jax.random.key(0)))
    with Running(params, config=config, limits=Limits(samples=4)) as server:
        server.wait()
        before = server.metrics()["chatpose_compiled_programs"]
        asked = {"max_tokens": 8, "force_pose": True}
        [pose] = server.ask(samples=3, **asked).json()["choices"][0]["message"]["poses"]
        assert len(pose["samples"]) == 3 and len({str(each["axis_angle"]) for each in pose["samples"]}) == 3
        assert {name: pose[name] for name in pose["samples"][0]} == pose["samples"][0]
        files = [server.client.get(f"/v1/poses/{each['id']}.npz") for each in pose["samples"]]
        for each, file in zip(pose["samples"], files):
            stored = np.load(io.BytesIO(file.content))
            assert any(np.allclose(stored[name].ravel()[:3], each["axis_angle"][0], atol=1e-5) for name in stored)
        [lone] = server.ask(**asked).json()["choices"][0]["message"]["poses"]
        assert lone["axis_angle"] == pose["axis_angle"] and "samples" not in lone
        assert server.ask(samples=5, **asked).json()["error"]["param"] == "samples"
        assert server.metrics()["chatpose_compiled_programs"] == before


def test_a_shape_is_shown_where_there_is_one(alone):
    betas = np.arange(alone.body.num_betas, dtype=np.float32)
    pose = Pose(np.tile(np.eye(3, dtype=np.float32), (24, 1, 1)), "camera", betas=betas)
    shown = pose_json(["x"], [PosedBody(pose, alone.body)])
    assert shown["betas"] == betas.tolist() and shown["id"] == "x" and "samples" not in shown


def test_poses_are_kept_for_a_while(alone, monkeypatch):
    pose = PosedBody(Pose(np.tile(np.eye(3, dtype=np.float32), (24, 1, 1)), "camera"), alone.body)
    store, now = PoseStore(most=2, seconds=10), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    names = [store.put(pose) for _ in range(3)]
    assert [store.get(name) is pose for name in names] == [False, True, True] and len(set(names)) == 3
    now[0] = 11.0
    assert all(store.get(name) is None for name in names)
    last = store.put(pose)
    assert store.get(last) is pose and len(store._held) == 1


def test_an_answer_is_forgotten_at_once(running):
    """Its request holds the pictures. Python's search for circles of references would come thousands of answers later."""
    gc.collect()
    gc.disable()
    try:
        who = {"type": "text", "text": "Who?"}
        answer = running.ask(messages=user(picture(data_url()[0]), who), max_tokens=12, force_pose=True)
        assert answer.json()["choices"][0]["message"]["poses"]
        kept = (worker.Answering, engines.Completion)
        running.until(lambda: not any(issubclass(type(o), kept) for o in gc.get_objects()))
    finally:
        gc.enable()


def test_meshes_of_a_licensed_body_stay_here(running):
    model = running.worker.model
    [pose] = running.ask(max_tokens=8, force_pose=True).json()["choices"][0]["message"]["poses"][:1]
    own = running.server.poses.get(pose["id"])
    name = running.server.poses.put(PosedBody(own.pose, dataclasses.replace(model.body, name="SMPL neutral")))
    for kind in ("glb", "obj"):
        answer = running.client.get(f"/v1/poses/{name}.{kind}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "licensed_body")
        assert "--share-body" in answer.json()["error"]["message"]
    for kind in ("npz", "png"):
        assert running.client.get(f"/v1/poses/{name}.{kind}").status_code == 200
    running.server.share_body = True
    try:
        assert running.client.get(f"/v1/poses/{name}.glb").status_code == 200
    finally:
        running.server.share_body = False


# --- what is refused

WRONG = [
    ({"messages": []}, 400, "messages"),
    ({"messages": "x"}, 400, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "audio": {"id": "1"}}]}, 400, "messages[0].audio"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 400, "messages[0].content[0]"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages"),
    ({"temperature": 3}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 10**9}, 400, "max_tokens"),
    ({"max_tokens": 2.5}, 400, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, 400, "max_tokens"),
    ({"max_tokens": 1, "force_pose": True}, 400, "max_tokens"),
    ({"n": 1000}, 400, "n"),
    ({"seed": 2**70}, 400, "seed"),
    ({"samples": 2}, 400, "samples"),
    ({"stop": ["x"] * 9}, 400, "stop"),
    ({"stop": ""}, 400, "stop"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"frequency_penalty": 1}, 400, "frequency_penalty"),
    ({"tempratur": 1}, 400, "tempratur"),
    ({"model": "other"}, 404, "model"),
    ({"messages": [{"role": "user", "content": "w " * 600}]}, 400, "messages"),
]


@pytest.mark.parametrize(("body", "status", "param"), WRONG)
def test_what_is_wrong_is_named(running, body, status, param):
    answer = running.ask(**body)
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] == param
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 400


def test_an_error_speaks_of_what_was_sent(running):
    for body, words in (
        (
            {"response_format": {"type": "json_object"}},
            'response_format must be {"type": "text"} or null, found an object',
        ),
        ({"messages": user({"type": "video"})}, 'text or image_url or pose, found the type "video"'),
        ({"max_tokens": 1, "force_pose": True}, "max_tokens=1 leaves no room"),
    ):
        assert words in running.ask(**body).json()["error"]["message"]
    said = running.client.post("/v1/chat/completions", content=b'{"messages": NaN}').json()["error"]["message"]
    assert said == "the body is no JSON: NaN is no JSON"


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x.png", "https://example.org/x.png", "data:text/html;base64,eA==",
        "data:image/png;base64,eA==", "data:image/png;base64,%%", "data:image/png,x", " data:", "", 5, None,
    ],
)  # fmt: skip
def test_pictures_come_in_the_request_only(running, url):
    error = running.ask(messages=user(picture(url))).json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"].startswith("messages[0].content[0].image_url")
    assert len(error["message"]) < 300


def test_bodies_that_are_no_requests(running):
    post = running.client.post
    for content in (b"{", b"", b"[" * 100_000, b"\xff", b'{"messages": NaN}', b"1" * 5000, rb'{"messages": "\ud800"}'):
        answer = post("/v1/chat/completions", content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json"), content[:20]
    assert post("/v1/chat/completions", json=[1]).status_code == 400
    assert running.client.get("/v1/chat/completions").status_code == 405
    assert running.client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert running.client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert running.client.get("/version").json().keys() == {"version"}


def test_a_key_covers_every_route_but_health(running):
    assert httpx.get(f"{running.address}/health").status_code == 200
    paths = [
        *running.client.get("/openapi.json").json()["paths"],
        "/openapi.json",
        "/v1/poses/x.glb",
        "/none",
        "//health",
    ]
    for path in set(paths) - {"/health"}:
        for headers in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Basic {KEY}"}):
            answer = httpx.get(f"{running.address}{path}", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
    assert httpx.post(f"{running.address}/v1/chat/completions", json={}).status_code == 401


def test_pages_elsewhere_are_kept_out(running, params):
    """CORS is closed, and a simple request, for which a browser does not ask first, is refused too."""
    elsewhere, own = {"Origin": "https://evil.example"}, {"Origin": running.address}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization", **elsewhere}
    before = running.client.options("/v1/chat/completions", headers=asked)
    assert before.status_code == 403 and "access-control-allow-origin" not in before.headers
    for path in ("/v1/models", "/metrics"):
        answer = running.client.get(path, headers=elsewhere)
        assert answer.json()["error"]["code"] == "wrong_origin" and "access-control-allow-origin" not in answer.headers
        assert running.client.get(path, headers=own).status_code == 200
    with Running(params, key=None, hosts=("127.0.0.1", "localhost"), origins=["https://evil.example"]) as open_one:
        get = open_one.client.get
        answer = get("/v1/models", headers=elsewhere)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://evil.example"
        preflight = open_one.client.options("/v1/models", headers={**asked, "Access-Control-Request-Method": "GET"})
        assert preflight.status_code == 200
        assert get("/v1/models", headers={"Origin": "https://another.example"}).status_code == 403
        # A domain whose owner lets it lead to this machine is no way in.
        assert get("/v1/models", headers={"Host": "evil.example:8000"}).json()["error"]["code"] == "wrong_host"
        assert get("/v1/models", headers={"Host": "localhost:8000"}).status_code == 200


# --- limits


def test_large_requests_are_refused(params):
    with Running(params, limits=Limits(body=4000, pixels=1000, images=2)) as server:
        server.wait()
        url, _ = data_url(size=(40, 40))
        assert server.ask(messages=user(picture(url))).json()["error"]["code"] == "request_too_large"

        def chunks():
            for _ in range(100):
                yield b" " * 100

        sent = server.client.post("/v1/chat/completions", content=chunks())  # without a length
        assert sent.status_code == 413
        wide = server.ask(messages=user(picture(url_of(Image.new("L", (40, 40))))))
        assert wide.json()["error"]["code"] == "image_too_large"
        small = picture(url_of(Image.new("L", (20, 20))))
        assert server.ask(messages=user(*[small] * 3)).json()["error"]["code"] == "too_many_images"
        assert server.ask(messages=user(*[small] * 2), max_tokens=1).status_code == 200


def test_a_full_queue_is_said_at_once(params):
    with Running(params, slots=1, queue=2) as server:
        server.wait()
        found = []
        with server.held():
            threads = [threading.Thread(target=lambda: found.append(server.ask(max_tokens=2))) for _ in range(3)]
            for thread in threads:
                thread.start()
            server.until(lambda: len(server.worker.answers) == 3)
            refused = [server.ask(), server.ask(stream=True)]
            for answer in refused:
                assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
                assert answer.json()["error"]["type"] == "rate_limit_error"
            assert server.metrics()["chatpose_waiting_requests"] >= 2
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in found] == [200] * 3
        # Choices have a place together, or none of them does.
        assert server.ask(n=4).status_code == 429 and server.ask(n=3, max_tokens=2).status_code == 200
        assert server.metrics()['chatpose_errors_total{code="queue_full"}'] == 3


def test_an_answer_that_takes_too_long_ends(params):
    with Running(params, slots=1, patience=0.5) as server:
        server.wait()
        with server.held():
            answers = [server.ask(), server.ask(stream=True)]
            assert not server.worker.answers
        for answer in answers:
            assert answer.status_code == 504 and answer.headers["x-should-retry"] == "false"
        server.until(lambda: server.engine.idle)
        assert server.ask(max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_a_row(params, stream):
    """Before the first token, while it waits in the queue, and in the middle of an answer."""
    with Running(params, slots=1, queue=4) as server:
        server.wait()
        request = httpx.Request(
            "POST", f"{server.address}/v1/chat/completions", json=server.body(stream=stream, **LONG),
            headers={"Authorization": f"Bearer {KEY}"},
        )  # fmt: skip
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        sent = f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + request.content
        with server.held():
            clients = [server.connect() for _ in range(3)]
            for client in clients:
                client.sendall(sent)
            server.until(lambda: len(server.worker.answers) == 3)
            for client in clients:
                client.close()
            server.until(lambda: not server.worker.answers)
        server.until(lambda: server.engine.idle)
        with server.connect() as client:
            client.sendall(sent)
            server.until(lambda: server.engine.active == 1)
        server.until(lambda: server.engine.idle)
        with server.connect() as client:  # half closed: nobody can tell it from one that is gone
            client.sendall(sent)
            client.shutdown(1)
            gone = [
                f'chatpose_requests_total{{route="/v1/chat/completions",status="{status}"}}' for status in (200, 499)
            ]
            server.until(lambda: sum(server.metrics().get(name, 0) for name in gone) == 5)
        server.until(lambda: not server.worker.answers and server.engine.idle)
        assert server.ask(max_tokens=1).status_code == 200


def test_who_sends_or_reads_too_slowly_is_cut_off(params, monkeypatch):
    monkeypatch.setattr(listen, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(listen, "STALLED_SECONDS", 0.5)
    with Running(params, limits=Limits(upload=0.5)) as server:
        server.wait()
        key = f"Host: x\r\nAuthorization: Bearer {KEY}\r\n"
        for begin in (b"", b"GET / HT", f"GET /version HTTP/1.1\r\n{key}".encode()):
            with server.connect() as client:
                client.sendall(begin)
                assert client.recv(100) == b""
        with server.connect() as client:  # one whole request, and the beginning of the next
            client.sendall(f"GET /version HTTP/1.1\r\n{key}\r\n".encode() * 1)
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
            client.sendall(b"GET /ver")
            assert client.recv(100) == b""
        with server.connect() as client:
            client.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{key}Content-Length: 1000\r\n\r\n{{".encode())
            assert client.recv(1000).startswith(b"HTTP/1.1 408")
        with server.connect() as client:  # reads nothing of much
            client.setsockopt(1, 8, 4096)
            name = server.ask(max_tokens=8, force_pose=True).json()["choices"][0]["message"]["poses"][0]["id"]
            client.sendall(f"GET /v1/poses/{name}.obj HTTP/1.1\r\n{key}\r\n".encode() * 40)
            server.until(lambda: len(server.listener.server_state.connections) <= 1)


# --- begin and end


def test_until_the_model_is_there_it_says_so(params):
    gate = threading.Event()
    with Running(params, gate=gate) as server:
        server.until(lambda: server.listener.started)
        for answer in (server.client.get("/health"), server.ask()):
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_loading"
            assert answer.headers["Retry-After"]
        gate.set()
        server.wait()
        assert server.ask(max_tokens=2).status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_server(params, caplog):
    gate = threading.Event()

    def load():
        gate.wait(60)
        raise UserError("no weights here")

    with Running(params, load=load) as server:
        server.until(lambda: server.listener.started)
        server.listener.give_up = server.worker.failed = lambda: None  # to look at it meanwhile
        gate.set()
        server.until(lambda: server.worker.error is not None)
        answer = server.client.get("/health")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_failed"
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 1 byte")
    for error, words in ((UserError("no weights here"), "no weights here"), (full, "fewer --slots")):

        def fail(error=error):
            raise error

        server = Running(params, load=fail)
        with pytest.raises(UserError, match=words):
            server.listener.listen(server.socket)


def test_an_engine_that_fails_answers_with_an_error_and_goes_on(running):
    write = running.engine._write

    def fail():
        raise RuntimeError("the device is gone")

    running.engine._write = fail
    try:
        answers = [running.ask(max_tokens=2), running.ask(max_tokens=2, stream=True)]
    finally:
        running.engine._write = write
    for answer in answers:
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal"
        assert "device" not in answer.text
    assert running.ask(max_tokens=2).status_code == 200


def test_a_stop_finishes_what_is_under_way_and_refuses_what_is_new(params):
    with Running(params, slots=1) as server:
        server.wait()
        found = []
        threads = [threading.Thread(target=lambda: found.append(server.ask(**LONG))) for _ in range(2)]
        key = f"Host: x\r\nAuthorization: Bearer {KEY}\r\n"
        body = json.dumps(server.body()).encode()
        with server.connect() as late:  # its request is there only after the stop has begun
            late.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{key}Content-Length: {len(body)}\r\n\r\n".encode())
            for thread in threads:
                thread.start()
            server.until(lambda: len(server.worker.answers) == 2)
            server.listener.should_exit = True
            server.until(lambda: server.worker.closing)
            late.sendall(body)
            assert b"503" in late.recv(1000).split(b"\r\n")[0]
        with pytest.raises(OSError):
            server.connect()
        for thread in threads:
            thread.join(60)
    assert [answer.status_code for answer in found] == [200, 200]


def test_a_device_that_does_not_answer_shows_in_health(params, monkeypatch):
    monkeypatch.setattr(worker, "STALLED_SECONDS", 0.2)
    with Running(params, slots=1) as server:
        server.wait()
        with server.held():
            thread = threading.Thread(target=lambda: server.ask(max_tokens=1))
            thread.start()
            server.until(lambda: server.client.get("/health").status_code == 503)
            assert server.client.get("/health").json()["error"]["code"] == "stalled"
        thread.join()
        assert server.client.get("/health").status_code == 200


def test_a_device_that_fails_shows_in_health_until_it_works(params, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the device is lost")

    with Running(params, slots=1) as server:
        server.wait()
        with monkeypatch.context() as broken:
            broken.setattr(engines, "decode", fail)
            for health in (200, 200, 503):
                assert server.ask(max_tokens=1).status_code == 500
                assert server.client.get("/health").status_code == health
            assert server.client.get("/health").json()["error"]["code"] == "failing"
        assert server.ask(max_tokens=1).status_code == 200
        assert server.client.get("/health").status_code == 200


def test_a_stop_does_not_wait_for_ever(params):
    with Running(params, slots=1, grace=1) as server:
        server.wait()
        found = []

        def ask():
            try:
                found.append(server.ask(**LONG))
            except httpx.HTTPError as error:
                found.append(error)

        with server.held():
            thread = threading.Thread(target=ask)
            thread.start()
            server.until(lambda: server.worker.answers)
            server.listener.should_exit = True
            before = time.monotonic()
            thread.join(30)
            assert found and time.monotonic() - before < 20
        server.thread.join(30)


# --- what others see


def test_metrics_count_what_happened(params):
    with Running(params, slots=1) as server:
        server.wait()
        first = server.metrics()
        assert first["chatpose_slots"] == 1 and first["chatpose_cache_use"] == 0
        answers = [server.ask(max_tokens=6, force_pose=True).json() for _ in range(2)]
        events = server.events(max_tokens=3)
        server.ask(n=0)
        server.client.get("/v1/nothing")
        httpx.get(f"{server.address}/version")
        with server.held():
            thread = threading.Thread(target=lambda: answers.append(server.ask(n=3, max_tokens=2).json()))
            thread.start()
            server.until(lambda: server.engine.waiting == 3)
            assert server.metrics()["chatpose_waiting_requests"] == 3
        thread.join()
        found = server.metrics()

    def grown(name):
        return found[name] - first.get(name, 0)

    route = "/v1/chat/completions"
    assert found[f'chatpose_requests_total{{route="{route}",status="200"}}'] == 4
    assert found[f'chatpose_requests_total{{route="{route}",status="400"}}'] == 1
    assert found['chatpose_requests_total{route="none",status="404"}'] == 1
    assert sum(value for name, value in found.items() if 'status="401"' in name) == 1
    for code in ("invalid_value", "not_found", "invalid_api_key"):
        assert found[f'chatpose_errors_total{{code="{code}"}}'] == 1
    prompt = answers[0]["usage"]["prompt_tokens"]
    computed, cached = (
        grown(f'chatpose_prompt_tokens_total{{source="{source}"}}') for source in ("computed", "cached")
    )
    assert (computed, cached) == (prompt + 5, 5 * (prompt - 1))  # of five of the six answers, the last token only
    written = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert grown("chatpose_generated_tokens_total") == written + 3
    shown = sum(len(choice["message"]["poses"]) for answer in answers for choice in answer["choices"])
    told = sum(len(choice["delta"].get("poses", ())) for event in events for choice in event["choices"])
    assert grown("chatpose_poses_total") == shown + told >= 2
    assert found["chatpose_first_token_seconds_count"] == found["chatpose_answer_seconds_count"] == 6
    assert 0 < found["chatpose_first_token_seconds_sum"] <= found["chatpose_answer_seconds_sum"]
    assert found["chatpose_step_seconds_count"] > 0 and 0 < found["chatpose_cache_use"] < 1
    assert found["chatpose_active_requests"] == found["chatpose_waiting_requests"] == 0


def test_every_metric_is_explained(running):
    shown = {re.sub(r"(_bucket|_sum|_count)?(\{.*)?$", "", name) for name in running.metrics()}
    told = set(re.findall(r"chatpose_[a-z_]+(?=[`{])", (ROOT / "docs" / "serving.md").read_text()))
    assert shown - told == set() and told - shown <= {"chatpose_errors_total", "chatpose_requests_total"}


def test_the_published_schema_is_the_one_that_checks(running):
    from chatpose_jax.serve.schema import Mismatch, check_json

    document = running.client.get("/openapi.json").json()
    schema = document["components"]["schemas"]["Request"]
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    for body in [running.body(), *[running.body(**body) for body, status, _ in WRONG if status == 400]]:
        try:
            check_json(body, schema)
            fits = True
        except Mismatch:
            fits = False
        assert fits == validator.is_valid(body), body


@pytest.mark.slow
def test_over_a_mesh_the_answers_are_the_same_and_the_plan_is_what_runs(params, running, monkeypatch):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = make_mesh(2, 1, 2, devices=jax.devices()[:4])
    whole = stacked()
    ran = []

    def noted(config, params, state, count, tail, **settings):
        if settings["greedy"] and not ran:
            ran.append(decode.lower(config, params, state, count, tail, **settings).as_text())
        return decode(config, params, state, count, tail, **settings)

    monkeypatch.setattr(engines, "decode", noted)
    with Running(unstack_layers(jax.device_put(whole, shardings(whole, mesh)))) as server:
        server.wait()
        url, _ = data_url(4)
        parts = user(picture(url), {"type": "text", "text": "Who is this?"})
        for settings in ({"max_tokens": 12, "force_pose": True}, {"max_tokens": 9, "temperature": 1.0, "n": 2}):
            found, expected = (
                [choice["message"] for choice in each.ask(messages=parts, **settings).json()["choices"]]
                for each in (server, running)
            )
            assert [each["content"] for each in found] == [each["content"] for each in expected]
            for one, other in zip(found, expected):
                for mine, theirs in zip(one["poses"], other["poses"], strict=True):
                    np.testing.assert_allclose(mine["joints"], theirs["joints"], atol=1e-4)
        capacity, tail = server.engine._state.cache.capacity, len(server.engine.tail)
    assert ran[0] == trace_decoding(CONFIG, mesh, 4, capacity, tail).lower().as_text()
