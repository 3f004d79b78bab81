"""Shared fixtures, one thread, no network."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub; a test that reaches for the network is wrong

torch.set_num_threads(1)


@pytest.fixture
def pipe():
    """A fresh tiny aligned Stable Diffusion pipeline."""
    from tests.tiny import tiny_stable_diffusion

    return tiny_stable_diffusion()


@pytest.fixture
def stock():
    """The stock pipeline with the same weights as `pipe`."""
    from diffusers import StableDiffusionPipeline

    from tests.tiny import tiny_stable_diffusion

    return tiny_stable_diffusion(StableDiffusionPipeline)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved tiny pipeline. Tests that damage it copy it first."""
    from tests.tiny import tiny_stable_diffusion

    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    tiny_stable_diffusion().save_pretrained(folder)
    return folder
