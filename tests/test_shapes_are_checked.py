"""The hook of tests/conftest.py: array shapes in annotations are checked at run time, and wrong ones are found."""

from __future__ import annotations

import importlib

import jaxtyping
import pytest
import torch


@pytest.mark.parametrize(
    ("where", "arguments", "name"),
    [
        ("diffalign.training.data:covering", (torch.zeros(4, 2, 2), None), "image"),
        ("diffalign.shapes.measures:vendi_score", (torch.zeros(2, 3, 4),), "features"),
        ("diffalign.methods.particles:systematic", (torch.zeros(2, 2), 0, 0), "logs"),
    ],
)
def test_a_wrong_shape_is_found(where, arguments, name):
    module, _, function = where.partition(":")
    with pytest.raises(jaxtyping.TypeCheckError, match=f"parameter '{name}'"):
        getattr(importlib.import_module(module), function)(*arguments)


@pytest.mark.parametrize(
    "module", ["cli.generate", "evaluation.generation", "reports.statistics", "pipelines.aligned", "reward_models.base"]
)
def test_packages_whose_tensors_have_no_annotation_yet_are_loaded_by_it_too(module):
    assert type(importlib.import_module(f"diffalign.{module}").__spec__.loader).__name__ == "_JaxtypingLoader"
