"""Released checkpoints, in files as PoseScript's code writes them: features beside torch modules assembled here with its layers and names."""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from scipy.spatial.transform import Rotation
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from chatpose_jax.cli.main import main
from chatpose_jax.errors import UserError
from chatpose_jax.posescript.distilbert import DistilBertConfig
from chatpose_jax.posescript.generator import Generator, load_generator
from chatpose_jax.posescript.layouts import POSE_VAE, to_tensors
from chatpose_jax.posescript.network import TextEncoderConfig, run
from chatpose_jax.posescript.pose_vae import PoseVae, PoseVaeConfig
from chatpose_jax.posescript.released import convert_released, read_vocabulary
from chatpose_jax.posescript.retriever import load_retriever
from chatpose_jax.posescript.run import read_distilbert
from chatpose_jax.posescript.tokens import SPECIAL, WordPieces, WordVocabulary, pad
from smpl_jax.pose import Pose

torch = pytest.importorskip("torch")
nn = torch.nn

TEXTS = (
    "The person's left arm is raised, it isn't bent.",
    "Someone kneels.",
    "A figure sits on the ground with both legs straight. The head looks up, and unknownword is here.",
)
LATENT, WIDTH, NARROW, WORD_WIDTH = 24, 40, 16, 12
WORDS = (
    "left",
    "arm",
    "is",
    "raised",
    ",",
    ".",
    "the",
    "person",
    "'s",
    "someone",
    "kneels",
    "a",
    "sits",
    "on",
    "ground",
    "n't",
    "it",
)
PIECES = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    "the",
    ".",
    ",",
)


def poses(joints: int) -> tuple[np.ndarray, Pose]:
    """Poses without yaw, as PoseScript's loader gives them and as rows hold them."""
    vectors = np.random.default_rng(3).normal(0, 0.4, (5, joints, 3))
    roll_pitch = Rotation.from_euler("ZYX", np.concatenate([np.zeros((5, 1)), vectors[:, 0, :2]], 1))
    vectors[:, 0] = roll_pitch.as_rotvec()
    matrices = Rotation.from_rotvec(vectors.reshape(-1, 3)).as_matrix().reshape(5, joints, 3, 3)
    return vectors.astype(np.float32), Pose(matrices.astype(np.float32), "z-up")


def normalised(x: Any) -> Any:
    return x / x.norm(dim=-1, keepdim=True)


class PoseNet(nn.Module):
    def __init__(self, joints: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.BatchNorm1d(joints * 3), nn.Linear(joints * 3, WIDTH), nn.LeakyReLU(), nn.BatchNorm1d(WIDTH), nn.Dropout(0.1),
            nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, NARROW), nn.ReLU(), nn.Linear(NARROW, LATENT),
        )  # fmt: skip

    def forward(self, x: Any) -> Any:
        return normalised(self.encoder(x))


class WordNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(SPECIAL) + len(WORDS), WORD_WIDTH)
        self.sent_enc = nn.GRU(WORD_WIDTH, LATENT // 2, bidirectional=True, batch_first=True)

    def forward(self, tokens: Any, lengths: Any) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(tokens), lengths, batch_first=True, enforce_sorted=False)
        _, states = self.sent_enc(packed)
        return normalised(torch.cat([states[0], states[1]], -1))


class PieceNet(nn.Module):
    def __init__(self, bert: Any) -> None:
        super().__init__()
        self.pretrained_text_encoder = bert
        self.projection = nn.Sequential(nn.ReLU(), nn.Linear(bert.config.dim, LATENT))
        self.positional_encoding = nn.Module()
        angles = np.arange(60)[:, None] / 10000 ** (np.arange(0, LATENT, 2) / LATENT)
        waves = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(60, 1, LATENT)
        self.positional_encoding.register_buffer("pe", torch.tensor(waves, dtype=torch.float32))
        layer = nn.TransformerEncoderLayer(LATENT, nhead=4, dim_feedforward=36, dropout=0.1, activation="gelu")
        self.transformer_encoder = nn.TransformerEncoder(layer, 3)

    def forward(self, tokens: Any, lengths: Any) -> Any:
        valid = torch.arange(tokens.shape[1])[None] < lengths[:, None]
        states = self.pretrained_text_encoder(input_ids=tokens, attention_mask=valid.long()).last_hidden_state
        x = self.projection(states).permute(1, 0, 2)
        x = self.transformer_encoder(x + self.positional_encoding.pe[: len(x)], src_key_padding_mask=~valid).permute(
            1, 0, 2
        )
        return normalised((x * valid[..., None]).sum(1) / valid.sum(1, keepdim=True))


class Whole(nn.Module):
    def __init__(self, joints: int, text: nn.Module) -> None:
        super().__init__()
        self.pose_encoder, self.text_encoder = PoseNet(joints), text
        self.loss_weight = nn.Parameter(torch.tensor([11.5]))


