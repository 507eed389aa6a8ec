"""The report: what stands in it for given scores, that text of systems stays text, and that equal files give equal bytes."""

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from chatpose_jax.errors import UserError
from chatpose_jax.evaluation import page
from chatpose_jax.evaluation.published import PUBLISHED, differences, is_of
from chatpose_jax.evaluation.report import write_report
from chatpose_jax.evaluation.results import DrawnAnswer, NotRun, write_drawn, write_not_run
from chatpose_jax.evaluation.scores import Value

from .results import scores, write

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Reads a page: its text, its tags, and whether each tag is closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.open, self.links, self.ids = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        self.links += [found[name] for name in ("src", "href") if name in found]
        self.ids += [found["id"]] if "id" in found else []
        assert not any(name.startswith("on") for name in found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(out):
    markdown, html = write_report(out)
    return markdown.read_text(), Page(html.read_text()), html.read_text()


def test_a_row_has_value_interval_command_and_counts(tmp_path):
    write(
        tmp_path,
        "ours",
        [scores(pa=58.44, counts={"no pose in the answer": 1234, "a zero": 0})],
        command="chatpose eval X",
    )
    markdown, found, _html = read(tmp_path)
    assert "| ours | 88.4 [86.4, 91.4] | 58.4 [57.4, 59.4] |" in markdown
    assert "| system | MPJPE (mm) ↓ | PA-MPJPE (mm) ↓ |" in markdown
    assert "samples: 35,515" in markdown and "`chatpose eval X`" in markdown
    assert "Left out or failed, ours: no pose in the answer: 1,234." in markdown
    words = " ".join(found.words)
    for part in ("58.4", "[57.4, 59.4]", "chatpose eval X", "no pose in the answer: 1,234", "Table 3"):
        assert part in words
    assert "a zero" not in markdown


def test_a_note_of_a_system_stands_below_its_table_and_compares_nothing(tmp_path):
    write(tmp_path, "ours", [scores(pa=50)])
    write(tmp_path, "mean pose", [scores(pa=80)], note="computed from 9 training rows of synthetic")
    markdown, found, _html = read(tmp_path)
    assert "| **80.0** [78.0, 83.0] | **50.0** [49.0, 51.0] |" in markdown, "the facts are the same"
    assert "computed from 9 training rows of synthetic" in markdown and "9 training rows" in " ".join(found.words)


def test_the_best_measured_value_is_bold_and_published_rows_never_are(tmp_path):
    write(tmp_path, "good", [scores(pa=50)])
    write(tmp_path, "bad", [scores(pa=80)])
    markdown, _found, html = read(tmp_path)
    assert "| good | **80.0** [78.0, 83.0] | **50.0** [49.0, 51.0] |" in markdown and "**110" not in markdown
    assert html.count("<strong>50.0</strong>") == 1
    unipose = next(line for line in markdown.splitlines() if line.startswith("| UniPose"))
    assert "*94.7*" in unipose and "*59.1*" in unipose and "**" not in unipose
    assert 'class="published"' in html


def test_rows_that_depend_on_other_things_are_marked_and_none_is_best(tmp_path):
    write(tmp_path, "all", [scores(pa=50)])
    write(tmp_path, "few", [scores(pa=40, facts={"protocol": "B", "betas": "0 on both sides", "samples": "200"})])
    markdown, *_ = read(tmp_path)
    assert "<sup>a</sup> samples: 35,515" in markdown and "<sup>b</sup> samples: 200" in markdown
    assert "protocol: B; betas: 0 on both sides." in markdown
    assert "| all <sup>a</sup> | 80.0" in markdown and "| few <sup>b</sup> | 70.0" in markdown


def test_published_rows_say_how_their_conditions_differ(tmp_path):
    write(
        tmp_path,
        "ours",
        [scores(facts={"protocol": "C", "pelvis": "joint 0", "betas": "0 on both sides", "samples": "200 of 35,515"})],
    )
    markdown, *_ = read(tmp_path)
    note = next(line for line in markdown.splitlines() if "2024, Table 3)" in line)
    assert "not stated: protocol, pelvis, betas" in note and "samples" not in note
    assert "protocol: B, here C" in markdown and "pelvis: point 39, here joint 0" in markdown
    assert "| ChatPose, published <sup>a</sup> | *163.6* | *81.9* |" in markdown


def test_published_rows_of_other_data_stand_apart(tmp_path):
    write(tmp_path, "ours", [scores("estimation/synthetic/C", title="generated")], data="synthetic")
    markdown, _found, html = read(tmp_path)
    assert "| ChatPose" not in markdown and 'class="published"' not in html
    apart = markdown.split("not comparable with this table:")[1]
    assert (
        "- ChatPose: MPJPE 163.6, PA-MPJPE 81.9, MPJRE 10.4" in apart
        and "data: 3dpw or 3dpw\\_test, here synthetic" in apart
    )


def test_figures_of_rpe_stand_beside_the_mean_over_attributes_only(tmp_path):
    tables = [scores(f"rpe/rpe_refined/{name}", title=name) for name in ("mean", "behaviour")]
    write(tmp_path, "ours", tables, task="rpe", data="rpe_refined")
    markdown, *_ = read(tmp_path)
    mean, behaviour = markdown.split("### ")[1:]
    assert mean.startswith("mean") and "*275.0*" in mean
    assert behaviour.startswith("behaviour") and "275" not in behaviour


def test_text_of_systems_is_never_mark_up(tmp_path):
    evil = "<script>alert(1)</script> | **x** [y](javascript:z) ``` `` & \n\n# head <img src=x onerror=y>"
    folder = write(
        tmp_path,
        evil,
        [scores(title=evil, facts={evil: evil}, counts={evil: 2})],
        command=f"chatpose {evil}",
        folder="evil",
    )
    write_drawn(folder, [DrawnAnswer("estimation/3dpw_test/B", "best", evil, "PA-MPJPE", 1.0, "mm", evil, evil, "")])
    write_not_run(tmp_path, [NotRun(evil, evil, evil, evil)])
    markdown, found, html = read(tmp_path)
    assert "script" not in found.tags and "img" not in found.tags and "<script" not in html
    assert sum(text.count("<script>alert(1)</script>") for text in found.words) >= 10
    outside = re.sub(r"(?<!\\)```` .* ````", "", markdown)
    assert outside.count("````") == 0 and markdown.count("````") == 4, "two commands"
    assert "<script" not in outside and "<img" not in outside and not re.search(r"(?<!\\)\]\(", outside)
    assert sum(line.startswith("# ") for line in markdown.splitlines()) == 1
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {4}


def test_markdown_is_read_by_another_program_as_it_is_meant(tmp_path):
    renderer = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    evil = "<script>x</script> | *a* _b_ [c](d) ~e~ `f` \\ & 1. g # h"
    folder = write(tmp_path, evil, [scores(title=evil, counts={evil: 1})], command=evil, folder="evil")
    write_drawn(
        folder,
        [DrawnAnswer("estimation/3dpw_test/B", "best", evil, "PA-MPJPE", 1.0, "mm", evil, evil, "gallery/a b.png")],
    )
    found = Page(renderer.render(read(tmp_path)[0]))
    assert found.tags.count("table") == 1 and not {"script", "em"} & {*found.tags[: found.tags.index("table")]}
    assert "script" not in found.tags and found.links == ["estimation/3dpw_test/evil/gallery/a%20b.png"]
    heads = found.tags.count("th")
    assert heads == 3 and found.tags.count("td") % heads == 0
    text = " ".join("".join(found.words).split())
    assert text.count(evil) >= 6


def test_drawn_answers_are_part_of_the_page_while_they_are_small(tmp_path, monkeypatch):
    folder = write(tmp_path, "ours", [scores()], folder="a b#c")
    (folder / "gallery").mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "gallery/x.png")
    shown = DrawnAnswer(
        "estimation/3dpw_test/B", "worst", "row 7", "PA-MPJPE", 123.456, "mm", "Where?", "Here.", "gallery/x.png"
    )
    write_drawn(folder, [shown])
    markdown, found, _html = read(tmp_path)
    relative = "estimation/3dpw_test/a%20b%23c/gallery/x.png"
    assert f"![worst, PA-MPJPE 123.5 mm, row 7]({relative})" in markdown
    assert [link for link in found.links if not link.startswith("#")] == [found.links[-1]]
    assert found.links[-1].startswith("data:image/png;base64,") and "Where?" in found.words
    monkeypatch.setattr(page, "INLINE", 10)
    assert read(tmp_path)[1].links[-1] == relative


