"""`hpsv3`: HPSv3, Qwen2-VL-7B with a head on the token <|Reward|>. Score = the mean mu of a normal preference score.

Paper: Ma et al., HPSv3 (arXiv 2508.03789). Weights: HPSv3.safetensors, in the names transformers 4.45 gave a Qwen2-VL; MIT.

    h = hidden state at <|Reward|> of: image, fixed instruction with the prompt in it, "... of this image: <|Reward|>"
    (mu, log sigma) = MLP(h)             P(A preferred to B) = E sigmoid(z), z ~ N(mu_A - mu_B, sigma_A^2 + sigma_B^2)

Positions. transformers 4.45, with which HPSv3 was trained, gave a Qwen2-VL fed with embeddings the positions 0, 1, 2, ... on all three
rotary axes: time, height and width. Later versions derive rows and columns for the image's tokens from `image_grid_thw`, which changes
scores. We pass 0, 1, 2, ... explicitly.

The model is causal, so what follows <|Reward|> (the original goes on with "END" and the opening of an answer) cannot reach the score; we
leave it out, and pad on the right without a mask for the same reason. The instruction is the published model's own, MIT licence, in
hpsv3_prompt.txt (see hpsv3_prompt.LICENSE). The image is resized to 200,704 pixels, in sides of multiples of 28.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from diffalign.files import read_json
from diffalign.reward_models.base import Images, RewardModel, Scores, check_call
from diffalign.reward_models.checkpoints import load_strict, read_weights, weights_file, without_weights
from diffalign.reward_models.pixels import OPENAI_MEAN, OPENAI_STD
from diffalign.reward_models.qwen_pixels import QwenPixels
from diffalign.reward_models.qwen_text import last, pad, read_chat, show
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec

REWARD = "<|Reward|>"
PIXELS = 256 * 28 * 28
NAMES = {"visual.": "backbone.visual.", "model.": "backbone.language_model.", "rm_head.": "head."}
HEAD = (0, 3, 5)  # places of the linear layers of rm_head; between them ReLUs, and a dropout that does nothing here


class HPSv3(RewardModel):
    """Gradients reach the image through the vision tower and the language model. Prompt and image share all layers: nothing to drop."""

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        path = weights_file(sources["model"], "HPSv3.safetensors")
        tensors = {rename(name): tensor for name, tensor in read_weights(path, None).items()}
        self.backbone, self.head = build(sources["backbone"].file("config.json"), tensors, path)
        self.chat = read_chat(sources["backbone"])
        self.reward_token = len(self.chat.tokenizer)  # the one token that HPSv3 adds
        vision = self.backbone.config.vision_config
        self.pixels = QwenPixels(
            vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, OPENAI_MEAN, OPENAI_STD, PIXELS, PIXELS
        )
        rows = self.backbone.config.text_config.vocab_size
        if rows != self.reward_token + 1:
            raise ValueError(f"{path} has {rows} tokens; there should be one more than the {self.reward_token} of {sources['backbone']}")
        self.instruction = read_instruction().partition(REWARD)[0]
        self.train(False)

    def encode_text(self, prompts: list[str]) -> list[Int[Tensor, " l"]]:
        return [torch.tensor([*self.chat.before, *self.chat.ids(self._text(prompt)), self.reward_token]) for prompt in prompts]

    def _text(self, prompt: str) -> str:
        return self.instruction.replace("{text_prompt}", self.chat.cut(self.name, prompt))

    def collate(self, texts: list[Tensor]) -> Int[Tensor, "b l"]:
        return pad(texts)

    def score(self, images: Images, texts: Int[Tensor, "b l"] | None) -> Scores:
        return self._outputs(images, texts)[:, 0]

    def distribution(self, images: Images, prompts: Sequence[str]) -> tuple[Scores, Scores]:
        """mu, which is the score, and sigma, how unsure the model is of it; both float32. Raises as a call does."""
        check_call(self, images, prompts)
        outputs = self._outputs(images, self._embed(prompts, images.device))
        return outputs[:, 0], outputs[:, 1].exp()

    def _outputs(self, images: Images, texts: Int[Tensor, "b l"]) -> Float[Tensor, "b 2"]:
        patches, (rows, columns) = self.pixels(images)
        ids = show(texts, self.chat.column, rows * columns // self.pixels.merge**2)
        states = self.backbone(
            input_ids=ids.clamp(min=0),
            pixel_values=patches.flatten(0, 1),
            image_grid_thw=torch.tensor([[1, rows, columns]] * len(ids), device=ids.device),
            position_ids=torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape),
            use_cache=False,
        ).last_hidden_state
        return self.head(last(states, ids).to(self.head[0].weight.dtype)).float()


def read_instruction() -> str:
    """The published instruction: {text_prompt} stands for the prompt, <|Reward|> for the token that is scored."""
    return importlib.resources.files("diffalign.reward_models").joinpath("hpsv3_prompt.txt").read_text(encoding="utf-8")


def rename(name: str) -> str:
    """The checkpoint's name of a tensor -> ours; others stay as they are."""
    return next((new + name.removeprefix(old) for old, new in NAMES.items() if name.startswith(old)), name)


def build(config_path: Path, tensors: dict[str, Tensor], path: Path) -> tuple[Qwen2VLModel, nn.Sequential]:
    """The backbone with its weights as stored, and the head in float32. Raises ValueError naming what does not fit."""
    config = read_json(config_path, ("vision_config",))
    embedding = "backbone.language_model.embed_tokens.weight"
    if embedding not in tensors or any(f"head.{i}.weight" not in tensors for i in HEAD):
        raise ValueError(f"{path} is no HPSv3 checkpoint: it needs model.embed_tokens.weight and rm_head.0, rm_head.3 and rm_head.5")
    try:
        config = Qwen2VLConfig.from_dict(config)
        config.text_config.vocab_size = len(tensors[embedding])
        backbone = without_weights(lambda: Qwen2VLModel(config))
    except Exception as error:  # transformers validates configurations with exceptions of its own
        raise ValueError(f"{config_path} does not describe a Qwen2-VL ({error})") from error
    first, second, third = (nn.Linear(*reversed(tensors[f"head.{i}.weight"].shape)) for i in HEAD)
    head = nn.Sequential(first, nn.ReLU(), nn.Identity(), second, nn.ReLU(), third)
    parts = nn.ModuleDict({"backbone": backbone, "head": head})
    load_strict(parts, tensors, path, unused=("lm_head.",))
    return backbone, head.float()
