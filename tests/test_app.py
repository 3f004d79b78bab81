"""The app's handler from the page's inputs to its outputs, with a tiny pipeline and a reward that is really climbed."""

from __future__ import annotations

import base64
import io
import re
import time
from pathlib import Path

import pytest
import torch

gr = pytest.importorskip("gradio", reason="the app is an extra: pip install 'diffalign[app]'")
gradio_client = pytest.importorskip("gradio_client")

from gradio.utils import get_upload_folder  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.transforms.functional import to_tensor  # noqa: E402

from diffalign.app import improve as app  # noqa: E402
from diffalign.app import live, pictures  # noqa: E402
from diffalign.methods.table import names  # noqa: E402
from diffalign.types import Evaluation, RewardScores  # noqa: E402
from tests.tiny import tiny_stable_diffusion  # noqa: E402

WEIGHTS = (1.0, 0.0)
ENDPOINT = {"pipeline": "tiny", "method": "reno", "budget": 4, "seed": 3, "dark_red": WEIGHTS[0], "blue": WEIGHTS[1]}


class RedAndBlue:
    """Mean red, optimised, and mean blue, watched: a mix as the app is given one."""

    differentiable = True

    def __init__(self, weights, watch):
        self.weights, self.watch = weights, watch

    def prepare(self, prompts):
        pass

    def __call__(self, images, prompts):
        means = {"dark-red": images[:, 0].mean((1, 2)), "blue": images[:, 2].mean((1, 2))}
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

    page = app.build_app(load_pipeline, lambda spec, watch: RedAndBlue(spec, watch), ("tiny", "absent"), ("dark-red", "blue"))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", ssr_mode=False)
    yield gradio_client.Client(url, verbose=False)
    page.close()


def submit(client, **changes):
    given = {"prompt": "a red circle", **ENDPOINT, **changes}
    return client.submit(**given, api_name="/generate")


def pixels(html):
    """The picture inside the page's text, "3 h w"."""
    return to_tensor(Image.open(io.BytesIO(base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', html)[1]))))


def red(html):
    return float(pixels(html)[0].mean())


def test_reno_shows_two_images_a_growing_trace_and_a_better_reward(client):
    job = submit(client)
    before, after, plot, status = job.result(timeout=120)
    assert red(after) > red(before)
    assert "finished" in status
    assert "evaluation 4 of 4" in status
    columns, rows = plot["columns"], plot["data"]
    scores = [dict(zip(columns, row, strict=True)) for row in rows]
    assert {row["reward"] for row in scores} == {"dark-red", "blue"}  # the total would be red's line again
    assert [row["evaluation"] for row in scores if row["reward"] == "blue"] == [0, 1, 2, 3]
    assert scores[0]["gain"] == 0
    assert len(job.outputs()) >= 3  # loading, at least once while it ran, and the end


def test_models_are_loaded_once(client, loads):
    submit(client).result(timeout=120)
    submit(client, seed=4).result(timeout=120)
    assert loads == ["tiny"]


def test_without_a_search_there_is_one_image(client):
    before, after, plot, status = submit(client, method="none").result(timeout=120)
    assert red(before) == red(after)
    assert "evaluation 1 of 1" in status
    assert {row[0] for row in plot["data"]} == {0}


def test_best_of_n_starts_from_the_same_image_as_reno(client):
    first = [submit(client, method=method).result(timeout=120)[0] for method in ("reno", "best-of-n", "none")]
    assert len({red(html) for html in first}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "Write a prompt first."),
        ({"prompt": "a star " * 1000}, "at most 2000 characters"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": None}, "seed must be a whole number"),
        ({"budget": 1.5}, "budget must be a whole number"),
        ({"dark_red": 0.0}, "at least one reward a weight"),
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

    search = live.Search(endless)
    shown = live.follow(search, 0.05)
    assert next(shown).state == "running"
    time.sleep(0.1)
    search.stop.set()
    *_, seen = shown
    assert seen.state == "stopped"
    assert torch.equal(seen.first, images[0][0])
    assert torch.equal(seen.best, images[1][0])
    assert len(seen.scores) < 10_000


def test_leaving_the_page_ends_the_search():
    heard = []

    def endless(progress):
        while True:
            heard.append(0)
            progress(event(len(heard), torch.zeros(1, 3, 32, 32), 0.0))
            time.sleep(0.005)

    shown = live.follow(live.Search(endless), 0.0)
    next(shown)
    shown.close()
    count = len(heard)
    time.sleep(0.1)
    assert len(heard) == count


def test_the_best_is_the_earliest_of_the_greatest_finite_totals():
    seen = live.Seen()
    images = [torch.full((1, 3, 2, 2), k / 10) for k in range(5)]
    for k, total in enumerate([float("nan"), 1.0, 1.0, float("inf"), 0.5]):
        seen.add(event(k, images[k], total))
    assert torch.equal(seen.first, images[0][0])
    assert torch.equal(seen.best, images[1][0])


def test_a_picture_is_in_the_page_itself_with_its_own_pixels():
    image = torch.rand(3, 8, 5)
    html = pictures.picture(image, "Before")
    torch.testing.assert_close(pixels(html), image, atol=0.5 / 255 + 1e-6, rtol=0)
    assert 'alt="Before"' in html
    assert 'download="before.png"' in html
    assert 'class="small"' in html
    assert 'class="small"' not in pictures.picture(torch.rand(3, 256, 256), "Before")
    assert "<img" not in pictures.picture(None, "Before")
    assert "<script>" not in pictures.picture(None, "<script>")


def test_nothing_is_written_for_a_picture(client, tmp_path):
    cached = Path(get_upload_folder())
    before = set(cached.rglob("*.png"))
    submit(client).result(timeout=120)
    assert set(cached.rglob("*.png")) == before


def test_the_choices_are_those_of_the_table(client):
    info = client.view_api(return_format="dict")["named_endpoints"]["/generate"]
    parameters = {each["parameter_name"]: each for each in info["parameters"]}
    assert list(parameters) == ["prompt", *ENDPOINT]
    assert [each["label"] for each in info["returns"][:2]] == ["Before", "After"]
    assert parameters["method"]["type"]["enum"] == [*names("noise"), "none"]


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
        list(live.follow(live.Search(broken), 1))
