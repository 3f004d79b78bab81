"""`vlm-judge`: a Qwen-VL asked a yes/no question. Score = P(yes) / (P(yes) + P(no)) of the first token of its answer.

GenEval 2 (arXiv 2512.16853) reads its judge in this way. It is related to VQAScore (Lin et al., arXiv 2404.01291), and not its form for
decoders: that is P("Yes") among the whole vocabulary, a geometric mean where the answer has several tokens. Any Qwen2-VL, Qwen2.5-VL
or Qwen3-VL folder will do. A word counts under every spelling that is one token: Yes, yes, and either after a space.

    reward(images, prompts)                asks 'Does this image show "<prompt>"? Please answer yes or no.'
    judge.ask(images, questions)           asks the questions themselves
    judge.answer(images, questions, words) probability of any of some words, among all tokens: counts, colours

Gradients reach the image: preprocessing is ours, and numerically that of the model's image processor. Logits are computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging as transformers_logging

from diffalign.files import read_json
from diffalign.reward_models.base import Images, RewardModel, Scores, check_call
from diffalign.reward_models.checkpoints import weights_file
from diffalign.reward_models.qwen_pixels import read_qwen_pixels
from diffalign.reward_models.qwen_text import Chat, float_linear, last, pad, read_chat, show
from diffalign.reward_models.sources import Source
from diffalign.reward_models.spec import Spec

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # a chat with one image, patches as qwen_pixels.py cuts them
QUESTION = 'Does this image show "{}"? Please answer yes or no.'
YES, NO = ("Yes", "yes", " Yes", " yes"), ("No", "no", " No", " no")


class VLMJudge(RewardModel):
    """Question and image share all layers, so only token ids can be prepared."""

    full_precision = ()

    def __init__(self, spec: Spec, sources: Mapping[str, Source]) -> None:
        super().__init__(spec)
        self.vlm = load_vlm(sources["model"])
        self.chat = read_chat(sources["model"])
        self.pixels = read_qwen_pixels(sources["model"].file("preprocessor_config.json"))
        self.yes, self.no = (words(self.chat, spellings) for spellings in (YES, NO))
        self.train(False)

    def encode_text(self, prompts: list[str]) -> list[Int[Tensor, " l"]]:
        return [self._tokens(QUESTION.replace("{}", self.chat.cut(self.name, prompt))) for prompt in prompts]

    def collate(self, texts: list[Tensor]) -> Int[Tensor, "b l"]:
        return pad(texts)

    def score(self, images: Images, texts: Int[Tensor, "b l"] | None) -> Scores:
        return self._yes(self._logits(images, texts, [*self.yes, *self.no]))

    def ask(self, images: Tensor, questions: Sequence[str]) -> Scores:
        """P(yes) / (P(yes) + P(no)) as the first token of the answer to each question, float32. Raises as a call does."""
        return self._yes(self._logits(images, self._questions(images, questions), [*self.yes, *self.no]))

    def answer(self, images: Tensor, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> Scores:
        """The probability that the first token of the answer begins one of answers[i], among all tokens; float32.

        Each answer counts by its first token, as in GenEval 2; give the spellings you accept ("three", "Three", "3").
        Raises as a call does, and ValueError where there are not as many answers as questions.
        """
        texts = self._questions(images, questions)
        if isinstance(answers, str) or len(answers) != len(questions) or any(isinstance(row, str) or not row for row in answers):
            raise ValueError(f"reward {self.name!r}: answers must be one list of words for each of the {len(questions)} questions")
        probabilities = self._logits(images, texts, None).softmax(dim=1)
        rows = [sorted({self.chat.ids(word)[0] for word in row}) for row in answers]
        return torch.stack([p[row].sum() for p, row in zip(probabilities, rows, strict=True)])

    def _questions(self, images: Tensor, questions: Sequence[str]) -> Int[Tensor, "b l"]:
        check_call(self, images, questions)
        return pad([self._tokens(self.chat.cut(self.name, question)) for question in questions]).to(images.device)

    def _tokens(self, text: str) -> Int[Tensor, " l"]:
        return torch.tensor([*self.chat.before, *self.chat.ids(text), *self.chat.after])

    def _yes(self, logits: Float[Tensor, "b n"]) -> Scores:
        """The odds of all spellings of yes against all of no, as a probability."""
        yes, no = logits.split([len(self.yes), len(self.no)], dim=1)
        return (yes.logsumexp(dim=1) - no.logsumexp(dim=1)).sigmoid()

    def _logits(self, images: Images, texts: Int[Tensor, "b l"], tokens: list[int] | None) -> Float[Tensor, "b n"]:
        """Logits of these tokens (None: of all) as the first of the answer, float32. Padding needs no mask: it comes after what is read."""
        patches, (rows, columns) = self.pixels(images)
        ids = show(texts, self.chat.column, rows * columns // self.pixels.merge**2)
        states = self.vlm.model(
            input_ids=ids.clamp(min=0),
            mm_token_type_ids=(ids == self.chat.image).int(),  # 1: a token of the image, whose rows and columns become positions
            pixel_values=patches.flatten(0, 1),
            image_grid_thw=torch.tensor([[1, rows, columns]] * len(ids), device=ids.device),
            use_cache=False,
        ).last_hidden_state
        weight = self.vlm.get_output_embeddings().weight
        return float_linear(last(states, ids), weight if tokens is None else weight[tokens])


def words(chat: Chat, spellings: Sequence[str]) -> list[int]:
    """The tokens of those spellings that are one token each. Raises ValueError where none is."""
    found = sorted({ids[0] for word in spellings if len(ids := chat.ids(word)) == 1})
    if not found:
        raise ValueError(f"the tokenizer has no token for any of {', '.join(map(repr, spellings))}; this model cannot be read as a judge")
    return found


def load_vlm(source: Source) -> PreTrainedModel:
    """The model of a Qwen-VL folder, in the dtype it is stored in, every tensor accounted for.

    Raises FileNotFoundError, or ValueError for another kind of model and for tensors that are missing, left over or of another shape.
    """
    path = source.file("config.json")
    kind = read_json(path, ("model_type",))["model_type"]
    if kind not in FAMILIES:
        raise ValueError(f"{path} describes a {kind!r}; the judge knows {', '.join(FAMILIES)}")
    weights = weights_file(source, "model.safetensors.index.json", "model.safetensors")
    folder = _one_folder(path, weights)
    try:
        with _quietly():
            model, report = AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, dtype="auto", use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # a safetensors, JSON, shape or validation error, depending on what is wrong
        raise ValueError(f"the model in {folder} cannot be read ({' '.join(str(error).split())[:300]})") from error
    kinds = {"missing": "missing_keys", "unexpected": "unexpected_keys", "of another shape": "mismatched_keys"}
    found = {kind: sorted(map(str, report[key])) for kind, key in kinds.items() if report[key]}
    if found:
        raise ValueError(f"{weights} does not fit its config.json; " + "; ".join(f"{k}: {', '.join(v[:3])}" for k, v in found.items()))
    return model


def _one_folder(path: Path, weights: Path) -> Path:
    if path.parent != weights.parent:
        raise ValueError(f"the judge needs one folder with configuration and weights, got {path} and {weights}")
    return path.parent


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' bar and its table of tensors that do not fit, which we name ourselves."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
