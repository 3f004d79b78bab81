"""The app's handler from the page's inputs to its outputs, with a tiny pipeline and a reward that is really climbed."""

from __future__ import annotations

import time

import pytest
import torch

gr = pytest.importorskip("gradio", reason="the app is an extra: pip install 'diffalign[app]'")
gradio_client = pytest.importorskip("gradio_client")

from diffalign.app import improve as app  # noqa: E402
from diffalign.types import Evaluation, RewardScores  # noqa: E402
from tests.tiny import tiny_stable_diffusion  # noqa: E402

WEIGHTS = (1.0, 0.0)
ENDPOINT = {"pipeline": "tiny", "method": "ReNO", "evaluations": 4, "seed": 3, "param_5": WEIGHTS[0], "param_6": WEIGHTS[1]}


class RedAndBlue:
    """Mean red, optimised, and mean blue, watched: a mix as the app is given one."""

    differentiable = True

    def __init__(self, weights, watch):
        self.weights, self.watch = weights, watch

    def prepare(self, prompts):
        pass

    def __call__(self, images, prompts):
        means = {"red": images[:, 0].mean((1, 2)), "blue": images[:, 2].mean((1, 2))}
        total = sum(weight * means[name] for name, weight in self.weights.items())
        return RewardScores(total, {n: means[n] for n in self.weights}, {n: means[n] for n in self.watch})


@pytest.fixture(scope="module")
def loads():
    return []


@pytest.fixture(scope="module")
def client(loads):
    def load_pipeline(name):
        if name == "absent":
            raise FileNotFoundError("the weights of 'absent' are not there;\nmake them")
        loads.append(name)
        pipe = tiny_stable_diffusion()
        pipe.defaults = {"num_inference_steps": 1, "guidance_scale": 0.0}
        return pipe

    page = app.build_app(load_pipeline, lambda spec, watch: RedAndBlue(spec, watch), ("tiny", "absent"), ("red", "blue"))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", ssr_mode=False)
    yield gradio_client.Client(url, verbose=False)
    page.close()


def submit(client, **changes):
    given = {"prompt": "a red circle", **ENDPOINT, **changes}
    return client.submit(*given.values(), api_name="/generate")


def red(path):
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    return float(to_tensor(Image.open(path).convert("RGB"))[0].mean())


def test_reno_shows_two_images_a_growing_trace_and_a_better_reward(client):
    job = submit(client)
    before, after, plot, status = job.result(timeout=120)
    assert red(after) > red(before)
    assert "finished" in status
    assert "evaluation 4 of 4" in status
    columns, rows = plot["columns"], plot["data"]
    scores = [dict(zip(columns, row, strict=True)) for row in rows]
    assert {row["reward"] for row in scores} == {"red", "blue"}  # the total would be red's line again
    assert [row["evaluation"] for row in scores if row["reward"] == "red"] == [0, 1, 2, 3]
    assert scores[0]["gain"] == 0
    assert len(job.outputs()) >= 3  # loading, at least once while it ran, and the end


def test_models_are_loaded_once(client, loads):
    submit(client).result(timeout=120)
    submit(client, seed=4).result(timeout=120)
    assert loads == ["tiny"]


def test_without_a_search_there_is_one_image(client):
    before, after, plot, status = submit(client, method="None").result(timeout=120)
    assert red(before) == red(after)
    assert "evaluation 1 of 1" in status
    assert {row[0] for row in plot["data"]} == {0}


def test_best_of_n_starts_from_the_same_image_as_reno(client):
    first = [submit(client, method=method).result(timeout=120)[0] for method in ("ReNO", "Best of N", "None")]
    assert len({red(path) for path in first}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "Write a prompt first."),
        ({"seed": -1}, "seed must be a whole number"),
        ({"param_5": 0.0}, "at least one reward a weight"),
        ({"pipeline": "absent"}, "the weights of 'absent' are not there; make them"),
    ],
)
def test_errors_are_one_sentence(client, changes, message):
    with pytest.raises(gradio_client.exceptions.AppError, match=message):
        submit(client, **changes).result(timeout=60)


def test_the_handler_works_after_an_error(client):
    with pytest.raises(gradio_client.exceptions.AppError):
        submit(client, prompt="").result(timeout=60)
    assert "finished" in submit(client).result(timeout=120)[3]


def event(index, images, total):
    return Evaluation(index, [0], {"total": [total]}, images)


def test_stop_ends_the_search_and_keeps_the_best_so_far():
    images = [torch.full((1, 3, 32, 32), value) for value in (0.25, 0.75)]

    def endless(progress):
        for i in range(10_000):
            progress(event(i, images[i % 2], float(i % 2)))
            time.sleep(0.005)

    search = app.Search(endless)
    shown = app.follow(search, 10_000)
    next(shown)
    time.sleep(0.1)
    search.stop.set()
    *_, (before, after, _, status) = shown
    assert "stopped" in status
    assert before.getpixel((0, 0)) == (64, 64, 64)
    assert after.getpixel((0, 0)) == (191, 191, 191)


def test_leaving_the_page_ends_the_search():
    seen = []

    def endless(progress):
        while True:
            seen.append(0)
            progress(event(len(seen), torch.zeros(1, 3, 32, 32), 0.0))
            time.sleep(0.005)

    shown = app.follow(app.Search(endless), 10)
    next(shown)
    shown.close()
    count = len(seen)
    time.sleep(0.1)
    assert len(seen) == count


def test_the_total_is_drawn_where_it_is_a_line_of_its_own():
    one = app.scores_table([{"total": 2.0, "a": 2.0, "b": 1.0}, {"total": 3.0, "a": 3.0, "b": 0.5}])
    assert app.scores_table([]) is None
    two = app.scores_table([{"total": 5.0, "a": 2.0, "b": 3.0}, {"total": 6.0, "a": 3.5, "b": 2.5}])
    assert set(one["reward"]) == {"a", "b"}
    assert list(two[two["reward"] == "total"]["gain"]) == [0, 1]


def test_the_plot_follows_the_best_image_so_far():
    table = app.scores_table([{"total": t, "a": t, "b": b} for t, b in ((2.0, 5.0), (1.0, 9.0), (4.0, 3.0), (3.0, 7.0))])
    assert list(table[table["reward"] == "a"]["gain"]) == [0, 0, 2, 2]
    assert list(table[table["reward"] == "b"]["gain"]) == [0, 0, -2, -2]


def test_an_error_inside_the_search_reaches_the_page():
    def broken(progress):
        raise ValueError("the reward is not finite")

    with pytest.raises(ValueError, match="not finite"):
        list(app.follow(app.Search(broken), 1))
