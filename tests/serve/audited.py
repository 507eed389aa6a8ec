"""A server whose process notes what it opens, connects to and starts, from the moment on when it is ready. Run as ``python -m tests.serve.audited``.

It prints its address, and after SIGTERM one line of JSON: what it did that no request may make it do.
"""

import contextlib
import json
import os
import socket
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path

import httpx

from chatpose_jax.models.chatpose import unstack_layers
from chatpose_jax.serve.listen import Listener
from chatpose_jax.serve.openai import Limits

from ..test_engine import stacked
from .running import Running, data_url, picture, user

OWN = tuple(
    str(Path(path).resolve())
    for path in {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), Path(__file__).parents[2], *sys.path[1:]}
)
"""Where the program's own files are, which it may load late."""
FILES = {"open", "os.listdir", "os.scandir", "os.rename", "os.chmod", "os.remove", "os.mkdir"}
WATCHED = {
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "subprocess.Popen", "os.system", "os.exec", "os.fork",
    "os.posix_spawn", "ctypes.dlopen", "pickle.find_class",
}  # fmt: skip


def main():
    running, found = Running(unstack_layers(stacked()), limits=Limits(tokens=16, upload=5)), []
    temporary = Path(tempfile.mkdtemp()).resolve()
    tempfile.tempdir = str(temporary)  # so that nothing else of the machine's folder counts as the server's own

    def hear(event, args):
        if event in FILES and not isinstance(args[0], int):
            path = Path(os.fsdecode(args[0] or ".")).resolve()
            # A pose's file is written into a folder of its own, read, and removed.
            if not (str(path).startswith(OWN) or path.is_relative_to(temporary) or str(path) == "/dev/null"):
                found.append([event, str(path)])
        elif event in WATCHED:
            found.append([event, repr(args)[:200]])

    def watch():
        url, _ = data_url()
        running.client.get("/metrics")
        answer = running.ask(messages=user(picture(url)), max_tokens=12, force_pose=True).json()
        for kind in ("glb", "obj", "npz", "png"):
            pose = answer["choices"][0]["message"]["poses"][0]["id"]
            assert running.client.get(f"/v1/poses/{pose}.{kind}").status_code == 200
        running.client.close()
        sys.addaudithook(hear)
        with contextlib.suppress(OSError):  # it hears what it should
            open("/etc/hostname").close()
        with contextlib.suppress(OSError), socket.socket() as other:
            other.connect(("127.0.0.1", 1))
        assert [each[0] for each in found] == ["open", "socket.connect"], found
        found.clear()
        print(running.address, flush=True)

    def begin():
        headers = {"Authorization": "Bearer secret"}
        running.client = httpx.Client(base_url=running.address, timeout=120, headers=headers)
        running.wait()
        watch()

    threading.Thread(target=begin, daemon=True).start()
    listener = Listener(running.server, log_level="error")
    listener.listen(running.socket)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
