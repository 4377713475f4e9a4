"""Sliding windows, scales and flips against straightforward loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from common.evaluation.inference import Protocol, evaluation_mode, predict, sum_logits
from common.images import normalize


class Toy(nn.Module):
    """A convolution and a batch norm, whose mode changes the output."""

    align_corners = True

    def __init__(self, stride: int = 1, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3, stride, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.sizes = []

    def forward(self, image):
        self.sizes.append(tuple(image.shape))
        return self.norm(self.conv(image))


def image_of(height: int, width: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def test_whole_image_is_upsampled_to_the_label():
    network, image = Toy(stride=2), image_of(20, 31)
    probability = predict(network, image, (40, 62))
    network.eval()
    with torch.no_grad():
        logits = F.interpolate(network(normalize(image)), (40, 62), mode="bilinear", align_corners=True)
    torch.testing.assert_close(probability, logits.softmax(1))
    torch.testing.assert_close(probability.sum(1), torch.ones(1, 40, 62))


def naive_slide(network: nn.Module, image: torch.Tensor, crop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Window by window, as the released evaluations write it."""
    height, width = image.shape[-2:]
    down, right = max(0, crop - height), max(0, crop - width)
    margins = (right // 2, right - right // 2, down // 2, down - down // 2)
    if max(height, width) <= crop:
        padded = F.pad(normalize(image), margins)
    else:
        padded = normalize(F.pad(image, margins))
    rows, columns = padded.shape[-2:]
    stride = math.ceil(crop * 2 / 3)
    total, count = torch.zeros(1, 4, rows, columns), torch.zeros(rows, columns)
    for i in range(math.ceil((rows - crop) / stride) + 1):
        for j in range(math.ceil((columns - crop) / stride) + 1):
            bottom, end = min(i * stride + crop, rows), min(j * stride + crop, columns)
            area = (slice(bottom - crop, bottom), slice(end - crop, end))
            total[0, :, *area] += network(padded[..., *area])[0]
            count[area] += 1
    inside = (..., slice(margins[2], margins[2] + height), slice(margins[0], margins[0] + width))
    return total[inside], count[inside]


@pytest.mark.parametrize("size", [(40, 50), (18, 41), (20, 23), (24, 24), (25, 24)])
def test_sliding_window_matches_a_loop(size):
    network, image = Toy().eval(), image_of(*size)
    total, passes = sum_logits(network, image, size, Protocol(crop=(24, 24)))
    with torch.no_grad():
        expected, count = naive_slide(network, image, 24)
    torch.testing.assert_close(total, expected)
    assert torch.equal(passes, count)
    assert passes.min() >= 1


def test_windows_of_a_batch_do_not_mix():
    network, images = Toy(), image_of(30, 44, batch=3)
    protocol = Protocol(crop=(16, 20), scales=(1.0, 1.5), flip=True)
    together = predict(network, images, (30, 44), protocol)
    apart = torch.cat([predict(network, image[None], (30, 44), protocol) for image in images])
    torch.testing.assert_close(together, apart)


def test_flip_adds_the_mirrored_prediction():
    network, image = Toy().eval(), image_of(12, 17)
    total, passes = sum_logits(network, image, (12, 17), Protocol(flip=True))
    with torch.no_grad():
        x = normalize(image)
        expected = network(x) + network(x.flip(-1)).flip(-1)
    torch.testing.assert_close(total, expected)
    assert passes.unique().tolist() == [2]


def test_scales_are_summed_at_the_size_of_the_label():
    network, image = Toy(), image_of(30, 37)
    total, _ = sum_logits(network, image, (30, 37), Protocol(scales=(0.5, 1.0, 1.5)))
    assert [size[-2:] for size in network.sizes] == [(15, 18), (30, 37), (45, 56)]
    single = [sum_logits(network, image, (30, 37), Protocol(scales=(scale,)))[0] for scale in (0.5, 1.0, 1.5)]
    torch.testing.assert_close(total, sum(single))


def test_half_scale_averages_pixels_and_keeps_the_last_odd_column():
    class Identity(nn.Module):
        align_corners = False

        def forward(self, image):
            return image

    image = torch.zeros(1, 3, 4, 6, dtype=torch.uint8)
    image[..., 0, 0] = 101
    total, _ = sum_logits(Identity(), image, (2, 3), Protocol(scales=(0.5,)))
    expected = torch.zeros(1, 3, 2, 3, dtype=torch.uint8)
    expected[..., 0, 0] = 25
    torch.testing.assert_close(total, normalize(expected))
    odd = torch.full((1, 3, 3, 3), 7, dtype=torch.uint8)
    torch.testing.assert_close(
        sum_logits(Identity(), odd, (2, 2), Protocol(scales=(0.5,)))[0], normalize(odd)[..., :2, :2]
    )


def test_network_is_left_as_it_was():
    network = nn.Sequential(Toy(), nn.BatchNorm2d(4))
    network.align_corners = True
    network.train()
    network[1].eval()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    probability = predict(network, image_of(8, 8), (8, 8))
    assert not probability.requires_grad
    assert network.training and network[0].norm.training and not network[1].training
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_mode_is_restored_after_an_error():
    network = Toy()
    with pytest.raises(RuntimeError), evaluation_mode(network):
        assert not network.norm.training
        raise RuntimeError
    assert network.training and network.norm.training


def test_float_and_uint8_images_agree():
    network, image = Toy(), image_of(16, 16)
    torch.testing.assert_close(predict(network, image, (16, 16)), predict(network, image / 255, (16, 16)))


@pytest.mark.parametrize(
    ("protocol", "text"),
    [
        (Protocol(), "whole image, scale 1, no flip"),
        (
            Protocol(crop=(512, 800), scales=(0.5, 1.0), flip=True),
            "sliding window 512x800 stride 342x534, scales 0.5 1, flip",
        ),
    ],
)
def test_protocol_in_words(protocol, text):
    assert protocol.describe() == text


@pytest.mark.parametrize("bad", [{"scales": ()}, {"scales": (0.0,)}, {"scales": (math.nan,)}, {"crop": (0, 8)}])
def test_invalid_protocols_are_refused(bad):
    with pytest.raises(UserError):
        Protocol(**bad)


def test_confidence_does_not_grow_with_the_number_of_passes():
    # Logits are the same everywhere, so windows, scales and flips must not change the probability.
    class Constant(nn.Module):
        align_corners = True

        def forward(self, image):
            return torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(len(image), 2, *image.shape[-2:])

    probability = predict(Constant(), image_of(40, 50), (40, 50), Protocol((24, 24), (0.75, 1.0), True))
    expected = torch.tensor(np.exp(1) / (1 + np.exp(1)), dtype=torch.float32)
    torch.testing.assert_close(probability[:, 1], expected.expand(1, 40, 50))
