"""Converted, loaded and asked: the answers of whole checkpoints against the torch modules that wrote them.

The peers are transformers (CLIP, LLaMA, LLaVA-1.5) and, for CHATPOSE-V0's own parts, plain torch.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

import chatpose_jax  # noqa: E402
from chatpose_jax.chat import FORCED_ANSWER, ChatPose, Reply  # noqa: E402
from chatpose_jax.cli.main import main  # noqa: E402
from chatpose_jax.models.chatpose import bind  # noqa: E402
from chatpose_jax.processing.processor import Encoded  # noqa: E402
from chatpose_jax.weights.convert import convert  # noqa: E402
from chatpose_jax.weights.spec import SourceSpec  # noqa: E402
from tests import heads  # noqa: E402

from ..numerics import Rounded, agree, rounded  # noqa: E402
from .sources import FlatModels, Sizes, make_chatpose, make_llava_transformers  # noqa: E402

PHOTO = np.random.default_rng(0).integers(0, 255, (48, 60, 3), dtype=np.uint8)
Messages = list[dict[str, Any]]


def user(text: str, *images: Any) -> dict[str, Any]:
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def load(source: Path, out: Path, **options: Any) -> ChatPose:
    """By the two calls that a user makes."""
    convert(SourceSpec(source, **options), out)
    return chatpose_jax.load(out, dtype="float32")


def ours(model: ChatPose, encoded: Encoded) -> tuple[Rounded, Rounded]:
    """Logits (T, V), and the matrices (P, 24, 3, 3) of the pose tokens among the ids."""
    pixels = np.stack(encoded.images)[None] if encoded.images else None

    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        bound = bind(model.config, params)
        hidden = bound(encoded.input_ids[None], pixel_values=pixels).hidden[0]
        return bound.logits(hidden), heads.matrices(bound, hidden[encoded.pose_positions - 1])

    with jax.default_matmul_precision("highest"):
        return rounded(jax.jit(run), model.params)


def torch_pixels(encoded: Encoded) -> Any:
    return torch.from_numpy(np.stack(encoded.images).transpose(0, 3, 1, 2).copy())


def gram_schmidt(columns: Any) -> np.ndarray:
    """(…, 6), two columns one after the other, -> (…, 3, 3) (Zhou et al. 2019, section B)."""
    first, second = columns[..., :3], columns[..., 3:]
    x = torch.nn.functional.normalize(first, dim=-1)
    y = torch.nn.functional.normalize(second - (x * second).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], dim=-1).numpy()


def poses_of(models: FlatModels, hidden: Any) -> np.ndarray:
    first, _, second = models.extra.text_hidden_fcs[0]
    return gram_schmidt(second(torch.relu(first(hidden))).reshape(*hidden.shape[:-1], 24, 6))


@torch.no_grad()
def flat_forward(models: FlatModels, encoded: Encoded, image_token_id: int) -> tuple[np.ndarray, Any]:
    """Logits (T, V) and final-norm hidden states (T, D) of CLIP → projector → LLaMA, put together by hand."""
    ids = torch.from_numpy(encoded.input_ids).long()
    is_image = ids == image_token_id
    embeds = models.llama.model.embed_tokens(ids.masked_fill(is_image, 0))
    if encoded.images:
        features = models.clip(torch_pixels(encoded), output_hidden_states=True).hidden_states[-2][:, 1:]
        embeds[is_image] = models.extra.mm_projector(features).flatten(0, 1)
    hidden = models.llama.model(inputs_embeds=embeds[None]).last_hidden_state[0]
    return models.llama.lm_head(hidden).numpy(), hidden


@pytest.fixture(scope="module")
def chatpose(tmp_path_factory: pytest.TempPathFactory) -> tuple[FlatModels, ChatPose]:
    folder = tmp_path_factory.mktemp("chatpose")
    models = make_chatpose(folder / "CHATPOSE-V0", folder / "clip")
    return models, load(folder / "CHATPOSE-V0", folder / "out", vision=folder / "clip")


@pytest.mark.parametrize("images", [[], [PHOTO], [PHOTO, PHOTO[::-1]]], ids=["text", "image", "two images"])
def test_chatpose_gives_torchs_logits_and_poses(chatpose: tuple[FlatModels, ChatPose], images: list[Any]) -> None:
    models, model = chatpose
    messages = [
        user("How do they stand?", *images),
        {"role": "assistant", "content": "It is <POSE>."},
        user("And who sits?"),
        {"role": "assistant", "content": "<POSE> or <POSE>."},
    ]
    encoded = model.processor.encode(messages, add_generation_prompt=False)
    assert len(encoded.pose_positions) == 3
    logits, matrices = ours(model, encoded)
    expected, hidden = flat_forward(models, encoded, model.config.image_token_id)
    with torch.no_grad():
        poses = poses_of(models, hidden[encoded.pose_positions - 1])
    assert expected.std() > 0.1
    assert np.abs(poses - np.eye(3)).max() > 0.5
    agree(logits, expected)
    agree(matrices, poses)


def test_chatpose_answers_an_image_as_torch_does(chatpose: tuple[FlatModels, ChatPose]) -> None:
    models, model = chatpose
    messages = [user("How do they stand?", PHOTO)]
    reply = model.chat(messages, max_new_tokens=16, force_pose=True)
    encoded = model.processor.encode([*messages, reply.message], add_generation_prompt=False)
    logits, hidden = flat_forward(models, encoded, model.config.image_token_id)
    check_answer(model, messages, reply, logits)
    with torch.no_grad():
        poses = poses_of(models, hidden[encoded.pose_positions - 1])
    _, matrices = ours(model, encoded)
    agree(matrices, poses, [pose.matrices for pose in reply.poses])


def check_answer(model: ChatPose, messages: Messages, reply: Reply, logits: np.ndarray) -> None:
    """The answer is the greedy one under the peer's ``logits`` up to where a pose was forced, and then has that pose."""
    tail = model.processor.encode([user("?"), {"role": "assistant", "content": FORCED_ANSWER}], False)
    forced = tail.input_ids[tail.labels >= 0][:-1]  # without the end of sequence
    free = len(reply.ids) - len(forced)
    np.testing.assert_array_equal(reply.ids[free:], forced)
    assert free > 0
    assert reply.text.endswith("It is <POSE>.")
    assert (len(reply.poses), reply.finish_reason) == (1, "stop")
    start = len(model.processor.encode(messages).input_ids)
    logits = logits.copy()
    if model.config.image_token_id >= 0:
        logits[:, model.config.image_token_id] = -np.inf  # never said
    np.testing.assert_array_equal(reply.ids[:free], logits[start - 1 : start - 1 + free].argmax(-1))


