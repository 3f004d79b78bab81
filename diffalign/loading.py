"""load_pipeline: a pipeline from a preset, a Hub id or a folder, with the parts, the scheduler and the settings that a preset names.

Folders and weights are checked by pipelines/integrity.py, before anything heavy is made of them and after.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffalign.files import HUB_ID, packaged_path

if TYPE_CHECKING:
    import torch

    from diffalign.pipelines.aligned import AlignedPipeline
    from diffalign.pipelines.preset import Component, Family, Preset

ATTENTIONS = ("sdpa", "xformers")
OFFLOADS = ("text", "all")


def load_pipeline(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: Literal["sdpa", "xformers"] = "sdpa",
    gradient_checkpointing: bool = False,
    sliced_decoder: bool = False,
    offload: Literal["text", "all"] | None = None,
) -> AlignedPipeline:
    """A pipeline ready to call, from a preset ("sd-turbo"), a Hub id ("org/name") or a local folder in diffusers layout.

    device: cuda where there is one, else cpu. dtype: float32 on a CPU, else the preset's own, float16 without one.
    A preset's steps, guidance scale and image size become the call's defaults. No safety checker is loaded.

    attention: "sdpa" is torch's own; "xformers" needs that extra. gradient_checkpointing: less memory and more time for methods that climb.
    sliced_decoder: decode one image at a time. offload: "text" leaves the text encoders on the CPU but for the moment they encode, which
    every method can live with; "all" moves each part to the accelerator only while it works, for methods that need no gradient.

    Raises: ValueError (unknown name, option or model family, damaged folder), FileNotFoundError (no such folder or weights not trained
    yet), ImportError (an extra is missing), OSError (the Hub cannot be reached or refuses). Each names the argument or the file.
    """
    from diffalign.pipelines import memory

    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    if offload not in (None, *OFFLOADS):
        raise ValueError(f"offload must be one of {', '.join(OFFLOADS)} or None, got {offload!r}")
    target = find_device(device)
    if offload is not None and target.type == "cpu":
        raise ValueError(f"offload={offload!r} moves parts between the CPU and an accelerator, and device is {target}; leave it out")
    pipeline = _load(name, target, dtype)
    if attention == "xformers":
        memory.use_xformers(pipeline)
    if gradient_checkpointing:
        pipeline.enable_gradient_checkpointing()
    if sliced_decoder:
        pipeline.vae.enable_slicing()
    if offload == "all":
        pipeline.enable_model_cpu_offload(device=target)
        return pipeline
    if offload == "text":
        memory.offload_text_encoders(pipeline, target)
    return memory.move(pipeline, target)


def _load(name: str | Path, device: torch.device, dtype: Any) -> AlignedPipeline:
    """On the CPU; `device` decides about the dtype alone."""
    from diffalign.pipelines import integrity, presets

    if not isinstance(name, (str, Path)) or not str(name):
        raise TypeError(f"name must be a preset, a Hub id or a folder, got {name!r}")
    text = str(name)
    if text in presets.PRESETS:
        preset = presets.get_preset(text)
        family = presets.FAMILIES[preset.family]
        packaged = _packaged_path(preset)
        if packaged is None:
            return _from_hub(preset.source, family, preset, device, dtype)
        if not (packaged / "model_index.json").exists():
            raise FileNotFoundError(f"the weights of {text!r} are not at {packaged}; make them with `python -m diffalign.shapes.train`")
        return _from_folder(packaged, family, preset, device, dtype)
    folder = Path(text).expanduser()
    if folder.exists():
        family = presets.family_of_stock_class(integrity.stock_class(folder), what=f"the folder {folder}")
        return _from_folder(folder, family, _preset_of_folder(folder), device, dtype)
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {folder}; give a folder in diffusers layout, a Hub id 'org/model' or a preset")
    if HUB_ID.fullmatch(text):
        stock_class = _stock_class_on_hub(text)
        return _from_hub(text, presets.family_of_stock_class(stock_class, what=repr(text)), presets.preset_of_source(text), device, dtype)
    presets.get_preset(text)  # raises, with a suggestion
    raise AssertionError(text)


def find_device(device: Any) -> torch.device:
    """cuda where there is one and nothing is asked for. ValueError for what there is not."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'cpu', 'cuda', 'cuda:1' or the like, got {device!r}") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use device='cpu'")
    return target


def _dtype(dtype: Any, device: torch.device, preset: Preset | None) -> torch.dtype:
    import torch

    if dtype is None:
        dtype = "float32" if device.type == "cpu" else (preset.half if preset else "float16")
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
    return chosen


