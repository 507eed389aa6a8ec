"""Captions of poses in words: posecodes are selected, joined and written as sentences.

Selection: a code is not said if the posture or the arm's shape implies it, or if it is true of more than 40 % of all poses. A code that is
true of fewer than 6 % is always said. Of the rest, 15 % are skipped at random. Joining: left and right with the same code become "both"
(symmetry), codes of hand and elbow join the sentence of the arm (entity), parts that do the same share a verb (interpretation), codes of one
leg share a sentence (focus).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from chatpose_jax.data.synthetic import skeleton
from chatpose_jax.data.synthetic.families import sample_poses
from chatpose_jax.data.synthetic.posecodes import CODES, KINDS, Codes, encode
from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line

Detail = Literal["short", "detailed"]
MAX_WORDS = 70
RARE, TRIVIAL, IMPLIED, SKIP = 0.06, 0.40, 0.70, 0.15

SUBJECTS = ("a person", "someone", "the person", "a figure")
# {lead} is the leg in front or raised, or the side that the body lies on; {other} is the other one.
POSTURES: dict[str, tuple[str, ...]] = {
    "stand": ("stands upright", "is standing", "stands on both feet"),
    "step": (
        "takes a step with the {lead} foot in front",
        "walks, the {lead} leg leading",
        "is walking with the {lead} foot forward",
    ),
    "run": ("runs with the {lead} knee in front", "is running, the {lead} leg leading"),
    "kick": ("kicks forward with the {lead} leg", "stands on the {other} leg and kicks with the {lead} one"),
    "squat": ("squats", "is squatting with the hips low", "crouches in a squat"),
    "lunge": ("lunges with the {lead} leg in front", "is in a lunge, the {lead} foot forward"),
    "kneel": ("kneels on both knees", "is kneeling upright on both knees"),
    "half_kneel": ("kneels on the {other} knee with the {lead} foot in front", "is down on the {other} knee"),
    "sit": ("sits on a seat", "is sitting as if on a chair", "sits on a chair"),
    "floor_sit": ("sits on the floor", "is sitting on the ground with the legs in front"),
    "bend": ("bends far forward at the hips", "stands bent over", "is bending down"),
    "crawl": ("is on hands and knees", "crawls on all fours"),
    "supine": ("lies on the back", "is lying face up"),
    "prone": ("lies on the belly", "is lying face down"),
    "side": ("lies on the {lead} side", "is lying on the {lead} side"),
    "one_leg": ("stands on the {other} leg with the {lead} knee raised", "balances on the {other} leg"),
}
# (verb, rest); "be" and the plural are inflected, {s} makes nouns plural when both arms are meant.
ARMS: dict[str, tuple[tuple[str, str], ...]] = {
    "down": (("hang", "down at the side{s}"), ("be", "down beside the body")),
    "hip": (("be", "bent with the hand{s} on the hip{s}"), ("rest", "with the hand{s} on the hip{s}")),
    "forward": (("reach", "forward"), ("be", "stretched out in front")),
    "side": (("be", "held out to the side{s}"), ("stretch", "out to the side{s}")),
    "up": (("be", "raised overhead"), ("reach", "up above the head")),
    "chest": (("be", "bent in front of the chest"), ("be", "folded before the chest")),
    "head": (("be", "bent with the hand{s} at the head"), ("bend", "so that the hand{s} touch{es} the head")),
    "wave": (("be", "bent with the hand{s} raised as in a wave"), ("be", "out to the side{s} with the forearm{s} up")),
    "prop": (
        ("support", "the body with the hand{s} on the ground"),
        ("be", "straight down with the hand{s} on the ground"),
    ),
}
ELBOW = {
    "folded": "fully bent", "sharply": "sharply bent", "right_angle": "bent at a right angle", "half": "half bent",
    "slightly": "slightly bent", "straight": "straight",
}  # fmt: skip
HAND: dict[str, dict[str, str]] = {
    "hand_height": {
        "low": "low", "waist": "at waist height", "chest": "at chest height", "shoulder": "at shoulder height",
        "head": "at head height", "overhead": "above the head",
    },
    "hand_depth": {"behind": "behind the back", "front": "in front of the body", "far_front": "far in front"},
    "hand_side": {"across": "across the body", "out": "off to the side", "far_out": "far out to the side"},
    "hand_head": {"close": "close to the head"},
    "hand_hip": {"close": "close to the hip"},
    "hand_knee": {"close": "near the knee"},
    "hand_foot": {"close": "near the foot"},
    "hand_ground": {"touching": "on the ground"},
}  # fmt: skip
FOREARM = {"vertical": "upright", "level": "level"}
UPPER_ARM = {"lifted": "half raised", "level": "level with the shoulder", "above": "above the shoulder"}
LEG: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {  # kind: (part, category → (verb, rest))
    "thigh": ("thigh", {
        "back": ("point", "backward"), "little": ("be", "a little forward"), "raised": ("be", "half raised"),
        "level": ("be", "raised to hip level"), "drawn_up": ("be", "drawn up to the chest"),
    }),
    "knee": ("knee", {name: ("be", words) for name, words in ELBOW.items()}),
    "thigh_side": ("leg", {
        "crossed": ("cross", "to the other side"), "out": ("point", "outward"), "far_out": ("be", "spread far outward"),
    }),
    "shin": ("shin", {"vertical": ("be", "upright"), "level": ("be", "level")}),
    "foot_lift": ("foot", {"lifted": ("be", "off the ground"), "high": ("be", "high off the ground")}),
    "knee_ground": ("knee", {"touching": ("touch", "the ground")}),
}  # fmt: skip
WHOLE: dict[str, dict[str, str]] = {
    "feet_apart": {
        "together": "the feet are together",
        "apart": "the feet are apart",
        "wide": "the feet are wide apart",
    },
    "hand_hand": {"close": "the hands are close together"},
    "trunk_lean": {
        "back": "the trunk leans back",
        "forward": "the trunk leans forward",
        "far_forward": "the trunk leans far forward",
    },
    "trunk_side": {"left": "the trunk bends to the left", "right": "the trunk bends to the right"},
    "trunk_turn": {"left": "the trunk turns left", "right": "the trunk turns right"},
    "back_curve": {"curved": "the back is curved", "rounded": "the back is rounded"},
    "head_turn": {"left": "the head turns left", "right": "the head turns right"},
    "head_nod": {"up": "the chin is up", "down": "the chin is down"},
}
ARM_KINDS = (*HAND, "elbow", "elbow_height", "forearm")
# Kinds that are not said beside a posture or a shape, which says as much or makes them meaningless.
_PLACED = tuple(kind for kind in ARM_KINDS if kind not in ("elbow", "hand_ground"))
_LYING = ("trunk_lean", "knee_ground", "foot_lift", "hand_ground", "forearm")
SILENCED: dict[str, tuple[str, ...]] = {
    "hip": _PLACED,
    "head": _PLACED,
    "supine": _LYING,
    "prone": _LYING,
    "side": _LYING,
    "crawl": ("knee_ground", "foot_lift", "trunk_lean", "hand_height"),
}


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Shares of poses for which each category is true.

    overall: (kind, category) → share of all poses. by_posture: (posture, kind, category) → share of poses with that posture. by_shape:
    (shape, kind, category) → share of arms with that shape, left and right together.
    """

    overall: dict[tuple[str, str], float]
    by_posture: dict[tuple[str, str, str], float]
    by_shape: dict[tuple[str, str, str], float]

    __repr__ = one_line


