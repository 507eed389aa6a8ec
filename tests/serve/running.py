"""A server in a thread, for tests: over real sockets, with a tiny model."""

import base64
import contextlib
import io
import socket
import threading
import time

import httpx
import numpy as np
from PIL import Image

from chatpose_jax.chat import ChatPose
from chatpose_jax.engine import Engine
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.serve.app import Server
from chatpose_jax.serve.listen import Listener, open_socket

from ..test_engine import CONFIG

KEY = "secret"


class Running:
    """gate: an event that the loading of the model waits for. options: of ``Server``."""

    def __init__(
        self, params, *, config=CONFIG, slots=4, capacity=512, gate=None, load=None, grace=60, port=0, **options
    ):
        self.params, self.config, self.slots, self.capacity, self.gate = params, config, slots, capacity, gate
        self.server = Server(load or self.load, "tiny", **{"key": KEY, **options})
        self.listener = Listener(self.server, log_level="critical", grace=grace)
        self.socket = open_socket("127.0.0.1", port)
        self.port = self.socket.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.listener.run, args=([self.socket],), daemon=True)

    def load(self):
        if self.gate is not None:
            assert self.gate.wait(60)
        model = ChatPose(self.config, self.params, tiny_processor(self.config))
        tail = model.engine.tail.tolist()
        model.engine = Engine(self.config, self.params, tail, slots=self.slots, capacity=self.capacity)
        return model

    def __enter__(self):
        self.thread.start()
        headers = {"Authorization": f"Bearer {KEY}"}
        self.client = httpx.Client(base_url=self.address, timeout=120, headers=headers)
        return self

    def wait(self):
        self.until(lambda: self.client.get("/health").status_code == 200, 120)
        return self

    @staticmethod
    def until(holds, seconds=20):
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.02)

    def body(self, **body):
        body.setdefault("messages", [{"role": "user", "content": "Hello?"}])
        return body

    def ask(self, **body):
        return self.client.post("/v1/chat/completions", json=self.body(**body))

    def events(self, **body):
        """The events of a streamed answer, as values; without [DONE], which must be the last."""
        with self.client.stream("POST", "/v1/chat/completions", json=self.body(stream=True, **body)) as answer:
            assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        return [httpx.Response(200, content=line).json() for line in lines]

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def metrics(self):
        """name{labels} -> value."""
        lines = self.client.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}

    @property
    def worker(self):
        return self.server.worker

    @property
    def engine(self):
        return self.worker.model.engine

    @contextlib.contextmanager
    def held(self):
        """Meanwhile the engine makes no step."""
        go, step = threading.Event(), self.engine.step

        def wait():
            go.wait(60)
            step()

        self.engine.step = wait
        try:
            yield
        finally:
            go.set()
            self.engine.step = step

    def __exit__(self, *_):
        self.client.close()
        self.listener.should_exit = True
        self.thread.join(60)
        self.socket.close()
        assert not self.thread.is_alive()


def data_url(seed=0, size=(64, 64), kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    return url_of(Image.fromarray(pixels), kind), pixels


def url_of(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def picture(url):
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]
