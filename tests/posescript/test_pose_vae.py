"""The generator beside a torch module assembled here with PoseScript's layers and tensor names; its draws; its folder; the system."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chatpose_jax import named
from chatpose_jax.cli.main import main
from chatpose_jax.data.example import Example
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.poses import pose_errors, true_poses
from chatpose_jax.evaluation.system import SYSTEMS, Question
from chatpose_jax.posescript.folder import write_folder
from chatpose_jax.posescript.generator import Generator, load_generator
from chatpose_jax.posescript.layouts import POSE_VAE, to_tensors
from chatpose_jax.posescript.network import TextEncoderConfig
from chatpose_jax.posescript.pairs import PoseInput, axis_angles
from chatpose_jax.posescript.pose_vae import Normal, PoseVae, PoseVaeConfig, VaeLossConfig, pose_vae_loss
from chatpose_jax.posescript.tokens import WordVocabulary, pad
from chatpose_jax.posescript.trainer import Batch
from smpl_jax import body as bodies
from smpl_jax import io
from smpl_jax.pose import Pose, to_family, to_frame
from smpl_jax.rotations import axis_angle_to_matrix

TEXTS = (
    "The left arm is raised.",
    "Someone kneels.",
    "A person sits on the ground, with both legs straight, and looks up.",
)
TOKENS = WordVocabulary.of(TEXTS)


def network(joints=22, seed=0):
    text = TextEncoderConfig(words=len(TOKENS), word_width=12)
    model = PoseVae(PoseVaeConfig(joints, latent=8, width=32, text=text), rngs=nnx.Rngs(seed))
    for number, trunk in enumerate((model.pose_encoder.norm_in, model.pose_encoder.norm)):  # as if they were trained
        rng = np.random.default_rng(number)
        for leaf in (trunk.mean, trunk.var, trunk.scale, trunk.bias):
            leaf[...] = jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
    model.log_scale_vertices[...], model.log_scale_joints[...] = jnp.array([-2.0]), jnp.array([-1.5])
    model.log_variance_rotations[...] = jnp.array([-3.0])
    return model


def batch(joints=22, count=4):
    rng = np.random.default_rng(0)
    lengths = np.array([9, 4, 7, 9], np.int32)[:count]
    tokens = rng.integers(4, len(TOKENS), (count, 9)).astype(np.int32) * (np.arange(9) < lengths[:, None])
    poses = rng.normal(0, 0.5, (count, joints, 3)).astype(np.float32)
    return Batch(poses, tokens, lengths, np.ones((count, joints), bool))


@pytest.fixture(scope="module")
def body():
    return io.load_body().subset(np.arange(0, 6890, 100))


@pytest.fixture(scope="module")
def generator():
    pose_input = PoseInput(np.zeros((22, 3), np.float32), np.ones(22, bool))
    return Generator("random", network(), TOKENS, pose_input, {"fingerprint": "random"})


def torch_generator(joints, latent=8, width=32, word_width=12):
    """PoseScript's generator with the bi-GRU, from the layers that its checkpoints name."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Distribution(nn.Module):
        def __init__(self):
            super().__init__()
            self.mu, self.logvar = nn.Linear(width, latent), nn.Linear(width, latent)

        def forward(self, x):
            return torch.distributions.Normal(self.mu(x), nn.functional.softplus(self.logvar(x)))

    class TextEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(len(TOKENS), word_width)
            self.sent_enc = nn.GRU(word_width, width // 2, bidirectional=True, batch_first=True)
            self.output_layer = Distribution()

        def forward(self, tokens, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(
                self.embed(tokens), lengths, batch_first=True, enforce_sorted=False
            )
            return self.output_layer(torch.cat(tuple(self.sent_enc(packed)[1]), -1))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(
                nn.Flatten(), nn.BatchNorm1d(joints * 3), nn.Linear(joints * 3, width), nn.LeakyReLU(), nn.BatchNorm1d(width),
                nn.Dropout(0.1), nn.Linear(width, width), nn.Linear(width, width), Distribution(),
            )  # fmt: skip

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Sequential(
                nn.Linear(latent, width), nn.LeakyReLU(), nn.Dropout(0.1), nn.Linear(width, width), nn.LeakyReLU(),
                nn.Linear(width, joints * 6),
            )  # fmt: skip

        def forward(self, z):
            pair = self.decoder(z).view(-1, 3, 2)
            first = nn.functional.normalize(pair[:, :, 0], dim=1)
            along = (first * pair[:, :, 1]).sum(1, keepdim=True)
            second = nn.functional.normalize(pair[:, :, 1] - along * first, dim=1)
            return torch.stack([first, second, torch.linalg.cross(first, second)], -1).view(len(z), -1, 3, 3)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.pose_encoder, self.pose_decoder, self.text_encoder = Encoder(), Decoder(), TextEncoder()
            for name in ("v2v", "jts", "rot"):
                setattr(self, f"decsigma_{name}", nn.Parameter(torch.zeros(1)))

    return Whole().eval()


def peer(model):
    """The torch module with the numbers of ours, strictly: every tensor has its place."""
    torch = pytest.importorskip("torch")
    found = torch_generator(model.config.joints)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in to_tensors(model, POSE_VAE).items()}
    tensors |= {f"pose_encoder.encoder.{i}.num_batches_tracked": torch.tensor(3) for i in (1, 4)}
    found.load_state_dict(tensors, strict=True)
    return found


@pytest.mark.parametrize("joints", [22, 52])
def test_parity_of_encoders_and_decoder(joints):
    torch = pytest.importorskip("torch")
    model, rows = network(joints), batch(joints)
    theirs = peer(model)
    with torch.no_grad():
        pose = theirs.pose_encoder.encoder(torch.from_numpy(rows.poses))
        text = theirs.text_encoder(torch.from_numpy(rows.tokens), torch.from_numpy(rows.lengths))
        decoded = theirs.pose_decoder(pose.mean)
    for ours, expected in (
        (model.encode_poses(rows.poses), pose),
        (model.encode_texts(rows.tokens, rows.lengths), text),
    ):
        np.testing.assert_allclose(ours.mean, expected.mean, atol=1e-5)
        np.testing.assert_allclose(ours.deviation, expected.stddev, atol=1e-5)
    np.testing.assert_allclose(model.decode(pose.mean.numpy()), decoded, atol=1e-5)
    drawn = model.draw(rows.tokens, rows.lengths, np.zeros((4, 1, 8), np.float32))
    np.testing.assert_allclose(drawn[:, 0], theirs.pose_decoder(text.mean).detach(), atol=1e-5)


def test_parity_of_the_loss(body):
    """The terms by torch's distributions, with vertices and joints from ``smpl_jax``."""
    torch = pytest.importorskip("torch")
    model, rows = network(), batch()
    theirs, normal = peer(model).double(), torch.distributions.Normal
    with torch.no_grad():
        pose = theirs.pose_encoder.encoder(torch.from_numpy(rows.poses).double())
        text = theirs.text_encoder(torch.from_numpy(rows.tokens), torch.from_numpy(rows.lengths))
        rebuilt = theirs.pose_decoder(pose.mean).numpy()
    true = np.asarray(axis_angle_to_matrix(rows.poses))
    eye = np.broadcast_to(np.eye(3, dtype=np.float32), (4, 2, 3, 3))
    shown = [bodies.forward(body, np.concatenate([each, eye], 1)) for each in (rebuilt.astype(np.float32), true)]
    laplace = torch.distributions.Laplace(0.0, torch.tensor([np.exp(-2.0), np.exp(-1.5)]).double())
    apart = [torch.from_numpy(np.array(a - b)).double() for a, b in zip(*shown)]
    unit = normal(torch.zeros(8).double(), torch.ones(8).double())
    kl = torch.distributions.kl_divergence
    expected = {
        "vertices": -laplace.log_prob(apart[0][..., None])[..., 0].mean(),
        "joints": -laplace.log_prob(apart[1][..., None])[..., 1].mean(),
        "rotations": -normal(0.0, np.exp(-1.5)).log_prob(torch.from_numpy(rebuilt - true)).mean(),
        "kl": kl(pose, text).sum(1).mean(),
        "pose_prior": kl(pose, unit).sum(1).mean(),
        "text_prior": kl(text, unit).sum(1).mean(),
    }
    weights = VaeLossConfig(vertices=4, joints=2, rotations=3, kl=0.2, pose_prior=0.02, text_prior=0.5)
    loss, parts = pose_vae_loss(model, rows, None, body, weights)
    for name, value in expected.items():
        np.testing.assert_allclose(parts[name], value, rtol=2e-5, err_msg=name)
    scales = {"vertices": 4, "joints": 2, "rotations": 3, "kl": 0.2, "pose_prior": 0.004, "text_prior": 0.1}
    np.testing.assert_allclose(loss, sum(scales[name] * float(value) for name, value in expected.items()), rtol=1e-5)


def test_in_training_the_pose_is_drawn_from_its_distribution(body):
    """With huge deviations of the pose's distribution, two keys give different reconstructions; the text's do not matter to them."""
    model, rows = network(), batch()
    parts = [pose_vae_loss(model, rows, jax.random.key(seed), body, VaeLossConfig())[1] for seed in (0, 0, 1)]
    assert parts[0]["rotations"] == parts[1]["rotations"] != parts[2]["rotations"]
    model.text_output.mean.bias[...] += 1.0
    again = pose_vae_loss(model, rows, jax.random.key(0), body, VaeLossConfig())[1]
    assert again["rotations"] == parts[0]["rotations"] and again["kl"] != parts[0]["kl"]


def test_noise_moves_a_draw_by_its_deviations():
    found = Normal(jnp.array([1.0, 2.0]), jnp.array([0.5, 3.0]))
    np.testing.assert_allclose(found.at(jnp.array([2.0, -1.0])), [2.0, -1.0])
    assert found.divergence(found) == 0


def test_joints_that_are_not_measured_change_no_term_of_the_reconstruction(body):
    model, rows = network(), batch()
    measured = rows.measured.copy()
    measured[:, 10] = False

    def parts(model, rows):
        return pose_vae_loss(model, rows, None, body, VaeLossConfig())[1]

    masked, counted = parts(model, rows._replace(measured=measured)), parts(model, rows)
    model.decoder.linear_3.bias[...] = model.decoder.linear_3.bias[...].at[60:66].add(jnp.arange(6.0))
    assert parts(model, rows._replace(measured=measured)) == masked
    assert {name for name, value in parts(model, rows).items() if value != counted[name]} == {
        "vertices", "joints", "rotations",
    } - {"joints"}  # fmt: skip # joint 10 is a toe: it is the end of its chain


def test_every_text_has_its_own_draws(generator):
    drawn = generator.sample(TEXTS, seed=3, samples=4)
    assert drawn.shape == (3, 4) and drawn.num_joints == 22 and drawn.frame == "camera" and drawn.measured is None
    alone = generator.sample(TEXTS[1:2], seed=3, samples=4)
    np.testing.assert_array_equal(alone.rotations[0], drawn.rotations[1])
    fewer = generator.sample(TEXTS[::-1], seed=3, samples=2)
    np.testing.assert_allclose(fewer.rotations[::-1], drawn.rotations[:, :2], atol=1e-6)
    assert np.abs(generator.sample(TEXTS, seed=4, samples=4).rotations - drawn.rotations).max() > 0.01
    assert np.abs(drawn.rotations[:, 1:] - drawn.rotations[:, :1]).max(axis=(0, 2, 3, 4)).min() > 0.01
    assert generator.sample([]).shape == (0, 1)
    with pytest.raises(UserError, match="samples must be a whole number of at least 1"):
        generator.sample(TEXTS, samples=0)


def test_poses_stand_in_the_camera_frame_as_rows_do(generator):
    """What comes out of a network in PoseScript's frame is what went in, turned to the camera."""
    found = to_frame(generator.mean(TEXTS), "z-up")
    rotations = generator.model.draw(*pad(TOKENS.encode(TEXTS)), np.zeros((3, 1, 8), np.float32))[:, 0]
    np.testing.assert_allclose(found.rotations, rotations, atol=1e-5)
    rows = batch().poses
    rows[:, 0] = [np.pi / 2, 0, 0]  # upright: SMPL's y axis is z, and there is no yaw
    back, _ = axis_angles(to_frame(Pose(np.asarray(axis_angle_to_matrix(rows)), "z-up"), "camera"), 22)
    np.testing.assert_allclose(back, rows, atol=1e-5)


def test_fingers_that_training_did_not_see_are_not_measured():
    seen = np.arange(52) < 22
    found = Generator("x", network(52), TOKENS, PoseInput(np.zeros((52, 3), np.float32), seen), {}).sample(TEXTS)
    assert found.family == "smplh" and (found.measured == seen).all()
    assert to_family(found, "smpl").measured[..., :22].all()


def test_a_folder_gives_the_same_poses(generator, tmp_path):
    folder = write_folder(tmp_path / "own", "pose_vae", generator.model, TOKENS, generator.pose_input, {"data": "none"})
    loaded = load_generator(folder)
    assert loaded.name == "own" and loaded.settings["trained_on"] == {"data": "none"}
    np.testing.assert_array_equal(loaded.sample(TEXTS).rotations, generator.sample(TEXTS).rotations)
    assert dataclasses.asdict(loaded.model.config) == dataclasses.asdict(generator.model.config)


def test_the_system_answers_with_one_draw_their_mean_or_the_pose_of_the_mean(generator, tmp_path):
    folder = str(write_folder(tmp_path / "own", "pose_vae", generator.model, TOKENS, generator.pose_input, {}))
    pose = Pose(np.tile(np.eye(3, dtype=np.float32), (1, 24, 1, 1)), "camera")
    messages = [
        [{"role": "user", "content": f"{text} What is the pose in SMPL?"}, {"role": "assistant", "content": "<POSE>"}]
        for text in TEXTS
    ]
    questions = [Question.of(Example(str(i), "text", each, pose)) for i, each in enumerate(messages)]
    make = named.find("--system", "pose_vae", SYSTEMS)
    named.check_options("--system", named.signature("--system", make), {"folder": folder, "samples": 2})

    def rotations(**options):
        system = make(folder=folder, **options)
        return np.stack([answer.pose.rotations for answer in system.answer(questions)])

    drawn = generator.sample(TEXTS, 5, 6).rotations
    np.testing.assert_allclose(rotations(seed=5), drawn[:, 0], atol=1e-6)
    np.testing.assert_allclose(rotations(samples=0), generator.mean(TEXTS).rotations, atol=1e-6)
    u, _, vt = np.linalg.svd(drawn.astype(np.float64).mean(1))
    assert (np.linalg.det(u @ vt) > 0).all(), "this seed needs no reflection"
    np.testing.assert_allclose(rotations(seed=5, samples=6), u @ vt, atol=1e-5)
    assert make(folder=folder).name == "own" and make(folder=folder, name="PoseScript").name == "PoseScript"
    assert make(folder=folder, seed=1).settings != make(folder=folder).settings
    with pytest.raises(UserError, match=r"no config\.json"):
        make(folder=str(tmp_path))


def train(out, *more):
    settings = (
        "data.sources=(('synthetic', 1.0, {'tasks': {'text_short': 1}, 'train_size': 96, 'val_size': 32}),)",
        "model.width=32", "model.latent=8", "model.text.word_width=16", "loss.mesh=64", "train.batch_size=32", "train.epochs=3",
        "train.eval_every=1", *more,
    )  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    return main(["posescript", "train", "--config", "pose_vae_tiny", "--out", str(out), *words])


def test_the_command_trains_a_generator(tmp_path):
    assert train(tmp_path / "whole") == 0
    lines = [json.loads(line) for line in (tmp_path / "whole" / "training" / "metrics.jsonl").read_text().splitlines()]
    assert lines[2]["val_loss"] < lines[0]["val_loss"]
    whole = load_generator(tmp_path / "whole")
    found = whole.settings["trained_on"]["val"]
    assert found["val_loss"] == min(line["val_loss"] for line in lines)
    assert (whole.model.log_scale_joints[...] != -3.0).all()

    rows = SyntheticDataset("val", 32, tasks={"text_short": 1})[:]
    errors = pose_errors(whole.mean([row.extras["caption"] for row in rows]), true_poses(rows), io.load_body())
    assert errors["pa_mpjpe"] == pytest.approx(found["pa_mpjpe"], rel=1e-3)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("loss.kl=-1", "loss.kl must be at least 0"),
        ("loss.kld=1", "no such setting; did you mean loss.kl"),
        ("loss.body=none.npz", "none.npz"),
        ("model.width=33", "model.width must be a multiple of 2"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, capsys, setting, words):
    assert train(tmp_path, setting) == 2
    assert words in capsys.readouterr().err
