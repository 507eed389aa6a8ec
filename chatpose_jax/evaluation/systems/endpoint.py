"""A language model behind an endpoint as a system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatpose_jax.endpoint import Endpoint
from chatpose_jax.evaluation.endpoints import CACHE, as_openai, ask_all
from chatpose_jax.evaluation.system import Answer, Question
from chatpose_jax.settings import real, whole


class EndpointSystem:
    """Any model at the endpoint of ``OPENAI_BASE_URL``, with the key ``OPENAI_API_KEY``: GPT-4, or LLaVA in a server of one's own. It gives words.

    If the model refuses a question, or its answer is longer than ``max_tokens``, the answer is "" and is counted. If the server does not respond,
    the command stops. Answers are kept in ``cache``, so the same command resumes.

    Options: model: its name there. temperature: of sampling. max_tokens: of an answer. parallel: questions at a time. cache: folder of its
    answers. name: of the row in tables; by default that of the model.

    Raises UserError where no endpoint is named.
    """

    batch_size = 32

    def __init__(
        self,
        *,
        model: str,
        temperature: float = 0.0,
        max_tokens: int = 512,
        parallel: int = 4,
        cache: str = CACHE,
        name: str = "",
    ) -> None:
        whole("max_tokens", max_tokens, 1)
        real("temperature", temperature, lambda value: value >= 0, "at least 0")
        self.parallel, self.name = whole("parallel", parallel, 1), name or model
        self.endpoint = Endpoint.from_environment(
            model, temperature=temperature, max_tokens=max_tokens, cache=Path(cache).expanduser()
        )
        self.settings: Mapping[str, Any] = {"model": model, "temperature": temperature, "max_tokens": max_tokens}

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """The words of each answer."""
        written = ask_all(self.endpoint, [(as_openai(each.messages), 0) for each in questions], self.parallel)
        return [Answer(each.text, notes={"no answer in words": True} if each.why else {}) for each in written]