def statistics(codes: Codes) -> Statistics:
    """Statistics of the codes of poses. Left and right are counted together, so that both are treated alike."""
    overall: dict[tuple[str, str], float] = {}
    by_posture: dict[tuple[str, str, str], float] = {}
    by_shape: dict[tuple[str, str, str], float] = {}
    for kind, rule in KINDS.items():
        columns = codes.categories[:, [i for i, code in enumerate(CODES) if code[0] == kind]]
        for index, category in enumerate(rule.categories):
            hit = columns == index
            overall[kind, category] = float(hit.mean())
            for posture in np.unique(codes.posture):
                by_posture[str(posture), kind, category] = float(hit[codes.posture == posture].mean())
            if kind in ARM_KINDS:
                for shape in np.unique(codes.shapes):
                    by_shape[str(shape), kind, category] = float(hit[codes.shapes == shape].mean())
    return Statistics(overall, by_posture, by_shape)


@functools.cache
def reference_statistics() -> Statistics:
    """Statistics of 2,000 generated poses of a fixed seed."""
    return statistics(encode(sample_poses(2000, seed=20240617).rotations))


def describe(rotations: ArrayLike, detail: Detail = "detailed", seed: int = 0, family: str | None = None) -> str:
    """Describes one pose in words.

    Args:
        rotations: (24, 3, 3) matrices, joint 0 the global orientation in a y-up frame. Yaw is removed first.
        detail: "short" names the posture and the arms. "detailed" adds elbows, hands, legs, trunk and head, in at most ``MAX_WORDS`` words.
        seed: of the noise, of what is left out, and of the wording.
        family: the posture's name (``captions.POSTURES``) where it is known; otherwise the joints decide.

    Raises:
        UserError for another shape.
    """
    array = np.asarray(rotations, float)
    if array.shape != (24, 3, 3):
        raise UserError(f"describe() takes the rotation matrices of one pose, (24, 3, 3), and was given {array.shape}.")
    rng = np.random.default_rng(seed)
    codes = encode(skeleton.remove_yaw(array[None]), rng)
    return caption(codes, 0, rng, detail, family)


