"""Evaluators by name: what is refused, when, and in which words."""

import sys
import types

import jax
import numpy as np
import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.train import run as train_run
from chatpose_jax.train.config import EvaluatorRow, TrainConfig
from chatpose_jax.train.evaluators import Context, check_evaluators, make_evaluators
from chatpose_jax.train.run import run_training
from chatpose_jax.train.run_config import RunConfig, load_config

OWN = "an_evaluator_for_tests"


def context(*rows):
    config = RunConfig(preset("tiny"), load_config("tiny").data, TrainConfig(evaluators=rows))
    return Context(config, processor=None, mesh=None, rows=None, say=print)


@pytest.fixture
def own(monkeypatch):
    """Functions by their names, as a module of one's own."""
    module = types.ModuleType(OWN)
    monkeypatch.setitem(sys.modules, OWN, module)
    return lambda **functions: vars(module).update(functions)


def test_values_of_all_rows_stand_side_by_side(own):
    def threes(context, *, times: int = 1):
        return lambda params: {"threes": jax.numpy.float32(3 * times), "sheet": np.zeros((2, 2, 3), np.uint8)}

    own(threes=threes, fours=lambda context: lambda params: {"fours": 4})
    evaluate = make_evaluators(context((f"{OWN}:threes", {"times": 2}), (f"{OWN}:fours",)))
    values = evaluate({})
    assert values["val_threes"] == 6.0 and type(values["val_threes"]) is float
    assert values["val_fours"] == 4.0 and values["val_sheet"].shape == (2, 2, 3)
    assert evaluate.names is None, "neither said its names"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("validatoin",), "did you mean validation"),
        (("validation", {"row": 3}), "has no option 'row'; did you mean rows?"),
        (("validation", {"rows": "3"}), "the option rows: expected int, found '3'"),
        (("validation", {"split": "vla"}), "the option split: expected 'train' or 'val' or 'test', found 'vla'"),
        (("no_such_module:knees",), "cannot be imported: No module named 'no_such_module'"),
        ((f"{OWN}:nothing",), "has no function or class 'nothing'"),
        ((f"{OWN}:of_two",), "expected a function with one positional parameter"),
    ],
)
def test_a_wrong_row_is_refused_before_anything_is_made(own, row, words):
    own(of_two=lambda one, two: pytest.fail("was called"))
    with pytest.raises(UserError, match=r"^train\.evaluators\[1\] ") as raised:
        check_evaluators(TrainConfig(evaluators=(("validation",), row)))
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda context: {}["rows"], "KeyError: 'rows'"),
        (lambda context: None, "returned NoneType; expected a function of the parameters"),
        (lambda context: lambda params: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda context: lambda params: 3, "gave int; expected a mapping of names to values"),
        (lambda context: lambda params: {"x": "three"}, "'x' is 'three'; expected a number, or an image"),
        (lambda context: lambda params: {"x": np.zeros(3)}, "expected a number, or an image"),
        (lambda context: lambda params: {"twice": 2}, "gives 'twice', but an earlier evaluator already gives a value"),
    ],
)
def test_an_error_of_ones_own_names_the_evaluator(own, make, words):
    own(first=lambda context: lambda params: {"twice": 1}, wrong=make)
    with pytest.raises(UserError, match=rf"^train\.evaluators\[1\] '{OWN}:wrong'") as raised:
        make_evaluators(context((f"{OWN}:first",), (f"{OWN}:wrong",)))({})
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_the_command_line_reaches_names_and_options():
    rows = load_config("tiny", ["train.evaluators.validation.rows=8"]).train.evaluators
    assert rows == (EvaluatorRow("validation", {"rows": 8}),)
    assert load_config("tiny", ["train.evaluators=my.checks:knees"]).train.evaluators == (
        EvaluatorRow("my.checks:knees"),
    )
    both = "(('validation', {'rows': 8}), ('my.checks:knees',))"
    rows = load_config(
        "tiny", [f"train.evaluators={both}", "train.evaluators.my.checks:knees.side=left"]
    ).train.evaluators
    assert rows[1] == EvaluatorRow("my.checks:knees", {"side": "left"})
    with pytest.raises(UserError, match=r"train\.evaluators: expected rows of \(name, {option: value}\)"):
        load_config("tiny", ["train.evaluators=[3]"])


def test_a_best_that_nobody_gives_is_refused_before_the_weights_are_made(tmp_path, monkeypatch):
    """Validation knows the names of its values once it has its rows."""
    monkeypatch.setattr(train_run, "initial_params", lambda *_: pytest.fail("weights were made"))
    small = [
        "data.sources.synthetic.train_size=8",
        "data.sources.synthetic.val_size=8",
        "train.evaluators.validation.rows=2",
    ]
    config = load_config("tiny", [*small, "train.best=pa_mjpje"])
    with pytest.raises(
        UserError, match=r"train\.best='pa_mjpje': no evaluator gives it; did you mean pa_mpjpe\?; they give loss, "
    ):
        run_training(config, tmp_path / "run")
