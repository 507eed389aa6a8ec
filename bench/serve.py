"""``chatpose serve`` under load: are answers those that each conversation gets alone, and how fast do they come, also beside ``transformers serve``?

A small random LLaVA in float32 is written, and a real server process answers on loopback. Parts:

    same        64 clients at once, each three turns, with and without pictures, greedy, sampled or with a forced pose: every answer must be that of
                ``chatpose_jax.load(...).chat``, one conversation after the other, in another process. The model's output weights allow only words
                of its vocabulary, one token each, so equal texts are equal tokens
    memory      the same clients again and again for --minutes: resident memory of the server
    throughput  tokens a second with 1 and with 8 clients; with --peer also of transformers' server, on the same weights and prompts
    first       time to the first token of a short question, alone and while a long prompt is read
    overhead    one client's tokens a second beside ``generate`` in a process of its own, with one row and with the server's rows

What is compared alternates in one run, and a ratio is the median over the rounds.

    python bench/serve.py [--preset small] [--parts same throughput] [--minutes 10] [--rounds 5] [--peer PYTHON] [--json serve.json]

PYTHON is one that has ``transformers[serving]``; its server gets the folder that ``chatpose export --format transformers`` writes. Needs the extra
``serve``, and httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
from decoder import cores, random_ids, write
from PIL import Image

from chatpose_jax.chat import ChatPose, load
from chatpose_jax.generate import Sampling, generate
from chatpose_jax.models.chatpose import init_params
from chatpose_jax.models.config import ModelConfig, TextConfig, VisionConfig
from chatpose_jax.processing.processor import tiny_processor, tiny_tokenizer
from chatpose_jax.weights.export import export
from chatpose_jax.weights.save import save_folder

WIDTHS = {"full": (512, 1536, 12, 8), "small": (128, 384, 2, 4)}
"""Hidden and intermediate width, layers and heads of the language model: 43 M parameters, or few, which only show that the script runs."""
SLOTS = 8
PARTS = ("same", "memory", "throughput", "first", "overhead")


def make_model(folder: Path, preset: str) -> ModelConfig:
    """Writes a random LLaVA with the tokenizer of the preset ``tiny``. All that it can write are words of that vocabulary, the end and the pose."""
    hidden, inner, layers, heads = WIDTHS[preset]
    text = TextConfig(
        vocab_size=1026, base_vocab_size=1024, hidden_size=hidden, intermediate_size=inner, num_layers=layers,
        num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads, max_position_embeddings=2048,
    )  # fmt: skip
    vision = VisionConfig(
        image_size=112, patch_size=14, hidden_size=256, intermediate_size=1024, num_layers=4, num_heads=4
    )
    config = ModelConfig(
        text=text, vision=vision, lora=None, pose_token_id=1024, image_token_id=1025, dtype="float32", param_dtype="float32"
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    pieces = tiny_tokenizer()._pieces
    words = np.zeros(1024, np.float32)
    words[[i for i, piece in pieces.items() if i < 1024 and re.fullmatch("[A-Za-z]+▁", piece)]] = 8
    words[config.eos_token_id] = 6
    head = params["decoder"]["lm_head"]
    scale = hidden**-0.5 / np.asarray(head["kernel"]).std()
    head["kernel"], head["added"] = head["kernel"] * scale * words, head["added"] * scale * np.array([7, 0], np.float32)
    save_folder(folder, config, params, processor=tiny_processor(config, "plain"))
    return config


PLAIN = (
    "A chat about human poses. {% for message in messages %}{% if message.role == 'user' %}USER: "
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {% for part in message.content %}{{ part.text }}{% endfor %}</s>{% endif %}{% endfor %}ASSISTANT:"
)
"""The template ``plain`` in transformers' words: an export brings the tokenizer, and no template of a conversation."""


