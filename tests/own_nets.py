"""A module of a user's own, whose functions recipes name."""

from __future__ import annotations

from torch import Tensor, nn


class Residual(nn.Module):
    """A stem, a residual branch, and a head on the means."""

    def __init__(self, width: int, classes: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width))
        self.branch = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, width, 3, padding=1),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.branch(x)).relu().mean((2, 3)))


def residual(width: int = 8, classes: int = 10, channels: int = 1) -> nn.Module:
    return Residual(width, classes, channels)


class Nested:
    residual = staticmethod(residual)


class TwoAnswers(Residual):
    """In training a second answer, as auxiliary heads give it."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        answer = super().forward(x)
        return (answer, answer) if self.training else answer


def two_answers() -> nn.Module:
    return TwoAnswers(8, 10, 1)


def sized() -> nn.Module:
    """For images of 16 pixels."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


def maps() -> nn.Module:
    return nn.Conv2d(1, 10, 1)


def number() -> int:
    return 3


def broken() -> nn.Module:
    raise RuntimeError("the disk is gone")


not_a_function = 3
