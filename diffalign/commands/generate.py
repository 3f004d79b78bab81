from importlib import import_module
from pathlib import Path


def read_prompts(file: Path) -> list[str]:
    return import_module("diffalign.cli.prompts").read(file)
