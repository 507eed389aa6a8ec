"""The server over real sockets: what OpenAI's client and plain HTTP see."""

import base64
import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

import uvicorn  # noqa: E402

from chatpose_jax.chat import ChatPose  # noqa: E402
from chatpose_jax.engine import Engine  # noqa: E402
from chatpose_jax.models.chatpose import unstack_layers  # noqa: E402
from chatpose_jax.processing.processor import tiny_processor  # noqa: E402
from chatpose_jax.serve.app import Server  # noqa: E402
from chatpose_jax.serve.openai import Limits  # noqa: E402

from ..test_engine import CONFIG, stacked  # noqa: E402


class Running:
    """A server in a thread, and what loads its model."""

    def __init__(self, params, *, slots=4, gate=None, **options):
        self.params, self.slots, self.gate = params, slots, gate
        self.server = Server(self.load, "tiny", key="secret", **options)
        self.uvicorn = uvicorn.Server(uvicorn.Config(self.server.app, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)

    def load(self):
        if self.gate is not None:
            assert self.gate.wait(60)
        model = ChatPose(CONFIG, self.params, tiny_processor(CONFIG))
        model.engine = Engine(CONFIG, self.params, model.engine.tail.tolist(), slots=self.slots, capacity=512)
        return model

    def __enter__(self):
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.02)
        port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.address, timeout=120, headers={"Authorization": "Bearer secret"})
        return self

    def wait(self):
        while self.client.get("/health").status_code != 200:
            time.sleep(0.05)
        return self

    def ask(self, **body):
        body.setdefault("messages", [{"role": "user", "content": "Hello?"}])
        return self.client.post("/v1/chat/completions", json=body)

    def __exit__(self, *_):
        self.client.close()
        self.uvicorn.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


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


def data_url(seed=0, size=(64, 64), kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode(), pixels


def test_an_answer_is_that_of_the_model_alone(running, alone):
    url, pixels = data_url(3)
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Who?"}]
    answer = running.ask(messages=[{"role": "user", "content": parts}], max_tokens=12, force_pose=True)
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
        assert shown["frame"] == "camera" and shown["body"] == "chatpose-default"
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
    client = openai.OpenAI(base_url=f"{running.address}/v1", api_key="secret")
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
    assert (text, finish, usage) == (choice.message.content, choice.finish_reason, whole.usage)
    assert [pose["axis_angle"] for pose in poses] == [pose["axis_angle"] for pose in choice.message.poses]
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        client.chat.completions.create(**{**asked, "model": "gpt-9"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{running.address}/v1", api_key="wrong").models.list()


def test_several_choices_differ_by_their_seeds_and_repeat(running):
    first, again = (running.ask(n=3, temperature=1.0, max_tokens=8, seed=5).json()["choices"] for _ in range(2))
    texts = [choice["message"]["content"] for choice in first]
    assert texts == [choice["message"]["content"] for choice in again] and len(set(texts)) > 1
    assert [choice["index"] for choice in first] == [0, 1, 2]
    lone = running.ask(temperature=1.0, max_tokens=8, seed=6).json()["choices"][0]["message"]["content"]
    assert lone == texts[1]


def test_an_answer_stops_before_a_string(running):
    whole = running.ask(max_tokens=12).json()["choices"][0]["message"]["content"]
    word = whole[len(whole) // 2 :][:3]
    cut = running.ask(max_tokens=12, stop=[word, "never there"]).json()["choices"][0]
    assert cut["message"]["content"] == whole[: whole.find(word)] and cut["finish_reason"] == "stop"
    with running.client.stream(
        "POST", "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 12, "stop": word, "stream": True},
    ) as events:  # fmt: skip
        lines = [line.removeprefix("data: ") for line in events.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines]
    assert "".join(deltas) == cut["message"]["content"]


def test_who_goes_away_frees_a_row(running):
    with running.client.stream(
        "POST", "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Long?"}], "max_tokens": 400, "temperature": 1.0, "stream": True},
    ) as events:  # fmt: skip
        next(events.iter_lines())
    deadline = time.monotonic() + 20
    while running.server.worker.model.engine.active and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running.server.worker.model.engine.idle


WRONG = [
    ({"messages": []}, 400, "messages"),
    ({"messages": "x"}, 400, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 400, "messages[0].content[0]"),
    ({"temperature": 3}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 10**9}, 400, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, 400, "max_tokens"),
    ({"n": 1000}, 400, "n"),
    ({"stop": ["x"] * 9}, 400, "stop"),
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


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x.png", "https://example.org/x.png", "data:text/html;base64,eA==",
        "data:image/png;base64,eA==", "data:image/png;base64,%%", 5, None,
    ],
)  # fmt: skip
def test_pictures_come_in_the_request_only(running, url):
    answer = running.ask(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages[0].content[0].image_url"


def test_a_pose_may_be_sent(running):
    pose = running.ask(max_tokens=12, force_pose=True).json()["choices"][0]["message"]["poses"][0]
    parts = [{"type": "pose", "pose": pose}, {"type": "text", "text": "What is this?"}]
    assert running.ask(messages=[{"role": "user", "content": parts}], max_tokens=2).status_code == 200
    parts[0]["pose"] = {"axis_angle": [1, 2]}
    assert running.ask(messages=[{"role": "user", "content": parts}]).status_code == 400


def test_bodies_that_are_no_requests(running):
    post = running.client.post
    assert post("/v1/chat/completions", content=b"{").json()["error"]["code"] == "invalid_json"
    assert post("/v1/chat/completions", content=b"[" * 100_000).status_code == 400
    assert post("/v1/chat/completions", json=[1]).status_code == 400
    assert running.client.get("/v1/chat/completions").status_code == 405
    assert running.client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert httpx.get(f"{running.address}/health").status_code == 200
    for path in ("/v1/models", "/metrics", "/version", "/v1/poses/x.glb"):
        assert httpx.get(f"{running.address}{path}").status_code == 401
    text = running.client.get("/metrics").text
    assert "chatpose_generated_tokens_total" in text and 'chatpose_errors_total{code="invalid_json"}' in text


def test_limits_hold(params):
    limits = Limits(body=4000, pixels=1000)
    with Running(params, slots=1, queue=1, limits=limits) as server:
        server.wait()
        url, _ = data_url(size=(40, 40))
        large = server.ask(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
        assert large.status_code == 413
        grey = io.BytesIO()
        Image.new("L", (40, 40)).save(grey, "PNG")
        url = "data:image/png;base64," + base64.b64encode(grey.getvalue()).decode()
        wide = server.ask(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
        assert wide.json()["error"]["code"] == "image_too_large"
        found = []

        def run():
            found.append(server.ask(max_tokens=200, temperature=1.0))

        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [answer for answer in found if answer.status_code == 429]
        assert {answer.status_code for answer in found} == {200, 429}
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)


def test_until_the_model_is_there_it_says_so(params):
    gate = threading.Event()
    with Running(params, gate=gate) as server:
        for answer in (server.client.get("/health"), server.ask()):
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_loading"
        gate.set()
        server.wait()
        assert server.ask(max_tokens=2).status_code == 200


def test_a_stop_finishes_what_is_under_way(params):
    with Running(params) as server:
        server.wait()
        found = []
        thread = threading.Thread(target=lambda: found.append(server.ask(max_tokens=100, temperature=1.0)))
        thread.start()
        while not server.server.worker.model.engine.active:
            time.sleep(0.01)
        server.uvicorn.should_exit = True
        thread.join(60)
    assert found[0].status_code == 200
