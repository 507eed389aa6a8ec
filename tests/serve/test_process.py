"""``chatpose serve`` as a process, and what its command line refuses."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

from chatpose_jax.cli.main import main  # noqa: E402
from chatpose_jax.processing.processor import tiny_processor  # noqa: E402
from chatpose_jax.weights.save import save_folder  # noqa: E402

from ..test_engine import CONFIG, stacked  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = CONFIG.replace(scan_layers=True)
    return save_folder(tmp_path_factory.mktemp("serve") / "small", config, stacked(), processor=tiny_processor(config))


@contextlib.contextmanager
def serving(folder, *options, **environ):
    """The process, its address, and the lines that it has printed so far."""
    command = [sys.executable, "-m", "chatpose_jax.cli", "serve", str(folder), "--port", "0", *options]
    # The toy head of these tests is from a module that only --head may name.
    command += ["--head", "tests.model.toy_heads:Looking"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1", **environ}
    )  # fmt: skip
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    try:
        first = process.stdout.readline()
        reader.start()
        found = re.match(r"(http://127\.0\.0\.1:\d+)/v1 answers as '(\w+)'", first)
        assert found, first + process.stdout.read()
        yield SimpleNamespace(process=process, address=found[1], name=found[2], lines=lines)
    finally:
        process.kill()
        process.wait()
        reader.join(10)


def wait(served, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and served.process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.get(f"{served.address}/health")
            if answer.status_code == 200:
                return
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_loading"
        time.sleep(0.05)
    raise AssertionError("".join(served.lines))


@pytest.mark.slow
def test_openais_client_and_curl_ask_the_real_process(folder):
    openai = pytest.importorskip("openai")
    with serving(folder, "--slots", "2", "--mesh", "1x1x2", CHATPOSE_API_KEY="secret") as served:
        wait(served)
        client = openai.OpenAI(base_url=f"{served.address}/v1", api_key="secret")
        assert [model.id for model in client.models.list()] == ["small"] == [served.name]
        asked = {"model": "small", "messages": [{"role": "user", "content": "Kneel, please."}], "max_tokens": 16}
        whole = client.chat.completions.create(**asked, extra_body={"force_pose": True})
        text, poses = "", []
        for chunk in client.chat.completions.create(**asked, stream=True, extra_body={"force_pose": True}):
            text += chunk.choices[0].delta.content or ""
            poses += getattr(chunk.choices[0].delta, "poses", [])
        assert text == whole.choices[0].message.content
        assert [pose["joints"] for pose in poses] == [pose["joints"] for pose in whole.choices[0].message.poses]
        if curl := shutil.which("curl"):
            url = f"{served.address}/v1/poses/{poses[0]['id']}.glb"
            done = subprocess.run([curl, "-sf", "-H", "Authorization: Bearer secret", url], capture_output=True)
            assert done.returncode == 0 and done.stdout.startswith(b"glTF")
            assert subprocess.run([curl, "-sf", url], capture_output=True).returncode != 0
        # A signal: what is under way is finished, and nothing new begins.
        body = {**asked, "max_tokens": 300, "temperature": 1.0, "seed": 3}
        found = []
        thread = threading.Thread(target=lambda: found.append(client.chat.completions.create(**body)))
        thread.start()
        headers = {"Authorization": "Bearer secret"}
        while "chatpose_active_requests 1.0" not in httpx.get(f"{served.address}/metrics", headers=headers).text:
            time.sleep(0.005)
        served.process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert found and found[0].choices[0].finish_reason in ("stop", "length")
        assert served.process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.address}/health")
    assert "programs compiled" in "".join(served.lines)


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_process(tmp_path):
    with serving(tmp_path) as served:
        assert served.process.wait(60) == 2
    assert any(line.startswith("error: ") and str(tmp_path) in line for line in served.lines)


@pytest.mark.slow
def test_a_mesh_of_too_many_devices_is_said(folder):
    with serving(folder, "--mesh", "1x1x4096") as served:
        assert served.process.wait(60) == 2
    assert served.lines[-1].startswith("error: --mesh 1x1x4096 needs 4096 devices, and there are ")


@pytest.mark.slow
def test_a_signal_ends_it_while_the_model_is_loaded(folder):
    with serving(folder) as served:
        time.sleep(1)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "give a key"),
        (["--key-file", "KEY"], "the file is empty"),
        (["--mesh", "two"], "--mesh two: expected DATAxFSDPxTENSOR"),
        (["--slots", "0"], "--slots"),
        (["--port", "BUSY"], "cannot be listened at"),
        (["--port", "70000"], "--port must be"),
        (["--key-file", "BINARY"], "one word of ASCII"),
        (
            ["--allow-origin", "https://example.org/"],
            "--allow-origin https://example.org/: expected a scheme and a host",
        ),
        (
            ["--allow-media-domain", "https://example.org"],
            "--allow-media-domain https://example.org: expected the name of a host",
        ),
    ],
)
def test_what_it_cannot_do_it_says_before_it_loads(tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.delenv("CHATPOSE_API_KEY", raising=False)
    (tmp_path / "key").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        known = {"KEY": str(tmp_path / "key"), "BINARY": str(tmp_path / "binary"), "BUSY": str(busy.getsockname()[1])}
        assert main(["serve", str(tmp_path), *(known.get(word, word) for word in options)]) == 2
    assert words in capsys.readouterr().err


def test_a_key_must_fit_into_a_header(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CHATPOSE_API_KEY", "two words")
    assert main(["serve", str(tmp_path)]) == 2
    assert "one word of ASCII" in capsys.readouterr().err