def bert() -> Any:
    from transformers import DistilBertConfig as Config
    from transformers import DistilBertModel

    return DistilBertModel(
        Config(vocab_size=len(PIECES), max_position_embeddings=48, dim=128, n_layers=2, n_heads=2, hidden_dim=96)
    )


def whole(kind: str, joints: int) -> Whole:
    torch.manual_seed(0)
    model = Whole(joints, WordNet() if kind == "words" else PieceNet(bert()))
    for module in model.modules():  # as if it were trained
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def save(path: Path, model: Whole, **args: Any) -> Path:
    """As PoseScript's trainers do: with the optimiser, numbers of NumPy, and arguments in a Namespace, a device among them."""
    optimizer = torch.optim.Adam(model.parameters())
    given = {"latentD": LATENT, "dataset": "posescript-A1", "device": torch.device("cpu"), "lr": 2e-4, **args}
    content = {
        "epoch": 7, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": None,
        "args": argparse.Namespace(**given), "best_score": np.float64(32.3),
    }  # fmt: skip
    torch.save(content, path)
    return path


def vocabulary_class() -> type:
    module = types.ModuleType("text2pose.vocab")
    found = type("Vocabulary", (), {"__module__": "text2pose.vocab"})
    module.Vocabulary = found  # type: ignore[attr-defined]
    sys.modules["text2pose"], sys.modules["text2pose.vocab"] = types.ModuleType("text2pose"), module
    return found


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    """The file of ECCV 2022, a pickled object of PoseScript's class."""
    words = (*SPECIAL, *WORDS)
    state = {"idx": len(words), "word2idx": {w: i for i, w in enumerate(words)}, "idx2word": dict(enumerate(words))}
    value = vocabulary_class()()
    value.__dict__.update(state)
    (tmp_path / "vocab3893.pkl").write_bytes(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
    (tmp_path / "later.pkl").write_bytes(pickle.dumps(state, pickle.HIGHEST_PROTOCOL))
    del sys.modules["text2pose"], sys.modules["text2pose.vocab"]  # who reads it does not have them
    return tmp_path / "vocab3893.pkl"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))  # type: ignore[call-arg]
    found.normalizer = normalizers.BertNormalizer(lowercase=True)  # type: ignore[assignment]
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    found.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # type: ignore[assignment]
    folder = tmp_path_factory.mktemp("distilbert")
    found.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("joints", [52, 22])
def test_the_retriever_over_words_gives_the_features_of_torch(tmp_path: Path, vocabulary: Path, joints: int) -> None:
    model = whole("words", joints)
    file = save(tmp_path / "best_model.pth", model, text_encoder_name="glovebigru_vocA1H1", num_body_joints=joints)
    assert main(["posescript", "convert", str(file), "--out", str(tmp_path / "out"), "--tokens", str(vocabulary)]) == 0
    found = load_retriever(tmp_path / "out")
    assert found.settings["trained_on"] == {
        "released": "best_model.pth", "epoch": 7, "dataset": "posescript-A1", "text_encoder_name": "glovebigru_vocA1H1",
    }  # fmt: skip
    vectors, given = poses(joints)
    with torch.no_grad():
        expected = model.pose_encoder(torch.tensor(vectors)).numpy()
    np.testing.assert_allclose(found.embed_poses(given), expected, atol=1e-5)
    ids, lengths = pad(found.tokens.encode(TEXTS), 1)
    assert (ids == SPECIAL.index("<unk>")).any() and (ids[:, 0] == 1).all()
    with torch.no_grad():
        expected = model.text_encoder(torch.tensor(ids).long(), torch.tensor(lengths).long()).numpy()
    np.testing.assert_allclose(found.embed_texts(TEXTS), expected, atol=1e-5)
    assert float(found.model.loss_weight[0]) == 11.5


def test_the_retriever_over_distilbert_gives_the_features_of_torch(tmp_path: Path, tokenizer: Path) -> None:
    model = whole("pieces", 52)
    file = save(
        tmp_path / "checkpoint_best.pth", model, text_encoder_name="distilbertUncased", transformer_topping="avgp"
    )
    found = load_retriever(convert_released(file, tmp_path / "out", tokenizer))
    vectors, given = poses(52)
    with torch.no_grad():
        np.testing.assert_allclose(found.embed_poses(given), model.pose_encoder(torch.tensor(vectors)), atol=1e-5)
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer / "tokenizer.json"), model_max_length=48, pad_token="[PAD]"
    )
    batch = fast(list(TEXTS), truncation=True, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] == 48  # one is cut
    with torch.no_grad():
        expected = model.text_encoder(batch["input_ids"], batch["attention_mask"].sum(1)).numpy()
    np.testing.assert_allclose(found.embed_texts(TEXTS), expected, atol=1e-5)


