"""The endpoint's client against a stand-in server that has the faults of real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatpose_jax.endpoint import ATTEMPTS, KEY, URL, Endpoint, NoAnswer, NoServer
from chatpose_jax.errors import UserError

from .stand_in import Server, good

QUESTION = [{"role": "user", "content": "Hello?"}]


def endpoint(server: Server, waits: list[float], **settings: Any) -> Endpoint:
    return Endpoint(server.url, "m", "secret", sleep=waits.append, timeout=5, **settings)


FAULTS = {
    "busy": lambda h: h.send(429, b'{"error": {"message": "slow down"}}', Retry_After="7"),
    "broken": lambda h: h.send(500, b"<html>"),
    "cut": lambda h: h.send(200, good("fine")[:20], 500),
    "no JSON": lambda h: h.send(200, b"hello"),
    "another JSON": lambda h: h.send(200, b'{"choices": []}'),
    "a list": lambda h: h.send(200, b"[]"),
    "without text": lambda h: h.send(200, good("")),
    "hangs up": lambda h: h.connection.close(),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_faults_that_pass_are_asked_again(server: Server, fault: Any) -> None:
    server.script = [fault, fault]
    waits: list[float] = []
    assert endpoint(server, waits).ask(QUESTION) == "fine"
    assert len(server.asked) == 3 and len(waits) == 2
    if fault is FAULTS["busy"]:
        assert waits == [7, 7]
    headers, body = server.asked[0]
    assert headers["Authorization"] == "Bearer secret"
    assert body["path"] == "/v1/chat/completions" and body["model"] == "m" and body["messages"] == QUESTION


def test_a_fault_that_stays_ends_after_some_attempts(server: Server) -> None:
    for fault, words in (("broken", "500"), ("no JSON", "ValueError: an answer that is no JSON: 'hello'")):
        server.then, server.asked[:] = FAULTS[fault], []
        waits: list[float] = []
        with pytest.raises(NoServer, match=f"{ATTEMPTS} attempts failed, the last with {words}"):
            endpoint(server, waits).ask(QUESTION)
        assert len(server.asked) == ATTEMPTS and max(waits) <= 60


@pytest.mark.parametrize(
    "code, words",
    [(401, "wrong key"), (404, "no such model"), (400, "too long"), (429, "insufficient_quota"), (302, "Found")],
)
def test_what_the_server_refuses_is_not_asked_again(server: Server, code: int, words: str) -> None:
    server.then = lambda h: h.send(
        code, json.dumps({"error": {"message": words}}).encode(), Location="http://127.0.0.1:1/"
    )
    with pytest.raises(UserError, match=f"refuses the request for 'm': {code} .*{words}"):
        endpoint(server, []).ask(QUESTION)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "data, words",
    [
        (good("", refusal=None, finish_reason="content_filter"), "refused"),
        (good("half", finish_reason="length"), "cut off"),
    ],
)
def test_no_whole_answer(server: Server, data: bytes, words: str) -> None:
    server.then = lambda h: h.send(200, data)
    with pytest.raises(NoAnswer, match=words):
        endpoint(server, []).ask(QUESTION)
    assert len(server.asked) == 1


def test_the_cache_answers_the_same_question(server: Server, tmp_path: Path) -> None:
    asked = endpoint(server, [], cache=tmp_path)
    assert asked.known(QUESTION) is None
    assert asked.ask(QUESTION) == asked.ask(QUESTION) == asked.known(QUESTION) == "fine"
    assert len(server.asked) == 1
    asked.ask(QUESTION, turn=1)
    endpoint(server, [], cache=tmp_path, temperature=0.1).ask(QUESTION)
    assert len(server.asked) == 3
    for file in tmp_path.rglob("*.json"):
        assert "secret" not in file.read_text()
        file.write_text("{")
    assert asked.known(QUESTION) is None and asked.ask(QUESTION) == "fine"


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URL, raising=False)
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(UserError, match=f"set {KEY}"):
        Endpoint.from_environment("m")
    monkeypatch.setenv(KEY, "secret")
    found = Endpoint.from_environment("m")
    assert found.url == "https://api.openai.com/v1" and "secret" not in repr(found)
    for url, words in (("ftp://host/v1", "no web address"), ("http://example.org/v1", "unencrypted")):
        monkeypatch.setenv(URL, url)
        with pytest.raises(UserError, match=words):
            Endpoint.from_environment("m")
    monkeypatch.setenv(URL, "http://localhost:8000/v1/")
    assert Endpoint.from_environment("m").url == "http://localhost:8000/v1"
