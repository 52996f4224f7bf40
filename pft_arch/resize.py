"""MATLAB's `imresize(..., 'bicubic')` on 8-bit images: how every published super-resolution benchmark makes its LR.

Keys' kernel with a = -0.5 (Keys 1981), widened by the factor when shrinking (antialiasing), weights normalised,
borders mirrored with the edge repeated; height first, then width, rounded half up to 8 bits after each pass.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def imresize(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """(H, W, C) 8-bit -> (height, width, C) 8-bit."""
    rows = _to_8_bit(np.tensordot(_matrix(image.shape[0], height), image.astype(np.float64), (1, 0)))
    columns = np.tensordot(rows.astype(np.float64), _matrix(image.shape[1], width), (1, 1))  # height, C, width
    return _to_8_bit(columns.transpose(0, 2, 1))


def shrink(image: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """LR of an (H, W, C) image whose height and width are multiples of the scale."""
    return imresize(image, image.shape[0] // scale, image.shape[1] // scale)


def crop_to_multiple(image: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """The top left of the image, with height and width multiples of the scale."""
    return image[: image.shape[0] // scale * scale, : image.shape[1] // scale * scale]


def _to_8_bit(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.floor(values + 0.5).clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=8)  # the images of a set often have one size; for a large one a matrix takes many megabytes
def _matrix(source: int, target: int) -> NDArray[np.float64]:
    """(target, source) weights of every source pixel in every target pixel."""
    factor = target / source
    stretch = min(factor, 1.0)
    support = 4 / stretch
    centre = (np.arange(target) + 0.5) / factor - 0.5
    place = np.floor(centre - support / 2)[:, None].astype(int) + np.arange(int(np.ceil(support)) + 2)
    weights = _cubic((centre[:, None] - place) * stretch)
    weights /= weights.sum(1, keepdims=True)
    mirrored = place % (2 * source)
    mirrored = np.minimum(mirrored, 2 * source - 1 - mirrored)
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target)[:, None], mirrored), weights)
    return matrix


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
