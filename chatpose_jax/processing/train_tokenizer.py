"""Make the tokenizer of the preset ``tiny``: ``python -m chatpose_jax.processing.train_tokenizer OUT``.

LLaMA's layout in 1024 rows: ``<unk>``, ``<s>``, ``</s>``, 256 bytes (so any text has ids), printable ASCII, and merges
learnt on generated captions and conversations; then ``<POSE>`` = 1024 and ``<image>`` = 1025.
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


def build(texts: Iterable[str], rows: int = BASE_ROWS) -> tokenizers.Tokenizer:
    """Learn ``rows`` base rows from ``texts`` (deterministic) and add the pose and image tokens."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(True)]
    )
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=rows,
        special_tokens=_CONTROL + _BYTES,
        initial_alphabet=["▁", *map(chr, range(33, 127))],
        limit_alphabet=96,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
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


_SIDES = ("left", "right", "both")
_LIMBS = (
    "arm",
    "arms",
    "hand",
    "hands",
    "elbow",
    "elbows",
    "leg",
    "legs",
    "knee",
    "knees",
    "foot",
    "feet",
    "thigh",
    "shin",
    "forearm",
    "upper arm",
    "head",
    "torso",
    "hips",
    "back",
    "neck",
    "chest",
    "waist",
    "shoulder",
    "shoulders",
    "wrist",
    "ankle",
    "body",
)
_STATES = (
    "raised",
    "lowered",
    "bent",
    "straight",
    "slightly bent",
    "completely bent",
    "almost straight",
    "bent at a right angle",
    "stretched out",
    "extended to the side",
    "extended forward",
    "lifted",
    "tilted",
    "turned",
    "twisted",
    "crossed",
    "spread apart",
    "close together",
    "shoulder width apart",
    "wide apart",
    "vertical",
    "horizontal",
    "parallel to the floor",
    "folded",
    "relaxed",
    "hanging down",
    "resting",
    "pointing up",
    "pointing down",
    "held",
)
_PLACES = (
    "in front of the body",
    "behind the back",
    "above the head",
    "overhead",
    "below the hips",
    "next to the waist",
    "on the hips",
    "at shoulder height",
    "to the left",
    "to the right",
    "to the side",
    "forward",
    "backward",
    "on the ground",
    "near the knee",
    "in the air",
    "beside the ear",
    "across the chest",
    "at the level of the neck",
)
_ACTIONS = (
    "standing",
    "sitting",
    "kneeling",
    "squatting",
    "crouching",
    "walking",
    "running",
    "jumping",
    "lunging",
    "bowing",
    "leaning",
    "waving",
    "reaching",
    "kicking",
    "punching",
    "throwing",
    "stretching",
    "balancing on one leg",
    "lying on the floor",
    "doing yoga",
    "dancing",
    "bending over",
    "cheering",
    "pointing",
    "praying",
    "climbing",
    "stepping forward",
    "lifting a box",
    "holding something",
)
_QUESTIONS = (
    "Describe the pose of the person in this image.", "Can you show the SMPL pose of this person?", "What is this person doing?", "Give me the pose of someone who is {}.",
    "Please show me a pose: the {}.", "Now raise the {} arm.", "What would the body look like if someone were {}?", "Show it again, but with the {}.",
    "There is a person in the middle of the picture; predict the 3D pose.", "How are the arms and the legs placed?", "Which pose fits this description? {}", "Someone is {}. Can you generate the human pose?",
)  # fmt: skip
_ANSWERS = (
    f"Sure, it is {POSE}.", f"The pose of this person is {POSE}.", f"{POSE}", f"Here is the pose: {POSE}.", f"Of course, this is how it looks: {POSE}.", f"Yes, the body takes the pose {POSE}.",
    "The person is {}.", "They are {} with the {}.", "In this picture somebody is {} and the {}.",
)  # fmt: skip

_WORDS = (
    "a an the and or but with without while then now again still just very slightly fully partly almost about roughly exactly more less most least same other another each every first second last one two three four five six seven eight nine ten "
    "I you he she it they we his her their its your this that these those there here who what which where when why how is are was were be been has have had do does did can could would should will may might must "
    "show give make tell generate predict estimate describe imagine draw provide find look see think guess move put keep bring change turn raise lower bend straighten stretch lift spread cross open close rotate tilt lean place hold "
    "person people man woman someone somebody human figure player dancer athlete worker child boy girl photo photograph picture image camera view viewer scene middle center room wall chair table ball box door phone cup street "
    "red green blue yellow white black grey brown orange purple shirt trousers dress background clothing wearing dressed colour light dark "
    "facing away toward towards around between against along through under over inside outside onto into off up down left right front back side top bottom high low higher lower near far close apart together forward backward sideways diagonally upright straight angle degrees "
    "palm palms finger fingers toe toes heel heels hip pelvis spine stomach belly face eyes chin mouth shoulders forearms thighs shins calves limb limbs "
    "yes no sure okay please thanks thank sorry hello good great nice happy tired sad angry ready winner sprinter tree warrior plank bridge star airplane tennis golf football basketball swimming skating boxing archery guitar"
)  # fmt: skip


def pose_language() -> Iterator[str]:
    """Every combination of a small grammar of pose descriptions, questions and answers."""
    for side, limb, state in itertools.product(_SIDES, _LIMBS, _STATES):
        place = _PLACES[(len(side) + 7 * len(limb) + 3 * len(state)) % len(_PLACES)]
        action = _ACTIONS[(5 * len(side) + len(limb) + 11 * len(state)) % len(_ACTIONS)]
        yield f"The {side} {limb} is {state}, {place}. The person is {action}, their {limb} are {state} while the {side} one stays {place}."
        clause = f"{side} {limb} {state} {place}"
        for question, answer in zip(_QUESTIONS, itertools.cycle(_ANSWERS)):
            yield question.format(action if "someone" in question.lower() else clause)
            yield answer.replace(POSE, "").format(action, clause)
    for action, place in itertools.product(_ACTIONS, _PLACES):
        yield f"A man is {action}, looking {place}. She is {action}; he has his hands {place}. A woman is {action} with one leg {place}."


def corpus() -> Iterator[str]:
    """The generated text, and the frames of the conversation templates."""
    yield from pose_language()
    words = _WORDS.split()
    for start in range(7):
        yield from 4 * [" ".join(words[start::7]), " ".join(word.capitalize() for word in words[start::7])]
    for template in TEMPLATES.values():
        yield from 200 * [f"{template.system} {template.user}: {template.assistant}:"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder for tokenizer.json")
    out: Path = parser.parse_args().out
    tokenizer = TextTokenizer(build(corpus()))
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(tokenizer.backend.to_str(pretty=False), encoding="utf-8")
    words = tokens = 0
    for text in itertools.islice(corpus(), 0, None, 50):
        words, tokens = words + len(text.split()), tokens + len(tokenizer.encode(text))
    print(f"{out}: {tokenizer.size} rows, {tokens / words:.2f} tokens a word")


if __name__ == "__main__":
    main()
