"""How near the poses of answers come: MPJPE, PA-MPJPE and MPJRE on a split, beside the mean pose."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

from chatpose_jax.chat import ChatPose, Reply
from chatpose_jax.data.example import Example
from smpl_jax import body as bodies
from smpl_jax import metrics
from smpl_jax.body import BodyModel


def pose_errors(predicted: np.ndarray, target: np.ndarray, body: BodyModel) -> dict[str, float]:
    """Errors of (N, 24, 3, 3) rotations, both at β = 0 (protocol C of the follow-up literature: the body's own 24 joints).

    Returns ``mpjpe`` and ``pa_mpjpe`` in mm, ``mpjre`` (100 · mean |ΔR| entry over the 23 body joints), ``geodesic_degrees`` over the body joints.
    """
    joints = jax.jit(lambda matrices: bodies.joints(body, bodies.from_smpl_pose(body, matrices))[..., :24, :])
    a, b = joints(predicted), joints(target)
    return {
        "mpjpe": float(np.mean(metrics.mpjpe(a, b))),
        "pa_mpjpe": float(np.mean(metrics.pa_mpjpe(a, b))),
        "mpjre": float(np.mean(metrics.mpjre(predicted, target))),
        "geodesic_degrees": float(np.mean(metrics.geodesic_degrees(predicted[:, 1:], target[:, 1:]))),
    }


def mean_pose(poses: np.ndarray) -> np.ndarray:
    """(N, 24, 3, 3) -> (24, 3, 3): for each joint the rotation nearest to the mean matrix (Moakher 2002, the projected arithmetic mean)."""
    u, _, vt = np.linalg.svd(np.asarray(poses, np.float64).mean(axis=0))
    u[..., -1] *= np.linalg.det(u @ vt)[..., None]
    return (u @ vt).astype(np.float32)


def first_question(example: Example) -> list[dict]:
    """The messages before the first answer."""
    end = next(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
    return example.messages[:end]


def answer_poses(
    model: ChatPose,
    questions: Sequence[list[dict]],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    label: str | None = None,
) -> tuple[list[Reply], float]:
    """Chat about each list of messages; answers with a pose, and the share that offered one unasked.

    An answer without a pose is asked again with ``force_pose``, so every question counts.
    """
    answers: list[Reply] = []
    offered = 0
    bar = tqdm(total=len(questions), desc=label, unit="answer", disable=label is None, leave=False, dynamic_ncols=True)
    for start in range(0, len(questions), batch_size):
        asked = list(questions[start : start + batch_size])
        filled = asked + asked[:1] * (batch_size - len(asked))
        replies = model.chat(filled, max_new_tokens=max_new_tokens)[: len(asked)]
        missing = [i for i, reply in enumerate(replies) if not reply.poses]
        offered += len(replies) - len(missing)
        for i in missing:
            replies[i] = model.chat(asked[i], max_new_tokens=max_new_tokens, force_pose=True)
        answers += replies
        bar.update(len(asked))
    bar.close()
    return answers, offered / max(len(questions), 1)


def evaluate_chat(
    model: ChatPose,
    examples: Sequence[Example],
    baseline: np.ndarray,
    *,
    batch_size: int = 32,
    label: str | None = None,
) -> dict[str, float]:
    """Errors of real answers, and of ``baseline`` (24, 3, 3) given as the answer to everything, with their ratios.

    Returns ``pose_errors`` of the first pose of each answer to the first question, the same with prefix ``baseline_``, ``ratio_…`` of both,
    ``pose_rate`` and ``count``.
    """
    questions = [first_question(example) for example in examples]
    answers, rate = answer_poses(model, questions, batch_size=batch_size, label=label)
    targets = np.stack([example.poses[0] for example in examples])
    return {**_compare(_first(answers), targets, baseline, model.body), "pose_rate": rate, "count": len(examples)}


def evaluate_follow_ups(
    model: ChatPose,
    examples: Sequence[Example],
    baseline: np.ndarray,
    *,
    batch_size: int = 32,
    label: str | None = None,
) -> dict[str, float]:
    """Errors of the second of two answers with a pose each, its own first answer being what the model is asked to change.

    Returns what ``evaluate_chat`` returns, of the second pose; and with prefix ``kept_`` the errors of its first answer given once more, which a
    model that understands the change must beat.
    """
    questions = [first_question(example) for example in examples]
    first, _ = answer_poses(model, questions, batch_size=batch_size)
    asked = [
        [*question, reply.message, example.messages[len(question) + 1]]
        for question, reply, example in zip(questions, first, examples)
    ]
    second, rate = answer_poses(model, asked, batch_size=batch_size, label=label)
    targets = np.stack([example.poses[1] for example in examples])
    kept = pose_errors(_first(first), targets, model.body)
    return {
        **_compare(_first(second), targets, baseline, model.body),
        **{f"kept_{name}": value for name, value in kept.items()},
        "pose_rate": rate,
        "count": len(examples),
    }


def _first(answers: Sequence[Reply]) -> np.ndarray:
    """(N, 24, 3, 3), the first pose of each."""
    return np.stack([reply.poses[0].matrices for reply in answers])


def _compare(poses: np.ndarray, targets: np.ndarray, baseline: np.ndarray, body: BodyModel) -> dict[str, float]:
    errors = pose_errors(poses, targets, body)
    constant = pose_errors(np.broadcast_to(baseline, targets.shape), targets, body)
    ratios = {f"ratio_{name}": errors[name] / constant[name] for name in ("mpjpe", "pa_mpjpe", "mpjre")}
    return {**errors, **{f"baseline_{name}": value for name, value in constant.items()}, **ratios}
