"""Random variations of RGBA pictures, as batched tensor operations on CPU and GPU."""

import math

import numpy as np
import torch
import torch.nn.functional as F


def _uniform(count, low, high, device):
    return torch.empty(count, 1, 1, 1, device=device).uniform_(low, high)


def _warp(rgba, scale, angle, shift_x, shift_y, flip):
    """Resample premultiplied pictures. scale > 1 zooms in; shifts in half pictures; flip +1, -1."""
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = [torch.cat([cos * flip, -sin, shift_x], -1), torch.cat([sin * flip, cos, shift_y], -1)]
    theta = torch.cat(rows, -2).squeeze(1)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(rgba.shape), align_corners=False)
    return F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _premultiplied(pictures_uint8):
    """uint8 (B, H, W, 4) -> float (B, 4, H, W) in [0, 1] with the colours multiplied by alpha."""
    rgba = pictures_uint8.permute(0, 3, 1, 2).float() / 255
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)


def on_white(pictures_uint8: np.ndarray) -> torch.Tensor:
    """Plain pictures: uint8 (B, H, W, 4) RGBA -> float (B, 3, H, W) in [-1, 1] on white."""
    rgba = _premultiplied(pictures_uint8)
    return (rgba[:, :3] + 1 - rgba[:, 3:]) * 2 - 1


def placed_on_white(pictures_uint8: np.ndarray, can_flip: np.ndarray) -> torch.Tensor:
    """Slightly moved, scaled and mirrored pictures on white, for the denoiser.

    pictures_uint8: uint8 (B, H, W, 4) RGBA.
    can_flip: bool (B,), whether a mirror image means the same.
    Returns float (B, 3, H, W) in [-1, 1]; a third of the pictures is not scaled or moved."""
    count, device = len(pictures_uint8), pictures_uint8.device
    moved = (torch.rand(count, 1, 1, 1, device=device) > 1 / 3).float()
    scale = 1 - moved * _uniform(count, 0, 0.2, device)
    room = (1 - scale) / scale
    flip = 1 - 2 * ((torch.rand(count, device=device) < 0.5) & can_flip).float().view(-1, 1, 1, 1)
    angle = moved * _uniform(count, -0.1, 0.1, device)
    shift_x, shift_y = (room * _uniform(count, -1, 1, device) for _ in range(2))
    rgba = _warp(_premultiplied(pictures_uint8), scale, angle, shift_x, shift_y, flip)
    return ((rgba[:, :3] + 1 - rgba[:, 3:]) * 2 - 1).clamp(-1, 1)


def strongly_varied(pictures_uint8: np.ndarray) -> torch.Tensor:
    """Zoomed, turned, recoloured and shaded pictures on any background, for the autoencoder.

    The autoencoder has to carry styles that it never sees: two styles alone are too narrow.

    pictures_uint8: uint8 (B, H, W, 4) RGBA.
    Returns float (B, 3, H, W) in [-1, 1]."""
    count, device = len(pictures_uint8), pictures_uint8.device
    scale = torch.exp(_uniform(count, math.log(0.75), math.log(2.0), device))
    plain = torch.rand(count, 1, 1, 1, device=device) < 0.35
    scale = torch.where(plain, torch.ones_like(scale), scale)
    angle = torch.where(plain, torch.zeros_like(scale), _uniform(count, -0.5, 0.5, device))
    reach = (1 - 1 / scale).abs()
    shift_x, shift_y = (reach * _uniform(count, -1, 1, device) for _ in range(2))
    flip = 1 - 2 * (torch.rand(count, 1, 1, 1, device=device) < 0.5).float()
    rgba = _warp(_premultiplied(pictures_uint8), scale, angle, shift_x, shift_y, flip)
    white = torch.rand(count, 1, 1, 1, device=device) < 0.5
    background = _soft_fields(count, 3, rgba.shape[-1], device) * 0.5 + torch.rand(count, 3, 1, 1, device=device)
    background = torch.where(white, torch.ones_like(background), background)
    picture = rgba[:, :3] + (1 - rgba[:, 3:]) * background
    recoloured = torch.rand(count, 1, 1, 1, device=device) < 0.5
    picture = torch.where(recoloured, _recolour(picture), picture)
    shaded = torch.rand(count, 1, 1, 1, device=device) < 0.4
    shading = 1 + 0.8 * _soft_fields(count, 1, rgba.shape[-1], device)
    foreground_only = 1 + (shading - 1) * rgba[:, 3:]
    picture = torch.where(shaded, picture * foreground_only, picture)
    return (picture.clamp(0, 1) * 2 - 1).contiguous()


def _soft_fields(count, channels, size, device):
    """Smooth random fields in about [-0.5, 0.5]: few values, enlarged. (B, channels, size, size)"""
    coarse = torch.rand(count, channels, 4, 4, device=device) - 0.5
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)


def _recolour(picture):
    """Turn the hue by a random angle and change saturation, contrast and brightness."""
    count, device = len(picture), picture.device
    grey = picture.mean(1, keepdim=True)
    turn = _uniform(count, -math.pi, math.pi, device)
    axis = picture[:, [1, 2, 0]] - picture[:, [2, 0, 1]]  # at right angles to the grey axis and to the colour
    colour = (picture - grey) * torch.cos(turn) + axis / math.sqrt(3) * torch.sin(turn)
    picture = grey + colour * _uniform(count, 0.3, 1.4, device)
    return (picture - 0.5) * _uniform(count, 0.6, 1.2, device) + 0.5 + _uniform(count, -0.15, 0.15, device)
