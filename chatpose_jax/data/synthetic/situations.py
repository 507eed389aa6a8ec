"""Situations that ask for a pose without naming it.

Each line says what a person does (after "a person who …"), the posture, and the places of the two arms; None draws one. No line names a side,
so the arms may be exchanged. To add a situation, add a line.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import numpy as np

from chatpose_jax.data.synthetic import skeleton
from chatpose_jax.data.synthetic.families import sample_poses


class Situation(NamedTuple):
    words: str
    posture: str
    arms: tuple[str | None, str | None]


SITUATIONS: tuple[Situation, ...] = tuple(
    Situation(*row)
    for row in (
        ("proposes marriage", "half_kneel", ("forward", "chest")),
        ("ties a shoe in the middle of a walk", "half_kneel", ("down", "down")),
        ("receives a medal as a knight", "half_kneel", ("chest", "down")),
        ("waves to a friend across the street", "stand", ("wave", "down")),
        ("hails a taxi", "stand", ("up", "down")),
        ("has just won the final", "stand", ("up", "up")),
        ("surrenders to the police", "stand", ("wave", "wave")),
        ("is scanned at the airport", "stand", ("up", "up")),
        ("waits impatiently for a late bus", "stand", ("hip", "hip")),
        ("guards a palace without moving", "stand", ("down", "down")),
        ("plays a scarecrow", "stand", ("side", "side")),
        ("pushes a heavy cupboard", "lunge", ("forward", "forward")),
        ("fences with a sword", "lunge", ("forward", "wave")),
        ("aims a bow", "step", ("side", "chest")),
        ("walks through the park", "step", ("down", "down")),
        ("walks over a rope high above the ground", "step", ("side", "side")),
        ("walks in the dark and feels for the wall", "step", ("forward", "forward")),
        ("sleepwalks", "step", ("forward", "forward")),
        ("crosses the finish line first", "run", ("up", "up")),
        ("jogs in the morning", "run", ("chest", "chest")),
        ("runs to catch a train and waves at it", "run", ("wave", "chest")),
        ("plays an aeroplane while running", "run", ("side", "side")),
        ("scores a goal", "kick", ("side", "down")),
        ("practises karate", "kick", ("chest", "chest")),
        ("dances the can-can", "kick", ("hip", "hip")),
        ("does a strength exercise for the thighs", "squat", ("forward", "forward")),
        ("lifts a barbell over the head", "squat", ("up", "up")),
        ("catches the ball behind the batter", "squat", ("chest", "chest")),
        ("prays in a church", "kneel", ("chest", "chest")),
        ("begs for mercy", "kneel", ("up", "up")),
        ("is arrested and kneels", "kneel", ("head", "head")),
        ("listens to a lecture", "sit", ("chest", "chest")),
        ("asks a question in class", "sit", ("up", "chest")),
        ("drives a car", "sit", ("forward", "forward")),
        ("relaxes in an office chair", "sit", ("head", "head")),
        ("talks on the phone at a desk", "sit", ("head", "chest")),
        ("enjoys a picnic", "floor_sit", ("down", "chest")),
        ("rows a boat", "floor_sit", ("forward", "forward")),
        ("plays with blocks on the carpet", "floor_sit", ("chest", "forward")),
        ("picks a coin off the street", "bend", ("prop", "down")),
        ("touches the toes in the gym", "bend", ("prop", "prop")),
        ("takes a bow after the concert", "bend", ("down", "down")),
        ("plays a horse for a small child", "crawl", ("prop", "prop")),
        ("looks for a lost ring on the carpet", "crawl", ("prop", "prop")),
        ("sunbathes at the beach", "supine", ("head", "head")),
        ("makes an angel in the snow", "supine", ("side", "side")),
        ("waits for the doctor on the couch", "supine", ("down", "down")),
        ("sleeps curled up in bed", "side", ("chest", "chest")),
        ("reads a book in the grass, resting sideways", "side", ("forward", "chest")),
        ("imitates a stork", "one_leg", ("down", "down")),
        ("holds the tree pose in a yoga class", "one_leg", ("up", "up")),
        ("keeps the balance on a post", "one_leg", ("side", "side")),
        ("hops because one foot hurts", "one_leg", ("chest", "chest")),
    )
)

QUESTIONS = (
    "What pose does a person take who {situation}?",
    "Show me the body of someone who {situation}.",
    "Imagine a person who {situation}. What is the SMPL pose?",
    "How would a person who {situation} hold the body?",
    "Can you show a person who {situation}?",
    "Please give me the pose of somebody who {situation}.",
)

_GRAMMAR = """
a an the who someone somebody person figure of to in on at for off over above across behind out up down into with without while because after before
first and or as it its is are has have had been be just does do doing takes take makes make looks look get gets one all both so this that these what
how would can could you your me please show give
"""
GRAMMAR = frozenset(_GRAMMAR.split())
"""Words that say nothing of a situation: of grammar, and verbs of any action."""
_ENDING = re.compile(r"(?<=...)(ing|es|s|ed|e)$")


def stems(text: str) -> frozenset[str]:
    """The words of a text without ``GRAMMAR``, lower-cased and without their endings."""
    words = (word for word in re.findall(r"[a-z]+", text.lower()) if word not in GRAMMAR)
    return frozenset(_ENDING.sub("", word) for word in words)


def shared_words(one: frozenset[str], other: frozenset[str]) -> frozenset[str]:
    """Stems that two texts share. A stem of four letters or more is also shared where it stands inside another: walk, sleepwalk."""
    inside = {a for a in one for b in other if min(len(a), len(b)) >= 4 and (a in b or b in a)}
    return one & other | inside


CLEAR, TIE = 0.07, 0.01
_SAMPLES = 12


def situations_of(rotations: np.ndarray) -> list[Situation]:
    """The situations that a pose clearly belongs to, often none: a generated body of theirs, or its mirror image, is nearer than ``CLEAR``, and none
    of another situation is nearer by ``TIE``.

    rotations: (24, 3, 3) in the body frame, facing +z. Distances are means over the joints in metres, the pelvis at the origin.
    """
    joints, _ = skeleton.forward_kinematics(np.asarray(rotations, float)[None])
    nearest = np.linalg.norm(_bodies() - joints, axis=-1).mean(-1).min(-1)
    return [SITUATIONS[i] for i in np.flatnonzero(nearest <= min(CLEAR, nearest.min() + TIE))]


@functools.cache
def _bodies() -> np.ndarray:
    """Joints (situations, bodies, 24, 3) of bodies that are drawn once for each situation."""
    drawn = [
        sample_poses(_SAMPLES, [20240617, number], situation.posture, situation.arms).rotations
        for number, situation in enumerate(SITUATIONS)
    ]
    turned = [skeleton.remove_yaw(np.concatenate([poses, skeleton.mirror(poses)])) for poses in drawn]
    return np.stack([skeleton.forward_kinematics(poses)[0] for poses in turned])
