"""`diffalign pairs`: images of the shapes world's training prompts with votes by a simulated annotator, to tune on."""

from __future__ import annotations

from tqdm import tqdm

from diffalign.cli import parts
from diffalign.cli.train_commands import Pairs
from diffalign.files import require_writable
from diffalign.shapes.pairs import Annotator, Drawing, make_pairs


def run(options: Pairs, command: str) -> int:
    """Draws, and prints how many pairs there are. Raises ValueError or OSError with the sentence to show."""
    require_writable(options.out)
    model = options.model
    drawing = Drawing(options.prompts, options.images, model.steps, model.guidance_scale, options.seed)
    annotator = Annotator(options.flips, options.votes, captions=options.captions, strength=options.strength, seed=options.seed)
    pipe = parts.load_pipeline(model)
    name = str(model.pipeline) if model.lora is None else f"{model.pipeline} + {parts.lora_identity(model.lora)}"
    with tqdm(total=drawing.prompts * drawing.images, unit="image", disable=None) as bar:
        about = make_pairs(pipe, options.out, drawing, annotator, model=name, size=pipe.default_size(), batch_size=model.batch_size,
                           progress=bar.update)  # fmt: skip
    print(f"{about['images']} images, {about['right']:.1%} of them right by the judge; {about['pairs']} pairs of "
          f"{about['prompts with pairs']} prompts in {options.out}")  # fmt: skip
    return 0
