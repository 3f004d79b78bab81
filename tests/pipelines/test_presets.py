"""The table of models: complete, honest about what is implemented, and light to import."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from diffalign.pipelines import presets


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_row_is_usable(name):
    preset = presets.PRESETS[name]
    assert preset.name == name
    assert preset.steps >= 1
    assert preset.guidance_scale >= 0
    assert preset.height % 8 == preset.width % 8 == 0
    assert preset.licence
    assert preset.half in ("float16", "bfloat16", "float32")
    if not preset.source.startswith(presets.PACKAGED):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", preset.source)
    assert {"num_inference_steps", "guidance_scale", "height", "width"} <= set(preset.defaults())
    assert len(preset.timesteps or ()) in (0, preset.steps)


def test_names_are_unique():
    assert len(presets.PRESETS) == len(presets._TABLE)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown pipeline 'sd-turb'; did you mean 'sd-turbo'\? presets are shapes, "):
        presets.get_preset("sd-turb")
    with pytest.raises(ValueError, match="unknown pipeline 'qqqqqq'; presets are shapes"):
        presets.get_preset("qqqqqq")


def test_classes_that_are_missing_say_what_is_there():
    with pytest.raises(ValueError, match=r"the folder x is a KolorsPipeline.*StableDiffusionPipeline, "):
        presets.family_of_stock_class("KolorsPipeline", "the folder x")


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_has_a_family_whose_class_is_there(name):
    import importlib

    import diffusers

    preset = presets.PRESETS[name]
    family = presets.FAMILIES[preset.family]
    cls = getattr(importlib.import_module(family.module), family.aligned_class)
    assert cls.stock_class is getattr(diffusers, family.stock_class)
    assert set(preset.defaults()) <= set(cls.search_arguments), "a default that a search would refuse"
    if preset.scheduler:
        assert hasattr(diffusers, preset.scheduler)


def test_a_hub_id_finds_its_preset_where_that_is_unambiguous():
    assert presets.preset_of_source("stabilityai/sd-turbo") is presets.PRESETS["sd-turbo"]
    assert (
        presets.preset_of_source("stabilityai/stable-diffusion-xl-base-1.0") is presets.PRESETS["sdxl"]
    )  # hyper-sdxl needs more than its source
    assert presets.preset_of_source("someone/else") is None


def test_listing_names_imports_nothing_heavy():
    heavy = "[m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules]"
    code = f"import sys, diffalign, diffalign.pipelines.presets, diffalign.hub; print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
