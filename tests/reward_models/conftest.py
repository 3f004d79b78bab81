"""Tiny random checkpoints of the trained rewards, in exactly the layout of the real ones."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from diffalign import reward_models
from tests.reward_models import tiny_clips, tiny_vlms

PROMPTS = ["a red circle", "a photo of a blue square above a red ring", "three stars"]


def layout(tokenizer) -> dict:
    return {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 2.0},
        "text_cfg": {
            "context_length": tokenizer.model_max_length,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "./",
            "width": 48,
            "heads": 3,
            "layers": 2,
            "mlp_ratio": 3.0,
            "pool_type": "eos",
            "eos_id": tokenizer.eos_token_id,
            "pad_id": tokenizer.pad_token_id,
        },
    }


@pytest.fixture(scope="session")
def tokenizer():
    from diffalign.shapes.train.text import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_clip(tokenizer):
    """A random open_clip model in float32, with biases and layer norms away from their initial zeros and ones."""
    import open_clip

    torch.manual_seed(5)
    model = open_clip.CLIP(**layout(tokenizer))
    for name, p in model.named_parameters():
        if name != "logit_scale":
            p.data.add_(0.05 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="session")
def weights(tmp_path_factory, tokenizer, tiny_clip) -> Path:
    """The folder that holds one folder for each reward with weights. Tests that damage it copy what they need first."""
    from diffalign.reward_models.shapes_captioner import Captioner, CaptionerConfig
    from diffalign.reward_models.shapes_film import FilmConfig, FilmScorer
    from diffalign.shapes.train.rewards_aesthetic import build_head
    from diffalign.shapes.train.rewards_captioner import save_reward
    from diffalign.shapes.train.rewards_clip import save_clip
    from diffalign.shapes.train.rewards_convert import convert, save_half
    from diffalign.shapes.train.rewards_preference import save_preference
    from diffalign.shapes.train.rewards_watch import save_watch

    root = tmp_path_factory.mktemp("rewards")
    save_clip(root / "shapes-clip", tiny_clip, layout(tokenizer), tokenizer)
    save_preference(root / "shapes-preference", convert(layout(tokenizer), tiny_clip.state_dict()), tokenizer)
    head = {"features": "shapes-clip", "width": 32, "patches": 16, "channels": 4, "hidden": 8}
    torch.manual_seed(6)
    save_half(build_head(32, 16, 4, 8).state_dict(), root / "shapes-aesthetic" / "head.safetensors")
    (root / "shapes-aesthetic" / "config.json").write_text(json.dumps(head))
    torch.manual_seed(7)
    sizes = {"width": 24, "heads": 3, "image_layers": 1, "text_layers": 1, "stem": 4}
    captioner = Captioner(CaptionerConfig(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, **sizes))
    for p in captioner.parameters():
        p.data.mul_(1.5)  # or its gradients are too small for finite differences in float32
    save_reward(root / "shapes-reward", captioner, tokenizer)
    watch = FilmScorer(FilmConfig(len(tokenizer), tokenizer.eos_token_id, channels=8, text=48, blocks=2))
    save_watch(root / "shapes-watch", watch, tokenizer)
    tiny_clips.write_all(root)
    tiny_vlms.write_all(root)
    return root


@pytest.fixture(scope="session")
def server(weights):
    """The address of a server of `http` on this machine, behind which is shapes-clip."""
    from diffalign.reward_models.http_server import serve

    server = serve(reward_models.load("shapes-clip", source=weights / "shapes-clip"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield "http://{}:{}/score".format(*server.server_address[:2])
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def load(weights, server):
    """load(name): a fresh reward, from the tiny checkpoints where it has weights, through `reward_models.load`; in float32, as the tests'
    tolerances need it.

    A reward of several parts has a folder for each. What a row says of its checkpoint's architecture holds for the tiny one while it loads.
    """

    def fresh(name: str, root: Path = weights, dtype: str | None = "float32", **options):
        spec = reward_models.SPECS[name]
        parts = {part: root / name / part for part in spec.checkpoint}
        source = server if name == "http" else parts if len(parts) > 1 else root / name if parts else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(reward_models.SPECS, name, tiny_clips.tiny_spec(spec))
            return reward_models.load(name, source=source, dtype=dtype, options=options)

    return fresh


@pytest.fixture
def images() -> torch.Tensor:
    """Three images with values well inside [0, 1]."""
    return 0.3 + 0.4 * torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
