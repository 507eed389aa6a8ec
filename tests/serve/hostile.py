"""Asks a server nonsense: what schemathesis makes of its schema, what hypothesis makes of messages and pictures, and connections that end early.

``python -m tests.serve.hostile --count 10000`` starts a server (``audited``), asks it, and says what it answered. Exit status 1 if anything was
wrong.
"""

import argparse
import base64
import collections
import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import hypothesis
import numpy as np
import schemathesis
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from .running import KEY

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, negative_data_rejection,
]  # fmt: skip
CONTROL = [
    "<POSE>",
    "</s>",
    "<s>",
    "<image>",
    "<unk>",
    "[SEG]",
    "<im_start>",
    "ASSISTANT:",
    "<|im_end|>",
    "<0x00>",
    "\x00",
    "\ufeff",
    "\u202e",
]
PLACES = [
    "/etc/passwd", "file:///etc/passwd", "../../../etc/shadow", "http://127.0.0.1:8000/x.png", "https://localhost/x.png", "http://169.254.169.254/",
    "https://example.org/x.png", "ftp://example.org/", "data:,x", "data:image/svg+xml;base64,PHN2Zy8+", "\\\\host\\share", "gs://bucket/x.png",
    "s3://bucket/x", "javascript:alert(1)", "//example.org/x.png",
]  # fmt: skip
SETTINGS = {
    "deadline": None, "database": None, "phases": [hypothesis.Phase.generate], "suppress_health_check": list(hypothesis.HealthCheck),
}  # fmt: skip

texts = st.lists(st.one_of(st.text(max_size=40), st.sampled_from(CONTROL)), max_size=6).map("".join)
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(
    plain,
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=8), each, max_size=3),
    max_leaves=8,
)


def mostly(good, bad=values, one_in=8):
    """Of ``one_in`` values about one is from ``bad``."""
    return st.integers(1, one_in).flatmap(lambda number: bad if number == one_in else good)


@st.composite
def pictures(draw):
    """The bytes of a picture of any kind and size, whole or broken; or of something else."""
    kind = draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "bomb", "bytes"]))
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    if kind == "bomb":
        width, height = draw(st.sampled_from([(60000, 60000), (2**31 - 1, 1), (0, 0), (30000, 30000), (1, 100000)]))
        head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
        return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + head + draw(st.binary(min_size=4, max_size=40))
    width, height = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    mode = draw(st.sampled_from(["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F", "I"]))
    pixels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 255, (height, width, 3), np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    with contextlib.suppress(Exception):
        image = image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    try:
        more = (
            {"save_all": True, "append_images": [image]}
            if kind in ("GIF", "WEBP", "TIFF") and draw(st.booleans())
            else {}
        )
        image.save(file, kind, **more)
    except Exception:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
    data = bytearray(file.getvalue())
    for _ in range(draw(st.sampled_from([0, 0, 1, 4]))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(1, len(data)))] if draw(st.integers(0, 3)) == 0 else data)


@st.composite
def urls(draw):
    if draw(st.integers(0, 3)) == 0:
        return draw(st.one_of(st.sampled_from(PLACES), texts))
    coded = base64.b64encode(draw(pictures())).decode()
    kind = draw(st.sampled_from(["image/png", "image/jpeg", "text/html", "", "image/png;charset=utf-8"]))
    return f"data:{kind};base64,{coded[: draw(st.integers(0, len(coded)))] if draw(st.integers(0, 5)) == 0 else coded}"


angles = st.lists(st.lists(st.floats(-4, 4), min_size=3, max_size=3), min_size=24, max_size=24)
pose = st.fixed_dictionaries(
    {"axis_angle": mostly(angles)}, optional={"frame": st.sampled_from(["camera", "model", "z-up", "other", ""])}
)
part = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": texts}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": urls() | st.fixed_dictionaries({"url": urls()})}),
    st.fixed_dictionaries({"type": st.just("pose"), "pose": pose}),
)
content = mostly(texts | st.lists(mostly(part, one_in=20), min_size=1, max_size=4), one_in=20)


def turns(contents):
    """A conversation that may be answered: its roles take turns."""
    return [{"role": ("user", "assistant")[place % 2], "content": each} for place, each in enumerate(contents)]


