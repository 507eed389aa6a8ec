"""Malformed messages: each one clear error that names the message."""

import base64
import io

import pytest
from PIL import Image

from chatpose_jax.errors import UserError
from chatpose_jax.processing.conversation import ImageSource, parse_messages, template
from chatpose_jax.processing.images import load_image

USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi"}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("Hello", "expected a list"),
        (USER, "wrap one message in a list"),
        (None, "expected a list"),
        ([], "no user message"),
        ([{"role": "system", "content": "S"}], "no user message"),
        (["Hello"], r"messages\[0\]: expected a table"),
        ([{"content": "Hello"}], r"messages\[0\]: unknown role None"),
        ([{"role": "tool", "content": "Hello"}], r"unknown role 'tool'"),
        ([USER, USER], r"messages\[1\]: two user messages in a row"),
        ([USER, ANSWER, ANSWER], r"messages\[2\]: two assistant messages in a row"),
        ([ANSWER], "begins with an assistant message"),
        ([USER, {"role": "system", "content": "S"}], r"messages\[1\]: a system message must be the first"),
        ([{"role": "user"}], "'content' must be"),
        ([{"role": "user", "content": 3}], "found int"),
        ([{"role": "user", "content": " \n"}], "empty content"),
        ([{"role": "user", "content": []}], "empty content"),
        ([USER, {"role": "assistant", "content": ""}], r"messages\[1\]: empty content"),
        (user("Hello"), r"content\[0\]: expected a part"),
        (user({"type": "video"}), "unknown part type 'video'"),
        (user({"type": "text"}), "needs 'text'"),
        (user({"type": "image"}), "holds no image"),
        (user({"type": "image", "base64": 3}), "holds no image"),
        (user({"type": "image_url", "image_url": {}}), "holds no image"),
        ([USER, {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}], "cannot hold an image"),
        ([{"role": "system", "content": [{"type": "image", "image": "a.png"}]}, USER], "cannot hold an image"),
        ([{"role": "user", "content": "\ud800"}], "no valid Unicode"),
        ([{"role": "user", "content": "Q", "ids": [5]}], "only an assistant message may have .ids."),
        ([USER, {"role": "assistant", "ids": ["5"]}], "list of integers"),
        ([USER, {"role": "assistant", "ids": 5}], "list of integers"),
        ([{"role": "text", "content": "A river."}, USER], r"messages\[0\]: plain text must be the only message"),
        ([{"role": "text", "content": [{"type": "image", "image": "a.png"}]}], "a text message cannot hold an image"),
    ],
)
def test_malformed_messages(messages, error):
    with pytest.raises(UserError, match=error):
        parse_messages(messages)


def test_forms_of_an_image():
    for part in (
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
    ):
        (turn,) = parse_messages(user(part, {"type": "text", "text": " Who? "})).turns
        assert turn.parts == (ImageSource("a.png", "messages[0].content[0]"), "Who?")


def test_an_image_in_base64_as_transformers_writes_it():
    stream = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(stream, "PNG")
    part = {"type": "image", "base64": base64.b64encode(stream.getvalue()).decode()}
    (turn,) = parse_messages(user(part)).turns
    (source,) = turn.parts
    assert load_image(source.value).getpixel((2, 1)) == (9, 8, 7)
    (turn,) = parse_messages(user({"type": "image", "base64": "%%%"})).turns
    with pytest.raises(UserError, match=r"messages\[0\].content\[0\].*no valid base64"):
        load_image(turn.parts[0].value, turn.parts[0].where)


def test_unknown_template_lists_the_names():
    with pytest.raises(UserError, match="vicuna_v1, llava_v1, plain"):
        template("vicuna")