def test_llava_of_a_full_vocabulary_chats_as_transformers_does(tmp_path: Path, shared_data: Path) -> None:
    """LLaMA's own tokenizer, ``<image>`` as 32000, ``<pad>`` and ``<POSE>`` as 32002: text, an image from a file, a second turn."""
    sizes = dataclasses.replace(Sizes(), rows=32064, width=32, layers=2, mlp=64)
    peer = make_llava_transformers(tmp_path / "src", sizes=sizes, image_token_id=32000, pose=None)
    model = load(tmp_path / "src", tmp_path / "out", tokenizer=shared_data / "tokenizer")
    assert (model.config.image_token_id, model.config.pose_token_id) == (32000, 32002)
    Image.fromarray(PHOTO).save(tmp_path / "image.png")

    def check(messages: Messages) -> Messages:
        reply = model.chat(messages, max_new_tokens=12, force_pose=True)
        encoded = model.processor.encode([*messages, reply.message], add_generation_prompt=False)
        with torch.no_grad():
            expected = (
                peer(
                    input_ids=torch.from_numpy(encoded.input_ids).long()[None],
                    pixel_values=torch_pixels(encoded) if encoded.images else None,
                )
                .logits[0]
                .numpy()
            )
        logits, matrices = ours(model, encoded)
        agree(logits, expected)
        check_answer(model, messages, reply, expected)
        agree(matrices[-1], reply.poses[-1].matrices)
        return [*messages, reply.message]

    check([user("Show me someone who kneels.")])
    turns = check([user("How does this person stand?", tmp_path / "image.png")])
    check([*turns, user("And with both arms raised?")])


def test_commands_convert_and_answer_about_a_photograph(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer lies elsewhere, as Vicuna's often does; the image is a JPEG that a camera took."""
    photo = pytest.importorskip("matplotlib.cbook").get_sample_data("grace_hopper.jpg", asfileobj=False)
    sizes = dataclasses.replace(Sizes(), rows=32064, width=32, layers=2, mlp=64)
    make_llava_transformers(tmp_path / "src", sizes=sizes, image_token_id=32000, pose=None)
    for file in (tmp_path / "src").glob("tokenizer*"):
        file.unlink()
    model, tokenizer = str(tmp_path / "out"), str(shared_data / "tokenizer")
    assert main(["convert", str(tmp_path / "src"), model, "--tokenizer", tokenizer]) == 0
    assert main(["chat", model, "--prompt", "Show me someone who kneels.", "--max-new-tokens", "8"]) == 0
    capsys.readouterr()
    asked = [
        "--image",
        str(photo),
        "--prompt",
        "What pose is this person in?",
        "--force-pose",
        "--max-new-tokens",
        "16",
    ]
    assert main(["chat", model, *asked, "--json", "--out", str(tmp_path / "answer")]) == 0
    (turn,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert turn["text"].endswith("It is <POSE>.")
    with np.load(tmp_path / "answer/turn-1-pose-1.npz", allow_pickle=False) as saved:
        np.testing.assert_allclose(saved["axis_angle"], turn["poses"][-1]["axis_angle"], atol=1e-6)
