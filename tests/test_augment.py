import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from PIL import Image, ImageFilter

from common.augment import (
    CropGeometry,
    Photometric,
    PhotometricRanges,
    apply_geometry,
    apply_geometry_batch,
    apply_photometric_batch,
    draw_flip,
    draw_geometry,
    draw_photometric,
    flip,
    flip_batch,
    mix_batch,
)
from common.augment.mixing import box_mask, class_mask, draw_box, draw_class_keys
from common.errors import UserError
from common.images import denormalize, normalize

CPU = torch.device("cpu")
ALL_CHANGES = Photometric((("hue", 0.2), ("contrast", 0.8), ("saturation", 1.2), ("brightness", 1.1)), 0.9)


def rngs(count, first=0):
    return [np.random.default_rng(first + i) for i in range(count)]


def coordinates(height=60, width=80):
    """An image whose red and green, a label and a confidence that all say where a pixel comes from."""
    row = torch.arange(height).view(-1, 1).expand(height, width)
    column = torch.arange(width).expand(height, width)
    image = torch.stack((row / height, column / width, torch.zeros(height, width)))
    return image, row.to(torch.uint8), (column + 1) / width


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def changed(image, photometric):
    """Color changes of one image."""
    return apply_photometric_batch(image[None], [photometric])[0]


def batch(count=4, side=24, seed=0):
    label = (noise(count, side, side, seed=seed + 1) * 6).long()
    label[label == 5] = 255
    return noise(count, 3, side, side, seed=seed), label, noise(count, side, side, seed=seed + 2)


def all_equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


# ---- draws


def test_draws_follow_from_the_generator_alone():
    def draws(seed):
        rng = np.random.default_rng(seed)
        geometry = draw_geometry(rng, (375, 500), (321, 321), (0.5, 1.5))
        return geometry, draw_photometric(rng), draw_flip(rng), draw_box(rng, 33, 65), draw_class_keys(rng).tolist()

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)


def test_geometry_is_drawn_inside_its_ranges():
    drawn = [draw_geometry(rng, (40, 50), (32, 32), (0.5, 1.5)) for rng in rngs(300)]
    assert all(20 <= g.height < 60 and 25 <= g.width < 75 for g in drawn)
    assert all(0 <= g.top <= max(g.height - 32, 0) and 0 <= g.left <= max(g.width - 32, 0) for g in drawn)
    assert any(g.top == g.height - 32 for g in drawn if g.height > 32), "the last position must be possible"
    assert max(g.height for g in drawn) > 55 and min(g.height for g in drawn) < 24


def test_scale_one_keeps_the_size():
    geometry = draw_geometry(np.random.default_rng(0), (375, 500), (321, 321), (1.0, 1.0))
    assert (geometry.height, geometry.width) == (375, 500)


def test_probabilities_and_ranges_of_color_changes():
    drawn = [draw_photometric(rng) for rng in rngs(1000)]
    assert 0.75 < np.mean([bool(d.jitter) for d in drawn]) < 0.85
    assert 0.45 < np.mean([d.blur_sigma is not None for d in drawn]) < 0.55
    orders = {tuple(name for name, _ in d.jitter) for d in drawn if d.jitter}
    assert len(orders) == 24 and all(sorted(o) == ["brightness", "contrast", "hue", "saturation"] for o in orders)
    for name, (low, high) in {"brightness": (0.75, 1.25), "hue": (-0.25, 0.25)}.items():
        amounts = [dict(d.jitter)[name] for d in drawn if d.jitter]
        assert low <= min(amounts) < low + 0.01 and high - 0.01 < max(amounts) <= high
    assert all(0.15 <= d.blur_sigma <= 1.15 for d in drawn if d.blur_sigma is not None)


def test_a_probability_leaves_the_other_draws_alone():
    never = PhotometricRanges(jitter_probability=0.0, blur_probability=1.0)
    always = PhotometricRanges(jitter_probability=1.0, blur_probability=1.0)
    one, other = draw_photometric(np.random.default_rng(5), never), draw_photometric(np.random.default_rng(5), always)
    assert not one.jitter and other.jitter
    assert one.blur_sigma == other.blur_sigma


