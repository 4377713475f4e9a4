"""The page of results: tables and pictures from stored results, and text that stays."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import results
from common.errors import UserError

ROWS = ["Method A", "Method A, labels only", "Method B", "Method B, labels only"]


@pytest.fixture
def measured(curves, tmp_path, monkeypatch) -> Path:
    """A page with a planted table of two methods and two seeds: A gains 10 and 12 points, B loses 1 and gains 1."""
    table = {"seeds": [0, 1, 2], "rows": {row: {"script": "a", "config": "b"} for row in ROWS if "only" not in row}}
    scores = {ROWS[0]: (60, 66), ROWS[1]: (50, 54), ROWS[2]: (49, 55), ROWS[3]: (50, 54)}
    lines = []
    for row, by_seed in scores.items():
        for seed, miou in enumerate(by_seed):
            found = {"miou": miou, "pixel_accuracy": 90, "per_class_iou": {"road": miou + 1, "sky": None}}
            costs = {"seconds": 100 if "only" in row else 250, "peak_memory_mb": 900}
            curve = {"miou_last": miou, "miou_best": miou, "curve": [[10, miou / 2], [20, miou]]}
            lines.append({"row": row, "seed": seed, "protocol": "whole image", "scores": found} | costs | curve)
    (tmp_path / "planted.json").write_text(json.dumps(table))
    (tmp_path / "planted.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = tmp_path / "results.md"
    page.write_text("before\n<!-- table: planted -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(results, "TABLES", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "PAGE", page)
    return page


def test_blocks_are_replaced_by_tables_and_pictures(measured, tmp_path):
    out = tmp_path / "out"
    results.main(["--out", str(out)])
    text = (out / "results.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| Method A | 2 | 63.0 ± 4.2 | +11.0 ± 1.0 |" in text
    assert "| Method B | 2 | 52.0 ± 4.2 | +0.0 ± 1.0 |" in text
    assert "Seeds are missing of: Method A; Method A, labels only;" in text
    for kind in results.PICTURES:
        assert f"(pictures/results_planted_{kind}.png)" in text
        assert Image.open(out / "pictures" / f"results_planted_{kind}.png").width > 300


def test_a_written_page_is_the_same_when_written_again(measured, tmp_path):
    results.main(["--out", str(tmp_path)])
    first = measured.read_text(), (tmp_path / "pictures" / "results_planted_gain.png").read_bytes()
    results.main(["--out", str(tmp_path)])
    assert first == (measured.read_text(), (tmp_path / "pictures" / "results_planted_gain.png").read_bytes())


def test_gains_within_two_standard_errors_are_gray(measured, tmp_path):
    table, stored = results.read_table(tmp_path / "planted.json"), results.read_results(tmp_path / "planted.jsonl")
    bars = results.draw_gains(table, stored).axes[0].patches
    assert [round(bar.get_width()) for bar in bars] == [0, 11]
    from matplotlib.colors import same_color

    assert same_color(bars[0].get_facecolor(), results.UNCLEAR)
    assert same_color(bars[1].get_facecolor(), results.GAIN)


def test_an_unknown_table_is_an_error(measured):
    measured.write_text("<!-- table: absent -->\n<!-- end -->\n")
    with pytest.raises(UserError, match=r"absent\.json cannot be read"):
        results.write_page(measured, measured.parent)
