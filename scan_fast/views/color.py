"""Colour operations on (n, 3, H, W) float32 batches of integer pixel values 0..255, with PIL's arithmetic.

Enhancing an image by a factor f is PIL's blend of a degenerate image d and the image x: trunc(clip(d + f (x - d))).
Each function takes one factor per image, (n,) float32, and returns a new batch of integer pixel values.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

# PIL's luma in 16.16 fixed point: every partial sum is a multiple of 2^-16 below 256, hence exact in float32.
_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)


def luma(x: Tensor) -> Tensor:
    """Return PIL's "L" conversion, (n, 1, H, W)."""
    grey = x[:, 0:1] * _LUMA[0]
    grey.add_(x[:, 1:2], alpha=_LUMA[1]).add_(x[:, 2:3], alpha=_LUMA[2])
    return grey.add_(0.5).floor_()


def _blend(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Return trunc(clip(d + f (x - d)))."""
    return (x - degenerate).mul_(factor.view(-1, 1, 1, 1)).add_(degenerate).clamp_(0, 255).floor_()


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with black."""
    return (x * factor.view(-1, 1, 1, 1)).clamp_(max=255).floor_()


def mean_luma(x: Tensor) -> Tensor:
    """Return the rounded mean of each image's luma, (n, 1, 1, 1)."""
    pixels = x.shape[2] * x.shape[3]
    # A sum below 2^24 is exact in float32.
    total = luma(x).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float32 if pixels <= 1 << 16 else torch.float64)
    return (total.double() / pixels).add_(0.5).floor_().float()


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean grey."""
    return _blend(mean_luma(x), x, factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with luma (PIL's ImageEnhance.Color)."""
    return _blend(luma(x), x, factor)


def grayscale(x: Tensor) -> Tensor:
    """Replace by luma."""
    return luma(x).expand(-1, 3, -1, -1)


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the smoothed image: a 3x3 kernel of ones with 5 in the middle, over 13; border pixels are kept."""
    smooth = x.clone()
    if min(x.shape[-2:]) > 2:
        rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        smooth[..., 1:-1, 1:-1] = total.add_(x[..., 1:-1, 1:-1], alpha=4).mul_(1 / 13).add_(0.5).floor_()
    return _blend(smooth, x, factor)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue by a fraction of the colour circle, in PIL's 8-bit HSV: trunc(255 shift), wrapping at 256."""
    value, chroma, angle = _value_chroma_angle(x)
    weight = chroma.div_(value.clamp(min=1)).mul_(255).floor_()

    step = (shift.double() * 255).trunc().float().view(-1, 1, 1)
    angle.add_(step)
    angle.sub_((angle / 256).floor_(), alpha=256)
    # Back to RGB: channel c is v (1 - s t), where t in 0..1 is a trapezoid of the hue. In units of 1/255 all three are
    # integers. So the numerator v (255^2 - s t) < 2^24 is exact, and the only rounding is that of one true division.
    angle.mul_(6)
    divisor = torch.full((), 65025.0, device=x.device)
    out = torch.empty_like(x)
    torch.sub(angle, 3 * 255, out=out[:, 0]).abs_().neg_().add_(2 * 255)
    torch.sub(angle, 2 * 255, out=out[:, 1]).abs_().sub_(255)
    torch.sub(angle, 4 * 255, out=out[:, 2]).abs_().sub_(255)
    out.clamp_(0, 255).mul_(weight.neg_().unsqueeze(1)).add_(65025)
    return out.mul_(value.unsqueeze(1)).div_(divisor).add_(0.5).floor_()


def hue_angles(x: Tensor) -> Tensor:
    """Return PIL's 8-bit hue, (n, H, W) float32."""
    return _value_chroma_angle(x)[2]


