"""Every pose head leaves as files that say what it is, and comes back by them; what was written before says less and is read as well."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

import chatpose_jax
from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import HeadConfig, ModelConfig, preset
from chatpose_jax.models.heads import HEADS
from chatpose_jax.processing.processor import Processor
from chatpose_jax.weights import pose_head
from chatpose_jax.weights.convert import convert, load_source
from chatpose_jax.weights.export import export
from chatpose_jax.weights.folder import TOKENIZER, load_model_config, load_params
from chatpose_jax.weights.initial import initial
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.save import save_folder
from chatpose_jax.weights.spec import SourceSpec

from .sources import Sizes, make_llava_transformers

OLD_FOLDER = '{"head": {"name": "mlp", "num_joints": 24, "options": []}}'
OLD_DESCRIPTION = '{"format": "chatpose-pose-head", "version": 1, "name": "mlp", "num_joints": 24, "options": {}}'
"""What 0.1's commit b473e67 wrote, as far as it is read."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model folder."""
    folder = tmp_path_factory.mktemp("plain")
    make_llava_transformers(folder / "src", sizes=Sizes(width=16, heads=2, kv_heads=1, mlp=32, layers=1))
    convert(folder / "src", folder / "jax")
    return folder / "jax"


def with_head(plain: Path, out: Path, head: HeadConfig) -> dict[str, np.ndarray]:
    """Writes the folder with another head, and gives that head's weights."""
    config = load_model_config(plain)
    held = by_path(load_params(plain, abstract_params(config)))
    config = config.replace(head=head)
    new = initial("pose_head", config, 3)
    params = {path: leaf for path, leaf in held.items() if not path.startswith("pose_head/")} | new
    save_folder(out, config, unflatten_dict(params, sep="/"), processor=Processor.load(plain / TOKENIZER, config))
    return new


def check_round_trip(folder: Path, new: dict[str, np.ndarray], head: HeadConfig, given: str | None = None) -> None:
    plan, params = load_source(SourceSpec(folder, head=given))
    assert plan.config.head == head
    found = {path: leaf for path, leaf in by_path(params).items() if path.startswith("pose_head/")}
    assert found.keys() == new.keys()
    for path, leaf in new.items():
        np.testing.assert_array_equal(found[path], leaf)


OPTIONS = {"mlp": (("rotation", "svd9d"),)}


@pytest.mark.parametrize("name", HEADS)
def test_every_head_of_the_table_goes_out_and_comes_back(plain: Path, tmp_path: Path, name: str) -> None:
    head = HeadConfig(name, OPTIONS.get(name, ()))
    new = with_head(plain, tmp_path / "jax", head)
    export(tmp_path / "jax", tmp_path / "hf", "transformers")
    about = json.loads((tmp_path / "hf/pose_head.json").read_text())
    assert (about["name"], about["num_joints"], about["gives"]["rotations"]) == (name, 24, [24, 3, 3])
    assert ("betas" in about["gives"]) == (name == "shape")
    assert about["reads"] == ("conversation" if name == "queries" else "token")
    assert about["draws"] == (name in ("flow", "gaussian"))
    check_round_trip(tmp_path / "hf", new, head)


def test_a_head_of_ones_own_goes_out_and_comes_back_where_it_is_named(plain: Path, tmp_path: Path) -> None:
    name = "tests.model.toy_heads:Looking"
    head = HeadConfig(name, (("sharpness", 2.0),))
    new = with_head(plain, tmp_path / "jax", head)
    with pytest.raises(UserError, match=f"jax: its pose head '{name}' is not part .*--head {name}"):
        export(tmp_path / "jax", tmp_path / "hf", "transformers")
    export(tmp_path / "jax", tmp_path / "hf", "transformers", head=name)
    with pytest.raises(UserError, match=f"pose_head.json: its pose head '{name}' is not part .*--head {name}"):
        load_source(tmp_path / "hf")
    check_round_trip(tmp_path / "hf", new, head, name)
    export(plain, tmp_path / "mlp", "transformers")
    with pytest.raises(UserError, match=f"its pose head is 'mlp', which needs no --head; --head {name}"):
        load_source(SourceSpec(tmp_path / "mlp", head=name))
    reply = chatpose_jax.load(tmp_path / "hf", head=name).chat(
        [{"role": "user", "content": "Kneel."}], max_new_tokens=8, force_pose=True
    )
    assert len(reply.poses) >= 1


def test_the_description_of_the_papers_head_says_its_layers() -> None:
    config = preset("tiny")
    about = pose_head.describe_head(config, "<POSE>")
    assert (about["sizes"], about["output"]) == ([128, 128, 144], pose_head.OUTPUT["6d"])
    other = pose_head.describe_head(config.replace(head=HeadConfig("mlp", (("rotation", "quaternion"),))), "<POSE>")
    assert (other["sizes"], other["output"]) == ([128, 128, 96], pose_head.OUTPUT["quaternion"])


def test_a_head_that_is_no_6d_mlp_does_not_become_chatposes(plain: Path, tmp_path: Path) -> None:
    with_head(plain, tmp_path / "jax", HeadConfig("mlp", (("rotation", "svd9d"),)))
    with pytest.raises(UserError, match=r"'mlp' with 6D rotations, this model has HeadConfig\(name='mlp', .*svd9d"):
        export(tmp_path / "jax", tmp_path / "out", "chatpose")


def test_what_was_written_before_is_read(tmp_path: Path) -> None:
    assert ModelConfig.from_json(json.loads(OLD_FOLDER)) == ModelConfig()
    (tmp_path / "pose_head.json").write_text(OLD_DESCRIPTION)
    layout = pose_head.layout(tmp_path)
    assert layout.settings({}, {}) == {"head": HeadConfig()}
    assert {rule.target for rule in layout.rules} == {
        f"pose_head/fc{i}/{part}" for i in (1, 2) for part in ("kernel", "bias")
    }


def test_a_strangers_description_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strange_head.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "pose_head.json").write_text(OLD_DESCRIPTION.replace("mlp", "strange_head:Head"))
    with pytest.raises(
        UserError, match=r"pose_head.json: its pose head 'strange_head:Head' is not part .*--head strange_head:Head"
    ):
        pose_head.layout(tmp_path)
    assert not (tmp_path / "imported").exists() and "strange_head" not in sys.modules


def test_a_head_of_ones_own_is_read_where_it_is_named(tmp_path: Path) -> None:
    name = "tests.model.toy_heads:Drawing"
    config = preset("tiny").replace(head=HeadConfig(name))
    about = json.loads(json.dumps(pose_head.describe_head(config, "<POSE>")))
    (tmp_path / "pose_head.json").write_text(json.dumps(about))
    assert about["gives"] == {"rotations": [24, 3, 3], "betas": [10], "translation": [3]}
    assert (about["name"], about["draws"]) == (name, True)
    layout = pose_head.layout(tmp_path, name)
    assert {rule.source for rule in layout.rules} == {"out.kernel", "out.bias"}
    assert layout.settings({}, {}) == {"head": HeadConfig(name)}


def test_options_that_are_lists_come_back_hashable() -> None:
    head = HeadConfig("mlp", (("sizes", (1, (2, 3))),))
    config = preset("tiny").replace(head=head)
    back = ModelConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert back == config and hash(back) == hash(config)
