"""How a Qwen-VL model is spoken to: its chat template with one image and a text of ours, as token ids.

A prompt is ordinary text whatever it contains: special tokens written out in it are spelled, so it can neither end its turn nor show an
image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from diffalign.files import read_json
from diffalign.reward_models.checkpoints import report_cut
from diffalign.reward_models.sources import Source

PROMPT_TOKENS = 2048  # of one prompt; the models would read more, at a cost that grows with the square
PADDING = -1
MARK = "\ue000"  # stands for our text in the template; from Unicode's private use area
CHUNK = 16384  # rows of a vocabulary multiplied at once in float32


@dataclass(frozen=True)
class Chat:
    """One user turn: `before` ends with the image, of which `image` is the placeholder; then our text; `after` opens the answer."""

    tokenizer: PreTrainedTokenizerFast
    before: tuple[int, ...]
    after: tuple[int, ...]
    image: int

    @property
    def column(self) -> int:
        """Where the placeholder stands, in every row."""
        return self.before.index(self.image)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, special tokens spelled out."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def cut(self, reward: str, prompt: str) -> str:
        """The prompt, without what goes beyond PROMPT_TOKENS; that is reported."""
        if len(prompt.encode(errors="replace")) <= PROMPT_TOKENS:  # a token is a byte at least
            return prompt
        offsets = self.tokenizer(
            prompt, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        ).offset_mapping
        if len(offsets) <= PROMPT_TOKENS:
            return prompt
        end = offsets[PROMPT_TOKENS - 1][1]
        report_cut(reward, PROMPT_TOKENS, prompt[end:])
        return prompt[:end]


def read_chat(source: Source) -> Chat:
    """The chat of a Qwen-VL folder: tokenizer.json, tokenizer_config.json, and the template in one of the places its releases keep it.

    Raises FileNotFoundError, or ValueError where the template shows no image or the files cannot be read.
    """
    folder = source.folder("tokenizer.json", "tokenizer_config.json")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"the tokenizer in {folder} cannot be read ({error})") from error
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": MARK}]}
    for template in _templates(tokenizer, source):
        rendered = tokenizer.apply_chat_template([turn], chat_template=template, tokenize=False, add_generation_prompt=True)
        before, mark, after = rendered.partition(MARK)
        ids = tokenizer(before, add_special_tokens=False).input_ids
        if mark and image is not None and ids.count(image) == 1:
            return Chat(tokenizer, tuple(ids), tuple(tokenizer(after, add_special_tokens=False).input_ids), image)
    raise ValueError(f"{folder} has no chat template that shows one <|image_pad|> before the text, in tokenizer_config.json or beside it")


def _templates(tokenizer: PreTrainedTokenizerFast, source: Source) -> Iterator[str]:
    """The chat template in each of the places it may be, looked up in turn."""
    if isinstance(tokenizer.chat_template, str):
        yield tokenizer.chat_template
    if (path := source.find("chat_template.jinja")) is not None:
        yield path.read_text(encoding="utf-8")
    if (path := source.find("chat_template.json")) is not None:
        yield read_json(path, ("chat_template",))["chat_template"]


def pad(texts: list[Tensor]) -> Int[Tensor, "b l"]:
    """Rows of token ids, PADDING on the right: in a causal model nothing before it can see it."""
    return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PADDING)


def show(texts: Int[Tensor, "b l"], column: int, tokens: int) -> Int[Tensor, "b n"]:
    """Rows of token ids with the image's placeholder, which stands in `column` of every row, repeated for each of its tokens."""
    image = texts[:, column : column + 1].expand(-1, tokens)
    return torch.cat([texts[:, :column], image, texts[:, column + 1 :]], dim=1)


def last(states: Float[Tensor, "b n d"], ids: Int[Tensor, "b n"]) -> Float[Tensor, "b d"]:
    """The state at the last token of every row, in float32."""
    ends = (ids != PADDING).sum(dim=1) - 1
    return states[torch.arange(len(states), device=states.device), ends].float()


def float_linear(states: Float[Tensor, "b d"], weight: Float[Tensor, "v d"]) -> Float[Tensor, "b v"]:
    """states @ weight.T in float32, a few rows of a vocabulary at a time: bfloat16 logits come in steps of 1/8 where they are large."""
    return torch.cat([states.float() @ rows.float().T for rows in weight.split(CHUNK)], dim=1)
