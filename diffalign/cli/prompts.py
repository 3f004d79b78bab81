"""Prompts as commands are given them: typed, or in a file of lines or of JSON objects."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path


def collect(given: Sequence[str], file: Path | None) -> list[str]:
    """Prompts of the command line, then those of the file. Raises ValueError for text that no tokenizer takes."""
    prompts = [*given, *(read(file) if file else ())]
    for prompt in prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # how Python holds bytes that it cannot decode
            raise ValueError(f"a prompt must be text, and {prompt[:100]!r} holds bytes or marks that are none; write it in UTF-8")
    return prompts


def read(file: Path) -> list[str]:
    """One prompt a line; in a .jsonl file, each line's "prompt". Blank lines and # comments are skipped, and counted on stderr.

    A prompt that begins with # has to stand in a .jsonl file.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"--prompts-file {file} does not exist") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {file} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    blank = len(lines) - len(numbered)
    comments = [number for number, line in numbered if line.startswith("#")]
    numbered = [(number, line) for number, line in numbered if number not in set(comments)]
    if not numbered:
        raise ValueError(f"--prompts-file {file} holds no prompt; write one a line")
    skipped = [f"{count} {kind} lines" for count, kind in ((blank, "blank"), (len(comments), "comment")) if count]
    if skipped:
        print(f"note: {' and '.join(skipped)} of {file} skipped", file=sys.stderr)
    if file.suffix != ".jsonl":
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            prompt = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{file} line {number} must be a JSON object with a "prompt"; got {line[:80]!r}') from error
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f'{file} line {number}: "prompt" must be text that is not blank; got {prompt!r}')
        prompts.append(prompt)
    return prompts
