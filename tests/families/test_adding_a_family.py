"""The family of docs/adding_a_family.md, as it stands there, owes and holds what every family does."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from diffalign.pipelines.guidance import layouts
from tests.families import test_contract as contract
from tests.families.parts import WIDTH, autoencoder, finish, tiny_t5_tokenizer, wake
from tests.families.tiny import Row
from tests.places import ROOT


def build(cls: type, dtype: torch.dtype) -> Any:
    tokenizer = tiny_t5_tokenizer()
    config = UMT5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    parts = {"text_encoder": UMT5EncoderModel(config), "vae": autoencoder(), "transformer": wake(transformer)}
    return cls(**finish(parts, dtype), tokenizer=tokenizer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73))


@dataclass(frozen=True)
class Example(Row):
    cls: Any = None

    def aligned_class(self) -> Any:
        return self.cls


@pytest.fixture(scope="module")
def row():
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "adding_a_family.md").read_text(), re.M | re.S)
    module = ModuleType("aura_flow")
    sys.modules["aura_flow"] = module
    exec(compile(code, "docs/adding_a_family.md", "exec"), module.__dict__)
    yield Example("auraflow", build, {"num_inference_steps": 3, "guidance_scale": 3.5, "height": 64, "width": 64},
                  other_size={"height": 48, "width": 80}, cls=module.AlignedAuraFlowPipeline)  # fmt: skip
    del sys.modules["aura_flow"]


@pytest.fixture(scope="module")
def shared(row):
    return row.pipeline(row.aligned_class())


def test_it_is_the_stock_pipeline(row, shared):
    assert row.aligned_class().stock_class is AuraFlowPipeline
    for dtype in (torch.float32, torch.bfloat16):
        contract.test_without_plugins_it_is_the_stock_pipeline_to_the_bit(row, dtype)
    contract.test_another_size_is_the_stock_one_too(row, shared)


def test_its_loop_is_the_stock_loop(row, shared):
    contract.test_noise_to_images_is_the_plain_call_and_differentiates(row, shared)
    contract.test_rollout_with_the_stock_scheduler_is_the_stock_loop(row, shared)
    contract.test_ddim_is_the_stock_loop_of_first_order_schedulers(row, shared)
    contract.test_rollout_is_differentiable_and_checkpointing_changes_nothing(row, shared)
    contract.test_a_batch_is_its_singles(row, shared)


def test_methods_run_on_it(row, shared, monkeypatch, caplog):
    monkeypatch.setattr(layouts, "LAYOUTS", {
        **layouts.LAYOUTS, "AuraFlowPipeline": layouts.Layout(scale=None, guidance_from_encoder=True, time_factor=1e-3)
    })  # fmt: skip
    contract.test_adaptive_guidance_runs(row, shared)
    for method in ("reno", "best-of-n"):
        contract.test_a_search_runs_and_its_noise_makes_the_same_image_again(row, shared, method)
    contract.test_images_become_the_latents_that_decode_inverts(row, shared)
    contract.test_what_no_encoder_reads_is_reported(row, shared, caplog)
