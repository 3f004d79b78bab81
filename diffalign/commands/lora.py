from importlib import import_module

from diffalign.cli.values import lora as path

__all__ = ["identity", "load", "path"]


def load(pipeline, source) -> None:
    import_module("diffalign.cli.parts").load_lora(pipeline, source)


def identity(source) -> str:
    return import_module("diffalign.cli.parts").lora_identity(source)