def test_nothing_comes_from_the_web_and_links_lead_to_tables(tmp_path):
    write(tmp_path, "ours", [scores(), scores("estimation/3dpw_test/my own", title="other")])
    _, found, html = read(tmp_path)
    assert not re.search(r"https?://|@import|url\(", html) and "script" not in found.tags
    targets = [link[1:] for link in found.links]
    assert len(targets) == 2 and set(targets) <= set(found.ids)
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html


def test_what_was_not_run_is_listed_with_its_command(tmp_path):
    write_not_run(
        tmp_path, [NotRun("rpe", "rpe_refined", "its data is not prepared", "chatpose data prepare rpe_refined")]
    )
    markdown, found, _ = read(tmp_path)
    assert (
        "- **rpe, rpe\\_refined**: its data is not prepared To run it: `chatpose data prepare rpe_refined`" in markdown
    )
    assert "chatpose data prepare rpe_refined" in found.words


def test_equal_files_give_equal_bytes_anywhere(tmp_path):
    for name in ("one", "two/deeper"):
        for system in ("x", "y") if name == "one" else ("y", "x"):
            write(tmp_path / name, system, [scores()])
    first, second = ([path.read_bytes() for path in write_report(tmp_path / name)] for name in ("one", "two/deeper"))
    assert first == second and str(tmp_path).encode() not in b"".join(first)