def caption(
    codes: Codes,
    row: int,
    rng: np.random.Generator,
    detail: Detail = "detailed",
    family: str | None = None,
) -> str:
    """The caption of one row of ``codes``; see ``describe``."""
    writer = _Writer(codes, row, rng, family)
    opening, arms = writer.summary(), writer.arms(detail == "detailed")
    rest = [*writer.legs(), *writer.whole()] if detail == "detailed" else []
    while True:
        sentences = writer.plan(opening, arms, rest)
        if sum(len(s.split()) for s in sentences) <= MAX_WORDS:
            return " ".join(sentences)
        if rest:
            rest.remove(max(rest, key=lambda clause: clause.share))
        else:
            arms = writer.arms(detailed=False)


def summary(codes: Codes, row: int, rng: np.random.Generator, family: str | None = None) -> str:
    """The posture alone: a short clause with a subject and no full stop."""
    return _Writer(codes, row, rng, family).summary()


def arms(codes: Codes, row: int, rng: np.random.Generator) -> str:
    """The arms alone, in sentences."""
    return " ".join(f"{s[0].upper()}{s[1:]}." for s in _Writer(codes, row, rng, None).arms(detailed=True))


@dataclasses.dataclass(frozen=True)
class _Clause:
    """A clause about a part of one side, such as "the left knee".

    side: "left", "right", "both", or "" where ``rest`` is the whole clause. share: of poses for which it is true. Where there are too many
    words, the clause with the largest share is left out first.
    """

    part: str
    side: str
    verb: str
    rest: str
    share: float

    def subject(self) -> str:
        return f"both {plural(self.part)}" if self.side == "both" else f"the {self.side} {self.part}"

    def sentence(self, later: bool = False) -> str:
        """Subject and predicate. later: an earlier clause has named the side, so this one does not."""
        many = self.side == "both" or " and " in self.part
        ending = {"s": "s" if many else "", "es": "" if many else "es"}
        subject = f"the {plural(self.part) if self.side == 'both' else self.part}" if later else self.subject()
        return f"{subject} {conjugate(self.verb, many)} {self.rest.format(**ending)}"


