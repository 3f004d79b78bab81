"""Shared fixtures, one thread, no network, and array shapes in annotations checked at run time where they are known to hold."""

from __future__ import annotations

import os
import sys

# Before torch is imported: `set_num_threads` is for this thread alone, and a server's would sum in another order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from jaxtyping import install_import_hook

import tests.shapecheck

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub; a test that reaches for the network is wrong

torch.set_num_threads(1)

# The hook imports its checker by name, and finds no submodule of `tests` under pytest's importlib mode.
sys.modules["shapecheck"] = tests.shapecheck
# Not benchmarks, whose tests give arrays of other dtypes than the annotations say. Add a module here once its annotations hold.
CHECKED = [
    *("pipelines", "reward_models", "methods", "rewards", "training", "evaluation", "reports", "cli"),
    *("amortise", "backbone", "diffusion", "guidance", "loop", "noise", "noise_policy", "sampling", "tuning"),
    *("shapes.measures", "shapes.train.autoencoder", "shapes.train.flow", "shapes.train.turbo"),
]
install_import_hook([f"diffalign.{name}" for name in CHECKED], "shapecheck.check_shapes")


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
