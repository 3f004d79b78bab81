"""`hpsv3++`: HPSv3++, Qwen3-VL-8B with a head that knows how able the generator is and how far it was optimised. Score = mu.

Paper: Liu et al., HPSv3++ (arXiv 2606.14657). Weights: hpsv3++.pth, a plain state dict in the names of transformers from 4.57 on.

    h = hidden state at <|Reward|> of: image, HPSv3's instruction without its part on text alignment, "... of this image: <|Reward|>"
    c = sigmoid(capability(h))           how able the model is that made the picture, judged from the picture
    (gamma, beta) = film(condition(c, t))           t: iteration of the fine-tuning that uses this reward, from 0 to 1
    (mu, log sigma) = MLP((1 + gamma) h + beta)

t is 0 unless the option `iteration` says otherwise; inside a fine-tuning the authors raise it linearly from 0.3 to 1.

The image is resized twice, as there: to 200,704 pixels in sides of multiples of 28, which are HPSv3's, and then by Qwen3-VL's own
processor to multiples of 32. The released code pools c over its batch, so that there a score depends on its batch mates; here it is each
picture's own, which is what that code computes when it is given one. Everything after h is float32; there c is bfloat16.
Read from the released code; the weights themselves were never at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLModel

from diffalign.files import read_json
from diffalign.reward_models.base import Images, RewardModel, Scores
from diffalign.reward_models.checkpoints import load_strict, read_weights, weights_file, without_weights
from diffalign.reward_models.hpsv3 import HEAD, PIXELS, REWARD, read_instruction
from diffalign.reward_models.pixels import resize
from diffalign.reward_models.qwen_pixels import QwenPixels, read_qwen_pixels
from diffalign.reward_models.qwen_text import last, pad, read_chat, show
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec

FIRST = QwenPixels(14, 2, 2, (0.0,) * 3, (1.0,) * 3, PIXELS, PIXELS)  # whose sizes the first resizing has
NAMES = {
    "model.": "backbone.",
    "rm_head.": "head.",
    "cond_encoder.": "condition.",
    "film_gen.": "film.",
    "cap_encoder.": "capability.",
}
UNUSED = ("lm_head.", "capability.pool_attn.")  # weighs the pictures of a group; of one it makes 1
EMBEDDING = "backbone.language_model.embed_tokens.weight"


class HPSv3Plus(RewardModel):
    """Gradients reach the image through all of it, the judged capability too. Prompt and image share all layers: nothing to drop.

    Option iteration: t in [0, 1], see above.
    """

    full_precision = ("head", "condition", "film", "capability")

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        self.iteration = float(spec.options["iteration"])
        if not 0 <= self.iteration <= 1:
            raise ValueError(f"reward {self.name!r}: option iteration must lie between 0 and 1, got {spec.options['iteration']!r}")
        path = weights_file(sources["model"], "hpsv3++.pth")
        tensors = {rename(name): tensor for name, tensor in read_weights(path, None).items()}
        parts = build(sources["backbone"].file("config.json"), tensors, path)
        self.backbone, self.head = parts["backbone"], parts["head"]
        self.condition, self.film, self.capability = parts["condition"], parts["film"], parts["capability"]
        self.chat = read_chat(sources["backbone"])
        self.reward_token = len(self.chat.tokenizer)  # the one token that is added
        self.pixels = read_qwen_pixels(sources["backbone"].file("preprocessor_config.json"))
        rows = len(tensors[EMBEDDING])
        if rows != self.reward_token + 1:
            raise ValueError(f"{path} has {rows} tokens; there should be one more than the {self.reward_token} of {sources['backbone']}")
        self.instruction = instruction().partition(REWARD)[0]
        self.train(False)

    def encode_text(self, prompts: list[str]) -> list[Int[Tensor, " l"]]:
        texts = [self.instruction.replace("{text_prompt}", self.chat.cut(self.name, prompt)) for prompt in prompts]
        return [torch.tensor([*self.chat.before, *self.chat.ids(text), self.reward_token]) for text in texts]

    def collate(self, texts: list[Tensor]) -> Int[Tensor, "b l"]:
        return pad(texts)

    def score(self, images: Images, texts: Int[Tensor, "b l"] | None) -> Scores:
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        patches, (rows, columns) = self.pixels(resize(images, *FIRST.size(*images.shape[-2:]), self.pixels.bytes_between))
        ids = show(texts, self.chat.column, rows * columns // self.pixels.merge**2)
        states = self.backbone(
            input_ids=ids.clamp(min=0),
            mm_token_type_ids=(ids == self.chat.image).int(),
            pixel_values=patches.flatten(0, 1),
            image_grid_thw=torch.tensor([[1, rows, columns]] * len(ids), device=ids.device),
            use_cache=False,
        ).last_hidden_state
        return self.read(last(states, ids))[:, 0]

    def read(self, states: Float[Tensor, "b d"]) -> Float[Tensor, "b 2"]:
        """mu and log sigma of the states at <|Reward|>."""
        states = states.to(self.head[0].weight.dtype)
        able = self.capability.out_proj(self.capability.proj(states)).sigmoid()
        gamma, beta = self.film(self.condition(torch.cat([able, torch.full_like(able, self.iteration)], dim=1))).chunk(2, dim=1)
        return self.head((1 + gamma) * states + beta).float()


def instruction() -> str:
    """HPSv3's instruction without what it says of text alignment, as the released code of HPSv3++ has it."""
    before, _, rest = read_instruction().partition("\n**Text Alignment:**")
    return before + rest[rest.index("Textual prompt - ") :]


def rename(name: str) -> str:
    """The checkpoint's name of a tensor -> ours; others stay as they are."""
    return next((new + name.removeprefix(old) for old, new in NAMES.items() if name.startswith(old)), name)


def build(config_path: Path, tensors: dict[str, Tensor], path: Path) -> nn.ModuleDict:
    """All parts with their weights; those after the backbone in float32. Raises ValueError naming what does not fit."""
    config = read_json(config_path, ("vision_config", "text_config"))
    needed = (EMBEDDING, *(f"head.{i}.weight" for i in HEAD), "condition.0.weight", "film.0.weight", "capability.proj.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ValueError(f"{path} is no HPSv3++ checkpoint; missing: {missing[0]}")
    try:
        config = Qwen3VLConfig.from_dict(config)
        config.text_config.vocab_size = len(tensors[EMBEDDING])
        backbone = without_weights(lambda: Qwen3VLModel(config))
    except Exception as error:  # transformers validates configurations with exceptions of its own
        raise ValueError(f"{config_path} does not describe a Qwen3-VL ({error})") from error
    first, second, third = (nn.Linear(*reversed(tensors[f"head.{i}.weight"].shape)) for i in HEAD)
    width, known = config.text_config.hidden_size, len(tensors["condition.0.weight"])
    parts = nn.ModuleDict(
        {
            "backbone": backbone,
            "head": nn.Sequential(first, nn.ReLU(), nn.Identity(), second, nn.ReLU(), third),
            "condition": nn.Sequential(nn.Linear(2, known), nn.GELU(), nn.Linear(known, known)),
            "film": nn.Sequential(nn.Linear(known, width), nn.ReLU(), nn.Linear(width, 2 * width)),
            "capability": nn.ModuleDict({"proj": nn.Linear(width, known), "out_proj": nn.Linear(known, 1)}),
        }
    )
    load_strict(parts, tensors, path, unused=UNUSED)
    for name in HPSv3Plus.full_precision:
        parts[name].float()
    return parts
