"""Captions are true of their scenes by GenEval's rules, wrong captions are false, in exactly the respect that they name."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from diffalign.shapes.captions import LARGE_RADIUS, WRONGS, draw_scene, long_caption, relations, short_caption, wrong_caption
from diffalign.shapes.prompts import CARRIERS
from diffalign.shapes.scenes import SIZE, Scene
from tests.shapes.grammar import OPPOSITE, Said, parse, true_verdict

SCENES = 400


def drawn(seed: int, count: int = SCENES) -> list[tuple[np.random.Generator, Scene]]:
    rng = np.random.default_rng(seed)
    return [(rng, draw_scene(rng, "test")) for _ in range(count)]


def test_the_rules_used_here_can_tell_true_from_false():
    """Guards the tests below: most captions of one scene are false of another."""
    captions = [(scene, parse(short_caption(rng, scene))) for rng, scene in drawn(0)]
    others = captions[1:] + captions[:1]
    held = [true_verdict(scene, other.metadata()).correct for (scene, _), (_, other) in zip(captions, others, strict=True)]
    assert np.mean(held) < 0.2


def test_short_captions_are_true():
    said = Counter()
    for rng, scene in drawn(1):
        for _ in range(3):
            text = short_caption(rng, scene)
            caption = parse(text)
            verdict = true_verdict(scene, caption.metadata())
            assert verdict.correct, (text, scene, verdict.reason)
            said.update(
                relation=caption.relation is not None,
                number=caption.number > 1,
                colored=bool(caption.color_pairs()),
                plain=not caption.color_pairs(),
                two=len(caption.things) == 2,
            )
    assert min(said.values()) > 50, said


def test_long_captions_are_true_of_every_thing():
    columns, rows = ("left", "center", "right"), ("top", "middle", "bottom")
    for rng, scene in drawn(2):
        body = long_caption(rng, scene)
        body = body.removeprefix(next(c for c in CARRIERS if body.startswith(c)))
        told = Counter(parse(phrase).things[0] for phrase in body.split(" and "))
        truth = Counter(
            Said(
                t.shape,
                t.color,
                "large" if t.radius >= LARGE_RADIUS else "small",
                f"{rows[int(t.y // (SIZE / 3))]} {columns[int(t.x // (SIZE / 3))]}",
            )
            for t in scene.things
        )
        assert told == truth, body


def test_wrong_captions_are_false():
    kinds = Counter()
    for rng, scene in drawn(3):
        for _ in range(3):
            text, kind = wrong_caption(rng, scene)
            kinds[kind] += 1
            assert not true_verdict(scene, parse(text).metadata()).correct, (text, kind, scene)
    assert set(kinds) == set(WRONGS)
    assert min(kinds.values()) > 50, kinds


@pytest.mark.parametrize("kind", WRONGS)
def test_a_wrong_caption_is_wrong_in_the_one_respect_it_names(kind):
    checked = 0
    for rng, scene in drawn(4):
        text, named = wrong_caption(rng, scene)
        if named != kind:
            continue
        checked += 1
        caption, things = parse(text), {t.shape: t for t in scene.things}
        if kind == "count":
            (said,) = caption.things
            assert said.shape in things
            assert caption.number != len(scene.things)
            assert said.color is None
        elif kind == "color":
            wrong = [t for t in caption.things if things[t.shape].color != t.color]
            assert len(wrong) == 1
        elif kind == "shape":
            strangers = [t for t in caption.things if t.shape not in things]
            assert len(strangers) == 1
            assert Counter(t.color for t in caption.things) == Counter(t.color for t in scene.things)
        elif kind == "swapped_colors":
            a, b = caption.things
            assert (a.color, b.color) == (things[b.shape].color, things[a.shape].color)
            assert a.color != b.color
        else:
            a, b = (things[t.shape] for t in caption.things)
            assert OPPOSITE[caption.relation] in relations(a, b)
            assert all(t.color in (None, things[t.shape].color) for t in caption.things)
        if kind in ("color", "swapped_colors") and caption.relation:
            a, b = (things[t.shape] for t in caption.things)
            assert caption.relation in relations(a, b)
    assert checked > 20


def test_the_same_generator_state_gives_the_same_captions():
    first, second = np.random.default_rng(9), np.random.default_rng(9)
    for _ in range(30):
        a, b = draw_scene(first), draw_scene(second)
        assert short_caption(first, a) == short_caption(second, b)
        assert long_caption(first, a) == long_caption(second, b)
        assert wrong_caption(first, a) == wrong_caption(second, b)
