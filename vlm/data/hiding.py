"""Which patches of an image are hidden for masked image modelling (Xie et al. 2022, SimMIM)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.errors import ConfigError


@dataclass(frozen=True)
class PatchHiding:
    """Squares of `unit` by `unit` patches, a fixed number of them, out of a `grid` of (rows, columns) that the unit divides.

    share: of the squares that are hidden, rounded up, but never all.
    """

    grid: tuple[int, int]
    unit: int
    share: float

    @property
    def patches(self) -> int:
        """How many patches of an image are hidden."""
        units = self.grid[0] * self.grid[1] // self.unit**2
        return min(math.ceil(units * self.share), units - 1) * self.unit**2

    def draw(self, generator: torch.Generator) -> Tensor:
        """(K,) int64: the hidden patches by number, row by row, ascending."""
        rows, columns = self.grid[0] // self.unit, self.grid[1] // self.unit
        hidden = torch.zeros(rows * columns, dtype=torch.bool)
        hidden[torch.randperm(rows * columns, generator=generator)[: self.patches // self.unit**2]] = True
        squares = hidden.view(rows, 1, columns, 1).expand(-1, self.unit, -1, self.unit)
        return squares.reshape(-1).nonzero().squeeze(1)


def patch_hiding(grid: tuple[int, int], patch: int, pixels: int, share: float) -> PatchHiding:
    """Squares of `pixels` (objectives.hidden_unit) in an image of `grid` patches with sides of `patch` pixels.

    Raises:
        ConfigError: they do not fill the image; names those that do.
    """
    smaller = [
        n * patch for n in range(1, min(grid) + 1) if grid[0] % n == grid[1] % n == 0 and n * n < grid[0] * grid[1]
    ]
    if not smaller:
        raise ConfigError(
            f"objectives.masked_image: the image is one patch of {patch} px, and nothing would be left to see; use a larger model.image.image_size."
        )
    if pixels not in smaller:
        raise ConfigError(
            f"objectives.hidden_unit={pixels} does not cut {grid[0] * patch}x{grid[1] * patch} px with patches of {patch} px into squares; "
            f"use {', '.join(map(str, smaller[:-1]))}{' or ' if smaller[:-1] else ''}{smaller[-1]}."
        )
    return PatchHiding(grid, pixels // patch, share)
