"""Errors of the poses in generated answers: MPJPE, PA-MPJPE and MPJRE on a split, beside the mean pose."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from chatpose_jax.chat import ChatPose, Reply
from chatpose_jax.data.example import Example
from chatpose_jax.evaluation.system import first_question
from smpl_jax.body import BodyModel
from smpl_jax.metrics import pose_metrics
from smpl_jax.pose import Pose, known, stack, to_family, to_frame


def pose_errors(predicted: Pose, target: Pose, body: BodyModel) -> dict[str, float]:
    """Mean errors of poses of batch shape (N,), both at β = 0 (protocol C of the follow-up literature: the body's own 24 joints).

    Returns the means of ``smpl_jax.metrics.pose_metrics`` over the poses with measured joints: ``mpjpe`` and ``pa_mpjpe`` in mm,
    ``mpjre`` (100 · mean |ΔR| entry over the body joints), ``geodesic_degrees`` over the body joints.
    """
    errors = jax.jit(pose_metrics)(predicted, target, body)
    return {name: float(jnp.nanmean(values)) for name, values in errors.items()}


def mean_pose(poses: Pose) -> Pose:
    """The mean of a batch (N,): for each joint, the rotation nearest to the mean matrix over the measured ones (Moakher 2002, the projected
    arithmetic mean); the identity if there are none.
    """
    rotations = np.asarray(poses.rotations, np.float64)
    u, _, vt = np.linalg.svd(np.where(known(poses)[..., None, None], rotations, 0).mean(axis=0))
    u[..., -1] *= np.linalg.det(u @ vt)[..., None]
    return Pose((u @ vt).astype(np.float32), poses.frame)


def answer_poses(
    model: ChatPose,
    questions: Sequence[list[dict]],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    label: str | None = None,
) -> tuple[list[Reply], float]:
    """Answers each list of messages. Returns answers that all have a pose, and the fraction that had one without ``force_pose``.

    A question whose answer has no pose is asked again with ``force_pose``, so that every question counts.
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
    baseline: Pose,
    *,
    batch_size: int = 32,
    label: str | None = None,
) -> dict[str, float]:
    """Errors of generated answers, errors of the constant answer ``baseline``, and their ratios.

    Returns ``pose_errors`` for the first pose of each answer to the first question; the same for ``baseline`` with the prefix ``baseline_``; the
    ratios of the two with the prefix ``ratio_``; ``pose_rate`` and ``count``.
    """
    questions = [first_question(example) for example in examples]
    answers, rate = answer_poses(model, questions, batch_size=batch_size, label=label)
    targets = true_poses(examples)
    return {
        **compare_poses(first_poses(answers), targets, baseline, model.body),
        "pose_rate": rate,
        "count": len(examples),
    }


def evaluate_follow_ups(
    model: ChatPose,
    examples: Sequence[Example],
    baseline: Pose,
    *,
    batch_size: int = 32,
    label: str | None = None,
) -> dict[str, float]:
    """Errors of the second answer in conversations of two turns: the model is asked to change the pose of its own first answer.

    Returns the same values as ``evaluate_chat``, for the second pose. With the prefix ``kept_`` it also returns the errors of repeating the first
    answer; a model that understands the change must be better than this.
    """
    questions = [first_question(example) for example in examples]
    first, _ = answer_poses(model, questions, batch_size=batch_size)
    asked = [
        [*question, reply.message, example.messages[len(question) + 1]]
        for question, reply, example in zip(questions, first, examples)
    ]
    second, rate = answer_poses(model, asked, batch_size=batch_size, label=label)
    targets = true_poses(examples, 1)
    kept = pose_errors(first_poses(first), targets, model.body)
    return {
        **compare_poses(first_poses(second), targets, baseline, model.body),
        **{f"kept_{name}": value for name, value in kept.items()},
        "pose_rate": rate,
        "count": len(examples),
    }


def true_poses(examples: Sequence[Example], number: int = 0) -> Pose:
    """(N,), one pose of each row; see ``bare``."""
    return stack([bare(example.poses[number]) for example in examples])


def bare(pose: Pose) -> Pose:
    """The same poses in the camera frame, with SMPL's joints, without shape and translation, which no metric here needs."""
    pose = pose.replace(betas=None, has_betas=None, shape_space=None, translation=None, has_translation=None)
    return to_family(to_frame(pose, "camera"), "smpl")


def first_poses(answers: Sequence[Reply]) -> Pose:
    """(N,), the first pose of each."""
    return stack([reply.poses[0].pose for reply in answers])


def compare_poses(poses: Pose, targets: Pose, baseline: Pose, body: BodyModel) -> dict[str, float]:
    """``pose_errors`` of N poses, of the constant answer ``baseline`` with that prefix, and their ratios with the prefix ``ratio_``."""
    errors = pose_errors(poses, targets, body)
    constant = pose_errors(stack([baseline] * len(targets)), targets, body)
    ratios = {f"ratio_{name}": errors[name] / constant[name] for name in ("mpjpe", "pa_mpjpe", "mpjre")}
    return {**errors, **{f"baseline_{name}": value for name, value in constant.items()}, **ratios}
