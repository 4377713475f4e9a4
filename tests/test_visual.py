"""Pictures: colors, panels with blank tiles, curves."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.visual import DARK, LIGHT, Sample, colorize, compare, curve, panel, save_label, side_by_side

PALETTE = np.random.default_rng(0).integers(0, 200, (256, 3)).astype(np.uint8)
CLASSES = ("background", "disc", "ring")


def sample(name: str = "a", height: int = 20, width: int = 30, **changes) -> Sample:
    label = torch.zeros(height, width, dtype=torch.uint8)
    label[:4], label[4:8] = 255, 1
    given = {
        "image": torch.full((3, height, width), 128, dtype=torch.uint8),
        "prediction": torch.full((height, width), 2),
        "label": label,
    }
    return Sample(name, **(given | changes))


def test_colors_are_the_palette_and_ignore_is_white():
    colors = colorize(torch.tensor([[0, 2], [255, 1]]), PALETTE)
    assert colors.dtype == np.uint8
    assert colors[1, 0].tolist() == [255, 255, 255]
    assert np.array_equal(colors[0, 1], PALETTE[2])


def test_saved_label_holds_ids_and_shows_colors(tmp_path):
    label = torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8)
    save_label(label, PALETTE, tmp_path / "label.png")
    picture = Image.open(tmp_path / "label.png")
    assert np.array_equal(np.asarray(picture), label.numpy())
    assert np.array_equal(np.asarray(picture.convert("RGB")), colorize(label, PALETTE))


def test_side_by_side_puts_black_between():
    white = np.full((4, 5, 3), 255, np.uint8)
    row = np.asarray(side_by_side([white, white, white], gap=2))
    assert row.shape == (4, 19, 3)
    assert row[:, 5:7].max() == 0 and row[:, 12:14].max() == 0 and row[:, 17:].min() == 255


def test_compare_hides_predictions_on_ignored_pixels():
    picture = np.asarray(compare(sample(), PALETTE))
    prediction = picture[:, 45:75]
    assert picture.shape == (20, 120, 3)
    assert (prediction[:4] == 255).all() and np.array_equal(prediction[10, 10], PALETTE[2])
    assert np.asarray(compare(sample(label=None), PALETTE)).shape == (20, 75, 3)


def test_panel_shows_bool_maps_light_and_dark_without_a_legend_entry():
    agreed = torch.zeros(20, 30, dtype=torch.bool)
    agreed[:, :15] = True
    with_map, without = (panel([sample(maps=maps)], PALETTE, CLASSES, "t") for maps in ({"agreement": agreed}, {}))
    tile = np.asarray(with_map)[:, -20 - 256 : -20]
    height = round(256 * 20 / 30)
    rows = tile[:, [10, 245]][len(tile) - without.height :]
    assert (rows == LIGHT).all(2)[:, 0].sum() >= height - 1 and (rows == DARK).all(2)[:, 1].sum() >= height - 1
    assert with_map.height == without.height


def test_panel_shows_the_maps_of_a_paper_where_a_sample_has_them():
    near = torch.zeros(20, 30, dtype=torch.int64)
    plain, more = (panel([sample(maps=maps), sample()], PALETTE, CLASSES, "step 1") for maps in ({}, {"near": near}))
    assert more.width > plain.width
    last = np.asarray(more)[:, plain.width :]
    assert (last == PALETTE[0]).all(2).sum() > 100 * 100


def test_panel_shows_maps_legend_and_blanks():
    confidence = torch.linspace(0, 1, 600).view(20, 30)
    page = np.asarray(panel([sample("a", confidence=confidence), sample("b", label=None)], PALETTE, CLASSES, "step 5"))
    narrow = np.asarray(panel([sample("a")], PALETTE, CLASSES, "step 5"))
    assert page.shape[1] > narrow.shape[1] and page.shape[0] > narrow.shape[0]
    for class_id in (0, 1, 2):
        assert (page == PALETTE[class_id]).all(-1).any()
    first = (narrow == PALETTE[2]).all(-1).sum()
    without = (np.asarray(panel([sample("a", prediction=sample().label)], PALETTE, CLASSES, "")) == PALETTE[2]).all(-1)
    assert first > 256 * 100 and without.sum() == 0


def test_panel_of_pictures_of_different_sizes_and_many_classes():
    names = tuple(f"class number {index}" for index in range(60))
    ids = torch.arange(60).repeat_interleave(10).view(20, 30)
    page = panel([sample("a", prediction=ids), sample("b", 64, 16)], PALETTE, names, "a long title " * 20)
    assert page.width == panel([sample("a")], PALETTE, names, "").width
    assert page.height > 256 * 4


def write_log(path):
    lines = [{"step": 10, "loss": 2.0, "loss_u": 1.0}, {"step": 10, "valid/miou": 0.25}, {"step": 20, "loss": 1.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "lo')


def test_curve_is_drawn_from_a_log_that_is_being_written(curves, tmp_path):
    write_log(tmp_path / "metrics.jsonl")
    curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").width > 500


def test_curve_without_matplotlib_prints_the_package_and_continues(tmp_path, monkeypatch, capsys):
    write_log(tmp_path / "metrics.jsonl")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert "pip install matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "curve.png").exists()


def test_curve_of_a_missing_log_is_a_user_error(curves, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        curve(tmp_path / "none.jsonl", tmp_path / "curve.png")