def _packaged_path(preset: Preset) -> Path | None:
    """Where a preset of the package's own has its weights; None for one of the Hub's."""
    return packaged_path(preset.source)


def _preset_of_folder(folder: Path) -> Preset | None:
    """The packaged preset that lives in this folder: its path and its name must mean the same model and the same settings."""
    from diffalign.pipelines import presets

    for preset in presets.PRESETS.values():
        packaged = _packaged_path(preset)
        if packaged is not None and packaged.resolve() == folder.resolve():
            return preset
    return None


def _stock_class_on_hub(source: str) -> str:
    from diffusers import DiffusionPipeline

    try:
        return str(DiffusionPipeline.load_config(source)["_class_name"])
    except Exception as error:
        raise _hub_error(source, error) from error


def _hub_error(source: str, error: Exception) -> OSError:
    return OSError(
        f"could not load {source!r} from the Hugging Face Hub ({_first_sentence(error)}); check the name, the connection, and whether the "
        "model asks you to log in and accept its licence, or give a local folder"
    )


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _aligned_class(family: Family) -> Any:
    return getattr(importlib.import_module(family.module), family.aligned_class)


def _from_hub(source: str, family: Family, preset: Preset | None, device: torch.device, dtype: Any) -> AlignedPipeline:
    import torch

    from diffalign.pipelines import integrity

    chosen = _dtype(dtype, device, preset)
    variant = preset.variant if preset and chosen != torch.float32 else None
    cls = _aligned_class(family)
    try:
        parts = {name: _component(cls, source, name, part, chosen) for name, part in (preset.components if preset else {}).items()}
        pipeline = cls.from_pretrained(source, dtype=chosen, variant=variant, use_safetensors=True, **parts, **family.load_arguments)
    except Exception as error:
        raise _hub_error(source, error) from error
    for name, component in integrity.weighted(pipeline).items():
        integrity.require_finite(component, f"component {name!r} of {source!r}", chosen)
    return _finish(pipeline, preset)


def _component(cls: Any, source: str, name: str, part: Component, dtype: torch.dtype) -> Any:
    """A part that a preset takes from elsewhere: a diffusers folder, or a file of weights for the network that `source` describes."""
    import diffusers
    import torch
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file

    if part.file is None:
        library = getattr(diffusers, diffusers.AutoModel.load_config(part.source, subfolder=part.subfolder)["_class_name"])
        return library.from_pretrained(part.source, subfolder=part.subfolder, torch_dtype=dtype, use_safetensors=part.safetensors)
    index = cls.load_config(source)
    library = getattr(diffusers, index[name][1])
    network = library.from_config(library.load_config(source, subfolder=name))
    local = Path(part.source).expanduser() / part.file
    path = local if local.is_file() else hf_hub_download(part.source, part.file)
    weights = load_file(path) if part.safetensors else torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.to(dtype).eval()


def _from_folder(folder: Path, family: Family, preset: Preset | None, device: torch.device, dtype: Any) -> AlignedPipeline:
    from diffalign.pipelines import integrity

    files = integrity.check_files(folder)
    chosen = _dtype(dtype, device, preset)
    variants = {integrity.variant(file) for component in files.values() for file in component}
    try:
        pipeline = _aligned_class(family).from_pretrained(
            folder,
            dtype=chosen,
            variant=variants.pop() if len(variants) == 1 else None,
            use_safetensors=True,
            local_files_only=True,
            **family.load_arguments,
        )
    except Exception as error:
        raise ValueError(f"could not load the pipeline in {folder}: {_first_sentence(error)}") from error
    for name, component in integrity.weighted(pipeline).items():
        integrity.require_complete(component, files.get(name, []))
        integrity.require_finite(component, " and ".join(map(str, files.get(name, []))) or str(folder / name), chosen)
    return _finish(pipeline, preset)


def _finish(pipeline: AlignedPipeline, preset: Preset | None) -> AlignedPipeline:
    """The preset's scheduler and defaults."""
    if preset is None:
        return pipeline
    if preset.scheduler is not None or preset.scheduler_config:
        import diffusers

        cls = getattr(diffusers, preset.scheduler) if preset.scheduler else type(pipeline.scheduler)
        pipeline.scheduler = cls.from_config(pipeline.scheduler.config, **preset.scheduler_config)
    pipeline.defaults = preset.defaults()
    pipeline.cosine_threshold, pipeline.batch_size = preset.cosine_threshold, preset.batch_size
    return pipeline