def _value_chroma_angle(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the highest channel, its distance from the lowest, and PIL's 8-bit hue, each (n, H, W)."""
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    lowest = torch.minimum(torch.minimum(r, g), b)
    chroma = value - lowest
    # The hue depends on the order of the channels, on the chroma, and on value - middle = 2 value + lowest - r - g - b.
    # All are integers, so the hue is looked up.
    row = (2 * value).add_(lowest).sub_(r).sub_(g).sub_(b).add_(chroma, alpha=256).to(torch.int32)
    row.add_(g >= b, alpha=1 << 16).add_(r >= b, alpha=1 << 17).add_(g >= r, alpha=1 << 18)
    return value, chroma, _angles(x.device).index_select(0, row.flatten()).view(value.shape)


@cache
def _angles(device: torch.device) -> Tensor:
    """Tabulate PIL's 8-bit hue, (2^19,) float32, by channel order, chroma and value - middle.

    The order is three bits: g >= b, r >= b, g >= r, lowest first.
    PIL computes (max - c) / chroma per channel. It is 1 for the lowest and 0 for the highest channel. So the hue in
    sixths of the circle is an integer plus or minus the middle channel's quotient in float32, rounded once. The
    truncation to 8 bits follows PIL's float64 expressions.
    """
    order = torch.arange(8).view(8, 1, 1)
    chroma = torch.arange(256.0).view(1, 256, 1)
    quotient = torch.arange(256.0).view(1, 1, 256) / chroma.clamp(min=1)
    g_over_b, r_over_b, g_over_r = ((order >> bit) & 1 == 1 for bit in range(3))
    # For equal channels PIL tests red first, then green. A tie has quotient 0, which gives the same hue either way.
    red = torch.where(g_over_b, 1 - quotient, quotient - 1)
    green = torch.where(r_over_b, 1 + quotient, 3 - quotient)
    blue = torch.where(g_over_r, 3 + quotient, 5 - quotient)
    sixths = torch.where(~g_over_r & r_over_b, red, torch.where(g_over_b & g_over_r, green, blue))
    circle = (sixths.double() / 6 + 1).remainder(1).float()
    angle = (circle.double() * 255).floor().float()
    return torch.where(chroma == 0, 0, angle).flatten().to(device)


def histograms(x: Tensor) -> Tensor:
    """Count pixel values per channel: (n, 3, 256) int64."""
    n = x.shape[0] * 3
    values = x.reshape(n, -1).to(torch.int64)
    counts = torch.zeros((n, 256), dtype=torch.int64, device=x.device)
    return counts.scatter_add_(1, values, torch.ones_like(values)).view(-1, 3, 256)


def tables(x: Tensor, kind: Tensor, amount: Tensor, index: Mapping[str, int]) -> Tensor:
    """Return the lookup tables of the operations that depend only on the pixel value.

    Args:
        x: (n, 3, H, W) images; some tables depend on their content.
        kind: (n,) int64 operation numbers.
        amount: (n,) float32 magnitudes.
        index: operation numbers by name.

    Returns:
        (n, 3, 256) float32 integer pixel values.
    """
    ramp = torch.arange(256, dtype=torch.float32, device=x.device)
    table = ramp.expand(len(x), 3, 256).clone()

    def rows(name: str) -> Tensor:
        return (kind == index[name]).nonzero().squeeze(1)

    if len(chosen := rows("brightness")):
        table[chosen] = (ramp * amount[chosen].view(-1, 1, 1)).clamp_(max=255).floor_()
    if len(chosen := rows("contrast")):
        grey = mean_luma(x[chosen]).view(-1, 1, 1)
        table[chosen] = (ramp - grey).mul_(amount[chosen].view(-1, 1, 1)).add_(grey).clamp_(0, 255).floor_()
    if len(chosen := rows("solarize")):
        table[chosen] = torch.where(ramp < amount[chosen].view(-1, 1, 1), ramp, 255 - ramp)
    if len(chosen := rows("posterize")):
        width = torch.exp2(8 - amount[chosen]).view(-1, 1, 1)
        table[chosen] = (ramp / width).floor_().mul_(width)
    if len(chosen := rows("autocontrast")):
        table[chosen] = _autocontrast(x[chosen], ramp)
    if len(chosen := rows("equalize")):
        table[chosen] = _equalize(histograms(x[chosen]))
    return table


def _autocontrast(x: Tensor, ramp: Tensor) -> Tensor:
    """Stretch each channel's range to 0..255; a channel with a single value is unchanged."""
    low, high = (f(x.flatten(2), dim=2, keepdim=True).double() for f in (torch.amin, torch.amax))
    # In float64, term by term as in PIL, because the result is truncated. The numerator is a tensor, because torch
    # divides a Python number by multiplying with the reciprocal.
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)
    stretched = (ramp.double() * scale).add_(-low * scale).trunc_().clamp_(0, 255)
    return torch.where(high > low, stretched, ramp.double()).float()


def _equalize(counts: Tensor) -> Tensor:
    """Return tables that flatten each channel's histogram, in PIL's integer arithmetic; counts are (n, 3, 256)."""
    values = torch.arange(256, device=counts.device)
    last = torch.where(counts > 0, values, -1).amax(dim=2, keepdim=True)
    total = counts.sum(dim=2, keepdim=True)
    step = (total - counts.gather(2, last)) // 255
    below = counts.cumsum(dim=2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, table, values).float()


def apply_tables(x: Tensor, table: Tensor) -> Tensor:
    """Look up every pixel value in the table of its image and channel; table is (n, 3, 256)."""
    n = x.shape[0] * 3
    # 32-bit positions in the flattened tables need half the memory traffic of gather's 64-bit ones.
    position = x.reshape(n, -1).to(torch.int32)
    position += torch.arange(0, 256 * n, 256, dtype=torch.int32, device=x.device).unsqueeze(1)
    return table.reshape(-1).index_select(0, position.reshape(-1)).view(x.shape)
