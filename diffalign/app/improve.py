"""Improve: a prompt becomes an image, and then a better one while you watch.

`build_app()` gives the gradio Blocks, `main()` serves them (`diffalign demo`). No method is implemented here: the page wires
its inputs to the same calls as the command line, and shows what a search reports while it runs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import gradio as gr
import pandas as pd

import diffalign
from diffalign.app import pictures
from diffalign.app.live import Search, Seen, follow
from diffalign.cli.options import DEFAULT_REWARD
from diffalign.methods import build_method
from diffalign.methods.table import METHODS, NOISE, names

PIPELINES = ("shapes-turbo", "shapes")
REWARDS = ("shapes-reward", "shapes-clip", "shapes-preference", "shapes-aesthetic")
NO_SEARCH = "none"
MOST_BUDGET, LONGEST_PROMPT = 100, 2000
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
BUDGET_HINT = "How many images the search may make."
CSS = ".gradio-container {max-width: 1180px !important; margin: auto} #status p {font-variant-numeric: tabular-nums}" + pictures.CSS

Page = tuple[str, str, pd.DataFrame | None, str]
"""What the handler yields: before, after, the plot's table, the status."""


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
        request: gr.Request, prompt: str, pipeline: str, method: str, budget: float, seed: float, *weights: float
    ) -> Iterator[Page]:
        """Yields what the page shows while the search runs."""
        try:
            budget, seed = check(prompt, budget, seed, weights)
            yield show(Seen(), "loading the models ...")
            pipe, reward = pipeline_of(pipeline), reward_of(tuple(zip(rewards, map(float, weights), strict=True)))
            if method == NO_SEARCH:  # the best of one is the plain image, scored and reported
                method, budget = "best-of-n", 1
            plugin = build_method(method, reward, budget)
            search = Search(lambda progress: pipe([prompt], seed=[seed], plugins=[plugin], progress=progress))
            searches[request.session_hash] = search
            for seen in follow(search, REFRESH):
                yield show(seen, sentence(seen, budget))
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
                prompt = gr.Textbox(EXAMPLES[0], label="Prompt", info=HINT, lines=2, max_length=LONGEST_PROMPT)
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", scale=2)
                    halt = gr.Button("Stop", scale=1)
                method = gr.Radio([*names(NOISE), NO_SEARCH], value=names(NOISE)[0], label="Method", info=methods_hint())
                budget = gr.Slider(1, MOST_BUDGET, 50, step=1, label="Budget", info=BUDGET_HINT)
                with gr.Row():
                    pipeline = gr.Dropdown(list(pipelines), value=pipelines[0], label="Model", min_width=120)
                    seed = gr.Number(0, label="Seed", precision=0, min_width=120)
                with gr.Accordion("Rewards", open=True):
                    gr.Markdown("Weights of the sum that is optimised. A reward with weight 0 is only watched.")
                    sliders = [gr.Slider(-1, 2, DEFAULT_REWARD.get(name, 0.0), step=0.1, label=name) for name in rewards]
            with gr.Column(scale=7, min_width=420):
                with gr.Row():
                    before, after = (gr.HTML(pictures.picture(None, name), label=name, show_label=False) for name in ("Before", "After"))
                status = gr.Markdown("Press **Generate**.", label="Status", elem_id="status")
                # without a height: a fixed one cuts the legend off
                plot = gr.LinePlot(x="evaluation", y="gain", color="reward", y_title="gain", label="Rewards of the best image so far")
        gr.Examples([[example] for example in EXAMPLES], inputs=[prompt], label="Prompts to try")
        gr.on(
            [start.click, prompt.submit],
            with_named_weights(generate, rewards),
            [prompt, pipeline, method, budget, seed, *sliders],
            [before, after, plot, status],
            concurrency_id="model",
            concurrency_limit=1,
            show_progress="hidden",
            api_name="generate",
        )
        halt.click(stop, queue=False, api_visibility="private")
    return app


def with_named_weights(handler: Callable[..., Any], rewards: Sequence[str]) -> Callable[..., Any]:
    """The handler, its starred weights named after the rewards: these are the parameters of the page's API."""
    *fixed, _ = inspect.signature(handler).parameters.values()
    named = [inspect.Parameter(name.replace("-", "_"), inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in rewards]
    handler.__signature__ = inspect.Signature([*fixed, *named])
    return handler


def methods_hint() -> str:
    """What to know before choosing; what each method does is in docs/methods.md."""
    steered = [row.name for row in METHODS if row.kind == NOISE and row.needs_steps]
    return f"How the budget is spent. {', '.join(steered)} steer a denoising of several steps: choose the model shapes for them."


def check(prompt: str, budget: float, seed: float, weights: Sequence[float]) -> tuple[int, int]:
    """Budget and seed as integers. The page's own limits do not bind its API, so everything is looked at. Raises ValueError."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("Write a prompt first.")
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"The prompt must have at most {LONGEST_PROMPT} characters; got {len(prompt)}.")
    if not _whole(budget, 1) or budget > MOST_BUDGET:
        raise ValueError(f"The budget must be a whole number from 1 to {MOST_BUDGET}; got {budget!r}.")
    if not _whole(seed, 0):
        raise ValueError(f"The seed must be a whole number of at least 0; got {seed!r}.")
    if not all(isinstance(weight, int | float) and math.isfinite(weight) for weight in weights):
        raise ValueError(f"Weights must be finite numbers; got {', '.join(map(repr, weights))}.")
    if not any(weights):
        raise ValueError("Give at least one reward a weight other than 0.")
    return int(budget), int(seed)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value == int(value) and value >= least


def show(seen: Seen, status: str) -> Page:
    return pictures.picture(seen.first, "Before"), pictures.picture(seen.best, "After"), scores_table(seen.scores), status


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


def sentence(seen: Seen, budget: int) -> str:
    """Where the search stands, in Markdown."""
    if not seen.scores:
        return f"**{seen.state}**"
    totals = [scores["total"] for scores in seen.scores]
    gain = f"reward {totals[0]:.4g} → **{max(totals):.4g}**"
    return f"**{seen.state}** · evaluation {len(totals)} of {budget} · {gain} · {seen.seconds:.1f} s"


def main(host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serves the page until Ctrl-C."""
    theme = gr.themes.Soft(primary_hue="blue", font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build_app().launch(server_name=host, server_port=port, theme=theme, css=CSS, footer_links=["api"])
