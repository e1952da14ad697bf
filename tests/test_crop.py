"""Crops from the flat buffer against torchvision's, in both forms."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

import kernels
from kernels.crop import crop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLOSE = 1e-3  # of 0 .. 255: float32's rounding, where a shift by a hundredth of a pixel would show as units

# Heights and widths with boxes in whole pixels (top, left, bottom, right): inner and whole, enlarged and shrunk, one
# pixel, one row, one column, every edge and corner.
CASES = [
    ((41, 57), (3, 5, 33, 45)),
    ((41, 57), (0, 0, 41, 57)),
    ((1, 1), (0, 0, 1, 1)),
    ((100, 30), (0, 0, 100, 30)),
    ((9, 200), (4, 100, 9, 200)),
    ((33, 35), (32, 0, 33, 35)),
    ((33, 35), (0, 34, 33, 35)),
    ((33, 35), (7, 8, 8, 9)),
    ((33, 35), (0, 0, 17, 17)),
    ((16, 16), (0, 0, 16, 16)),
]


@pytest.fixture(params=["torch", "triton"])
def device(request, monkeypatch):
    """Each form in turn, where it runs."""
    if request.param == "triton":
        return request.getfixturevalue("triton_device")
    monkeypatch.setattr(kernels, "choice", "torch")
    return "cpu"


def buffer_of(images):
    """pixels, offsets and sizes of images (3, H, W)."""
    length = torch.tensor([image.numel() for image in images])
    sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.int32)
    return torch.cat([image.permute(2, 0, 1).reshape(-1) for image in images]), length.cumsum(0) - length, sizes


def shown(images, boxes, flips, size, device, **options):
    """Crops (B, 3, size, size) in units of 0 .. 255."""
    arguments = *buffer_of(images), torch.tensor(boxes, dtype=torch.float64), torch.tensor(flips)
    out = crop(*(argument.to(device) for argument in arguments), size, MEAN, STD, **options).cpu()
    return 255 * (out * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])


@pytest.fixture
def noise():
    generator = torch.Generator().manual_seed(0)
    return lambda height, width: torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", [16, 23])
def test_a_crop_is_torchvisions_resized_crop_and_flip(size, device, noise):
    images, flips = [noise(*shape) for shape, _ in CASES], [n % 3 == 0 for n in range(len(CASES))]
    got = shown(images, [box for _, box in CASES], flips, size, device)
    for image, (_, (top, left, bottom, right)), flip, mine in zip(images, CASES, flips, got):
        theirs = tv.resized_crop(image.float(), top, left, bottom - top, right - left, [size, size], antialias=True)
        torch.testing.assert_close(mine, tv.horizontal_flip(theirs) if flip else theirs, atol=CLOSE, rtol=0)


def test_a_crop_of_the_resized_image_is_torchvisions(device, noise):
    size, resized = 20, (24, 31)
    for shape in ((50, 64), (24, 31), (13, 17)):
        image = noise(*shape)
        theirs = tv.center_crop(tv.resize(image.float(), resized, antialias=True), size)
        box = np.array([2, 6, 2 + size, 6 + size]) * np.tile(np.array(shape) / resized, 2)  # round((31 - 20) / 2) is 6
        mine = shown([image], [box.tolist()], [False], size, device, within=False)[0]
        torch.testing.assert_close(mine, theirs, atol=CLOSE, rtol=0)


def test_a_box_between_pixels_weighs_them_by_the_formula(device, noise):
    (height, width), size, box = (12, 15), 4, (1.25, 2.5, 9.75, 14.1)
    image, flips = noise(height, width), [False, True]

    def weights(start, stop):
        """(size, pixels), one by one."""
        scale, rows = (stop - start) / size, []
        for o in range(size):
            centre = start + (o + 0.5) * scale
            row = [max(0, 1 - abs(p + 0.5 - centre) / max(scale, 1)) for p in range(int(start), int(np.ceil(stop)))]
            rows.append(np.array(row) / sum(row))
        return np.array(rows)

    part = image.numpy()[:, 1:10, 2:15]
    expected = weights(box[0], box[2]) @ part @ weights(box[1], box[3]).T
    mine = shown([image, image], [box, box], flips, size, device)
    np.testing.assert_allclose(mine[0], expected, atol=CLOSE)
    np.testing.assert_allclose(mine[1], expected[..., ::-1], atol=CLOSE)


def test_the_batch_is_channels_last_normalised_and_written_whole(device, noise):
    grey = torch.full((3, 5, 7), 128, dtype=torch.uint8)
    out = torch.full((2, 9, 9, 3), torch.nan, device=device).permute(0, 3, 1, 2)
    arguments = *buffer_of([grey, grey]), torch.tensor([[0.0, 0, 5, 7]] * 2, dtype=torch.float64), torch.tensor([False, True])
    got = crop(*(argument.to(device) for argument in arguments), 9, MEAN, STD, out=out)
    assert got is out and got.is_contiguous(memory_format=torch.channels_last)
    expected = ((128 / 255 - torch.tensor(MEAN)) / torch.tensor(STD))[:, None, None].expand_as(out)
    torch.testing.assert_close(got.cpu(), expected)
    fresh = crop(*(argument.to(device) for argument in arguments), 9, MEAN, STD)
    assert fresh.is_contiguous(memory_format=torch.channels_last) and torch.equal(fresh, got)
