"""Crop, resize, flip and normalise images straight from one flat buffer of decoded ones, a whole batch at a time.

A box of an image becomes size x size values by antialiased bilinear resampling, as torchvision's: along each axis
output o looks at the pixels p near its centre, weighted by a triangle that widens when the image shrinks,

    centre_o = start + (o + 1/2) * scale,    weight_op = max(0, 1 - |p + 1/2 - centre_o| / max(scale, 1)) / (their sum),

with scale = box / size. Both axes in turn, then (v/255 - mean) / std. Boxes need not lie on whole pixels.

An image lies in the buffer column by column, (width, 3, height): the plain form then resamples the columns where they
lie and the rows after one transposition, and comes out channels-last. Traffic, Triton: the box's bytes once from memory
(each again for every output near it, from the cache) and 12 bytes a pixel written.

Shapes: B images, S = size, P bytes of the buffer, K pixels that an output looks at along an axis.
"""

import os

import torch

from kernels import jit, tl, triton, use_triton

ROWS, COLUMNS = 8, 128  # a program's output rows, and interleaved values (3 a pixel) of each


def crop(pixels, offsets, sizes, boxes, flips, size, mean, std, within=True, out=None):
    """Boxes of images as a normalised batch, float32 (B, 3, size, size), channels-last.

    pixels: uint8 (P,), images of (width, 3, height); offsets: int64 (B,), where each begins; sizes: int32 (B, 2), their
    heights and widths. boxes: float64 (B, 4), top, left, bottom and right in pixels, inside the image; flips: bool (B,),
    left-right. mean, std: of the three channels, for values of 0 .. 1. within: the image ends at its box, as for a crop
    that is resized; else pixels around the box count as well, as for a resized image that is cropped.
    out: written and returned if given, else a new tensor.
    """
    if out is None:
        out = pixels.new_empty(len(offsets), size, size, 3, dtype=torch.float32).permute(0, 3, 1, 2)
    start, stop = torch.zeros_like(boxes[:, :2]), sizes
    if within:
        start, stop = boxes[:, :2].floor(), boxes[:, 2:].ceil()
    window = torch.cat([sizes[:, :1], stop - start], dim=1).int()  # (B, 3): pixels a column, height, width
    top, left = start.long().unbind(1)
    at = offsets + 3 * left * sizes[:, 0] + top  # of the window's corner
    boxes = torch.cat([boxes[:, :2] - start, boxes[:, 2:] - boxes[:, :2]], dim=1).float()  # corner, height, width
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std)]
    form = _crop_triton if in_triton(pixels) else _crop_torch
    form(pixels, at, window, boxes, flips, scale, shift, out)
    return out