def test_values_without_number_or_interval(tmp_path):
    nan = float("nan")
    write(tmp_path, "ours", [scores(MPJRE=Value(nan), FID=Value(0.49, digits=2), share=Value(1.0, better=""))])
    markdown, *_ = read(tmp_path)
    assert "| ours | 88.4 [86.4, 91.4] | 58.4 [57.4, 59.4] | – | 0.49 | 1.0 |" in markdown
    assert "| share |" in markdown


def test_damaged_or_missing_results_are_one_error(tmp_path):
    with pytest.raises(UserError, match="there are no results"):
        write_report(tmp_path)
    folder = write(tmp_path, "ours", [scores()])
    for text in ("{", "[]", '{"scores": [{}]}', '{"scores": 3}'):
        (folder / "scores.json").write_text(text)
        with pytest.raises(UserError, match=r"scores\.json"):
            write_report(tmp_path)
    shutil.rmtree(folder)
    for text in ('[{"x": 1}]', '[{"task": "poses", "data": "cmu", "why": 3}]'):
        (tmp_path / "not_run.json").write_text(text)
        with pytest.raises(UserError, match=r"not_run\.json"):
            write_report(tmp_path)


def test_results_of_strangers_hold_what_they_should(tmp_path):
    """Else a value is no number where it is printed, or the page holds a file of the reader's machine."""
    folder = write(tmp_path, "ours", [scores()])
    good = json.loads((folder / "scores.json").read_text())
    [table] = good["scores"]
    value = table["values"]["MPJPE"]
    for wrong in (
        {"facts": {"protocol": 3}},
        {"counts": {"no pose": "<b>"}},
        {"title": None},
        *(
            {"values": {"MPJPE": {**value, name: item}}}
            for name, item in (("value", "<b>"), ("digits", 99), ("better", "most"))
        ),
    ):
        (folder / "scores.json").write_text(json.dumps({**good, "scores": [{**table, **wrong}]}))
        with pytest.raises(UserError, match=r"scores\.json: expected what chatpose eval writes"):
            write_report(tmp_path)
    (folder / "scores.json").write_text(json.dumps(good))
    (tmp_path / "secret.png").write_bytes(b"secret")
    drawn = dataclasses.asdict(DrawnAnswer(table["table"], "best", "a", "MPJPE", 1.0, "mm", "", "", "gallery/a.png"))
    for wrong in ({"image": "../../../secret.png"}, {"image": str(tmp_path / "secret.png")}, {"value": "<b>"}):
        (folder / "gallery.json").write_text(json.dumps([{**drawn, **wrong}]))
        with pytest.raises(UserError, match=r"gallery\.json"):
            write_report(tmp_path)
    (folder / "gallery.json").write_text(json.dumps([drawn]))
    write_report(tmp_path)


