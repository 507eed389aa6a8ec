"""Pose heads are found by name, by an entry point, as package.module:Class; what is wrong is one line, and a file names none by itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.models import heads
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import HeadConfig, preset
from chatpose_jax.models.heads.base import PoseHead
from chatpose_jax.models.heads.mlp import MLPHead

MODULE = """
from pathlib import Path

from chatpose_jax.models.heads.mlp import MLPHead

Path(__file__).with_name("imported").touch()


class Own(MLPHead):
    def __init__(self, width, *, rngs, depth: int = 1, options=None):
        super().__init__(width, rngs=rngs)
        self.depth = depth


class Moody(MLPHead):
    def __init__(self, width):
        pass


def make():
    pass


number = 3
"""

BAD = """
import jax.numpy as jnp

from chatpose_jax.models.heads.base import PoseHead
from chatpose_jax.models.heads.mlp import MLPHead
from chatpose_jax.models.layers import Linear


class NoInit(PoseHead):
    def __call__(self, states, key):
        pass


class NoCall(PoseHead):
    def __init__(self, width, *, rngs):
        pass


class Call(MLPHead):
    def __call__(self, states):
        pass


class Loss(MLPHead):
    def loss(self, states, target):
        pass


class Layers(MLPHead):
    def __init__(self, width, *, rngs):
        self.layers = [Linear(width, 3, rngs=rngs)]  # HERE Layers


class Reads(MLPHead):
    def __call__(self, states, key):
        return states.conversation.mean()  # HERE Reads


class InInit(MLPHead):
    def __init__(self, width, *, rngs):
        raise KeyError("two\\nlines")  # HERE InInit


class InCall(MLPHead):
    def __call__(self, states, key):
        return states.token @ jnp.zeros((3, 4))  # HERE InCall


class InLoss(MLPHead):
    def loss(self, states, target, mask, key, distance):
        return helper(states)


class InSample(MLPHead):
    def sample(self, states, key, count):
        return super().sample(states, key)  # HERE InSample


