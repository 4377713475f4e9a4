"""Operators of augmentation: as many for a large batch as for a small one, with the result of each image by itself."""

import importlib
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference

from benchmarks.launches import count_operators, main
from cac_cps import crops as cac
from common.augment import Photometric, apply_geometry, apply_geometry_batch, apply_photometric_batch, draw_geometry
from common.augment.mixing import Box, box_mask
from common.augment.photometric import PhotometricRanges, adjust_hue, draw_photometric
from common.seeding import generators
from tests.conftest import SCRIPTS, method_flags, module_of
from unimatch import augment as unimatch

BOUND = 250
GRAY_LEVEL = 1 / 255
# Settings with everything that augmentation can do, from the first step on.
MOST = {"cac_cps": {"jitter": True, "cac.epoch_start_unsup": 0}, "memory_bank": {"unlabeled_batch_size": 8}}
OFTEN = PhotometricRanges(jitter_probability=0.8, gray_probability=0.3, blur_probability=0.6, blur_sigma=(0.1, 2.5))


def smooth(count, height=40, width=56):
    """Images with gray levels in [0, 1], uint8 / 255, that vary over a few pixels; some gray, black and white."""
    numbers = torch.Generator().manual_seed(0)
    image = torch.rand(count, 3, height // 4, width // 4, generator=numbers)
    image = torch.nn.functional.interpolate(image, (height, width), mode="bicubic")
    image[:, :, :4] = image[:, :1, :4]
    image[:, :, -3:, :5], image[:, :, -3:, 5:9] = 0, 1
    return (image.clamp(0, 1) * 255).round() / 255


def blurred(image, sigma):
    """Three extended boxes per direction, pixel by pixel of the box: its whole reach, and a fraction of the next."""
    variance = sigma**2 / 3
    whole = int(((12 * variance + 1) ** 0.5 - 1) / 2)
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = torch.tensor([edge, *[1.0] * (2 * whole + 1), edge]) / (2 * whole + 1 + 2 * edge)
    for _ in range(2):
        for _ in range(3):
            padded = torch.nn.functional.pad(image, (whole + 1, whole + 1), mode="replicate")
            image = (padded.unfold(-1, len(box), 1) * box).sum(-1)
        image = image.mT
    return image


def colored(image, photometric):
    """Color changes of one image by torchvision, without the blur."""
    for name, amount in photometric.jitter:
        image = getattr(reference, f"adjust_{name}")(image, amount)
    return reference.rgb_to_grayscale(image, 3) if photometric.gray else image


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_operators_of_augmentation_are_few_at_any_batch_size(script, size, small_run, tmp_path):
    paper = script.split("/")[0]
    more = method_flags(MOST.get(paper, {})) + (["--method.mix_mode", "classmix"] if paper in ("css", "prcl") else [])
    arguments = small_run(script, tmp_path / "run", "--optim.batch_size", str(size), "--data.scale_range", "[0.5,1.5]")
    counts = count_operators(importlib.import_module(module_of(script)).main, [*arguments, *more], steps=2)
    assert len(counts) == 2 and 0 < max(counts) <= BOUND


def test_table(small_run, tmp_path, monkeypatch, capsys):
    arguments = small_run("supervised/train.py", tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["launches.py", "--scripts", "supervised/train.py", "--steps", "1", *arguments])
    main()
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    counts = [int(cell) for cell in rows[0][2:4]]
    assert counts and all(0 < count <= BOUND for count in counts)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_color_changes_of_a_batch_are_those_of_each_image(count):
    image = smooth(count)
    choices = [draw_photometric(np.random.default_rng(seed), OFTEN) for seed in range(count)]
    ours = apply_photometric_batch(image, [Photometric(one.jitter, None, one.gray) for one in choices])
    assert (ours - torch.stack([*map(colored, image, choices)])).abs().max() <= 0.01 * GRAY_LEVEL


def test_blurs_of_a_batch_are_those_of_each_image():
    image, sigma = smooth(16), np.linspace(0.1, 2.5, 16).tolist()
    ours = apply_photometric_batch(image, [Photometric((), one) for one in sigma])
    assert (ours - torch.stack([*map(blurred, image, sigma)])).abs().max() <= 0.01 * GRAY_LEVEL


@pytest.mark.parametrize("size", [(40, 56), (3, 5), (1, 13)])
def test_a_blur_of_narrow_images_repeats_the_edges(size):
    image = smooth(1)[..., 8 : 8 + size[0], : size[1]]
    ours = apply_photometric_batch(image, [Photometric((), 2.0)])[0]
    assert (ours - blurred(image[0], 2.0)).abs().max() <= 0.01 * GRAY_LEVEL


def test_crops_of_a_batch_are_those_of_each_image():
    image, label = smooth(16), (torch.rand(16, 2, 40, 56) * 9).long()
    confidence, crop = torch.rand(16, 40, 56), (36, 44)
    drawn = [draw_geometry(np.random.default_rng(seed), (40, 56), crop, (0.2, 1.7)) for seed in range(16)]
    ours = apply_geometry_batch(image, label, confidence, drawn, crop)
    each = [apply_geometry(*one, geometry, crop) for *one, geometry in zip(image, label, confidence, drawn)]
    expected = [torch.stack(maps) for maps in zip(*each)]
    assert (ours[0] - expected[0]).abs().max() <= 0.01 * GRAY_LEVEL
    assert ours[1].equal(expected[1]) and ours[2].equal(expected[2])


def test_hues_of_a_batch_are_those_of_each_image():
    image, turns = smooth(9), torch.linspace(-0.5, 0.5, 9)
    expected = torch.stack([reference.adjust_hue(one, turn) for one, turn in zip(image, turns.tolist())])
    assert (adjust_hue(image, turns.view(-1, 1, 1, 1)) - expected).abs().max() <= 0.01 * GRAY_LEVEL


def test_views_of_cac_are_those_of_each_image():
    views = (smooth(16).unflatten(0, (8, 2)) * 255).round().to(torch.uint8)
    ours = cac.augment_views(views, range(20, 28), seed=3)
    blur = partial(reference.gaussian_blur, kernel_size=[5, 5], sigma=[1.1, 1.1])
    for number in (1, 2):
        for i, rng in enumerate(generators(3, f"view {number}, on the device", range(20, 28))):
            is_blurred, colors = cac.draw_changes(rng)
            image = views[i, number - 1] / 255
            expected = colored(blur(image) if is_blurred else image, colors)
            assert (ours[i, number - 1] - cac.normalize(expected)).abs().max() <= 0.05 * GRAY_LEVEL


def test_strong_views_of_unimatch_are_those_of_each_image():
    weak = smooth(8, 48, 48)
    views = unimatch.strong_views(weak, range(40, 48), seed=3, count=2)
    for i, rng in enumerate(generators(3, "strong views, on the device", range(40, 48))):
        for image, mask in views:
            colors, box = draw_photometric(rng, unimatch.STRONG), unimatch.draw_cutmix_box(rng, 48, 48)
            expected = colored(weak[i], colors)
            expected = expected if colors.blur_sigma is None else blurred(expected, colors.blur_sigma)
            assert (image[i] - expected).abs().max() <= 0.01 * GRAY_LEVEL
            assert mask[i].equal(box_mask([box], 48, 48, weak.device)[0])


def test_boxes_of_a_batch():
    boxes = [Box(0, 0, 0, 0), Box(0, 3, 7, 9), Box(2, 0, 5, 4)]
    expected = torch.ones(3, 7, 9, dtype=torch.bool)
    expected[1, 0:7, 3:9], expected[2, 2:5, 0:4] = False, False
    assert box_mask(boxes, 7, 9, torch.device("cpu")).equal(expected)


def test_an_image_changes_in_the_same_way_in_any_batch():
    image = smooth(8, 32, 32)
    choices = [draw_photometric(np.random.default_rng(seed), OFTEN) for seed in range(8)]
    drawn = [draw_geometry(np.random.default_rng(seed), (32, 32), (32, 32), (0.5, 1.5)) for seed in range(8)]

    def views(part: slice) -> torch.Tensor:
        cropped = apply_geometry_batch(image[part], None, None, drawn[part], (32, 32))[0]
        return apply_photometric_batch(cropped, choices[part])

    parts = torch.cat([views(slice(0, 1)), views(slice(1, 4)), views(slice(4, 8))])
    assert (views(slice(0, 8)) - parts).abs().max() <= 0.001 * GRAY_LEVEL
