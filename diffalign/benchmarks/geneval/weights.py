"""The weights that GenEval's detector and colour classifier run on, and what a result made with them is called.

- an mmdet 2.x checkpoint file: the official detector, results are "GenEval";
- "hf": the weights of transformers' hub (Facebook's own training, CC BY-NC 4.0). Another training of the same network, so scores near the
  thresholds differ and results are "GenEval-HF".
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPModel, CLIPTokenizer, Mask2FormerForUniversalSegmentation

from diffalign.benchmarks.geneval.colors import ClipColors
from diffalign.benchmarks.geneval.options import OFFICIAL_URL
from diffalign.benchmarks.geneval.prompts import OBJECTS
from diffalign.benchmarks.geneval.scorer import GenEvalScorer
from diffalign.benchmarks.models.mask2former import Mask2FormerDetector
from diffalign.benchmarks.models.mask2former_checkpoint import load_mmdet
from diffalign.benchmarks.models.pretrained import load_model, load_part

OFFICIAL = "743b7d99"
HUB_DETECTOR = "facebook/mask2former-swin-small-coco-instance"
HUB_CLIP = "openai/clip-vit-large-patch14"


def load_scorer(detector: str, clip: str = HUB_CLIP, device: str = "cpu") -> GenEvalScorer:
    """The scorer for `detector`: an mmdet checkpoint file, "hf", or a transformers folder; `clip`: a hub id or a folder."""
    found, colors = load_detector(detector, device), load_colors(clip, device)
    return GenEvalScorer(found, colors, f"{found.version}; colours by {colors.version}")


def load_detector(source: str, device: str = "cpu") -> Mask2FormerDetector:
    """Raises FileNotFoundError saying where to get the checkpoint, ValueError where the weights do not fit."""
    path = Path(source)
    if source != "hf" and path.suffix != ".pth" and not path.is_dir():
        raise FileNotFoundError(f"the detector must be a .pth file, a folder or 'hf'; got {source!r}. The official file: {OFFICIAL_URL}")
    if path.suffix == ".pth":
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; download it from {OFFICIAL_URL}")
        model, digest = load_mmdet(path)
        version = f"GenEval (Mask2Former mmdet {digest})" if digest == OFFICIAL else f"GenEval with the detector {digest}"
    else:
        name = HUB_DETECTOR if source == "hf" else source
        model = load_model(Mask2FormerForUniversalSegmentation, name, unused=lambda key: "swin.layernorm" in key or "empty_weight" in key)
        version = f"GenEval-HF (Mask2Former {name})"
    return Mask2FormerDetector(model.to(device, torch.float32), OBJECTS, version)


def load_colors(source: str = HUB_CLIP, device: str = "cpu") -> ClipColors:
    """CLIP from the hub or a folder. Raises ValueError where tensors are missing, OSError where it cannot be had."""
    return ClipColors(load_model(CLIPModel, source, device), load_part(CLIPTokenizer, source), f"CLIP {source}")
