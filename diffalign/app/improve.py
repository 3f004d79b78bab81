"""The app: a prompt becomes an image, and then a better one while you watch.

`build_app()` gives the gradio Blocks, `main()` serves them (`diffalign demo`). No method is implemented here: the page wires inputs to the
same calls as the command line, and shows what a search reports while it runs.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

import diffalign
from diffalign.commands import options
from diffalign.plots import enlarge
from diffalign.types import Evaluation, Progress

PIPELINES = ("shapes-turbo", "shapes")
REWARDS = ("shapes-clip", "shapes-preference", "shapes-aesthetic")
METHODS = {"ReNO": "reno", "Best of N": "best-of-n", "None": "none"}
VIEW = 448  # least edge of a shown image, in pixels
REFRESH = 0.15  # seconds between updates of the page; each one is sent to the browser whole
EXAMPLES = (
    "a red circle left of a blue square",
    "three green stars",
    "a yellow heart and a purple ring",
    "a photo of an orange triangle above a black cross",
)
INTRO = """# diffalign
Reward-guided search over the initial noise of a text-to-image model: the **same model, same prompt**, a better starting point."""
HINT = "The embedded models draw circles, squares, triangles, diamonds, stars, crosses, hearts and rings in ten colours."
CSS = ".gradio-container {max-width: 1180px !important; margin: auto} #status p {font-variant-numeric: tabular-nums}"


class Stopped(Exception):
    """Raised inside a search when the user presses Stop or leaves."""


@dataclass
class Seen:
    """What the events of one sample's search add up to: its scores in order, its first image and the best so far."""

    scores: list[dict[str, float]] = field(default_factory=list)
    first: Any = None
    best: Any = None

    def add(self, event: Evaluation) -> None:
        scores = {name: values[0] for name, values in event.scores.items()}
        if self.first is None:
            self.first = event.images[0]
        if not self.scores or scores["total"] > max(each["total"] for each in self.scores):
            self.best = event.images[0]
        self.scores.append(scores)


@dataclass
class Search:
    """One search in a thread of its own; `events` receives every Evaluation, then an Exception or None when it is over."""

    run: Callable[[Progress], Any]
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)
    output: Any = None

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._work, daemon=True)
        thread.start()
        return thread

    def _work(self) -> None:
        try:
            self.output = self.run(self._progress)
            self.events.put(None)
        except Exception as error:  # handed to the page's thread, which raises it
            self.events.put(error)

    def _progress(self, evaluation: Evaluation) -> None:
        if self.stop.is_set():
            raise Stopped
        self.events.put(evaluation)


def build_app(
    load_pipeline: Callable[[str], Any] | None = None,
    load_reward: Callable[..., Any] | None = None,
    pipelines: Sequence[str] = PIPELINES,
    rewards: Sequence[str] = REWARDS,
) -> gr.Blocks:
    """The page. The loaders default to diffalign's; each model is loaded once, when first used."""
    pipeline_of = lru_cache(maxsize=2)(load_pipeline or diffalign.load_pipeline)
    load_mix = load_reward or diffalign.load_reward

    @lru_cache(maxsize=4)
    def reward_of(weights: tuple[tuple[str, float], ...]) -> Any:
        return load_mix({name: w for name, w in weights if w}, watch=[name for name, w in weights if not w])

    searches: dict[str | None, Search] = {}

    def generate(
        request: gr.Request, prompt: str, pipeline: str, method: str, evaluations: float, seed: float, *weights: float
    ) -> Iterator[tuple[Any, Any, pd.DataFrame | None, str]]:
        """Yields (before, after, scores so far, status) while the search runs."""
        if not prompt.strip():
            raise gr.Error("Write a prompt first.", print_exception=False)
        if seed is None or seed < 0 or seed != int(seed):
            raise gr.Error(f"The seed must be a whole number of at least 0; got {seed}.", print_exception=False)
        if not any(weights):
            raise gr.Error("Give at least one reward a weight other than 0.", print_exception=False)
        try:
            yield None, None, scores_table([]), "loading the models ..."
            pipe, reward = pipeline_of(pipeline), reward_of(tuple(zip(rewards, weights, strict=True)))
            budget = 1 if METHODS[method] == "none" else int(evaluations)  # the best of one is the plain image, scored and reported
            chosen = options.build_method("best-of-n" if budget == 1 else METHODS[method], reward, budget)
            search = Search(lambda progress: pipe([prompt], seed=[int(seed)], plugins=[chosen], progress=progress))
            searches[request.session_hash] = search
            yield from follow(search, budget)
        except (ValueError, OSError, NotImplementedError) as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from error
        finally:
            searches.pop(request.session_hash, None)

    def stop(request: gr.Request) -> None:
        if request.session_hash in searches:
            searches[request.session_hash].stop.set()

    with gr.Blocks(title="diffalign", analytics_enabled=False) as app:
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                prompt = gr.Textbox(EXAMPLES[0], label="Prompt", info=HINT, lines=2, max_length=10_000)
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", scale=2)
                    halt = gr.Button("Stop", scale=1)
                method = gr.Radio(list(METHODS), value="ReNO", label="Method", info="How to search for a better noise.")
                evaluations = gr.Slider(1, 100, 50, step=1, label="Evaluations", info="How many images the search may try.")
                with gr.Row():
                    pipeline = gr.Dropdown(list(pipelines), value=pipelines[0], label="Model", min_width=120)
                    seed = gr.Number(0, label="Seed", precision=0, min_width=120)
                with gr.Accordion("Rewards", open=True):
                    gr.Markdown("Weights of the sum that is optimised. A reward with weight 0 is only watched.")
                    sliders = [gr.Slider(-1, 2, options.DEFAULT_REWARD.get(name, 0.0), step=0.1, label=name) for name in rewards]
            with gr.Column(scale=7, min_width=420):
                with gr.Row():
                    before = gr.Image(label="Before", type="pil", format="png", interactive=False, buttons=["download"], min_width=200)
                    after = gr.Image(label="After", type="pil", format="png", interactive=False, buttons=["download"], min_width=200)
                status = gr.Markdown("Press **Generate**.", elem_id="status")
                # without a height: a fixed one cuts the legend off
                plot = gr.LinePlot(x="evaluation", y="gain", color="reward", y_title="gain", label="Rewards of the best image so far")
        gr.Examples([[example] for example in EXAMPLES], inputs=[prompt], label="Prompts to try")
        inputs = [prompt, pipeline, method, evaluations, seed, *sliders]
        gr.on(
            [start.click, prompt.submit],
            generate,
            inputs,
            [before, after, plot, status],
            concurrency_id="model",
            concurrency_limit=1,
            show_progress="hidden",
            api_name="generate",
        )
        halt.click(stop, queue=False, api_visibility="private")
    return app


