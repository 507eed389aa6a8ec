"""Pose errors and the mean-pose baseline on poses whose errors are known; answers that offer no pose are asked again."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.evaluation.poses import evaluate_chat, evaluate_follow_ups, mean_pose, pose_errors
from chatpose_jax.evaluation.system import first_question
from smpl_jax import Pose, PosedBody, io, stack


@pytest.fixture(scope="module")
def body():
    return io.load_body()


def rest(count):
    return np.tile(np.eye(3, dtype=np.float32), (count, 24, 1, 1))


def test_errors_of_known_differences(body):
    target, predicted = rest(2), rest(2)
    predicted[:, 0] = Rotation.from_euler("y", 90, degrees=True).as_matrix()
    errors = pose_errors(Pose(predicted, "camera"), Pose(target, "camera"), body)
    assert errors["mpjpe"] > 100
    assert errors["pa_mpjpe"] < 0.1, "a turned body is the same pose"
    assert errors["mpjre"] == 0, "the root does not count"
    predicted = rest(2)
    predicted[:, 16] = Rotation.from_euler("z", 30, degrees=True).as_matrix()
    errors = pose_errors(Pose(predicted, "camera"), Pose(target, "camera"), body)
    angle = np.deg2rad(30)
    np.testing.assert_allclose(errors["mpjre"], 100 * 2 * (1 - np.cos(angle) + np.sin(angle)) / 9 / 23, rtol=1e-4)
    np.testing.assert_allclose(errors["geodesic_degrees"], 30 / 23, rtol=1e-3)
    assert errors["mpjpe"] > 1
    assert errors["pa_mpjpe"] > 1


def test_mean_pose_is_a_rotation_between():
    turns = Rotation.from_euler("x", [[-20], [40]], degrees=True).as_matrix()
    poses = rest(2)
    poses[:, 3] = turns
    mean = mean_pose(Pose(poses, "camera")).rotations
    np.testing.assert_allclose(mean[3], Rotation.from_euler("x", 10, degrees=True).as_matrix(), atol=1e-6)
    np.testing.assert_allclose(mean @ mean.swapaxes(-1, -2), rest(1)[0], atol=1e-6)


class Oracle:
    """Answers every question with the true pose, but offers it unasked only half of the time."""

    def __init__(self, examples, body):
        self.body, self.calls = body, 0
        self.truth = {str(first_question(example)): example.poses[0] for example in examples}

    def chat(self, messages, *, max_new_tokens, force_pose=False):
        if isinstance(messages[0], dict):
            assert force_pose
            return self.reply(messages, True)
        return [self.reply(m, i % 2 == 0) for i, m in enumerate(messages)]

    def reply(self, messages, offers):
        poses = [PosedBody(self.truth[str(messages)], self.body)] if offers else []
        return type("Reply", (), {"poses": poses})()


def test_evaluation_counts_every_row_and_the_share_that_offers_a_pose(body):
    examples = SyntheticDataset("test", 10, tasks={"text": 1})[:10]
    baseline = mean_pose(stack([example.poses[0] for example in examples]))
    results = evaluate_chat(Oracle(examples, body), examples, baseline, batch_size=4)
    assert results["count"] == 10
    assert results["pose_rate"] == 0.5
    assert results["pa_mpjpe"] < 0.1
    assert results["baseline_pa_mpjpe"] > 50
    assert results["ratio_pa_mpjpe"] < 0.01


def test_follow_ups_are_measured_beside_the_models_own_first_answer(body):
    rows = SyntheticDataset("test", 16, tasks={"text_turns": 1})
    examples = [row for row in rows if len(row.poses) == 2][:6]

    def asked(messages):
        return tuple(message["content"] for message in messages if message["role"] == "user")

    class Follower:
        def __init__(self, answers_second):
            self.body, self.truth = body, {}
            for example in examples:
                for turn, number in enumerate((0, answers_second)):
                    self.truth[asked(example.messages[: 1 + 2 * turn])] = example.poses[number]

        def chat(self, messages, *, max_new_tokens):
            return [self.reply(self.truth[asked(m)]) for m in messages]

        def reply(self, pose):
            message = {"role": "assistant", "content": "<POSE>"}
            return type("Reply", (), {"poses": [PosedBody(pose, body)], "message": message})()

    baseline = mean_pose(stack([example.poses[0] for example in examples]))
    follows, stays = (evaluate_follow_ups(Follower(n), examples, baseline, batch_size=4) for n in (1, 0))
    assert follows["count"] == 6
    assert follows["pa_mpjpe"] < 0.1
    assert follows["kept_pa_mpjpe"] > 10
    assert follows["kept_mpjpe"] == stays["mpjpe"] == stays["kept_mpjpe"]
    assert follows["baseline_pa_mpjpe"] > 50