# ---- geometry


@pytest.mark.parametrize("seed", range(12))
def test_image_label_and_confidence_stay_aligned(seed):
    image, label, confidence = coordinates()
    rng = np.random.default_rng(seed)
    geometry = draw_geometry(rng, label.shape, (48, 48), (0.5, 1.5))
    maps = apply_geometry(image, label, confidence, geometry, (48, 48))
    image, label, confidence = flip(*maps, draw_flip(rng))
    assert image.shape == (3, 48, 48) and label.shape == confidence.shape == (48, 48)
    valid = label != 255
    assert valid.sum() == min(geometry.height, 48) * min(geometry.width, 48)
    assert torch.equal(valid, confidence > 0)
    assert (image[0] * 60 - label)[valid].abs().max() <= 1.01
    assert (image[1] * 80 - (confidence * 80 - 1))[valid].abs().max() <= 1.01


@pytest.mark.parametrize(
    ("size", "crop"), [((7, 9), (16, 20)), ((3, 30), (16, 20)), ((1, 2), (5, 5)), ((8, 8), (9, 8))]
)
def test_padding_reflects_the_image_and_ignores_the_label(size, crop):
    image, label, confidence = noise(3, *size), torch.zeros(size, dtype=torch.uint8), torch.ones(size)
    geometry = CropGeometry(*size, 0, 0)
    padding = [(0, max(c - s, 0)) for s, c in zip(size, crop, strict=True)]
    expected = np.pad(image.numpy(), [(0, 0), *padding], mode="reflect")[:, : crop[0], : crop[1]]
    padded, label, confidence = apply_geometry(image, label, confidence, geometry, crop)
    np.testing.assert_array_equal(padded, expected)
    inside = torch.zeros(crop, dtype=torch.bool)
    inside[: size[0], : size[1]] = True
    assert label.dtype == torch.uint8 and torch.equal(label == 255, ~inside)
    assert torch.equal(confidence, inside.float())


def test_without_a_scale_pixels_are_only_cut_out():
    image, label, confidence = noise(3, 40, 50), (noise(40, 50) * 255).long(), noise(40, 50)
    cut = apply_geometry(image, label, confidence, CropGeometry(40, 50, 5, 11), (20, 30))
    assert all_equal(cut, (image[:, 5:25, 11:41], label[5:25, 11:41], confidence[5:25, 11:41]))


@pytest.mark.parametrize("size", [(23, 31), (52, 90), (37, 41)])
def test_nearest_is_that_of_torch(size):
    values = noise(37, 41)
    _, _, ours = apply_geometry(noise(3, 37, 41), None, values, CropGeometry(*size, 0, 0), size)
    torchs = torch.nn.functional.interpolate(values[None, None], size, mode="nearest-exact")[0, 0]
    assert torch.equal(ours, torchs)


def test_maps_with_more_dimensions_and_absent_maps():
    image, confidence = noise(3, 20, 22), noise(2, 20, 22)
    geometry = CropGeometry(26, 17, 4, 0)
    _, label, both = apply_geometry(image, None, confidence, geometry, (19, 19))
    assert label is None
    for one, expected in zip(confidence, both, strict=True):
        assert torch.equal(apply_geometry(image, None, one, geometry, (19, 19))[2], expected)
    assert flip(image, None, None, True)[1:] == (None, None)


def test_memory_layout_of_a_decoder_changes_nothing():
    image = (noise(3, 30, 40) * 255).to(torch.uint8)
    decoded = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    geometry = CropGeometry(45, 60, 3, 7)
    one, other = (apply_geometry(i, None, None, geometry, (32, 32))[0] for i in (image, decoded))
    assert torch.equal(one, other)


