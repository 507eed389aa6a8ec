"""Hostile requests, and what comes of them: an answer or an error that says why."""

import pytest

for package in ("starlette", "uvicorn", "prometheus_client", "httpx", "schemathesis", "hypothesis"):
    pytest.importorskip(package)

from chatpose_jax.models.chatpose import unstack_layers  # noqa: E402
from chatpose_jax.serve.openai import Limits  # noqa: E402

from ..test_engine import stacked  # noqa: E402
from .hostile import Attack, assault  # noqa: E402
from .running import Running  # noqa: E402


def test_some_hostile_requests_do_no_harm():
    with Running(unstack_layers(stacked()), limits=Limits(tokens=16, upload=5)) as server:
        attack = Attack(server.wait().address)
        attack.run(50)
        assert not attack.wrong, "\n".join(list(dict.fromkeys(attack.wrong))[:20])
        assert (
            sum(attack.statuses.values()) >= 50 and attack.statuses["messages", 400] and attack.statuses["schema", 200]
        )
        assert {what for what, _ in attack.statuses} == {"schema", "messages", "connections"}
        assert server.worker.error is None and not server.worker.answers


@pytest.mark.slow
def test_ten_thousand_hostile_requests_do_no_harm():
    """No crash, no 500, no file read, no request sent anywhere: in a process that notes what it opens and connects to."""
    statuses, wrong = assault(10_000)
    assert not wrong, "\n".join(list(dict.fromkeys(wrong))[:20])
    assert sum(statuses.values()) >= 10_000
