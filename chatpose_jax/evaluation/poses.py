"""How near the poses of answers come: MPJPE, PA-MPJPE and MPJRE on a split, beside the mean pose."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

from chatpose_jax.chat import ChatPose, Pose
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
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    label: str | None = None,
) -> tuple[list[Pose], float]:
    """Chat about the first question of each example; the first pose of each answer, and the share that offered one unasked.

    An answer without a pose is asked again with ``force_pose``, so every example counts.
    """
    poses: list[Pose] = []
    offered = 0
    bar = tqdm(total=len(examples), desc=label, unit="answer", disable=label is None, leave=False, dynamic_ncols=True)
    for start in range(0, len(examples), batch_size):
        questions = [first_question(example) for example in examples[start : start + batch_size]]
        filled = questions + questions[:1] * (batch_size - len(questions))
        replies = model.chat(filled, max_new_tokens=max_new_tokens)[: len(questions)]
        missing = [i for i, reply in enumerate(replies) if not reply.poses]
        offered += len(replies) - len(missing)
        for i in missing:
            replies[i] = model.chat(questions[i], max_new_tokens=max_new_tokens, force_pose=True)
        poses += [reply.poses[0] for reply in replies]
        bar.update(len(questions))
    bar.close()
    return poses, offered / max(len(examples), 1)


def evaluate_chat(
    model: ChatPose,
    examples: Sequence[Example],
    baseline: np.ndarray,
    *,
    batch_size: int = 32,
    label: str | None = None,
) -> dict[str, float]:
    """Errors of real answers, and of ``baseline`` (24, 3, 3) given as the answer to everything, with their ratios.

    Returns ``pose_errors`` of the answers, the same with prefix ``baseline_``, ``ratio_…`` of both, ``pose_rate`` and ``count``.
    """
    poses, rate = answer_poses(model, examples, batch_size=batch_size, label=label)
    targets = np.stack([example.poses[0] for example in examples])
    errors = pose_errors(np.stack([pose.matrices for pose in poses]), targets, model.body)
    constant = pose_errors(np.broadcast_to(baseline, targets.shape), targets, model.body)
    ratios = {f"ratio_{name}": errors[name] / constant[name] for name in ("mpjpe", "pa_mpjpe", "mpjre")}
    return {
        **errors,
        **{f"baseline_{k}": v for k, v in constant.items()},
        **ratios,
        "pose_rate": rate,
        "count": len(examples),
    }
