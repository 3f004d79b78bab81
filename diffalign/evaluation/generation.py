"""Making the images of a benchmark's items that a folder lacks, a batch at a time, each on the disk before the next."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffalign.benchmarks.base import Item, Record
from diffalign.files import read_json, whole_file, write_json, write_text

FORMATS = {".png": {"format": "PNG"}, ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0}}


@dataclass(frozen=True)
class Generated:
    """An image and, as plain JSON data, how it came about: at least "seconds", "best" and "rewards" (name -> one score per evaluation)."""

    image: Image.Image
    trace: Record


def to_make(items: Sequence[Item], folder: Path, batch_size: int) -> list[list[Item]]:
    """The batches with missing items, made up as in a run that was never stopped, since a batch's size moves the last digits of its images.

    The traces of the images that are there say who was made together; a batch that lacks an image is made again as a whole. What no trace
    speaks of is cut into new batches, in order.
    """
    known = {item.name: item for item in items}
    together: dict[str, list[str]] = {}
    for item in items:
        if item.trace_path(folder).is_file():
            members = read_json(item.trace_path(folder)).get("batch", [item.name])
            together.update(dict.fromkeys(members, members))
    missing = [item for item in items if not item.is_done(folder)]
    again = {tuple(together[item.name]): None for item in missing if item.name in together}
    fresh = [item for item in missing if item.name not in together]
    batches = [[known[name] for name in members if name in known] for members in again]
    return batches + [fresh[start : start + batch_size] for start in range(0, len(fresh), batch_size)]


def generate_missing(
    items: Sequence[Item],
    folder: Path,
    generate: Callable[[Sequence[Item]], Sequence[Generated]],
    batch_size: int,
) -> int:
    """Makes the items that `folder` lacks, in the batches of `to_make`, saving each batch before the next. Returns how many it saved."""
    saved = 0
    for batch in to_make(items, folder, batch_size):
        names = {"batch": [item.name for item in batch]} if len(batch) > 1 else {}
        for item, generated in zip(batch, generate(batch), strict=True):
            if not item.is_done(folder):
                save(item, Generated(generated.image, {**generated.trace, **names}), folder)
                saved += 1
    return saved


def save(item: Item, generated: Generated, folder: Path) -> None:
    """Writes one item's row, image and trace, the trace last."""
    image_path, trace_path = item.image_path(folder), item.trace_path(folder)
    for path in (image_path, trace_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if item.path is None:  # GenEval's folder belongs to one prompt
        write_text(image_path.parent.parent / "metadata.jsonl", json.dumps(item.metadata) + "\n")
    data = encoded(item, generated.image)
    with whole_file(image_path) as temporary:
        temporary.write_bytes(data)
    facts = {
        "prompt": item.prompt,
        "index": item.index,
        "sample": item.sample,
        "seed": item.seed,
        "size": list(generated.image.size),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_json(trace_path, {**facts, **generated.trace})


def encoded(item: Item, image: Image.Image) -> bytes:
    """The image as it is written to the disk."""
    buffer = io.BytesIO()
    image.save(buffer, **FORMATS[Path(item.name).suffix])
    return buffer.getvalue()
