"""Reports of studies whose truth is known: the figures, the files, the page in a browser."""

import csv
import json
import re
import statistics

import browser
import pytest
import study_folders
import vl_convert
from PIL import Image

from maskdiff.errors import UserError
from maskdiff.study import charts, drawing, page, report, results

NEEDS_BROWSER = pytest.mark.skipif(browser.found() is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """A sweep of all that there is, with names that a page must not take for its own; and its report."""
    folder = study_folders.rich(tmp_path_factory.mktemp("rich") / "study")
    hostile = '</script><script class="planted">document.title="taken"</script><b class="planted">'
    for place in (folder / "study.json", *(folder / "cells").glob("*.json")):
        text = place.read_text().replace('"patch 50%"', json.dumps(f"patch 50%{hostile}"))
        place.write_text(text.replace('"emoji.zip"', json.dumps(f"emoji & {hostile}")))
    return folder, report.write(folder)


@pytest.fixture(scope="module")
def transfer(tmp_path_factory):
    folder = study_folders.transfer(tmp_path_factory.mktemp("transfer") / "study")
    return folder, report.write(folder)


def test_files_of_a_sweep(rich):
    folder, paths = rich
    assert [path.name for path in paths] == ["report.html", "report.png", "report.csv", "report.json"]
    assert paths[0].stat().st_size < 1.5e6 and Image.open(paths[1]).width > 1200
    found = json.loads(paths[3].read_text())
    study = results.read(folder)
    assert found["verdicts"]["frechet"]["outcome"] == "better" and found["verdicts"]["frechet"]["best"] == "patch 70%"
    assert found["missing"] == ["patch-70---4x-as-long.seed0"] and "43 of 44 cells" in found["sentences"][1]
    lines = list(csv.DictReader(paths[2].open()))
    assert len(lines) == sum(len(group.points()) for group in study.groups)
    last = [line for line in lines if line["group"] == "patch 70%"][-1]
    (group,) = (group for group in study.groups if group.name == "patch 70%")
    values = group.final("frechet")
    assert float(last["frechet"]) == pytest.approx(sum(values) / 3) and last["seeds"] == "3"
    assert float(last["frechet_low"]) < min(values) and last["stage"] == "1"
    names = {group["name"] for group in found["groups"]}
    assert {"patch 70%, masked only", "patch 70%, position none", "dense, 4x as long"} <= names
    assert found["differences"]["patch 70%, position none"]["low"] > 0


def test_no_distance_is_called_fid_unless_it_is(rich):
    page = rich[1][0].read_text()
    assert "FID" not in page.split('<script type="application/json"')[0] and "Frechet distance (builtin)" in page


def test_figures_of_a_sweep(tmp_path):
    """The arithmetic: speed-ups, the front, the time to the dense run's quality."""
    truth = {0.0: 200.0, 0.5: 150.0, 0.9: 210.0}
    study = results.read(study_folders.sweep(tmp_path / "study", truth=truth, spread=0.0))
    dense, half, most = (study_folders.stage("", rate, 9.0) for rate in (0.0, 0.5, 0.9))
    found = {one["mask"]: one for one in results.speed_ups(study)}
    rate = dense["step_ms"] / dense["batch"]  # of an image
    assert found["patch:0.5"]["speed_up"] == pytest.approx(rate / (half["step_ms"] / half["batch"]))
    work = dense["flops"] / dense["batch"]
    assert found["patch:0.9"]["ideal"] == pytest.approx(work / (most["flops"] / most["batch"]))
    assert {one["group"]: one["best"] for one in results.front(study)} == {
        "dense": False,
        "patch 50%": True,
        "patch 90%": True,
    }
    by_name = {group.name: group for group in study.groups}
    # the distance falls linearly between the judgements at 9 and 12 twelfths
    rows = by_name["patch 50%"].rows[0]
    ends = [(row["seconds"], row["scores"]["frechet"]) for row in rows if row["scores"]][1:]
    middle = (ends[0][1] + ends[1][1]) / 2
    reached = results.time_to(by_name["patch 50%"], "frechet", dict.fromkeys(range(3), middle))
    assert reached.seconds == pytest.approx((ends[0][0] + ends[1][0]) / 2) and reached.reached == reached.seeds == 3
    assert results.time_to(by_name["patch 90%"], "frechet", dict.fromkeys(range(3), 200.0)).reached == 0
    first = results.time_to(by_name["patch 50%"], "frechet", dict.fromkeys(range(3), 1e3))
    assert first.bound and first.seconds == pytest.approx(rows[5]["seconds"])


def test_no_rate_is_recommended_where_all_are_alike(tmp_path):
    folder = study_folders.sweep(tmp_path / "study", truth=dict.fromkeys(study_folders.TRUTH, 200.0), spread=2.0)
    said = report.said(results.read(folder))
    assert said.verdicts["frechet"].outcome == "none"
    assert said.sentences[0].startswith("No rate can be told apart from dense training")


@pytest.mark.parametrize("left", [0, 2])
def test_a_study_that_has_hardly_begun(tmp_path, left):
    folder = study_folders.sweep(tmp_path / "study", seeds=1)
    for place in sorted((folder / "cells").glob("*.json"))[left:]:
        place.unlink()
    (folder / "times.json").unlink()
    paths = report.write(folder)
    assert f"{left} of 6 cells" in paths[0].read_text() and "No verdict" in paths[0].read_text()
    assert Image.open(paths[1]).width > 300


def test_transfer_says_where_it_pays(transfer):
    found = json.loads(transfer[1][3].read_text())
    verdicts = {key: one for key, one in found["verdicts"].items() if "loss" not in key}
    assert {key: one["outcome"] for key, one in verdicts.items()} == {
        f"{target}, {share}% of the images": "none" if share == "100" else "better"
        for target in ("noto", "twemoji")
        for share in ("100", "10", "1")
    }
    assert all("12 degrees of freedom" in one["method"] for one in found["verdicts"].values())  # 2 of each of 6 cases
    ends = {one["name"]: one["final"]["heldout_loss"] for one in found["groups"]}
    for case in verdicts:
        target, share = case.split(", ")
        (gap,) = found["verdicts"][f"{case}: held-out loss on whole images"]["differences"].values()
        of = f"{share.split()[0]} of {target}"
        (source,) = {"noto", "twemoji"} - {target}
        known = statistics.fmean(ends[f"pre-trained on {source}, {of}"]) - statistics.fmean(ends[f"from scratch, {of}"])
        assert gap["mean"] == pytest.approx(known)
    assert "in 4 of 6 cases" in found["sentences"][0] and len(found["sentences"]) == 8
    assert all("The held-out loss" in sentence for sentence in found["sentences"][1:7])
    assert all("the fine-tuning's time alone" in sentence for sentence in found["sentences"][1:7])
    lines = list(csv.DictReader(transfer[1][2].open()))
    assert {(line["source"], line["target"], line["share"]) for line in lines} >= {("noto", "twemoji", "0.01")}
    (tuned,) = (one for one in found["groups"] if one["name"] == "pre-trained on noto, 1% of twemoji")
    assert tuned["points"][0]["seconds"] > study_folders.SECONDS / 2 and tuned["time"][0]["mask"] == "pre-training"


@NEEDS_BROWSER
def test_in_a_browser(rich, transfer):
    """At the width of a desk and of a phone: all drawn, nothing cut off, nothing said on the console."""
    pages = [(paths[0], width) for _, paths in (rich, transfer) for width in (1280, 390)]
    found, console = browser.look(pages)
    assert console == []
    for said in found:
        assert said["drawn"] == said["charts"] >= 14 and said["empty"] == []
        assert said["overflow"] == 0 and said["wide"] == [] and said["cut"] == []
        assert said["broken"] == 0 and said["smallest"] >= 11 and said["planted"] == 0


def test_the_page_fetches_nothing(rich):
    page = rich[1][0].read_text()
    own = page.replace(drawing.javascript(), "")
    for inside in ('src="data:image/webp', '<link rel="icon" href="data:'):
        own = own.replace(inside, "")
    assert "src=" not in own and "<link" not in own and "url(" not in own


def test_names_do_not_end_the_script_that_holds_them(rich):
    """Where no browser is, too: the page has its own three alone."""
    page = rich[1][0].read_text().replace(drawing.javascript(), "")
    assert '<script class="planted">' not in page and "\\u003cscript class=" in page
    assert page.count("</script>") == page.count("<script") == 3


def test_what_is_no_study(tmp_path):
    with pytest.raises(UserError, match="is no study: it has no study.json"):
        report.write(tmp_path)
    folder = study_folders.sweep(tmp_path / "study", seeds=1)
    (folder / "cells" / "dense.seed0.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        report.write(folder)


def test_a_value_measured_once_has_no_curve(transfer, monkeypatch):
    groups = results.read(transfer[0]).groups
    monkeypatch.setattr(charts, "unit_of", lambda _: ("s", 1.0))
    curve = charts.curves("loss", "title", groups, "heldout_loss", "held-out loss")
    assert curve is not None
    times = re.findall(">([^<>]+)</text>", vl_convert.vegalite_to_svg(curve.spec()))
    assert "training time, s" in " ".join(times) and not any("e+" in text for text in times)
    points = results.Group.points
    monkeypatch.setattr(results.Group, "points", lambda group: points(group)[-1:])
    assert charts.curves("loss", "title", groups, "heldout_loss", "held-out loss") is None


def test_means_with_their_intervals_are_short():
    """Student's t of two values, one degree of freedom: 12.71 times half of their distance."""
    assert page.with_ends([170.0, 172.0]) == "171 ± 13"
    assert page.with_ends([1.0e10, 1.2e10]) == "1.1e+10 ± 1.27e+10"
    assert page.with_ends([0.25]) == "0.250" and page.with_ends([]) == "–"