wild = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "developer", "robot"]), "content": content},
        optional={"name": texts, "poses": values, "extra": values},
    ),
    max_size=4,
)
messages = mostly(
    st.lists(content, min_size=1, max_size=5).map(lambda some: turns(some[: len(some) - 1 + len(some) % 2])), wild
)
settings = {
    "max_tokens": st.integers(6, 16), "temperature": st.floats(0, 2), "top_p": st.floats(0, 1), "n": st.integers(1, 3), "seed": st.integers(0, 9),
    "stop": texts.filter(bool) | st.lists(texts.filter(bool), max_size=4), "stream": st.booleans(), "force_pose": st.booleans(),
    "samples": st.just(1), "model": st.just("tiny"), "user": values, "metadata": values,
}  # fmt: skip
unwanted = {
    "max_tokens": st.integers(),
    "n": st.integers(),
    "samples": st.integers(),
    "tools": values,
    "stream_options": values,
    "x": values,
}
bodies = mostly(
    st.fixed_dictionaries(
        {"messages": messages}, optional={name: mostly(each, one_in=40) for name, each in settings.items()}
    ),
    st.fixed_dictionaries({"messages": mostly(messages)}, optional=unwanted),
)
paths = st.sampled_from(
    ["/v1/poses/../../etc/passwd", "/v1/poses/%2e%2e%2fetc%2fpasswd.glb", "/v1/models/../../etc/passwd", "/page/../app.py", "/page/%2e%2e/app.py",
     "/page/..%2fapp.py", "/v1/poses/\x00.glb", "/%00", "//etc/passwd", "/metrics/..", "/v1/chat/completions/", "*", "http://example.org/", ""]
)  # fmt: skip


@st.composite
def raw(draw):
    """Bytes of a connection, and how it goes on: a whole request or a part of one, garbage, or several."""
    body = json.dumps(
        {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 16, "stream": draw(st.booleans())}
    ).encode()
    key = f"Host: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n".encode()
    post = b"POST /v1/chat/completions HTTP/1.1\r\n" + key
    path = draw(paths).encode("latin-1")
    whole = draw(
        st.sampled_from(
            [
                post + b"Content-Length: %d\r\n\r\n" % len(body) + body,
                post + b"Content-Length: %d\r\n\r\n" % (len(body) + 10) + body,
                post + b"Content-Length: -1\r\n\r\n" + body,
                post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + body,
                post + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n",
                post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body,
                post + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
                post + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
                b"GET " + path + b" HTTP/1.1\r\n" + key + b"\r\n",
                b"GET /version HTTP/1.1\r\n" + key + b"X: " + b"y" * 70000 + b"\r\n\r\n",
                b"GET /version HTTP/1.1\r\n" + key + b"\r\n" + b"GET /version HTTP/1.1\r\n" + key + b"\r\n",
                b"GET /version HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" + key + b"\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00",
                b"OPTIONS * HTTP/1.1\r\n" + key + b"\r\n",
                draw(st.binary(max_size=60)),
            ]
        )
    )
    cut = draw(st.integers(0, len(whole))) if draw(st.booleans()) else len(whole)
    return whole[:cut], draw(st.sampled_from(["close", "half", "reset", "read", "slow"]))


