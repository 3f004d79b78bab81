"""Guidance methods on compiled networks. The backend "eager" traces and guards as others do, and computes as the plain network does."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.methods.adaptive_guidance import AdaptiveGuidance
from diffalign.methods.guidance_rivals import FixedFraction
from diffalign.pipelines.guidance.hook import guide
from tests.tiny_families import FAMILIES

HALF = FixedFraction(fraction=0.5)
RECORD = AdaptiveGuidance(threshold=math.inf)


@pytest.mark.parametrize("where", ["in place", *(pytest.param(where, marks=pytest.mark.slow) for where in ("outside", "before"))])
def test_compiled(where):
    torch.compiler.reset()
    family = FAMILIES["sd3"]
    pipe = family.pipeline()
    with guide(pipe, HALF):
        expected = family(pipe, [1, 2], steps=4)
    stock = family(pipe, [1, 2], steps=4)
    if where == "in place":
        pipe.transformer.compile(backend="eager")
    elif where == "outside":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with guide(pipe, HALF) as guided:
        if where == "before":
            pipe.transformer.compile(backend="eager")
        torch.testing.assert_close(family(pipe, [1, 2], steps=4), expected, rtol=1e-5, atol=1e-5)
    assert guided.report.evaluations == [6, 6]
    torch.testing.assert_close(family(pipe, [1, 2], steps=4), stock, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_families(name):
    """Each in place, as people compile: full guidance changes nothing, and half of it is what it was."""
    torch.compiler.reset()
    family = FAMILIES[name]
    pipe = family.pipeline()
    with guide(pipe, HALF):
        expected = family(pipe, [1, 2], steps=4)
    getattr(pipe, family.attribute).compile(backend="eager")
    stock = family(pipe, [1, 2], steps=4)
    with guide(pipe, RECORD):
        assert torch.equal(family(pipe, [1, 2], steps=4), stock)
    with guide(pipe, HALF) as guided:
        torch.testing.assert_close(family(pipe, [1, 2], steps=4), expected, rtol=1e-5, atol=1e-5)
    assert guided.report.evaluations == [6, 6]
    assert torch.equal(family(pipe, [1, 2], steps=4), stock)
