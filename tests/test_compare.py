"""Comparison of runs: the tables that are printed, and one page that needs nothing but itself."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from common.compare import main as compare
from common.evaluation.cli import main_eval
from common.evaluation.line_chart import ticks
from common.metrics import ConfusionMatrix
from supervised.train import Config
from supervised.train import main as train


class Page(HTMLParser):
    """Texts, addresses of resources and open tags of a page."""

    EMPTY = ("meta", "img", "line", "path", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.resources, self.open, self.headings, self.images = text, [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.resources += [values[key] for key in ("src", "href", "srcset", "xlink:href", "data") if key in values]
        self.images += [values["alt"]] if tag == "img" else []
        self.open += [tag] if tag not in self.EMPTY else []

    def handle_startendtag(self, tag, attributes):
        if tag not in self.EMPTY:
            raise AssertionError(tag)
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.headings += [data] if self.open and self.open[-1] == "h2" else []


@pytest.fixture(scope="module")
def runs(small_run, tmp_path_factory) -> Path:
    """Run folders: a, evaluated with pictures; b, of another rate and without them; c, whose name must be escaped."""
    folder = tmp_path_factory.mktemp("compare")
    rates = {"a": "0.01", "b": "0.02", "c<i>&": "0.02"}
    for name, rate in rates.items():
        train(small_run("supervised/train.py", folder / name, "--optim.lr", rate))
        AcceleratorState._reset_state(reset_partial_state=True)
    evaluate(folder / "a", "-s")
    evaluate(folder / "b")
    return folder


def evaluate(run: Path, *more: str) -> None:
    main_eval("supervised", Config, [str(run), "-e", "last", "-d", "cpu", *more])
    AcceleratorState._reset_state(reset_partial_state=True)


def shown(runs: Path, capsys, *arguments: str) -> tuple[str, Page]:
    given = [str(runs / name) if (runs / name).is_dir() else name for name in arguments]
    compare([*given, "--out", str(runs / "page.html")])
    return capsys.readouterr().out, Page((runs / "page.html").read_text())


def table_rows(text: str) -> dict[str, list[str]]:
    """Cells of each row of an HTML page, by the text of its first cell."""
    rows = {}
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", text):
        first, *cells = (re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row))
        rows.setdefault(first, cells)
    return rows


def test_the_page_needs_nothing_but_itself(runs, capsys):
    _, page = shown(runs, capsys, "a", "b")
    assert page.open == []  # every tag is closed, in its order
    assert page.resources and all(source.startswith("data:image/jpeg;base64,") for source in page.resources)
    assert not re.search(r"url\(|@import|<script|https?:", page.text)
    headings = ["Scores", "Settings that differ", "Curves", "IoU per class (%)", "Worst validation images"]
    assert page.headings == headings


def test_settings_and_scores_are_those_of_the_runs(runs, capsys):
    printed, page = shown(runs, capsys, "a", "b")
    rows = table_rows(page.text)
    assert rows["optim.lr"] == ["0.01", "0.02"] and "optim.momentum" not in page.text and "run.dir" not in page.text
    assert re.search(r"optim\.lr\W+0\.01\W+0\.02", printed)
    scores = [json.loads((runs / name / "eval" / "last.json").read_text()) for name in "ab"]
    for name in scores[0]["per_class_iou"]:
        values = [score["per_class_iou"][name] for score in scores]
        texts = ["-" if value is None else f"{100 * value:.2f}" for value in values]
        assert rows[name] == texts
        assert re.search(rf"{name}\W+{re.escape(texts[0])}\W+{re.escape(texts[1])}", printed)
    for name, score in zip("ab", scores):
        steps = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        best = max(line["valid/miou"] for line in steps if "valid/miou" in line)
        evaluation, miou, accuracy, training, _ = rows[str(runs / name)]
        assert evaluation == "last, step 6" and miou == f"{100 * score['miou']:.2f}"
        assert accuracy == f"{100 * score['pixel_accuracy']:.2f}" and training.startswith(f"{100 * best:.2f} at step")


def test_curves_run_through_the_points_of_the_log(runs, capsys):
    _, page = shown(runs, capsys, "a", "b")
    scores, losses = (ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page.text, re.DOTALL)[-2:])
    for chart, count in ((scores, 2), (losses, 6)):
        assert len(chart.findall("polyline")) == 2  # a line per run
        assert len(chart.findall("circle")) == 2 * count
    lines = [json.loads(line) for line in (runs / "a" / "metrics.jsonl").read_text().splitlines()]
    points = [(line["step"], 100 * line["valid/miou"]) for line in lines if "valid/miou" in line]
    titles = [circle.find("title").text for circle in scores.findall("circle")]
    assert titles[: len(points)] == [f"{runs / 'a'}: {miou:.4g} at {step}" for step, miou in points]
    # Higher scores are higher on the page, and later steps further to the right.
    places = [(float(circle.get("cx")), float(circle.get("cy"))) for circle in scores.findall("circle")[:2]]
    assert places[0][0] < places[1][0] and (places[0][1] > places[1][1]) == (points[0][1] < points[1][1])


def test_the_worst_images_are_shown_with_their_scores(runs, capsys):
    printed, page = shown(runs, capsys, "a", "b")
    pictures = runs / "a" / "eval" / "pictures" / "last"
    scores = json.loads((pictures / "scores.json").read_text())
    names = sorted(scores, key=scores.get)
    assert page.images == names[:4] and len(scores) == 7
    assert f"{names[0]}: mIoU {100 * scores[names[0]]:.2f}" in page.text
    # The score is that of the picture: recomputed from the files of ids and of the label.
    config = json.loads((runs / "a" / "config.json").read_text())
    confusion = ConfusionMatrix(config["model"]["num_classes"])
    label = Path(config["data"]["root"]) / "SegmentationClassAug" / f"{names[0]}.png"
    pair = [torch.from_numpy(np.array(Image.open(path))) for path in (pictures / "ids" / f"{names[0]}.png", label)]
    confusion.update(*pair)
    assert scores[names[0]] == pytest.approx(confusion.scores().miou)
    how = f"{runs / 'b'} has no pictures of its images: python supervised/eval.py {runs / 'b'} -e last -s"
    assert how in page.text and how in printed


def test_runs_without_an_evaluation_and_with_odd_names(runs, capsys):
    printed, page = shown(runs, capsys, "a", "c<i>&")
    name = runs / "c<i>&"
    assert f"{name} has no scores per class: python supervised/eval.py {name} -s" in printed
    assert "c&lt;i&gt;&amp;" in page.text and "<i>" not in page.text
    assert table_rows(page.text)[str(name).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")][0] == (
        "not evaluated"
    )
    evaluate(runs / "b", "--flip")
    printed, page = shown(runs, capsys, "a", "b", "-e", "last_flip")
    assert "a has no scores per class" in printed and "flip" in page.text
    printed, _ = shown(runs, capsys, "b", "a")  # both have `last`, though b's newest is another
    assert "scores were measured differently" not in printed


def test_different_protocols_are_noted(runs, capsys, tmp_path):
    for name, protocol in (("d", "whole image"), ("e", "sliding window")):
        (tmp_path / name / "eval").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        scores = {"per_class_iou": {"sky": 0.5}, "miou": 0.5, "protocol": {"text": protocol}, "step": 1}
        (tmp_path / name / "eval" / "best.json").write_text(json.dumps(scores))
    compare([str(tmp_path / "d"), str(tmp_path / "e"), "--out", str(tmp_path / "page.html")])
    assert "scores were measured differently" in capsys.readouterr().out.replace("\n", " ")
    assert "No run has a line in metrics.jsonl yet" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{runs}/a"], "give two or more different run folders"),
        (["{runs}/a", "{runs}/./a"], "give two or more different run folders"),
        (["{runs}/a", "{runs}"], "is not a run folder"),
        (["{runs}/a", "{runs}/b", "--out", "{runs}/a/config.json/page.html"], "cannot be written"),
    ],
)
def test_mistakes_are_errors_of_one_line(runs, capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        compare([text.format(runs=runs) for text in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (31.2, 58.9, [30, 40, 50, 60]), (0.5, 0.5, [0.5, 0.6]), (0, 0, [0, 0.2])],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert ticks(low, high)[: len(expected)] == expected
    assert ticks(low, high)[0] <= low and ticks(low, high)[-1] >= high