class Attack:
    """Counts what a server answers; ``wrong`` names each answer that must not be."""

    def __init__(self, address):
        self.address = address
        self.statuses, self.wrong = collections.Counter(), []
        self.client = httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)

    def hear(self, what, status, text=""):
        self.statuses[what, status] += 1
        if status >= 500:
            self.wrong.append(f"{what}: status {status}: {text[:300]}")

    def schema(self, count, seed):
        """Requests by schemathesis, valid and invalid, of each route."""
        document = self.client.get("/openapi.json").json()
        api = schemathesis.openapi.from_dict(document)
        found = [operation.ok() for operation in api.get_all_operations()]
        headers = {"Authorization": f"Bearer {KEY}"}
        for operation in found:
            share = count // 2 if operation.method == "post" else count // 2 // (len(found) - 1)
            for mode in schemathesis.GenerationMode:
                try:
                    strategy = operation.as_strategy(generation_mode=mode)

                    @hypothesis.seed(seed)
                    @hypothesis.settings(max_examples=max(1, share // 2), **SETTINGS)
                    @hypothesis.given(strategy)
                    def ask(case):
                        answer = case.call(base_url=self.address, headers=headers, timeout=60)
                        self.hear("schema", answer.status_code, str(answer.content[:300]))
                        try:
                            case.validate_response(answer, checks=CHECKS)
                        except Exception as error:
                            self.wrong.append(
                                f"schema: {case.method} {case.path}: {' '.join(str(error).split())[:600]}"
                            )

                    ask()
                except hypothesis.errors.Unsatisfiable:  # a route without parameters has no invalid requests
                    continue

    def messages(self, count, seed):
        """Requests by hypothesis: conversations, pictures and settings of all kinds."""

        @hypothesis.seed(seed)
        @hypothesis.settings(max_examples=count, **SETTINGS)
        @hypothesis.given(bodies)
        def ask(body):
            answer = self.client.post(
                "/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
            )
            self.hear("messages", answer.status_code, answer.text)
            if answer.headers["content-type"].startswith("text/event-stream"):
                if not answer.text.endswith("data: [DONE]\n\n"):
                    self.wrong.append(f"messages: a stream without end: {answer.text[-200:]}")
                return
            value = answer.json()
            if answer.status_code == 200:
                for choice in value["choices"]:
                    if not choice["finish_reason"]:
                        self.wrong.append("messages: an answer without an end")
            elif set(value["error"]) != {"message", "type", "param", "code"} or len(value["error"]["message"]) > 600:
                self.wrong.append(f"messages: another shape of an error: {answer.text[:300]}")

        ask()

    def connections(self, count, seed):
        """Connections that are slow, half closed, reset, or speak something else."""
        host, port = self.address.removeprefix("http://").split(":")

        @hypothesis.seed(seed)
        @hypothesis.settings(max_examples=count, **SETTINGS)
        @hypothesis.given(raw())
        def ask(sent):
            data, end = sent
            with (
                contextlib.suppress(ConnectionError, TimeoutError),
                socket.create_connection((host, int(port)), timeout=1) as client,
            ):
                if end == "slow":
                    for place in range(0, min(len(data), 60), 12):
                        client.sendall(data[place : place + 12])
                        time.sleep(0.001)
                    data = data[60:]
                client.sendall(data)
                if end == "half":
                    client.shutdown(socket.SHUT_WR)
                if end == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                status = 0
                if end == "read" and data.endswith((b"\r\n\r\n", b"}")):
                    answer = client.recv(4096)
                    status = int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0
                self.hear("connections", status)

        ask()

    def run(self, count, seed=0):
        """``count`` requests. A second client asks something sensible meanwhile, and must be answered all the time."""
        stop, answered = threading.Event(), []

        def sensible():
            body = {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4}
            while not stop.wait(0.5):
                answer = self.client.post("/v1/chat/completions", json=body)
                answered.append(
                    answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text
                )

        beside = threading.Thread(target=sensible)
        beside.start()
        try:
            self.schema(count * 2 // 5, seed)
            self.connections(count // 5, seed)
            self.messages(max(1, count - sum(self.statuses.values())), seed)
        finally:
            stop.set()
            beside.join()
        if len(set(answered)) != 1:
            self.wrong.append(
                f"what is sensible was answered in {len(set(answered))} ways: {sorted(set(answered))[:3]}"
            )


@contextlib.contextmanager
def audited():
    """The address of a server, and a function that ends it and gives what it did that it may not, as lines."""
    command = [sys.executable, "-m", "tests.serve.audited"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    errors = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)
    reader.start()
    try:
        while not (line := process.stdout.readline()).startswith("http"):
            if not line:
                raise RuntimeError("".join(errors))

        def end():
            if process.poll() is not None:
                return [f"the process ended with status {process.returncode}", *errors]
            process.send_signal(signal.SIGTERM)
            rest = process.stdout.read().strip().splitlines()
            wrong = [] if process.wait(60) == 0 else [f"the process ended with status {process.returncode}"]
            wrong += (
                [" ".join(map(str, each)) for each in json.loads(rest[-1])]
                if rest
                else ["it did not say what it opened"]
            )
            return wrong + [line for line in errors if "Traceback" in line or "Error" in line]

        yield line.strip(), end
    finally:
        process.kill()
        process.wait()


def assault(count, seed=0):
    """(statuses, what was wrong) of an attack on a server of its own."""
    with audited() as (address, end):
        attack = Attack(address)
        attack.run(count, seed)
        return attack.statuses, attack.wrong + end()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    before = time.perf_counter()
    statuses, wrong = assault(args.count, args.seed)
    for (what, status), number in sorted(statuses.items()):
        print(f"{what:12} {status or 'not read':>8}  {number}")
    print(f"{sum(statuses.values())} requests in {time.perf_counter() - before:.0f} s; {len(wrong)} wrong")
    print("\n".join(dict.fromkeys(wrong)))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
