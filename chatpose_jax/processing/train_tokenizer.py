"""Trains a small tokenizer in LLaMA's layout: ``python -m chatpose_jax.processing.train_tokenizer OUT TEXT…``.

It has 1024 rows: ``<unk>``, ``<s>``, ``</s>``, 256 bytes, so that any text has ids, printable ASCII, and merges learnt from the lines of the
TEXT files. ``<POSE>`` is 1024 and ``<image>`` 1025. ``tools/tiny_tokenizer.py`` makes that of the preset ``tiny`` from the generated set.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from chatpose_jax.processing.conversation import POSE, TEMPLATES
from chatpose_jax.processing.tokenizer import IMAGE_LITERAL, TextTokenizer

BASE_ROWS = 1024
_CONTROL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SPACE = "▁"

# Words that people may use beyond the given text. They count little, so they get only the merges that are left.
_GENERAL = """
a an the and or but with without while then now again still just very slightly fully partly almost about roughly
exactly more less most least same other another each every first second last one two three four five six seven eight
nine ten I you he she it they we his her their its your this that these those there here who what which where when
why how is are was were be been has have had do does did can could would should will may might must show give make
tell generate predict estimate describe imagine draw provide find look see think guess move put keep bring change
turn raise lower bend straighten stretch lift spread cross open close rotate tilt lean place hold person people man
woman someone somebody human figure player dancer athlete worker child boy girl photo photograph picture image
camera view viewer scene middle center room wall chair table ball box door phone cup street red green blue yellow
white black grey brown orange purple shirt trousers dress background clothing wearing dressed colour light dark
facing away toward towards around between against along through under over inside outside onto into off up down left
right front back side top bottom high low higher near far apart together forward backward sideways diagonally
upright straight angle degrees palm palms finger fingers toe toes heel heels hip pelvis spine stomach belly face
eyes chin mouth shoulders forearms thighs shins calves limb limbs yes no sure okay please thanks thank sorry hello
good great nice happy tired sad angry ready winner sprinter tree warrior plank bridge star airplane tennis golf
football basketball swimming skating boxing archery guitar
"""


def build_tokenizer(texts: Iterable[str], rows: int = BASE_ROWS) -> tokenizers.Tokenizer:
    """Learns ``rows`` base rows from ``texts`` and adds the pose and image tokens. The same text gives the same tokenizer.

    Merges may cross spaces but not punctuation (Liu et al. 2025, "SuperBPE"): sequences become shorter, and common phrases one token.

    Raises ValueError if the text is too short for that many rows.
    """
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "removed"),  # the first word of a line follows no space, as after an image
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=rows,
        special_tokens=_CONTROL + _BYTES,
        initial_alphabet=[_SPACE, *map(chr, range(33, 127))],
        limit_alphabet=95,
        show_progress=False,
    )
    framed = itertools.chain(texts, _general(), _frames())
    learner.train_from_iterator((text.replace(" ", _SPACE) for text in framed), trainer)
    learnt: dict[str, Any] = json.loads(learner.to_str())["model"]
    if len(learnt["vocab"]) != rows:
        raise ValueError(f"the text yields {len(learnt['vocab'])} rows, expected {rows}: give more text")
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=learnt["vocab"],
            merges=[tuple(merge) for merge in learnt["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in _CONTROL])
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in (POSE, IMAGE_LITERAL)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def tokens_a_word(tokenizer: TextTokenizer, texts: Iterable[str]) -> float:
    """The mean number of ids for each word between spaces."""
    counts = [(len(tokenizer.encode(text)), len(text.split())) for text in texts]
    return sum(tokens for tokens, _ in counts) / max(1, sum(words for _, words in counts))


def write_tokenizer_files(texts: Iterable[str], out: Path) -> TextTokenizer:
    """Learns from ``texts`` and writes ``out/tokenizer.json``."""
    tokenizer = TextTokenizer(build_tokenizer(texts))
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(tokenizer.backend.to_str(pretty=False) + "\n", encoding="utf-8")
    return tokenizer


def _general() -> Iterator[str]:
    words = _GENERAL.split()
    for word in (*words, *(word.capitalize() for word in words)):
        yield f" {word}"


def _frames() -> Iterator[str]:
    for name in ("vicuna_v1", "llava_v1", "plain"):
        yield from 200 * [f" {TEMPLATES[name].system} USER: ASSISTANT:"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder for tokenizer.json")
    parser.add_argument("text", type=Path, nargs="+", help="text files, one caption, question or answer a line")
    args = parser.parse_args()
    lines = [line for path in args.text for line in path.read_text(encoding="utf-8").splitlines()]
    tokenizer = write_tokenizer_files((f" {line}" for line in lines), args.out)
    print(f"{args.out}: {tokenizer.size} rows, {tokens_a_word(tokenizer, lines):.2f} tokens a word")


if __name__ == "__main__":
    main()
