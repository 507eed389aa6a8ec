"""Renders the chat template of a stranger, in a process of its own that ends if the template does not.

A chat template is a program in Jinja. transformers runs it in a sandbox, which keeps it from the machine, but not from an endless loop or from
filling the memory. So ``render`` starts this module as a program, which limits itself.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.processing.tokenizer import import_transformers

_SECONDS, _WAIT = 5, 300
"""Processor time of the template, and how long to wait on a busy machine for the program with its imports."""
_MEMORY, _LENGTH = 1 << 30, 1_000_000
"""Bytes that the template may take, and characters that it may give for one conversation."""


def render(
    template: str, conversations: Sequence[Sequence[Mapping[str, Any]]], values: Mapping[str, Any]
) -> list[str | Exception]:
    """The text of each conversation as a prompt, or the error that the template raised for it.

    Args:
        template: the Jinja text.
        conversations: messages as JSON values.
        values: other names that the template may use.

    Raises:
        UserError for a template that takes too much time, or a process that cannot be started.
    """
    request = json.dumps({"template": template, "conversations": conversations, "values": values})
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-c", f"from {__name__} import main; main()"]
    try:
        done = subprocess.run(
            command,
            input=request.encode(),
            capture_output=True,
            timeout=_WAIT,
            env={**os.environ, "PYTHONPATH": paths},
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"it did not end in {_WAIT} seconds") from None
    if done.returncode < 0:
        raise UserError(f"it was ended by signal {-done.returncode}: it may take {_SECONDS} seconds of processor time")
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"it could not be run ({''.join(last):.300})")
    return [answer["text"] if "text" in answer else ValueError(answer["error"]) for answer in json.loads(done.stdout)]


def main() -> None:
    """Reads a request from standard input, limits itself, and writes what ``rendered`` gives to standard output."""
    request = json.load(sys.stdin)
    rendered({"template": "", "conversations": [[]], "values": {}})  # imports everything, before the limits
    used = sum(os.times()[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + _SECONDS, int(used) + _SECONDS + 1))
    if (statm := Path("/proc/self/statm")).is_file():
        held = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + _MEMORY, held + _MEMORY))
    json.dump(rendered(request), sys.stdout)


def rendered(request: Mapping[str, Any]) -> list[dict[str, str]]:
    """``{"text": …}`` or ``{"error": …}`` for each conversation of a request, without limits."""
    import jinja2  # noqa: F401  what transformers renders with; missing, it is named here

    import_transformers()
    from transformers.utils.chat_template_utils import render_jinja_template

    answers = []
    for conversation in request["conversations"]:
        try:
            result: Any = render_jinja_template(
                [conversation], chat_template=request["template"], add_generation_prompt=True, **request["values"]
            )
            text = result[0][0]
            if len(text) > _LENGTH:
                raise ValueError(f"{len(text)} characters for a short conversation")
            answers.append({"text": text})
        except Exception as error:  # whatever a template can raise
            answers.append({"error": f"{type(error).__name__}: {error!s:.200}"})
    return answers
