"""Language models behind an endpoint: what they are sent, and what happens when they fail."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from chatpose_jax.data.example import LazyImage
from chatpose_jax.endpoint import KEY, URL, Endpoint
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.endpoints import as_openai, ask_all
from chatpose_jax.evaluation.system import Question
from chatpose_jax.evaluation.systems.endpoint import EndpointSystem

from ..stand_in import good

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def asks(text, image=None):
    parts = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture
def endpoint(server, monkeypatch):
    monkeypatch.setenv(URL, server.url)
    monkeypatch.setenv(KEY, "secret")
    return server


def encoded(kind):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (encoded("JPEG"), "jpeg"),
        (encoded("PNG"), "png"),
        (encoded("BMP"), "png"),
        (PIXELS, "png"),
        (LazyImage(lambda: PIXELS), "png"),
    ],
    ids=["jpeg", "png", "bmp", "array", "lazy"],
)
def test_images_are_sent_as_data(image, kind):
    (message,) = as_openai(asks("Where?", image))
    shown, words = message["content"]
    start, data = shown["image_url"]["url"].split(",")
    assert start == f"data:image/{kind};base64" and words == {"type": "text", "text": "Where?"}
    if isinstance(image, bytes) and kind in ("jpeg", "png") and not image.startswith(b"BM"):
        assert base64.b64decode(data) == image  # the bytes of the data set, not encoded again
    if kind == "png":
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), PIXELS)


def question(text, image=None):
    return Question(text, "", "instruction", asks(text, image))


def test_an_endpoint_answers_in_order_and_is_asked_once(endpoint, tmp_path):
    endpoint.answers(lambda messages: f"answer to {messages[0]['content'][-1]['text']}")
    system = EndpointSystem(model="m", cache=str(tmp_path), parallel=3, max_tokens=7, temperature=0.5)
    asked = [question(f"question {i}", PIXELS) for i in range(9)]
    expected = [f"answer to question {i}" for i in range(9)]
    assert [answer.text for answer in system.answer(asked)] == expected and len(endpoint.asked) == 9
    assert [answer.text for answer in system.answer(asked[::-1])] == expected[::-1] and len(endpoint.asked) == 9
    body = endpoint.asked[0][1]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 7, 0.5)
    assert body["messages"][0]["content"][0]["type"] == "image_url"
    assert system.settings == {"model": "m", "temperature": 0.5, "max_tokens": 7} and system.name == "m"


def test_a_refusal_is_counted(endpoint, tmp_path):
    endpoint.then = lambda handler: handler.send(200, good("half", finish_reason="length"))
    (found,) = EndpointSystem(model="m", cache=str(tmp_path), name="GPT").answer([question("?")])
    assert found.text == "" and found.notes == {"no answer in words": True}


def test_a_refusal_is_one_missing_answer_and_a_dead_server_ends_the_work(endpoint, server, tmp_path):
    def refuses_one(handler):
        refused = "1" in handler.body["messages"][0]["content"]
        handler.send(200, good("", finish_reason="content_filter") if refused else good("fine"))

    endpoint.then = refuses_one
    asked = Endpoint(server.url, "m", sleep=lambda wait: None, cache=tmp_path)
    questions = [([{"role": "user", "content": f"question {i}"}], 0) for i in range(3)]
    found = ask_all(asked, questions, 2)
    assert [each.text for each in found] == ["fine", "", "fine"] and "refused" in found[1].why
    endpoint.then = lambda handler: handler.send(500, b"<html>")
    with pytest.raises(UserError, match=r"'m': 6 attempts failed, the last with 500 .*run the same command again"):
        ask_all(asked, [([{"role": "user", "content": "new"}], 0)], 2)


def test_settings_are_checked(endpoint, monkeypatch):
    for name, value in (("parallel", 0), ("max_tokens", 0), ("temperature", -1.0)):
        with pytest.raises(UserError, match=name):
            EndpointSystem(model="m", **{name: value})
    monkeypatch.delenv(URL)
    monkeypatch.delenv(KEY)
    with pytest.raises(UserError, match=f"set {KEY}"):
        EndpointSystem(model="m")
