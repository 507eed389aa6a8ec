"""Published figures of the paper's tables and of later systems, with the conditions under which they were measured, as far as these are known."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from chatpose_jax.settings import one_line

PAPER = "ChatPose, CVPR 2024"
UNKNOWN = ""
_3DPW = ("3dpw", "3dpw_test")
_H36M = ("h36m_val_p2",)
_RPE = ("rpe_refined", "rpe")
_POSESCRIPT = ("posescript",)
_SPG = ("spg",)
_BENCH = ("llava_bench",)


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of a published table.

    task, data: key of ``TASKS``, and names of the data sets here that hold its rows. system: as it is called there. values: by column name.
    conditions: what the figures depend on, by the names of ``Scores.facts``; ``UNKNOWN`` where the publication does not say it. source: of the
    figures, and what else is known of them.
    """

    task: str
    data: tuple[str, ...]
    system: str
    values: Mapping[str, float]
    conditions: Mapping[str, str]
    source: str

    __repr__ = one_line


def _rows(
    task: str,
    data: tuple[str, ...],
    columns: Sequence[str],
    rows: Iterable[tuple[str, Sequence[float | None]]],
    conditions: Mapping[str, str],
    source: str,
) -> tuple[Published, ...]:
    """Rows of a table that share columns, conditions and source. A value of None was not published."""
    found = []
    for system, numbers in rows:
        assert len(numbers) == len(columns)
        values = {name: number for name, number in zip(columns, numbers) if number is not None}
        found.append(Published(task, data, system, values, conditions, source))
    return tuple(found)


_RECALL = tuple(f"{way}@{k}" for way in ("R^P2T", "R^T2P") for k in (5, 10, 20))
_POSE, _POINTS = ("MPJPE", "PA-MPJPE", "MPJRE"), ("MPJPE", "PA-MPJPE")
_RETRIEVER = {"retriever": "PoseScript's, trained on real poses, used on generated ones", "gallery": UNKNOWN}
_POSES = {"protocol": UNKNOWN, "pelvis": UNKNOWN, "betas": UNKNOWN, "samples": "200"}
_DESCRIBED = {"protocol": UNKNOWN, "pelvis": UNKNOWN, "betas": UNKNOWN}
_LATER = {**_DESCRIBED, "samples": UNKNOWN}
_FULL = {"protocol": "B", "pelvis": "point 39", "betas": "0; predicted poses on the neutral SMPL", "samples": UNKNOWN}