def helper(states):
    return states.nothing  # HERE InLoss
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with the module ``outside_heads``, which leaves a file behind when it is imported, and one that raises."""
    (tmp_path / "outside_heads.py").write_text(MODULE)
    (tmp_path / "bad_heads.py").write_text(BAD)
    (tmp_path / "broken_heads.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "raising_heads.py").write_text("raise RuntimeError('two\\nlines')\n")
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[chatpose_jax.heads]\noutside = outside_heads:Own\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    heads._offered.cache_clear()
    yield tmp_path
    heads._offered.cache_clear()
    for name in ("outside_heads", "bad_heads", "broken_heads", "raising_heads"):
        sys.modules.pop(name, None)


def make(name: str, **options: object) -> PoseHead:
    return heads.create_head(HeadConfig(name, tuple(options.items())), 8, rngs=nnx.Rngs(0))


def test_a_head_of_ones_own_is_found_by_its_class_and_by_its_packages_name(package: Path) -> None:
    assert make("outside_heads:Own", depth=2).depth == 2
    assert type(make("outside")).__name__ == "Own"
    config = preset("tiny").replace(head=HeadConfig("outside_heads:Own", (("depth", 3),)))
    assert abstract_params(config)["pose_head"].keys() == abstract_params(preset("tiny"))["pose_head"].keys()


def test_two_packages_of_one_name_are_refused_and_the_boxs_names_stay(package: Path) -> None:
    points = package / "outside-1.0.dist-info/entry_points.txt"
    points.write_text("[chatpose_jax.heads]\nmlp = outside_heads:Own\n")
    assert heads.head_class("mlp") is MLPHead
    other = package / "other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    for folder, place in ((points.parent, "outside_heads:Own"), (other, "other:Head")):
        (folder / "entry_points.txt").write_text(f"[chatpose_jax.heads]\nshared = {place}\n")
    with pytest.raises(UserError, match=r"two installed packages offer a pose head 'shared', .*outside_heads:Own"):
        make("shared")
    assert heads.head_class("mlp") is MLPHead


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nowhere.heads:Own", {}, "'nowhere.heads:Own' cannot be imported: No module named 'nowhere' .*installed.*PYTHONPATH"),
        ("outside_heads.deep:Own", {}, "cannot be imported: No module named 'outside_heads.deep'"),
        ("broken_heads:Own", {}, "'broken_heads:Own' cannot be imported: No module named 'nothing_of_that_name'"),
        ("raising_heads:Own", {}, "'raising_heads:Own' cannot be imported: RuntimeError: two lines"),
        ("outside_heads:Owm", {}, "the module outside_heads has no function or class 'Owm'; did you mean Own"),
        ("outside_heads:number", {}, "has no function or class 'number'; it is 3, of type int"),
        ("outside_heads:make", {}, "expected a class derived from .*PoseHead, found <function make"),
        ("outside_heads:", {}, "expected 'mlp'.*'package.module:name'"),
        (":Own", {}, "expected 'mlp'.*'package.module:name'"),
        ("pathlib:Path", {}, r"'pathlib:Path': expected a class derived from chatpose_jax.models.heads.base.PoseHead, found <class"),
        ("outsid", {}, "no pose head 'outsid'; did you mean outside.; the heads are .*mlp.*outside, .*or package.module:Class"),
        ("outside_heads:Own", {"dept": 2}, "pose head 'outside_heads:Own' has no option 'dept'; did you mean depth"),
        ("outside_heads:Own", {"depth": "two"}, "the option depth: expected int, found 'two'"),
        ("outside_heads:Own", {"rngs": 3}, "has no option 'rngs'"),
        ("outside_heads:Moody", {}, r"'outside_heads:Moody' has __init__\(self, width\); expected def __init__\(self, width, .*outside_heads.py:\d"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_head_is_one_line(
    package: Path, name: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words) as raised:
        make(name, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NoInit", r"has no __init__; expected def __init__\(self, width, \*, rngs, \*\*options\)"),
        ("NoCall", r"has no __call__; expected def __call__\(self, states, key\)"),
        ("Call", r"has __call__\(self, states\); expected def __call__\(self, states, key\)"),
        ("Loss", r"has loss\(self, states, target\); expected def loss\(self, states, target, mask, key, distance\)"),
        ("Layers", r"__init__ with width=128, FILE: a list of layers must be an nnx.List\(\[…\]\)"),
        ("Reads", r"__call__ with .*, FILE: its reads is 'token', so states.conversation .* None"),
        ("InInit", "__init__ with width=128, FILE: KeyError: 'two"),
        ("InCall", r"__call__ with states.token float32 \(2, 3, 128\), FILE: TypeError: dot_general"),
        ("InLoss", "loss with .*, FILE: AttributeError: 'States' object has no attribute 'nothing'"),
        ("InSample", "sample with .*count=4, FILE: TypeError: .*'count'"),
    ],
)
def test_an_error_in_the_code_of_a_head_is_one_line_with_its_place(package: Path, name: str, words: str) -> None:
    lines = BAD.splitlines()
    [mark] = [f"# HERE {name}"] if f"# HERE {name}" in BAD else [f"class {name}("]
    [number] = [i for i, line in enumerate(lines, 1) if line.endswith(mark) or line.startswith(mark)]
    place = f"bad_heads.py:{number}" if mark.startswith("#") else "bad_heads.py:"
    with pytest.raises(UserError, match=words.replace("FILE", f".*{place}")) as raised:
        abstract_params(preset("tiny").replace(head=HeadConfig(f"bad_heads:{name}")))
    assert str(raised.value).startswith(f"pose head 'bad_heads:{name}'")
    assert place in str(raised.value)
    assert "\n" not in str(raised.value)
    if mark.startswith("#"):
        assert raised.value.__cause__ is not None and not isinstance(raised.value.__cause__, UserError)


def test_a_file_names_no_head_of_somebodys_own_by_itself(package: Path) -> None:
    own = HeadConfig("outside_heads:Own", (("depth", 2),))
    with pytest.raises(
        UserError, match=r"^here: its pose head 'outside_heads:Own' is not part.*--head outside_heads:Own"
    ):
        heads.trusted_head("here", own)
    assert heads.trusted_head("here", own, "outside_heads:Own") == own
    assert not (package / "imported").exists(), "neither refusing nor allowing imports"
    for name in ("mlp", "outside"):
        assert heads.trusted_head("here", HeadConfig(name)) == HeadConfig(name)
    with pytest.raises(
        UserError, match=r"its pose head 'deep' is not part of this program.*--head package.module:Class"
    ):
        heads.trusted_head("here", HeadConfig("deep"))  # as it was called where users added files to this package
    with pytest.raises(UserError, match="its pose head is 'mlp', which needs no --head; --head outside_heads:Own"):
        heads.trusted_head("here", HeadConfig("mlp"), "outside_heads:Own")


def test_a_class_may_be_handed_over_and_may_have_moved(package: Path) -> None:
    class Local(MLPHead):
        pass

    given = heads.trusted_head("here", HeadConfig("nowhere:Local"), Local)
    assert heads.head_class(given.name) is Local
    moved = heads.trusted_head("here", HeadConfig("nowhere:Own", (("depth", 2),)), "outside_heads:Own")
    assert moved == HeadConfig("outside_heads:Own", (("depth", 2),))
    with pytest.raises(UserError, match="expected a class derived from"):
        heads.head_class(heads.trusted_head("here", HeadConfig("nowhere:Own"), Path).name)  # type: ignore[arg-type]


def test_a_class_that_is_defined_anew_takes_the_place_of_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, where the cell that defines a head runs again."""

    class Wide(MLPHead):
        def __init__(self, width: int, *, rngs: nnx.Rngs):
            super().__init__(width, rngs=rngs)
            self.more = nnx.Param(rngs.params.normal((3,)))

    for kind, more in ((MLPHead, False), (Wide, True), (MLPHead, False)):
        monkeypatch.setattr(heads, "_GIVEN", {})
        named = heads.trusted_head(
            "here", HeadConfig("notebook:Head"), type("Head", (kind,), {"__module__": "notebook"})
        )
        params = abstract_params(preset("tiny").replace(head=named))
        assert ("more" in params["pose_head"]) == more


def test_a_head_may_need_a_width_that_its_own_heads_divide() -> None:
    class Split(MLPHead):
        def __init__(self, width: int, *, rngs: nnx.Rngs):
            assert width % 128 == 0
            super().__init__(width, rngs=rngs)

    config = heads.trusted_head("here", HeadConfig("notebook:Split"), Split)
    assert heads.head_family(config) == "smpl"
