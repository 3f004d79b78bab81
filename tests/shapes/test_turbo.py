"""`shapes-turbo` is distilled on the device asked for: every tensor of a step, the teacher's pairs and the captions' states."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffalign.shapes.train import base, loop, text, turbo

FEW = loop.LoopConfig(steps=2, lr=1e-3, warmup=1)
LITTLE = turbo.TurboConfig(pairs=64, pair_steps=1, warm_steps=1, batch=2, pair_batch=1)


def moved(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """`module.to(device)` for tensors without storage, whose parameters torch cannot swap."""
    for part in module.modules():
        for name, tensor in part.named_parameters(recurse=False):
            setattr(part, name, torch.nn.Parameter(tensor.detach().to(device), requires_grad=tensor.requires_grad))
        for name, tensor in part.named_buffers(recurse=False):
            part.register_buffer(name, tensor.to(device))
    return module


def test_a_step_never_mixes_devices(tmp_path, monkeypatch):
    """On tensors that know their device and shape and have no values, of an accelerator that need not be there."""
    losses = []

    def both_steps(trainee, loss_of, label, companions=()):
        for step in (0, 1):  # on the pairs alone, then with the critic
            losses.append(loss_of(step, torch.Generator().manual_seed(step))[0])

    tokenizer = text.build_tokenizer()
    for family in (torch.nn.Module, turbo.UNet2DConditionModel, turbo.CLIPTextModel):
        monkeypatch.setattr(family, "to", moved)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 0.0)
    monkeypatch.setattr(torch.Tensor, "backward", lambda tensor: None)
    monkeypatch.setattr(turbo.DDIMScheduler, "step", lambda scheduler, eps, t, x: SimpleNamespace(prev_sample=x + eps))
    monkeypatch.setattr(turbo, "copy", SimpleNamespace(deepcopy=lambda unet: moved(base.build_unet(), "cuda")))
    monkeypatch.setattr(turbo, "save_file", lambda *given: None)
    monkeypatch.setattr(turbo.os, "replace", lambda *given: None)
    monkeypatch.setattr(loop, "train", both_steps)
    with FakeTensorMode():
        turbo.train(tmp_path, base.build_unet(), text.build_encoder(tokenizer), tokenizer, FEW, LITTLE, scenes=2, device="cuda")
        assert [loss.device.type for loss in losses] == ["cuda", "cuda"]
        with pytest.raises(RuntimeError, match="device"):
            losses[0].reshape(1) + torch.ones(1)  # such tensors do tell