def in_triton(pixels):
    """Whether `crop` uses Triton. What a GPU cannot hold stays on the CPU, and there that takes the interpreter."""
    return (pixels.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and use_triton(pixels)


# --------------------------------------------------------------------------------------------- plain


def _crop_torch(pixels, at, window, boxes, flips, scale, shift, out):
    size = out.shape[2]
    rows = _taps(boxes[:, 0], boxes[:, 2], window[:, 1], size)
    columns = _taps(boxes[:, 1], boxes[:, 3], window[:, 2], size)
    for part in columns:
        part[flips] = part[flips].flip(1)
    scale, shift = (torch.tensor(values, device=out.device).repeat(size) for values in (scale, shift))  # (3S,)
    first_row, first_column = (
        torch.arange(size, dtype=torch.int32, device=out.device) * pixel.shape[2] for pixel, _ in (rows, columns)
    )
    taps = (part.flatten(1).unbind() for part in (*columns, *rows))  # (S K,) an image
    batch = zip(at.tolist(), window.tolist(), *taps, out.permute(0, 2, 3, 1).view(-1, size, 3 * size).unbind())
    for corner, (pitch, height, width), column, column_weight, row, row_weight, shown in batch:
        image = pixels.as_strided((width, 3, height), (3 * pitch, pitch, 1), corner).float().view(width, -1)
        image = _resample(image, column, column_weight, first_column).view(3 * size, height)
        image = _resample(image.T.contiguous(), row, row_weight, first_row)  # (S, 3S)
        torch.addcmul(shift, image, scale, out=shown)


def _taps(start, extent, length, size):
    """Which of `length` pixels an output looks at and how much they weigh: int32 and float32 (B, S, K)."""
    scale = extent[:, None] / size  # (B, 1)
    reach = scale.clamp_min(1)
    centre = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * scale  # (B, S)
    first = (centre - reach + 0.5).floor().clamp_min(0)
    pixel = first[..., None] + torch.arange(int((2 * reach).max().ceil()), device=start.device)  # (B, S, K)
    weight = (1 - (pixel + 0.5 - centre[..., None]).abs() / reach[..., None]).clamp_min(0)
    last = length[:, None, None] - 1
    weight *= pixel <= last
    return pixel.minimum(last).int(), weight / weight.sum(2, keepdim=True)


def _resample(lines, pixel, weight, first):
    """Weighted sums of lines, (S, D). lines: (L, D); pixel, weight: (S K,); first: (S,), where each sum's begin."""
    # F.embedding_bag less its checks, which hold Python's lock for longer than the sums take.
    return torch.embedding_bag(lines, pixel, first, False, 0, False, weight)[0]


# -------------------------------------------------------------------------------------------- Triton


@jit
def _crop_kernel(
    pixels, at, window, boxes, flips, out, size, scale0, scale1, scale2, shift0, shift1, shift2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # A program owns ROWS output rows of one image, and COLUMNS of their 3 * size interleaved values.
    b = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x, channel = column // 3, column % 3
    shown = tl.where(tl.load(flips + b) != 0, size - 1 - x, x)
    corner = pixels + tl.load(at + b)
    pitch, height, width = tl.load(window + 3 * b), tl.load(window + 3 * b + 1), tl.load(window + 3 * b + 2)

    scale_y, scale_x = tl.load(boxes + 4 * b + 2) / size, tl.load(boxes + 4 * b + 3) / size
    reach_y, reach_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    centre_y = tl.load(boxes + 4 * b) + (row + 0.5) * scale_y  # (ROWS, 1)
    centre_x = tl.load(boxes + 4 * b + 1) + (shown + 0.5) * scale_x  # (1, COLUMNS)
    first_y = tl.maximum(tl.floor(centre_y - reach_y + 0.5), 0.0).to(tl.int32)
    first_x = tl.maximum(tl.floor(centre_x - reach_x + 0.5), 0.0).to(tl.int32)
    taps_y, taps_x = tl.ceil(2 * reach_y).to(tl.int32), tl.ceil(2 * reach_x).to(tl.int32)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    weights = tl.zeros((ROWS, COLUMNS), tl.float32)
    tap_x = 0
    while tap_x < taps_x:  # Triton 3.6 does not interpret range() of a computed number under NumPy 2.4
        px = first_x + tap_x
        weight_x = tl.where(px < width, tl.maximum(1 - tl.abs(px + 0.5 - centre_x) / reach_x, 0.0), 0.0)
        line = corner + (3 * px + channel).to(tl.int64) * pitch
        tap_y = 0
        while tap_y < taps_y:
            py = first_y + tap_y
            weight_y = tl.where(py < height, tl.maximum(1 - tl.abs(py + 0.5 - centre_y) / reach_y, 0.0), 0.0)
            weight = weight_x * weight_y
            total += weight * tl.load(line + py, mask=weight > 0, other=0).to(tl.float32)
            weights += weight
            tap_y += 1
        tap_x += 1

    scale = tl.where(channel == 0, scale0, tl.where(channel == 1, scale1, scale2))
    shift = tl.where(channel == 0, shift0, tl.where(channel == 1, shift1, shift2))
    value = total / tl.maximum(weights, 1e-6) * scale + shift  # no weight only where nothing is stored
    place = out + b * size * size * 3 + row * (3 * size) + column
    tl.store(place, value, mask=(row < size) & (column < 3 * size))


def _crop_triton(pixels, at, window, boxes, flips, scale, shift, out):
    size = out.shape[2]
    grid = (len(at), triton.cdiv(size, ROWS), triton.cdiv(3 * size, COLUMNS))
    _crop_kernel[grid](
        pixels, at, window, boxes, flips, out, size, *scale, *shift, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4, num_stages=1
    )  # fmt: skip


def ahead_of_time():
    """What tests/aot.py compiles."""
    types = dict(pixels="*u8", at="*i64", window="*i32", boxes="*fp32", flips="*i1", out="*fp32", size="i32")
    types |= {f"{name}{channel}": "fp32" for name in ("scale", "shift") for channel in range(3)}
    return [dict(kernel=_crop_kernel, types=types, constants=dict(ROWS=ROWS, COLUMNS=COLUMNS), num_warps=4, num_stages=1)]