class Server:
    """A server process, and a client of it."""

    def __init__(self, command: list[str], model: str, ready: str, log: Path, **environment: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.log = model, log
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)], stdout=log.open("w"), stderr=subprocess.STDOUT, env=os.environ | environment
        )  # fmt: skip
        self.client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.port}", timeout=3600, limits=httpx.Limits(max_connections=200)
        )
        begin = time.monotonic()
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{self.port}{ready}").status_code == 200:
                    break
            if self.process.poll() is not None or time.monotonic() > begin + 900:
                raise SystemExit(f"{command[:4]} did not start: {log.read_text()[-3000:]}")
            time.sleep(0.2)
        self.seconds = time.monotonic() - begin

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    @property
    def resident(self) -> float:
        """MB of memory that the process has."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024 / 1e6  # type: ignore[index]

    async def ask(self, messages: list[dict[str, Any]], **settings: Any) -> Answer:
        """One answer, streamed if ``stream``."""
        body = {"model": self.model, "messages": messages, "temperature": 0.0, **settings}
        begin = time.perf_counter()
        if not settings.get("stream"):
            response = await self.client.post("/v1/chat/completions", json=body)
            if response.status_code != 200:
                raise SystemExit(
                    f"status {response.status_code}: {response.text[:1000]}\n{self.log.read_text()[-2000:]}"
                )
            found = response.json()
            [choice] = found["choices"]
            message = choice["message"]
            return Answer(
                message["content"], choice["finish_reason"], message.get("poses", []), found["usage"]["completion_tokens"],
                seconds=time.perf_counter() - begin,
            )  # fmt: skip
        answer = Answer()
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise SystemExit(f"status {response.status_code}: {(await response.aread())[:1000]!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise SystemExit(f"an answer ended with {event}")
                for choice in event["choices"]:
                    delta = choice["delta"]
                    if delta.get("content"):
                        answer.first = answer.first or time.perf_counter() - begin
                        answer.text += delta["content"]
                    answer.poses += delta.get("poses") or []
                    answer.finish = choice["finish_reason"] or answer.finish
                answer.tokens = (event.get("usage") or {}).get("completion_tokens", answer.tokens)
        answer.seconds = time.perf_counter() - begin
        return answer


@dataclasses.dataclass
class Answer:
    """first: seconds up to the first piece, where it was streamed."""

    text: str = ""
    finish: str | None = None
    poses: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0


WORDS = "left right arm leg knee is raised bent and person stands sits with both hands up looks down to one side"


def words(seed: int, count: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS.split(), count))


def picture(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)


def address(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def asked(text: str, pixels: np.ndarray | None, here: bool) -> dict[str, Any]:
    """A user's message, in the words of ``ChatPose.chat`` (here) or of OpenAI's API."""
    if pixels is None:
        return {"role": "user", "content": text}
    image = {"type": "image", "image": pixels} if here else {"type": "image_url", "image_url": {"url": address(pixels)}}
    return {"role": "user", "content": [image, {"type": "text", "text": text}]}


@dataclasses.dataclass(frozen=True)
class Talk:
    """One client's three turns: what it asks, and how; every second one shows pictures, and every second one streams."""

    number: int

    def turn(self, turn: int) -> tuple[str, np.ndarray | None, dict[str, Any]]:
        seed = 3 * self.number + turn
        shown = (self.number % 2 == 0 and turn == 0) or (self.number % 4 == 2 and turn == 1)
        kinds: list[dict[str, Any]] = [
            {}, {"temperature": 1.5, "seed": seed}, {"force_pose": True}, {"temperature": 1.0, "top_p": 0.8, "seed": seed, "force_pose": True},
        ]  # fmt: skip
        settings = {"max_tokens": 12 + 5 * (seed % 6), **kinds[self.number // 2 % 4]}
        return f"{self.number}: {words(seed, 8 + seed % 17)}?", picture(seed, 112) if shown else None, settings

    async def over(self, server: Server) -> list[Answer]:
        messages, answers = list[dict[str, Any]](), list[Answer]()
        for turn in range(3):
            text, pixels, settings = self.turn(turn)
            messages.append(asked(text, pixels, here=False))
            stream = {"stream": True, "stream_options": {"include_usage": True}} if self.number % 3 == 0 else {}
            answers.append(await server.ask(messages, **settings, **stream))
            messages.append({"role": "assistant", "content": answers[-1].text})
        return answers

    def alone(self, model: ChatPose) -> list[Answer]:
        messages, answers = list[dict[str, Any]](), list[Answer]()
        for turn in range(3):
            text, pixels, settings = self.turn(turn)
            messages.append(asked(text, pixels, here=True))
            reply = model.chat(messages, max_new_tokens=settings.pop("max_tokens"), **settings)
            poses = [{"axis_angle": pose.axis_angle} for pose in reply.poses]
            answers.append(
                Answer(reply.text, reply.finish_reason, poses, len(reply.ids) + (reply.finish_reason == "stop"))
            )
            messages.append({"role": "assistant", "content": reply.text})
        return answers


async def together(server: Server, talks: Sequence[Talk]) -> list[list[Answer]]:
    return list(await asyncio.gather(*(talk.over(server) for talk in talks)))


async def same(server: Server, folder: Path, clients: int) -> dict[str, Any]:
    """Every answer beside the one that its conversation gets alone."""
    talks = [Talk(number) for number in range(clients)]
    begin = time.perf_counter()
    found = await together(server, talks)
    seconds = time.perf_counter() - begin
    model, differ, worst, spelled, plain = load(folder), list[dict[str, Any]](), 0.0, 0, 0
    for talk, answers in zip(talks, found):
        for turn, (one, other) in enumerate(zip(answers, talk.alone(model))):
            written = one.tokens - (one.finish == "stop")
            if "force_pose" not in talk.turn(turn)[2]:
                plain, spelled = plain + 1, spelled + (len(one.text.split()) == written)
            if (one.text, one.finish, one.tokens, len(one.poses)) != (
                other.text,
                other.finish,
                other.tokens,
                len(other.poses),
            ):
                differ.append({"talk": talk.number, "turn": turn, "found": one.text, "alone": other.text})
                break  # what follows was asked after other words
            for pose, expected in zip(one.poses, other.poses):
                worst = max(worst, float(np.abs(np.asarray(pose["axis_angle"]) - expected["axis_angle"]).max()))
    answers = sum(map(len, found))
    tokens = sum(answer.tokens for talk in found for answer in talk)
    poses = sum(len(answer.poses) for talk in found for answer in talk)
    print(
        f"| same | {clients} clients, {answers} answers, {tokens} tokens, {poses} poses in {seconds:.0f} s | {len(differ)} differ |"
    )
    print(
        f"| | words are as many as tokens in {spelled} of {plain} answers without a forced pose; poses differ by at most {worst:.1g} | |"
    )
    for each in differ[:3]:
        print(
            f"| | conversation {each['talk']}, turn {each['turn']}: {each['found']!r:.150} instead of {each['alone']!r:.150} | |"
        )
    return {
        "clients": clients, "answers": answers, "tokens": tokens, "poses": poses, "seconds": seconds, "differ": differ, "pose_difference": worst,
        "one_word_each": [spelled, plain],
    }  # fmt: skip


async def memory(server: Server, clients: int, minutes: float) -> dict[str, Any]:
    """Resident memory while the clients come again and again, with other words each time."""
    begin, samples = time.monotonic(), list[tuple[float, float]]()
    count = [0]

    async def client(number: int) -> None:
        turn = 0
        while time.monotonic() < begin + 60 * minutes:
            answers = await Talk(number + 1000 * turn).over(server)
            turn, count[0] = turn + 1, count[0] + len(answers)

    async def watch() -> None:
        while time.monotonic() < begin + 60 * minutes:
            samples.append((time.monotonic() - begin, server.resident))
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(client(number) for number in range(clients)))
    part = len(samples) // 5
    second, last = (statistics.median(mb for _, mb in each) for each in (samples[part : 2 * part], samples[-part:]))
    print(
        f"| memory | {clients} clients, {minutes:g} minutes, {count[0]} answers | {second:.0f} MB in the second fifth of the time, "
        f"{last:.0f} MB in the last, most {max(mb for _, mb in samples):.0f} |"
    )
    return {"minutes": minutes, "answers": count[0], "second_fifth": second, "last_fifth": last, "samples": samples}  # fmt: skip


def load_of(clients: int, round_: int, new: int) -> list[list[dict[str, Any]]]:
    """A question for each client; every second one shows a picture."""
    seeds = [1_000_000 + 1000 * round_ + 10 * clients + i for i in range(clients)]
    return [[asked(f"{words(seed, 20)}?", picture(seed, 112) if seed % 2 else None, here=False)] for seed in seeds]


async def rate(
    server: Server, questions: list[list[dict[str, Any]]], new: int, **settings: Any
) -> tuple[float, list[str]]:
    """Tokens a second of questions that come at once, and the answers."""
    begin = time.perf_counter()
    answers = await asyncio.gather(*(server.ask(each, max_tokens=new, **settings) for each in questions))
    return sum(answer.tokens for answer in answers) / (time.perf_counter() - begin), [answer.text for answer in answers]


async def throughput(server: Server, peer: Server | None, rounds: int, new: int) -> dict[str, Any]:
    """Tokens a second with one client and with as many as there are rows."""
    servers = {"ours": server} | ({} if peer is None else {"peer": peer})
    rates: dict[tuple[str, int], list[float]] = {(name, n): [] for name in servers for n in (1, SLOTS)}
    agree = [0, 0]

    for round_ in range(-1, rounds):  # the first one warms all up
        texts = dict[tuple[str, int], list[str]]()
        for name, n in rates if round_ % 2 else reversed(rates):
            speed, texts[name, n] = await rate(servers[name], load_of(n, round_, new), new)
            if round_ >= 0:
                rates[name, n].append(speed)
        if peer is not None:
            agree[0] += sum(a == b for n in (1, SLOTS) for a, b in zip(texts["ours", n], texts["peer", n]))
            agree[1] += 1 + SLOTS
    result: dict[str, Any] = {"rates": {f"{name}-{n}": each for (name, n), each in rates.items()}}
    result["clients"] = _ratio("throughput", f"{SLOTS} clients / 1", rates["ours", SLOTS], rates["ours", 1], "tokens/s")
    if peer is not None:
        for n in (1, SLOTS):
            result[f"peer_{n}"] = _ratio(
                "throughput",
                f"ours / transformers serve, {n} client{'s'[: n > 1]}",
                rates["ours", n],
                rates["peer", n],
                "tokens/s",
            )
        result["agree"] = agree
        print(f"| | {agree[0]} of {agree[1]} answers are the same texts in both | |")
    return result


def _ratio(part: str, what: str, a: Sequence[float], b: Sequence[float], unit: str) -> dict[str, Any]:
    ratios = sorted(x / y for x, y in zip(a, b))
    middle = statistics.median(ratios)
    print(
        f"| {part} | {what} | **{middle:.2f}** ({ratios[0]:.2f}–{ratios[-1]:.2f}): "
        f"{statistics.median(a):.4g} and {statistics.median(b):.4g} {unit} |",
        flush=True,
    )
    return {"ratio": middle, "ratios": ratios, "of": [list(a), list(b)]}


async def first(server: Server, rounds: int, context: int) -> dict[str, Any]:
    """Seconds to the first token of a short question, in turn alone and while a prompt that fills most of the context is read."""
    alone, beside, read, tokens = list[float](), list[float](), list[float](), tiny_tokenizer()

    async def short(seed: int) -> float:
        return (await server.ask([asked(f"{words(seed, 12)}?", None, False)], max_tokens=4, stream=True)).first

    seed = 2_000_000
    for round_ in range(10 * rounds):
        if len(beside) == 3 * rounds:
            break
        seed += 10
        alone.append(await short(seed))
        text = words(seed + 1, 100)
        while len(tokens.encode(text)) < context - 200:
            text += " " + words(seed + len(text), 50)
        long = asyncio.create_task(server.ask([asked(text, None, False)], max_tokens=4, stream=True))
        await asyncio.sleep(0.05 + 0.05 * (round_ % 5))
        seconds, over = await short(seed + 2), long.done()
        read.append((await long).first)
        if over:  # the long prompt was read already
            alone.pop()
        else:
            beside.append(seconds)
    if not beside:
        raise SystemExit("the long prompt was always read before the short question was answered: take --preset full")
    print(
        f"| first | a long prompt's first token, beside short questions, comes after {statistics.median(read):.2f} s | |"
    )
    return _ratio("first", "a short question while a long prompt is read / alone", beside, alone, "s") | {"long": read}


async def overhead(server: Server, folder: Path, rounds: int, new: int) -> dict[str, Any]:
    """Tokens a second of one client, whole and streamed, and of ``generate`` on one row and on the server's rows, of which one counts."""
    model = load(folder)
    rates: dict[str, list[float]] = {name: [] for name in ("whole", "streamed", "one row", f"{SLOTS} rows")}

    def here(rows: int) -> float:
        ids = list(random_ids(rows, 40, 1024, seed=len(rates["one row"])))
        begin = time.perf_counter()
        found = generate(model.config, model.params, ids, max_new_tokens=new, sampling=[Sampling()] * rows)
        return len(found.tokens[0]) / (time.perf_counter() - begin)

    async def there(round_: int, **settings: Any) -> float:
        [question] = load_of(1, round_ + 500, new)
        return (await rate(server, [question], new, **settings))[0]

    stream = {"stream": True, "stream_options": {"include_usage": True}}
    for round_ in range(-1, rounds):
        found = [await there(round_), await there(round_, **stream), here(1), here(SLOTS)]
        for each, speed in zip(rates.values(), found):
            if round_ >= 0:
                each.append(speed)
    return {
        name: _ratio("overhead", f"one client, {a} / generate, {b}", rates[a], rates[b], "tokens/s")
        for name, a, b in (
            ("batch", "whole", "one row"), ("server", "whole", f"{SLOTS} rows"), ("streaming", "streamed", f"{SLOTS} rows"),
        )
    }  # fmt: skip


@contextlib.contextmanager
def started(*arguments: Any, **environment: str) -> Iterator[Server]:
    server = Server(*arguments, **environment)
    try:
        yield server
    finally:
        server.close()


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"machine": platform.processor(), "cores": cores(), "preset": args.preset}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as running:
        root = Path(temporary)
        config = make_model(root / "model", args.preset)
        ours = [sys.executable, "-m", "chatpose_jax.cli", "serve", str(root / "model"), "--slots", str(SLOTS)]
        ours += ["--queue", str(args.clients)]
        server = running.enter_context(started(ours, "model", "/health", root / "ours.log"))
        peer = None
        if args.peer and "throughput" in args.parts:
            export(root / "model", root / "exported", "transformers")
            (root / "exported" / "chat_template.jinja").write_text(PLAIN)
            script = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
            theirs = [
                args.peer,
                "-c",
                script,
                "serve",
                str(root / "exported"),
                "--device",
                "cpu",
                "--host",
                "127.0.0.1",
            ]
            peer = running.enter_context(
                started(
                    theirs, str(root / "exported"), "/health", root / "theirs.log", HF_HUB_OFFLINE="1", PYTHONPATH=""
                )
            )
        print(f"preset {args.preset}, {SLOTS} rows; the server was ready after {server.seconds:.0f} s\n")
        print("| part | what | found |\n|---|---|---|", flush=True)
        for part in args.parts:
            result[part] = await {
                "same": lambda: same(server, root / "model", args.clients),
                "memory": lambda: memory(server, args.clients, args.minutes),
                "throughput": lambda: throughput(server, peer, args.rounds, args.new),
                "first": lambda: first(server, args.rounds, config.text.max_position_embeddings),
                "overhead": lambda: overhead(server, root / "model", args.rounds, args.new),
            }[part]()
            write(args.json, result)
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(WIDTHS), default="full")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10, help="of the part memory")
    parser.add_argument("--rounds", type=int, default=5, help="how often each of what is compared is timed")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer where speed is measured")
    parser.add_argument("--peer", help="a python with transformers[serving]; without it, only ours is measured")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    return asyncio.run(measure(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
