"""The judges of T2I-CompBench's categories: only what the categories of a run need, each model once; and the phrases of its prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from diffalign.benchmarks.base import Scorer
from diffalign.benchmarks.models.open_vocabulary import load_detector
from diffalign.benchmarks.t2i_compbench import language, models
from diffalign.benchmarks.t2i_compbench.detections import read_detections
from diffalign.benchmarks.t2i_compbench.language import Annotations
from diffalign.benchmarks.t2i_compbench.numeracy import Vocabulary
from diffalign.benchmarks.t2i_compbench.options import T2IOptions
from diffalign.benchmarks.t2i_compbench.prompts import CATEGORIES, read_lines
from diffalign.benchmarks.t2i_compbench.scorers import (
    BlipVqaScorer,
    ClipScorer,
    Finder,
    GivenDetections,
    NumeracyScorer,
    OpenVocabulary,
    Spatial2DScorer,
    Spatial3DScorer,
)
from diffalign.benchmarks.t2i_compbench.three_in_one import Kinds

NEED_PHRASES = ("BLIP-VQA", "3-in-1")


def load_scorers(
    options: T2IOptions, categories: Sequence[str], source: str | Path, phrases: Annotations | None, device: str
) -> tuple[dict[str, list[Scorer]], Kinds | None]:
    """Category -> its scorers, and for "complex" which of them a prompt takes."""
    wanted = {CATEGORIES[category].scorer for category in categories}
    blip = BlipVqaScorer(models.load_blip(options.blip or models.HUB_BLIP, device), phrases) if phrases else None
    clip = models.load_clip_score(options.clip or models.HUB_CLIP, device) if wanted & {"CLIPScore", "3-in-1"} else None
    finder = _finder(options, device) if wanted & {"2D spatial", "3D spatial", "numeracy", "3-in-1"} else None
    depth = models.load_depth(options.depth or models.HUB_DEPTH, device) if "3D spatial" in wanted else None
    makers: Mapping[str, Callable[[], list[Scorer]]] = {
        "BLIP-VQA": lambda: [blip],
        "2D spatial": lambda: [Spatial2DScorer(finder)],
        "3D spatial": lambda: [Spatial3DScorer(finder, depth)],
        "numeracy": lambda: [NumeracyScorer(finder, Vocabulary.of(read_lines(source, "new_objects.txt")))],
        "CLIPScore": lambda: [ClipScorer(clip)],
        "3-in-1": lambda: [blip, Spatial2DScorer(finder, phrases), ClipScorer(clip, phrases)],
    }
    kinds = None
    if "3-in-1" in wanted:
        kinds = Kinds.of(*(read_lines(source, f"complex_val_{kind}.txt") for kind in ("spatial", "action")))
    return {category: makers[CATEGORIES[category].scorer]() for category in categories}, kinds


def find_annotations(prompts: Sequence[str], given: Path | None, kept: Path) -> Annotations | None:
    """Phrases and tags of the prompts: from the file `given`, else from `kept`, to which spaCy adds what it lacks.

    None where there are no prompts. Raises ValueError where a prompt is not in `given`, ImportError where spaCy is needed and absent.
    """
    if not prompts:
        return None
    if given:
        annotations = Annotations.read(given)
        for prompt in prompts:
            annotations[prompt]
        return annotations
    annotations = Annotations.read(kept) if kept.is_file() else None
    missing = [prompt for prompt in prompts if annotations is None or prompt not in annotations.prompts]
    if missing:  # also where further categories are judged
        annotations = language.annotate(missing).beside(annotations)
        kept.parent.mkdir(parents=True, exist_ok=True)
        annotations.write(kept)
    return annotations


def _finder(options: T2IOptions, device: str) -> Finder:
    if options.detections:
        return GivenDetections(read_detections(options.detections))
    return OpenVocabulary(load_detector(options.detector, device))