def test_published_figures_are_those_of_the_paper():
    def row(task, system, data):
        found = [each for each in PUBLISHED if each.task == task and each.system == system and data in each.data]
        assert len(found) == 1
        return list(found[0].values.values())

    assert row("estimation", "ChatPose", "3dpw_test") == [163.6, 81.9, 10.4]
    assert row("estimation", "GPT4-P", "h36m_val_p2") == [354.1, 203.5]
    assert row("rpe", "LLaVA-S", "rpe") == [481.1, 203.7, 20.7]
    assert row("judge", "LLaVA-1.5-13B", "llava_bench") == [84.4, 81.0, 93.9, 86.5]
    spg = next(each for each in PUBLISHED if each.task == "spg" and each.system == "ChatPose")
    assert "R^P2T@5" not in spg.values and spg.values["R^P2T@20"] == 20.8
    sizes = {
        table: sum(table in each.source for each in PUBLISHED) for table in ("Table 1", "Table 2", "Table 3", "Table 4")
    }
    assert sizes == {"Table 1": 4, "Table 2": 5, "Table 3": 16, "Table 4": 3}


def test_conditions_are_compared_by_their_beginnings():
    row = next(each for each in PUBLISHED if each.system == "UniPose" and "3dpw" in each.data)
    betas = "0; predicted poses on the neutral SMPL"
    facts = {"protocol": "B: 14 of 44", "pelvis": "point 39", "betas": betas, "samples": "35,515"}
    assert differences(row, facts) == ["not stated: samples"]
    own = f"{betas}.5"
    assert differences(row, {**facts, "betas": own})[0] == f"betas: {betas}, here {own}"
    assert differences(row, {**facts, "pelvis": "point 3"})[0] == "pelvis: point 39, here point 3"
    del facts["protocol"]
    assert differences(row, facts)[0] == "protocol: B"


def test_subsets_of_a_test_split_are_of_its_data_and_other_splits_are_not():
    row = next(each for each in PUBLISHED if each.system == "UniPose" and "3dpw" in each.data)
    names = {
        "3dpw": True,
        "3dpw_test": True,
        "3dpw_test-200": True,
        "3dpw-ids": True,
        "3dpw-val": False,
        "3dpw-train-200": False,
        "3dpwx": False,
    }
    assert {name: is_of(row, name) for name in names} == names


def test_rows_for_comparison_stand_below_the_systems_and_are_never_the_best(tmp_path):
    real = {"MPJPE": Value(0.0, unit="mm"), "PA-MPJPE": Value(0.5, 0.4, 0.6, "mm")}
    for name, pa in (("ours", 58.44), ("theirs", 60.0)):
        write(tmp_path, name, [dataclasses.replace(scores(pa=pa), references={"the truth": real})])
    markdown, _, html = read(tmp_path)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].split()[0] for line in lines[2:5]] == ["ours", "theirs", "the"]
    assert "| 0.0 | 0.5 [0.4, 0.6] |" in lines[4]
    assert "**58.4**" in lines[2]
    assert "not a system: measured here for comparison" in markdown and "the truth" in html