class _Writer:
    def __init__(self, codes: Codes, row: int, rng: np.random.Generator, family: str | None):
        self.rng = rng
        self.posture = family or str(codes.posture[row])
        self.lead = str(codes.lead[row])
        self.shapes = dict(zip(("left", "right"), (str(s) for s in codes.shapes[row])))
        self.shares = reference_statistics()
        self.codes = self._select(codes.named(row))

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def _select(self, named: dict[tuple[str, str], str]) -> dict[tuple[str, str], str]:
        """The codes that are said."""
        out = {}
        # One number for each code, so that the wording that is drawn next does not depend on the pose.
        chance = dict(zip(CODES, self.rng.random(len(CODES))))
        for (kind, side), category in named.items():
            skipped = chance[kind, side] < SKIP
            share = self.shares.overall[kind, category]
            if kind in ARM_KINDS:
                implied = self.shares.by_shape.get((self.shapes[side], kind, category), 0.0)
            else:
                implied = self.shares.by_posture.get((self.posture, kind, category), 0.0)
            silenced = kind in SILENCED.get(self.posture, ()) or kind in SILENCED.get(self.shapes.get(side, ""), ())
            if silenced or implied > IMPLIED or share > TRIVIAL or (skipped and share > RARE):
                continue
            out[kind, side] = category
        return out

    def summary(self) -> str:
        other = "right" if self.lead == "left" else "left"
        return f"{self.pick(SUBJECTS)} {self.pick(POSTURES[self.posture]).format(lead=self.lead, other=other)}"

    def arms(self, detailed: bool) -> list[str]:
        if self.shapes["left"] == self.shapes["right"] != "":
            return [self._arm("both", detailed)]
        return [self._arm(side, detailed) for side in self._order()]

    def _order(self) -> tuple[str, ...]:
        return ("left", "right") if self.rng.random() < 0.5 else ("right", "left")

    def _arm(self, side: str, detailed: bool) -> str:
        """A sentence about one arm or both: the shape, then elbow and hand where the shape does not imply them."""
        sides = ("left", "right") if side == "both" else (side,)
        shape = self.shapes[sides[0]]
        details: list[str] = []
        for group in (("elbow",), ("elbow_height",), ("forearm",), tuple(HAND)):
            found = {s: self._adjectives(group, s) for s in sides}
            part = "hand" if group[0] in HAND else group[0].removesuffix("_height")
            if len(set(found.values())) == 1:
                shared = next(iter(found.values()))
                details += [f"the {plural(part) if side == 'both' else part} {shared}"] if shared else []
            else:
                details += [f"the {s} {part} {words}" for s, words in found.items() if words]
        if shape:
            verb, rest = ARMS[shape][int(self.rng.integers(len(ARMS[shape])))]
            clause = _Clause("arm", side, verb, rest, 0.0)
            base = clause.sentence()
            return f"{base}, {_join(details)}" if details and detailed else base
        if not details:
            return f"the {side} arm is free"
        part, *rest_of_it = details[0].removeprefix("the ").split()
        tail = f", {_join(details[1:])}" if len(details) > 1 and detailed else ""
        return f"the {side} {part} is {' '.join(rest_of_it)}{tail}"

    def _adjectives(self, kinds: tuple[str, ...], side: str) -> str:
        words = []
        for kind in kinds:
            category = self.codes.get((kind, side))
            if category:
                words.append({**HAND, "elbow": ELBOW, "elbow_height": UPPER_ARM, "forearm": FOREARM}[kind][category])
        return _join(words)

    def legs(self) -> list[_Clause]:
        clauses = []
        for kind, (part, phrases) in LEG.items():
            found = {side: self.codes.get((kind, side)) for side in self._order()}
            if len(set(found.values())) == 1:
                found = {"both": next(iter(found.values()))}
            for side, category in found.items():
                if category:
                    clauses.append(_Clause(part, side, *phrases[category], self.shares.overall[kind, category]))
        return clauses

    def whole(self) -> list[_Clause]:
        return [
            _Clause("", "", "", phrases[category], self.shares.overall[kind, category])
            for kind, phrases in WHOLE.items()
            if (category := self.codes.get((kind, "")))
        ]

    def plan(self, opening: str, arms: list[str], rest: list[_Clause]) -> list[str]:
        """Sentences: the posture first, then arms, legs and the whole body in random order."""
        groups = []
        if len(arms) == 2 and self.rng.random() < 0.6 and len(" ".join(arms).split()) < 24:
            arms = [arms[0] + self.pick((", while ", "; ", ", and ")) + arms[1]]
        groups.append(arms)
        legs = [clause for clause in rest if clause.side]
        by_side: dict[str, list[_Clause]] = {}
        for clause in self._share_verbs(legs):
            by_side.setdefault(clause.side, []).append(clause)
        groups.append([_join([c.sentence(later=i > 0) for i, c in enumerate(clauses)]) for clauses in by_side.values()])
        whole = [clause.rest for clause in rest if not clause.side]
        if whole:
            groups.append([_join(whole)])
        order = self.rng.permutation(len(groups))
        sentences = [s for i in order for s in groups[i]]
        if arms and len(sentences[0].split()) < 9 and self.rng.random() < 0.4:
            opening, sentences = f"{opening} and {sentences[0]}", sentences[1:]
        return [f"{s[0].upper()}{s[1:]}." for s in (opening, *sentences)]

    def _share_verbs(self, clauses: list[_Clause]) -> list[_Clause]:
        """Joins parts of one leg that do the same into one clause with two subjects."""
        out: list[_Clause] = []
        for clause in clauses:
            same = [o for o in out if (o.side, o.verb, o.rest) == (clause.side, clause.verb, clause.rest)]
            if same and " and " not in same[0].part:
                first = same[0]
                out[out.index(first)] = dataclasses.replace(first, part=f"{first.part} and {clause.part}")
            else:
                out.append(clause)
        return out


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def plural(noun: str) -> str:
    """The plural of a body part, or of two joined by "and"."""
    return " and ".join({"foot": "feet"}.get(word, f"{word}s") for word in noun.split(" and "))


def conjugate(verb: str, many: bool) -> str:
    """The present tense of a verb in the third person, plural if many."""
    if verb == "be":
        return "are" if many else "is"
    return verb if many else f"{verb}es" if verb.endswith(("ch", "ss", "sh")) else f"{verb}s"