def test_a_generator_is_found_by_its_tensors(tmp_path: Path, vocabulary: Path) -> None:
    """Its layers beside torch: test_pose_vae."""
    text = TextEncoderConfig(words=len(SPECIAL) + len(WORDS), word_width=WORD_WIDTH)
    model = PoseVae(PoseVaeConfig(22, latent=8, width=WIDTH, text=text), rngs=nnx.Rngs(0))
    model.pose_encoder.norm_in.mean[...] += 0.25
    tensors = {name: torch.tensor(np.array(value)) for name, value in to_tensors(model, POSE_VAE).items()}
    args = argparse.Namespace(text_encoder_name="glovebigru_vocA1H1", latentD=8)
    torch.save({"epoch": 1, "model": tensors, "args": args}, tmp_path / "best_model.pth")
    found = load_generator(convert_released(tmp_path / "best_model.pth", tmp_path / "out", vocabulary))
    given = Generator("given", model, found.tokens, found.pose_input, {})
    np.testing.assert_array_equal(found.sample(TEXTS).rotations, given.sample(TEXTS).rotations)
    np.testing.assert_array_equal(found.pose_input.fill, np.full((22, 3), 0.25, np.float32))


def test_distilbert_gives_the_states_of_transformers(tmp_path: Path, tokenizer: Path) -> None:
    torch.manual_seed(1)
    model = bert().eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    found, pieces = read_distilbert(tmp_path)
    assert found.config == DistilBertConfig(len(PIECES), 48, 128, 2, 2, 96) and isinstance(pieces, WordPieces)
    ids, lengths = pad(pieces.encode(TEXTS), 1)
    valid = np.arange(ids.shape[1]) < lengths[:, None]
    with torch.no_grad():
        expected = model(torch.tensor(ids).long(), torch.tensor(valid).long()).last_hidden_state.numpy()
    np.testing.assert_allclose(run(found, "__call__", ids, lengths)[valid], expected[valid], atol=1e-5)


def test_vocabularies_are_read_in_all_forms(tmp_path: Path, vocabulary: Path) -> None:
    WordVocabulary((*SPECIAL, *WORDS)).save(tmp_path)
    for path in (vocabulary, tmp_path / "later.pkl", tmp_path / WordVocabulary.FILE):
        assert read_vocabulary(path).words == (*SPECIAL, *WORDS)
    for value, words in (
        ({"word2idx": {"<pad>": 0, "a": 2}}, "ids from 0 on without gaps"),
        ({"word2idx": {"a": 0}}, "must begin with <pad>"),
        (["a"], "must begin with <pad>"),
        (argparse.Namespace(a=1), "refers to argparse.Namespace"),
    ):
        (tmp_path / "other.pkl").write_bytes(pickle.dumps(value))
        with pytest.raises(UserError, match=words):
            read_vocabulary(tmp_path / "other.pkl")


class Harm:
    def __reduce__(self) -> Any:
        return print, ("harm",)


def test_what_is_not_followed_is_refused(tmp_path: Path, vocabulary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = whole("words", 22)
    name = {"text_encoder_name": "glovebigru_vocA1H1"}

    def refused(words: str, tokens: Path = vocabulary, network: Any = model, **args: Any) -> None:
        with pytest.raises(UserError, match=words):
            convert_released(save(tmp_path / "x.pth", network, **args), tmp_path / "out", tokens)
        assert not (tmp_path / "out").exists()

    refused("text encoder 'clip' is not supported", text_encoder_name="clip")
    refused(
        "transformer_topping 'augtokens' is not supported",
        text_encoder_name="distilbertUncased",
        transformer_topping="augtokens",
    )
    refused("refers to __builtin__.print", harm=Harm(), **name)
    (tmp_path / "few.json").write_text(json.dumps(SPECIAL))
    refused(
        "has 4 token ids, and .* was trained with 21: it needs those of glovebigru_vocA1H1",
        tokens=tmp_path / "few.json",
        **name,
    )
    refused("neither a retriever", network=nn.Linear(2, 2), **name)
    deeper = whole("words", 22)
    deeper.text_encoder.sent_enc = nn.GRU(WORD_WIDTH, LATENT // 2, num_layers=2, bidirectional=True)
    refused("tensors have no place in this network", network=deeper, **name)
    other = whole("pieces", 22)
    other.text_encoder.positional_encoding.pe += 0.1
    refused("usual sines", network=other, text_encoder_name="distilbertUncased", transformer_topping="avgp")
    torch.save({"model": model.state_dict()}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="under 'args'"):
        convert_released(tmp_path / "bare.pth", tmp_path / "out", vocabulary)
    assert "harm" not in capsys.readouterr().out