def test_flip_twice_is_nothing():
    maps = (noise(3, 6, 7), noise(6, 7).long(), noise(6, 7))
    once = flip(*maps, True)
    assert not torch.equal(once[0], maps[0]) and torch.equal(once[0][..., 0], maps[0][..., -1])
    assert all_equal(flip(*once, True), maps)
    assert all_equal(flip(*maps, False), maps)


# ---- color


def test_hue_is_that_of_torchvision():
    image = noise(3, 40, 40)
    image[:, :8] = image[:1, :8]  # gray
    image[:, 8:12] = (image[:, 8:12] > 0.5).float()  # pure colors, ties of the channels, black and white
    for turns in (-0.5, -0.25, -0.1, 0.0, 0.01, 0.25, 0.5):
        ours = changed(image, Photometric((("hue", turns),)))
        torch.testing.assert_close(ours, reference.adjust_hue(image, turns), rtol=0, atol=1e-5)


def test_color_changes_are_made_in_their_order():
    image = noise(3, 16, 16)
    brighter_first = (("brightness", 1.25), ("contrast", 0.75))
    expected = reference.adjust_contrast(reference.adjust_brightness(image, 1.25), 0.75)
    torch.testing.assert_close(changed(image, Photometric(brighter_first)), expected)
    assert (changed(image, Photometric(brighter_first[::-1])) - expected).abs().max() > 0.01


@pytest.mark.parametrize("sigma", [0.15, 0.4, 0.8, 1.15, 2.5])
def test_blur_is_that_of_pillow(sigma):
    image = (noise(3, 30, 40) * 255).to(torch.uint8)
    blurred = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(sigma))
    expected = torch.from_numpy(np.array(blurred)).permute(2, 0, 1)
    ours = changed(image, Photometric((), sigma))
    assert (ours.int() - expected.int()).abs().max() <= 3  # Pillow rounds six times


def test_blur_keeps_the_mean_and_flat_images():
    flat = torch.full((3, 20, 20), 0.3)
    torch.testing.assert_close(changed(flat, Photometric((), 1.0)), flat)
    point = torch.zeros(3, 21, 21)
    point[:, 10, 10] = 1
    blurred = changed(point, Photometric((), 1.1))
    assert blurred[0].sum().item() == pytest.approx(1, abs=1e-5)
    variance = (blurred[0].sum(0) * (torch.arange(21) - 10.0) ** 2).sum().item()
    assert variance == pytest.approx(1.1**2, rel=1e-3)


def test_no_change_is_none():
    image = noise(3, 8, 8)
    assert torch.equal(changed(image, Photometric()), image)


def test_uint8_and_float_agree():
    eight_bit = (noise(3, 40, 50) * 255).to(torch.uint8)
    real = eight_bit / 255
    result = changed(eight_bit, ALL_CHANGES)
    assert result.dtype == torch.uint8
    assert (result / 255 - changed(real, ALL_CHANGES)).abs().max() <= 0.501 / 255
    geometry = CropGeometry(61, 33, 8, 0)
    resized = [apply_geometry(image, None, None, geometry, (36, 36))[0] for image in (eight_bit, real)]
    assert (resized[0] / 255 - resized[1]).abs().max() <= 1.01 / 255
    torch.testing.assert_close(normalize(eight_bit), normalize(real))


def test_normalize_and_back():
    image = noise(2, 3, 8, 8)
    expected = reference.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(normalize(image), expected)
    torch.testing.assert_close(denormalize(normalize(image)), image)


# ---- mixing


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 65), (512, 512), (4, 3)])
def test_boxes_hold_half_of_the_image(height, width):
    boxes = [draw_box(rng, height, width) for rng in rngs(200)]
    for box in boxes:
        box_height, box_width = box.bottom - box.top, box.right - box.left
        assert box.top >= 0 and box.bottom <= height and box.left >= 0 and box.right <= width
        assert width // 2 < box_width < width
        assert abs(box_height * box_width - height * width / 2) <= box_width / 2
    mask = box_mask(boxes[:5], height, width, CPU)
    outside = [height * width - (b.bottom - b.top) * (b.right - b.left) for b in boxes[:5]]
    assert mask.flatten(1).sum(1).tolist() == outside
    assert not mask[0, boxes[0].top, boxes[0].left] and not mask[0, boxes[0].bottom - 1, boxes[0].right - 1]


