"""What T2I-CompBench needs to know of a prompt's grammar: noun phrases for BLIP-VQA, parts of speech for free sentences. Kept in a file.

Upstream asks spaCy's en_core_web_sm each time. Here spaCy (an optional extra) writes a file once, and scoring reads the file:

    {"made_by": "en_core_web_sm 3.8.0", "prompts": {PROMPT: {"phrases": ["a red cup", ...], "tokens": [["a", "DET"], ...]}}}

The maker's name goes into the scorer's version, since another tagger finds other phrases and so gives other scores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.benchmarks.t2i_compbench.spatial import Token
from diffalign.files import read_json, write_json

SPACY_MODEL = "en_core_web_sm"
MOST_PHRASES = 8  # upstream's --np_num
NOT_THINGS = ("top", "the side", "the left", "the right")
REMOVED_FROM_QUESTIONS = re.compile(r"[.!\"()*#:;~]")
MOST_WORDS = 50


@dataclass(frozen=True)
class Grammar:
    """One prompt's noun phrases, as they stand in it, and its tagged words."""

    phrases: tuple[str, ...]
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Annotations:
    """Prompt -> grammar, and what made it."""

    made_by: str
    prompts: Mapping[str, Grammar]

    def __getitem__(self, prompt: str) -> Grammar:
        try:
            return self.prompts[prompt]
        except KeyError:
            raise ValueError(
                f"the phrase list made by {self.made_by} lacks the prompt {prompt!r}; make it again for these prompts"
            ) from None

    def beside(self, older: Annotations | None) -> Annotations:
        """These and the older ones. Raises ValueError where another tagger made those: phrases of two taggers are not one list."""
        if older is None:
            return self
        if older.made_by != self.made_by:
            raise ValueError(
                f"the phrase list was made by {older.made_by}, and {self.made_by} is here; delete it to make all phrases again"
            )
        return Annotations(self.made_by, {**older.prompts, **self.prompts})

    @classmethod
    def read(cls, path: Path) -> Annotations:
        """Raises ValueError where the file is not one that `write` made."""
        data = read_json(path)
        try:
            prompts = {
                prompt: Grammar(tuple(entry["phrases"]), tuple(Token(*token) for token in entry.get("tokens", ())))
                for prompt, entry in data["prompts"].items()
            }
            return cls(str(data["made_by"]), prompts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path} must hold "made_by" and "prompts", each with "phrases"; {error!r} is wrong in it') from error

    def write(self, path: Path) -> None:
        prompts = {
            prompt: {"phrases": list(grammar.phrases), "tokens": [[token.text, token.pos] for token in grammar.tokens]}
            for prompt, grammar in self.prompts.items()
        }
        write_json(path, {"made_by": self.made_by, "prompts": prompts})


def annotate(prompts: Sequence[str], model: str = SPACY_MODEL) -> Annotations:
    """Asks spaCy. Raises ImportError saying what to install."""
    try:
        import spacy

        language = spacy.load(model)
    except (ImportError, OSError) as error:
        hint = f"pip install 'diffalign[bench]' && python -m spacy download {model}"
        raise ImportError(f"noun phrases need spaCy and its {model}, or a phrase list made with them; install: {hint}") from error
    found = {}
    for prompt, document in zip(prompts, language.pipe(prompts), strict=True):
        phrases = [chunk.text for chunk in document.noun_chunks]
        found[prompt] = Grammar(tuple(phrases), tuple(Token(token.text, token.pos_) for token in document))
    return Annotations(f"{model} {language.meta['version']}", found)


def questions(phrases: Sequence[str]) -> list[str]:
    """What BLIP is asked: "a red cup?" for each phrase that may be a thing, at most eight."""
    things = [phrase for phrase in phrases if phrase not in NOT_THINGS][:MOST_PHRASES]
    return [clean(f"{phrase}?") for phrase in things]


def clean(question: str) -> str:
    """Lower case, without some punctuation and blanks at the end, at most 50 words."""
    text = REMOVED_FROM_QUESTIONS.sub("", question.lower()).rstrip(" ")
    return " ".join(text.split(" ")[:MOST_WORDS])


def without_adjectives(tokens: Sequence[Token]) -> str:
    """The words of a complex prompt as CLIPScore sees them: adjectives dropped, one blank between."""
    return " ".join(token.text for token in tokens if token.pos != "ADJ")
