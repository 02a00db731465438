"""Which pictures of a folder to calibrate on: drawn at random, or so that what stands out in any of them is seen."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgecomp_runtime.errors import InputError, UnknownNameError

CHOICES = ("random", "cover")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CANDIDATES = 16  # times the pictures asked for: 'cover' runs the tower on so many, drawn at random, where the folder has more
OUTLIER = 0.5  # of the largest number of a tensor: channels that reach it decide its scale
LEAST = 1e-30  # instead of a division by zero, where a tensor is zero on all pictures
REACHED = 0.9  # of the largest that a channel has in any picture: so much covers it


@dataclass(frozen=True)
class Calibration:
    """What the ranges of a vision tower's numbers are measured on.

    folder: of pictures; folders in it are looked into. images: how many are taken. choice: 'random' or 'cover'. seed: of what is drawn.
    """
    folder: Path
    images: int = 32
    choice: str = "random"
    seed: int = 0

    def candidates(self) -> list[Path]:
        """The pictures to choose from, in the order of their names: for 'random' those that are chosen.

        Raises:
            UnknownNameError, InputError: there is no such choice or folder, it has no pictures, or too few.
        """
        if self.choice not in CHOICES:
            raise UnknownNameError("choice of calibration pictures", self.choice, CHOICES)
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such folder of pictures to calibrate on")
        found = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise InputError(f"{self.folder} has no pictures to calibrate on ({', '.join(SUFFIXES)}): give some of what the model will see")
        if len(found) < self.images:
            raise InputError(f"{self.folder} has {len(found)} pictures, and {self.images} are asked for: give more, or ask for {len(found)} with "
                             f"--calibration-images {len(found)}")
        most = self.images * (CANDIDATES if self.choice == "cover" else 1)
        drawn = np.random.default_rng(self.seed).permutation(len(found))[:most]
        return [found[n] for n in sorted(drawn)]


def cover(largest: Mapping[str, NDArray[np.float32]], count: int) -> list[int]:
    """Pictures that together reach what the channels of every tensor reach, then those that differ most from the ones taken.

    A greedy weighted set cover of the outlier channels (as arXiv 2604.24008 proposes for text; what is an outlier, and when it is covered, are
    ours): a channel whose largest number is at least half of its tensor's is covered by a picture in which it reaches 0.9 of that, and weighs what it
    has of the tensor's largest. What is left of the count is filled by farthest points, in the largest numbers of all channels.

    Args:
        largest: of each tensor the largest absolute number of each channel of each picture, [pictures, channels].
        count: pictures to take, at most as many as there are.

    Returns:
        Their indices, in the order in which they were taken. Ties go to the lower index.
    """
    shares = np.concatenate([rows / max(float(rows.max()), LEAST) for rows in largest.values()], axis=1)  # [pictures, channels]
    most = shares.max(0)
    weights = np.where(most >= OUTLIER, most, 0)
    covers = shares >= REACHED * most
    taken: list[int] = []
    while weights.any() and len(taken) < count:
        taken.append(int((covers @ weights).argmax()))
        weights[covers[taken[-1]]] = 0
    return _farthest(shares, taken or [0], count)


def _farthest(points: NDArray[np.float32], taken: Sequence[int], count: int) -> list[int]:
    """Adds to what is taken the point that is farthest from all of it, until there are so many."""
    found = list(taken)
    distances = np.min([np.square(points - points[n]).sum(1) for n in found], axis=0)
    while len(found) < count:
        distances[found] = -1  # a copy of a picture is at no distance, and may be taken, but none is taken twice
        found.append(int(distances.argmax()))
        distances = np.minimum(distances, np.square(points - points[found[-1]]).sum(1))
    return found