@pytest.mark.parametrize("values", [[0, 3, 7, 255], [4, 5, 6], [0, 255], [9], [255], list(range(19))])
def test_half_of_the_classes_is_kept_whole(values):
    label = torch.tensor(values).repeat(8)[torch.randperm(8 * len(values), generator=torch.Generator().manual_seed(0))]
    label = label.view(1, 8, -1)
    chosen = set()
    for rng in rngs(40):
        mask = class_mask(label, draw_class_keys(rng)[None])
        kept, gone = set(label[mask].tolist()), set(label[~mask].tolist())
        assert len(kept) == len(values) // 2 and not kept & gone
        chosen |= kept
    assert chosen == (set(values) if len(values) > 1 else set()), "every class, ignore too, is kept sometimes"


def test_every_class_is_kept_as_often():
    label = torch.tensor([0, 1, 2, 255]).view(1, 2, 2)
    kept = sum(class_mask(label, draw_class_keys(rng)[None]).long() for rng in rngs(1000))
    assert ((kept - 500).abs() < 80).all()


def test_one_class_is_replaced_whole():
    image, label, confidence = batch(2)
    label[0] = 3
    mixed = mix_batch("classmix", image, label, confidence, rngs(2))
    assert all_equal([m[0] for m in mixed], (image[1], label[1], confidence[1]))


@pytest.mark.parametrize("mode", ["cutmix", "classmix"])
def test_every_pixel_is_its_own_or_of_the_next_image(mode):
    own = batch(3)
    mixed = mix_batch(mode, *own, rngs(3))
    for i in range(3):
        other = (i + 1) % 3
        kept = mixed[2][i] == own[2][i]
        assert 0 < kept.sum() < kept.numel()
        for m, o in zip(mixed, own, strict=True):
            assert torch.equal(m[i], torch.where(kept, o[i], o[other]))


def test_cutout_leaves_the_mean_color_and_no_label():
    image, label, confidence = batch(2)
    cut_image, cut_label, cut_confidence = mix_batch("cutout", image, label, confidence, rngs(2))
    gone = cut_confidence == 0
    assert 0.4 < gone.float().mean() < 0.6
    assert normalize(cut_image).movedim(1, -1)[gone].abs().max() < 1e-6
    assert (cut_label[gone] == 255).all() and torch.equal(cut_label[~gone], label[~gone])
    assert torch.equal(cut_image.movedim(1, -1)[~gone], image.movedim(1, -1)[~gone])
    assert torch.equal(cut_confidence[~gone], confidence[~gone])


def test_none_changes_nothing():
    own = batch(2)
    assert all_equal(mix_batch("none", *own, rngs(2)), own)


@pytest.mark.parametrize("mode", ["none", "cutout", "cutmix", "classmix"])
def test_two_processes_mix_as_one(mode):
    own = batch(4)
    whole = mix_batch(mode, *own, rngs(4))
    first, second = tuple(o[:2] for o in own), tuple(o[2:] for o in own)
    halves = [
        mix_batch(mode, *first, rngs(2, 0), partner_of_last=tuple(o[0] for o in second)),
        mix_batch(mode, *second, rngs(2, 2), partner_of_last=tuple(o[0] for o in first)),
    ]
    assert all_equal([torch.cat(parts) for parts in zip(*halves, strict=True)], whole)


