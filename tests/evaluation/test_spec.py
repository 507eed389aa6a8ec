"""Systems and data as command lines name them, and the folders that they get."""

import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.spec import Spec, data_name, demand_unique, folder_name, make_system, open_rows

HERE = "tests.evaluation.given_systems"


def test_options_are_values():
    spec = Spec.parse(
        "predictions,file=a b.npz, count=3,mesh=1x8x1,on=true,scale=-0.5,none=none,names=('a', 'b'),then='mean,rows=5'"
    )
    assert spec.name == "predictions"
    assert spec.options == {
        "file": "a b.npz", "count": 3, "mesh": "1x8x1", "on": True, "scale": -0.5, "none": None, "names": ("a", "b"),
        "then": "mean,rows=5",
    }  # fmt: skip
    assert Spec.parse("mean").options == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found no name"),
        (",a=1", "found no name"),
        ("mean,rows", "expected NAME,option=value,…, found 'rows'"),
        ("mean,=3", "found '=3'"),
        ("mean,rows=1,rows=2", "rows is given twice"),
        ("mean,names=(1", "names: the value in brackets"),
    ],
)
def test_what_is_no_spec(text, said):
    with pytest.raises(UserError, match=said):
        Spec.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("chatpos,model=x", "system 'chatpos': expected .*did you mean chatpose"),
        ("chatpose", "system 'chatpose' needs the option 'model'"),
        ("chatpose,model=x,batch_sice=3", "has no option 'batch_sice'; did you mean batch_size"),
        ("chatpose,model=x,batch_size=many", "the option batch_size: expected int"),
        ("chatpose,model=x,mesh=1x1", "expected DATAxFSDPxTENSOR"),
        (f"{HERE}:upright", "TypeError: upright"),
        (f"{HERE}:nothing", "has no function or class 'nothing'"),
        ("nowhere:System", "cannot be imported"),
    ],
)
def test_what_is_no_system(text, said):
    with pytest.raises(UserError, match=said):
        make_system(Spec.parse(text))


def test_names_of_rows():
    assert data_name(Spec.parse("3dpw_test"), "test", "") == "3dpw_test"
    assert data_name(Spec.parse("cmu,folder=x"), "val", "200") == "cmu-val-200"
    assert data_name(Spec.parse("prepared,folder=data/mine"), "test", "") == "mine"
    assert data_name(Spec.parse(f"{HERE}:rows,name=clips"), "test", "") == "clips"
    assert data_name(Spec.parse(f"{HERE}:rows"), "test", "") == "rows"
    assert len(open_rows(Spec.parse(f"{HERE}:rows,name=clips,count=3"), "test", "data")) == 3


def test_names_of_folders():
    assert folder_name("LLaVA*-S (13B)") == "LLaVA_-S_13B"
    assert folder_name("../../etc") == "etc"
    assert folder_name("姿勢/a") == "姿勢_a"
    with pytest.raises(UserError, match=r"'\.\./' has no letter"):
        folder_name("../")
    demand_unique("systems", ["a", "b", "a b"])
    for names, said in (
        (["a", "b", "a"], "two systems are called 'a': set name="),
        (["a b", "A_b"], "'A_b' and 'a b', which is one"),
    ):
        with pytest.raises(UserError, match=said):
            demand_unique("systems", names)
