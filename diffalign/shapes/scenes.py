"""Scenes of coloured shapes on a plain ground, and the renderer that draws them.

A scene is a tuple of things; a thing is a shape name, a colour name, a centre and a radius in pixels of a 64 x 64 image, y downward.
Drawing is exact and deterministic: each outline is filled at four times the size and averaged down, so edges are anti-aliased.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SUPERSAMPLING = 4
GROUND = (144, 144, 144)

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")

# GenEval's ten colour names in its order. The values are ours: far from one another and from the ground.
COLORS = {
    "red": (220, 30, 30),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (130, 40, 170),
    "pink": (250, 130, 190),
    "brown": (115, 65, 30),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}

RADIUS_RANGES = {1: (10.0, 13.5), 2: (10.0, 13.5), 3: (9.0, 12.0), 4: (8.5, 11.0)}  # pixels, by how many things share the ground
REACH = 1.14  # no outline leaves this many radii (the square and the triangle have corners outside the unit circle)
GAP = 2.5  # least distance in pixels between the reaches of two things, so that the detector can tell them apart
MARGIN = 2.0  # least distance in pixels from a thing to the edge of the image


@dataclass(frozen=True)
class Thing:
    """One coloured shape; centre and radius in pixels. The radius is that of the circle the outline is inscribed in."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) of the drawn outline, in pixels."""
        points = outline(self.shape) * self.radius + (self.x, self.y)
        (x1, y1), (x2, y2) = points.min(axis=0), points.max(axis=0)
        return float(x1), float(y1), float(x2), float(y2)


@dataclass(frozen=True)
class Scene:
    """Things that do not touch one another, on the plain ground."""

    things: tuple[Thing, ...]


@cache
def outline(shape: str) -> np.ndarray:
    """Outline of a shape for radius 1, within REACH of its centre: "n 2" points (x, y), y downward. A ring has its outer edge's."""
    if shape in ("circle", "ring"):
        angle = np.linspace(0, 2 * math.pi, 96, endpoint=False)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if shape == "square":
        return 0.8 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float)
    if shape == "triangle":
        return np.array([(0, -1.05), (0.9, 0.7), (-0.9, 0.7)], dtype=float)
    if shape == "diamond":
        return np.array([(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)], dtype=float)
    if shape == "star":
        angle = -math.pi / 2 + np.arange(10) * math.pi / 5
        radius = np.where(np.arange(10) % 2 == 0, 1.1, 0.45)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    if shape == "cross":
        w = 0.33
        corners = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]
        return np.array(corners, dtype=float)
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 96, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return np.stack([x / 16, (y - 2.5) / 15], axis=1)
    raise ValueError(f"unknown shape {shape!r}; the shapes are {', '.join(SHAPES)}")


RING_HOLE = 0.5  # radius of the hole as a fraction of the ring's radius


def coverage(thing: Thing, size: int = SIZE) -> np.ndarray:
    """How much of each pixel a thing covers: "size size" floats in [0, 1], for an image `size` pixels wide."""
    scale = SUPERSAMPLING * size / SIZE
    canvas = Image.new("L", (SUPERSAMPLING * size, SUPERSAMPLING * size), 0)
    draw = ImageDraw.Draw(canvas)
    centre = np.array([thing.x, thing.y])
    draw.polygon([tuple(p) for p in (outline(thing.shape) * thing.radius + centre) * scale], fill=255)
    if thing.shape == "ring":
        draw.polygon([tuple(p) for p in (outline("circle") * RING_HOLE * thing.radius + centre) * scale], fill=0)
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255.0


def render(scene: Scene, size: int = SIZE) -> np.ndarray:
    """Draw a scene: "size size 3" uint8, RGB. The same scene always gives the same bytes."""
    image = np.empty((size, size, 3), dtype=np.float32)
    image[:] = GROUND
    for thing in scene.things:
        alpha = coverage(thing, size)[..., None]
        image = image * (1 - alpha) + alpha * np.array(COLORS[thing.color], dtype=np.float32)
    return np.round(image).astype(np.uint8)


def place(rng: np.random.Generator, kinds: list[tuple[str, str]], attempts: int = 40) -> Scene | None:
    """Put (shape, colour) pairs at random places without touching; None where no free place was found in `attempts` draws."""
    things: list[Thing] = []
    low, high = RADIUS_RANGES[len(kinds)]
    for shape, color in kinds:
        for _ in range(attempts):
            radius = rng.uniform(low, high)
            reach = REACH * radius + MARGIN
            x, y = rng.uniform(reach, SIZE - reach, size=2)
            thing = Thing(shape, color, float(x), float(y), float(radius))
            if all(_apart(thing, other) for other in things):
                things.append(thing)
                break
        else:
            return None
    return Scene(tuple(things))


def _apart(a: Thing, b: Thing) -> bool:
    return math.hypot(a.x - b.x, a.y - b.y) > REACH * (a.radius + b.radius) + GAP
