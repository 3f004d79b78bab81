"""T2I-CompBench's judges for `diffalign bench t2i-compbench`: only what its categories need, each model once; and its phrase lists."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

DETECTOR = "owlv2"


def build(args: argparse.Namespace, common: Mapping[str, Any]) -> Any:
    from diffalign.benchmarks.t2i_compbench.benchmark import T2ICompBench
    from diffalign.benchmarks.t2i_compbench.prompts import CATEGORIES

    return T2ICompBench(args.prompts, categories=args.category or tuple(CATEGORIES), split=args.split, **common)


def settings(args: argparse.Namespace, benchmark: Any) -> dict[str, Any]:
    """What the images depend on besides the common settings: the lists, and the number of images, which names the files."""
    return {"samples": args.samples, "prompt lists": {category: found.version for category, found in benchmark.lists().items()}}


def with_judge(args: argparse.Namespace, benchmark: Any, device: str) -> Any:
    from diffalign.benchmarks.t2i_compbench import models as t2i_models
    from diffalign.benchmarks.t2i_compbench.numeracy import Vocabulary
    from diffalign.benchmarks.t2i_compbench.prompts import CATEGORIES, read_lines
    from diffalign.benchmarks.t2i_compbench.scorers import BlipVqaScorer, ClipScorer, NumeracyScorer, Spatial2DScorer, Spatial3DScorer
    from diffalign.benchmarks.t2i_compbench.three_in_one import Kinds

    wanted = {CATEGORIES[category].scorer for category in benchmark.categories}
    annotations = grammar(args, benchmark)
    blip = BlipVqaScorer(t2i_models.load_blip(args.blip or t2i_models.HUB_BLIP, device), annotations) if annotations else None
    uses_clip, uses_boxes = wanted & {"CLIPScore", "3-in-1"}, wanted & {"2D spatial", "3D spatial", "numeracy", "3-in-1"}
    clip = t2i_models.load_clip_score(args.clip or t2i_models.HUB_CLIP, device) if uses_clip else None
    finder = _finder(args, device) if uses_boxes else None
    depth = t2i_models.load_depth(args.depth or t2i_models.HUB_DEPTH, device) if "3D spatial" in wanted else None
    makers: Mapping[str, Callable[[], list[Any]]] = {
        "BLIP-VQA": lambda: [blip],
        "2D spatial": lambda: [Spatial2DScorer(finder)],
        "3D spatial": lambda: [Spatial3DScorer(finder, depth)],
        "numeracy": lambda: [NumeracyScorer(finder, Vocabulary.of(read_lines(args.prompts, "new_objects.txt")))],
        "CLIPScore": lambda: [ClipScorer(clip)],
        "3-in-1": lambda: [blip, Spatial2DScorer(finder, annotations), ClipScorer(clip, annotations)],
    }
    kinds = None
    if "3-in-1" in wanted:
        kinds = Kinds.of(*(read_lines(args.prompts, f"complex_val_{kind}.txt") for kind in ("spatial", "action")))
    scorers = {category: makers[CATEGORIES[category].scorer]() for category in benchmark.categories}
    return dataclasses.replace(benchmark, scorers=scorers, kinds=kinds)


def grammar(args: argparse.Namespace, benchmark: Any) -> Any:
    """Phrases and tags of the prompts that need them: from --phrases, else from OUT/phrases.json, which spaCy makes the first time.

    None where no category needs them. Raises ValueError where a prompt is not in the file, ImportError without file and spaCy.
    """
    from diffalign.benchmarks.t2i_compbench.language import Annotations, annotate
    from diffalign.benchmarks.t2i_compbench.prompts import CATEGORIES

    prompts = list(dict.fromkeys(item.prompt for item in benchmark.items() if CATEGORIES[item.task].scorer in ("BLIP-VQA", "3-in-1")))
    if not prompts:
        return None
    if args.phrases:
        annotations = Annotations.read(args.phrases)
        for prompt in prompts:
            annotations[prompt]
        return annotations
    kept = args.out / "phrases.json"
    annotations = Annotations.read(kept) if kept.is_file() else None
    missing = [prompt for prompt in prompts if annotations is None or prompt not in annotations.prompts]
    if missing:  # also where further categories are judged
        annotations = annotate(missing).beside(annotations)
        kept.parent.mkdir(parents=True, exist_ok=True)
        annotations.write(kept)
    return annotations


def official(benchmark: Any, folder: Any, rows: Any) -> None:
    from diffalign.benchmarks.t2i_compbench.benchmark import write_upstream_results

    write_upstream_results(folder, rows)


def _finder(args: argparse.Namespace, device: str) -> Any:
    from diffalign.benchmarks.t2i_compbench.scorers import GivenDetections, OpenVocabulary

    if args.detections:
        from diffalign.benchmarks.t2i_compbench.detections import read_detections

        return GivenDetections(read_detections(args.detections))
    from diffalign.benchmarks.models.open_vocabulary import load_detector

    return OpenVocabulary(load_detector(args.detector or DETECTOR, device))
