"""What is known of a model without loading it: one row of the table in presets.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Component:
    """A part of a pipeline that comes from elsewhere than the rest."""

    source: str
    """A Hub id, or a local folder."""
    subfolder: str | None = None
    """Where in it the component lies; None: at its root."""
    file: str | None = None
    """A single file of weights to load into the network that the pipeline's own configuration describes; None: a diffusers folder."""
    safetensors: bool = True
    """False where the weights exist as .bin alone: they are then read with torch's weights-only loader, which runs no code."""


@dataclass(frozen=True)
class Preset:
    """One model and the settings it was made for."""

    name: str
    source: str
    """A Hub id, or "package:" and a folder inside the installed diffalign package."""
    family: str
    steps: int
    guidance_scale: float
    """As the stock call takes it; 0 or 1 means no guidance."""
    height: int
    """Pixels."""
    width: int
    licence: str
    notes: str = ""
    frames: int = 1
    """Of a video; an image has one."""
    timesteps: tuple[int, ...] | None = None
    """The exact training timesteps to visit, in 0..1000."""
    scheduler: str | None = None
    """A diffusers scheduler class to use in place of the repository's own."""
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the repository's scheduler configuration."""
    components: Mapping[str, Component] = field(default_factory=dict)
    """Parts of the pipeline that come from elsewhere, by name."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further stock arguments used where the caller gives none."""
    half: str = "float16"
    """The dtype to use on an accelerator."""
    variant: str | None = None
    """The Hub's name of the half-precision files, where such files are known to exist."""
    batch_size: int | None = None
    """Images that a search may well make at once; None: one for each of the call's own. Memory and speed only."""
    cosine_threshold: float | None = None
    """Where Adaptive Guidance stops guiding, in its "auto" space; None where nobody has measured it."""

    def defaults(self) -> dict[str, Any]:
        """What the stock call is given where the caller says nothing."""
        values = {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale, "height": self.height, "width": self.width}
        if self.frames > 1:
            values["num_frames"] = self.frames
        if self.timesteps is not None:
            values["timesteps"] = list(self.timesteps)
        return {**values, **self.arguments}


@dataclass(frozen=True)
class Family:
    """A stock class whose folders a file of ours loads; the class in it is called Aligned and the stock class's name."""

    stock_class: str
    file: str
    """In pipelines/families/."""
    load_arguments: Mapping[str, Any] = field(default_factory=dict)
    """What `from_pretrained` is told beside the source."""

    @property
    def module(self) -> str:
        return f"diffalign.pipelines.families.{self.file}"

    @property
    def aligned_class(self) -> str:
        return f"Aligned{self.stock_class}"