PUBLISHED: tuple[Published, ...] = (
    *_rows(
        "generation",
        _POSESCRIPT,
        _RECALL,
        (
            ("PoseScript", (22.6, 31.0, 42.3, 22.4, 32.1, 43.6)),
            ("ChatPose", (17.6, 25.3, 35.8, 28.0, 39.0, 54.4)),
        ),
        _RETRIEVER,
        f"{PAPER}, Table 1",
    ),
    *_rows(
        "spg",
        _SPG,
        _RECALL,
        (
            ("PoseScript", (None, 3.8, 6.5, 2.8, 4.3, 7.2)),
            ("ChatPose", (None, 14.2, 20.8, 10.9, 16.9, 25.3)),
        ),
        {**_RETRIEVER, "retriever": "PoseScript's, trained on implicit questions and poses", "gallery": "780"},
        f"{PAPER}, Table 1",
    ),
    *_rows(
        "rpe",
        _RPE,
        _POSE,
        (
            ("SPIN", (244.9, 107.3, 12.4)),
            ("HMR 2.0", (225.2, 105.7, 12.1)),
            ("LLaVA-S", (481.1, 203.7, 20.7)),
            ("LLaVA-P", (394.8, 186.8, 17.7)),
            ("ChatPose", (275.0, 101.8, 11.9)),
        ),
        {**_DESCRIBED, "samples": "250", "attributes": "the mean of five"},
        f"{PAPER}, Table 2",
    ),
    *_rows(
        "estimation",
        _3DPW,
        _POSE,
        (
            ("SPIN", (102.9, 62.9, 10.1)),
            ("HMR 2.0", (91.0, 58.4, 9.2)),
            ("LLaVA-S", (440.8, 205.4, 21.8)),
            ("LLaVA*-S", (232.1, 101.1, 12.8)),
            ("GPT4-S", (322.0, 136.7, 16.0)),
            ("LLaVA-P", (335.2, 172.3, 16.5)),
            ("GPT4-P", (396.5, 203.4, 18.6)),
            ("ChatPose", (163.6, 81.9, 10.4)),
        ),
        _POSES,
        f"{PAPER}, Table 3",
    ),
    *_rows(
        "estimation",
        _H36M,
        _POINTS,
        (
            ("SPIN", (61.9, 42.6)),
            ("HMR 2.0", (50.0, 33.6)),
            ("LLaVA-S", (461.3, 195.4)),
            ("LLaVA*-S", (246.0, 118.2)),
            ("GPT4-S", (336.9, 144.0)),
            ("LLaVA-P", (334.1, 172.5)),
            ("GPT4-P", (354.1, 203.5)),
            ("ChatPose", (126.0, 82.4)),
        ),
        _POSES,
        f"{PAPER}, Table 3",
    ),
    *_rows(
        "judge",
        _BENCH,
        ("conv", "detail", "complex", "all"),
        (
            ("LLaVA-V1-13B", (83.1, 75.3, 96.5, 85.1)),
            ("LLaVA-1.5-13B", (84.4, 81.0, 93.9, 86.5)),
            ("ChatPose", (78.8, 76.2, 96.7, 84.0)),
        ),
        {"judge": UNKNOWN, "order of answers": UNKNOWN},
        f"{PAPER}, Table 4",
    ),
    # Later systems.
    *_rows(
        "generation",
        _POSESCRIPT,
        ("R^T2P@5",),
        (("UniPose", (73.7,)),),
        {
            "retriever": "the later one of PoseScript, with which real poses reach 51.4",
            "texts": "automatic captions",
            "gallery": "about 500",
        },
        "UniPose, CVPR 2025",
    ),
    *_rows("estimation", _3DPW, _POINTS, (("UniPose", (94.7, 59.1)),), _FULL, "UniPose, CVPR 2025"),
    *_rows(
        "estimation",
        _3DPW,
        _POINTS,
        (("HMVLM, alone", (105.3, 56.2)), ("HMVLM, all tasks", (127.7, 63.3))),
        _LATER,
        "HMVLM, NeurIPS 2025",
    ),
    *_rows(
        "estimation", _3DPW, _POINTS, (("ChatHuman", (91.3, 58.7)),), _LATER, "ChatHuman, CVPR 2025; it calls HMR 2.0"
    ),
    *_rows("estimation", _3DPW, _POINTS, (("Pose-RFT", (85.9, 51.6)),), _LATER, "Pose-RFT, ICLR 2026"),
    *_rows("estimation", _3DPW, ("MPJPE",), (("SAM 3D Body", (54.8,)),), _LATER, "SAM 3D Body; it takes no language"),
    *_rows("estimation", _H36M, _POINTS, (("UniPose", (69.2, 41.8)),), _LATER, "UniPose, CVPR 2025"),
    *_rows(
        "estimation",
        _H36M,
        _POINTS,
        (("HMVLM, alone", (92.8, 55.3)), ("HMVLM, all tasks", (114.7, 64.8))),
        _LATER,
        "HMVLM, NeurIPS 2025",
    ),
    *_rows("estimation", _H36M, _POINTS, (("Pose-RFT", (63.0, 44.5)),), _LATER, "Pose-RFT, ICLR 2026"),
    *_rows("rpe", _RPE, _POINTS, (("UniPose", (213.4, 94.1)),), _LATER, "UniPose, CVPR 2025"),
    *_rows("rpe", _RPE, ("MPJPE",), (("ChatHuman", (147.2,)),), _LATER, "ChatHuman, CVPR 2025"),
    *_rows("rpe", _RPE, _POINTS, (("Pose-RFT", (198.6, 87.0)),), _LATER, "Pose-RFT, ICLR 2026"),
)


def of_task(task: str) -> list[Published]:
    """All rows of a task."""
    return [row for row in PUBLISHED if row.task == task]


def is_of(row: Published, data: str) -> bool:
    """Whether a published row is of a data set that is named here: a name of ``Published.data``, or of a subset of its split "test", "NAME-200"."""
    names = "|".join(map(re.escape, row.data))
    return bool(re.fullmatch(rf"({names})(-(?!train|val).+)?", data))


def differences(row: Published, facts: Mapping[str, str]) -> list[str]:
    """How the conditions of a published row differ from those of a measured table, in words. Empty if none is known to differ and none is unknown.

    A condition that the facts do not mention is stated as it is. Two are equal if one is the beginning of the other: "C" and "C: 24 joints", "200"
    and "200 of 35,515".
    """
    found = []
    for name, value in row.conditions.items():
        if value != UNKNOWN and name not in facts:
            found.append(f"{name}: {value}")
        elif value != UNKNOWN and not _agree(value, facts[name]):
            found.append(f"{name}: {value}, here {facts[name]}")
    unknown = [name for name, value in row.conditions.items() if value == UNKNOWN]
    return [*found, *([f"not stated: {', '.join(unknown)}"] if unknown else [])]


def _agree(one: str, other: str) -> bool:
    short, long = sorted((each.strip().replace(",", "").casefold() for each in (one, other)), key=len)
    return long.startswith(short) and not re.match(r"[.-]?\w", long[len(short) :])