def follow(search: Search, evaluations: int) -> Iterator[tuple[Any, Any, pd.DataFrame | None, str]]:
    """What the page shows while `search` runs, at most every REFRESH seconds, and at its end. Raises what the search raised."""
    began, shown, seen = time.perf_counter(), 0.0, Seen()

    def page(word: str) -> tuple[Any, Any, pd.DataFrame | None, str]:
        return show(seen.first), show(seen.best), scores_table(seen.scores), sentence(word, seen.scores, evaluations, began)

    thread = search.start()
    try:
        while (event := search.events.get()) is not None:
            if isinstance(event, Stopped):
                break
            if isinstance(event, Exception):
                raise event
            seen.add(event)
            if time.perf_counter() - shown > REFRESH:
                shown = time.perf_counter()
                yield page("running")
        yield page("stopped" if search.output is None else "finished")
    finally:
        search.stop.set()  # also when the browser has gone: nobody would see the rest
        thread.join()


def show(image: Any) -> Image.Image | None:
    """A "3 h w" tensor in [0, 1] as a picture large enough to look at."""
    if image is None:
        return None
    pixels = (image.float().permute(1, 2, 0) * 255).round().clamp(0, 255).byte().cpu().numpy()
    return enlarge(Image.fromarray(pixels), VIEW)


def scores_table(seen: Sequence[Mapping[str, float]]) -> pd.DataFrame | None:
    """Each reward of the best image so far, as its gain over the first image, since the rewards' own scales differ. None for nothing.

    An empty table would do as well but for gradio's plot, which takes its colours and kinds of axes from the first table it sees.
    """
    if not seen:
        return None
    names = list(seen[0])
    if any(all(scores["total"] == scores[name] for scores in seen) for name in names if name != "total"):
        names.remove("total")  # one reward of weight 1: the total is that line again
    rows, best = [], seen[0]
    for i, scores in enumerate(seen):
        best = scores if scores["total"] > best["total"] else best
        rows += [{"evaluation": i, "reward": name, "gain": round(best[name] - seen[0][name], 6)} for name in names]
    return pd.DataFrame(rows)


def sentence(word: str, seen: Sequence[Mapping[str, float]], evaluations: int, began: float) -> str:
    """Where the search stands, in Markdown."""
    if not seen:
        return f"**{word}**"
    totals = [scores["total"] for scores in seen]
    seconds = time.perf_counter() - began
    return f"**{word}** · evaluation {len(seen)} of {evaluations} · reward {totals[0]:.4g} → **{max(totals):.4g}** · {seconds:.1f} s"


def main(host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serves the page until Ctrl-C."""
    theme = gr.themes.Soft(primary_hue="blue", font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build_app().launch(server_name=host, server_port=port, theme=theme, css=CSS, footer_links=["api"])