@pytest.mark.parametrize("mode", ["none", "cutout", "cutmix", "classmix"])
def test_several_maps_are_mixed_as_one_by_the_first_label(mode):
    image, label, confidence = torch.rand(3, 3, 12, 14), torch.randint(0, 5, (3, 12, 14)), torch.rand(3, 12, 14)
    alone = mix_batch(mode, image, label, confidence, [np.random.default_rng(i) for i in range(3)])
    labels, confidences = torch.stack([label, label + 5], 1), torch.stack([confidence, -confidence], 1)
    both = mix_batch(mode, image, labels, confidences, [np.random.default_rng(i) for i in range(3)])
    assert both[0].equal(alone[0])
    assert both[1][:, 0].equal(alone[1]) and both[2][:, 0].equal(alone[2])
    assert both[1][:, 1].equal(torch.where(alone[1] == 255, 255, alone[1] + 5)) and both[2][:, 1].equal(-alone[2])


def test_a_batch_of_one_mixes_with_the_next_process():
    own, following = batch(1), batch(1, seed=9)
    following_one = tuple(f[0] for f in following)
    mixed = mix_batch("cutmix", *own, rngs(1), partner_of_last=following_one)
    assert not torch.equal(mixed[0], own[0])
    assert torch.isin(mixed[2], torch.cat((own[2], following[2]))).all()


def test_wrong_arguments_are_errors():
    with pytest.raises(UserError, match=r"mixup.*classmix"):
        mix_batch("mixup", *batch(2), rngs(2))
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        mix_batch("classmix", *batch(2), rngs(1))


# ---- all


def test_a_batch_is_augmented_as_its_images_are():
    image, label, confidence = batch(4)
    geometries = [draw_geometry(rng, (24, 24), (20, 20), (0.5, 1.5)) for rng in rngs(4)]
    flips = [True, False, True, False]
    photometrics = [ALL_CHANGES, Photometric(), Photometric((), 0.7), Photometric((("hue", -0.1),))]
    maps = apply_geometry_batch(image, label, confidence, geometries, (20, 20))
    maps = flip_batch(*maps, flips)
    colored = apply_photometric_batch(maps[0], photometrics)
    for i in range(4):
        one = apply_geometry(image[i], label[i], confidence[i], geometries[i], (20, 20))
        one = flip(*one, flips[i])
        torch.testing.assert_close(maps[0][i], one[0], rtol=0, atol=1e-5)
        assert all_equal([m[i] for m in maps[1:]], one[1:])
        torch.testing.assert_close(colored[i], changed(one[0], photometrics[i]), rtol=0, atol=1e-5)
    only_images = apply_geometry_batch(image, None, None, geometries, (20, 20))
    assert only_images[1:] == (None, None) and flip_batch(*only_images, flips)[1:] == (None, None)


def pipeline(image, label, confidence):
    """What a training step does to its unlabeled batch."""
    count, (height, width) = len(image), label.shape[-2:]
    geometries = [draw_geometry(rng, (height, width), (20, 20), (0.5, 1.5)) for rng in rngs(count)]
    maps = apply_geometry_batch(image, label, confidence, geometries, (20, 20))
    for mode in ("cutout", "cutmix", "classmix"):
        maps = mix_batch(mode, *maps, rngs(count))
    image = apply_photometric_batch(maps[0], [ALL_CHANGES] * count)
    image, label, confidence = flip_batch(image, *maps[1:], [True, False] * (count // 2))
    return denormalize(normalize(image)), label, confidence


def test_inputs_are_left_as_they_are():
    own = batch(4)
    copies = [o.clone() for o in own]
    pipeline(*own)
    for mode in ("cutout", "cutmix", "classmix"):
        mix_batch(mode, *own, rngs(4))
    assert all_equal(own, copies)
    eight_bit = (own[0][0] * 255).to(torch.uint8)
    copy = eight_bit.clone()
    changed(eight_bit, ALL_CHANGES)
    apply_geometry(eight_bit, None, None, CropGeometry(30, 15, 2, 0), (20, 20))
    assert torch.equal(eight_bit, copy)


def test_applying_never_looks_at_values():
    """Tensors on `meta` have none, so whatever would make the host wait for a device fails."""
    image, label, confidence = pipeline(*(one.to("meta") for one in batch(4)))
    assert image.shape == (4, 3, 20, 20) and label.shape == confidence.shape == (4, 20, 20)
    assert label.dtype == torch.int64
