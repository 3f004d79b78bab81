"""The audit with rewards whose answers are known, and what each change does to a picture."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from diffalign import reward_models
from diffalign.reward_models import audit as auditing
from diffalign.reward_models.audit import CHANGES, AuditRow, Change, audit
from tests.reward_models.test_pixels import photo, tensor_of

PROMPTS = [f"picture {i}" for i in range(6)]


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """Six of different brightness, dark enough that a quarter more clips nothing."""
    return torch.cat([tensor_of(photo(48, 64, seed)) * (0.2 + 0.1 * seed) for seed in range(6)])


def row(rows: list[AuditRow], kind: str, amount: str) -> AuditRow:
    (found,) = [row for row in rows if (row.kind, row.amount) == (kind, amount)]
    return found


def test_brightness_answers_to_brightness_by_hand(photos):
    reward = reward_models.load("brightness")
    scores = reward(photos, PROMPTS).double().numpy()
    rows = audit(reward, photos, PROMPTS, batch=4)
    darker, brighter = row(rows, "brightness", "x 0.8"), row(rows, "brightness", "x 1.25")
    differences = -0.2 * scores / scores.std(ddof=1)
    assert darker.effect == pytest.approx(differences.mean(), abs=1e-5)
    low, high = stats.t.interval(0.95, 5, differences.mean(), stats.sem(differences))
    assert (darker.low, darker.high) == pytest.approx((low, high), abs=1e-5)
    assert (darker.rises, brighter.rises, darker.images) == (0, 1, 6)
    assert brighter.effect == pytest.approx(0.25 / 0.2 * -darker.effect, abs=1e-5)
    for kind, amount, most in (("flip", "left and right", 1e-5), ("sharpness", "blurred by 0.4%", 0.02), ("resolution", "x 0.5", 0.02)):
        assert abs(row(rows, kind, amount).effect) < most
    assert [(change.kind, change.amount) for change in CHANGES] == [(row.kind, row.amount) for row in rows]


def test_a_reward_of_detail_answers_to_sharpness_and_jpeg(photos):
    rows = audit(reward_models.load("jpeg-incompressibility"), photos, PROMPTS)
    blurred, sharpened = row(rows, "sharpness", "blurred by 1.2%"), row(rows, "sharpness", "sharpened by 0.4%")
    assert blurred.high < 0 < sharpened.low
    assert row(rows, "jpeg", "quality 20").effect < row(rows, "jpeg", "quality 90").effect
    assert row(rows, "resolution", "x 2.0").effect > 0 > row(rows, "resolution", "x 0.25").effect


def test_a_reward_of_sides_answers_to_flips_crops_and_resolution():
    def left_minus_right(images, prompts):
        half = images.shape[-1] // 2
        return images[..., :half].mean(dim=(1, 2, 3)) - images[..., half:].mean(dim=(1, 2, 3))

    images = torch.zeros(4, 3, 8, 8)
    for i in range(4):
        images[i, ..., :4] = 0.1 * (i + 1)
    flipped = row(audit(left_minus_right, images, [""] * 4), "flip", "left and right")
    assert flipped.effect == pytest.approx(-2 * 0.25 / np.std([0.1, 0.2, 0.3, 0.4], ddof=1), abs=1e-5)
    assert flipped.rises == 0

    sizes = lambda images, prompts: images[:, 0, 0, 0] + images.shape[-1]  # noqa: E731
    rows = audit(sizes, images, [""] * 4, changes=[Change("crop", "middle half", lambda images: auditing.crop(images, 0.5))])
    assert rows[0].effect == pytest.approx(-4 / np.std([0.1, 0.2, 0.3, 0.4], ddof=1), abs=1e-4)


def test_paraphrases_are_a_function_or_a_list(photos):
    length = lambda images, prompts: torch.tensor([float(len(prompt)) for prompt in prompts])  # noqa: E731
    prompts = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff"]
    by_function = audit(length, photos, prompts, paraphrase=lambda prompt: prompt + "!!", changes=())
    by_list = audit(length, photos, prompts, paraphrase=[prompt + "!!" for prompt in prompts], changes=())
    assert by_function == by_list
    assert by_function == [AuditRow("prompt", "paraphrased", *[pytest.approx(2 / np.std(range(1, 7), ddof=1))] * 3, 1.0, 6)]
    for wrong in (prompts[:3], "a picture"):
        with pytest.raises(ValueError, match="paraphrase must be a function of a prompt, or a list of 6 prompts"):
            audit(length, photos, prompts, paraphrase=wrong)


def test_pictures_of_several_sizes_keep_their_prompts(photos):
    reward = lambda images, prompts: images.mean(dim=(1, 2, 3)) + torch.tensor([float(prompt) for prompt in prompts])  # noqa: E731
    pictures = [photos[0], Image.fromarray(photo(20, 30)), photos[1], torch.rand(3, 20, 30)]
    darker = audit(reward, pictures, ["0", "1", "2", "3"], batch=1, changes=CHANGES[:1])
    whole = torch.tensor([x.mean() for x in (photos[0], tensor_of(photo(20, 30)), photos[1], pictures[3])]).double().numpy()
    assert darker[0].effect == pytest.approx((-0.2 * whole).mean() / (whole + np.arange(4)).std(ddof=1), abs=1e-5)


def test_rows_are_plain(photos):
    (plain,) = (dataclasses.asdict(row) for row in audit(reward_models.load("brightness"), photos, PROMPTS, changes=CHANGES[:1]))
    assert {type(value) for value in plain.values()} == {str, float, int}


def test_what_cannot_be_audited_is_said(photos):
    reward = reward_models.load("brightness")
    with pytest.raises(ValueError, match="at least two images and a prompt for each, got 1 images and 1 prompts"):
        audit(reward, photos[:1], ["a"])
    with pytest.raises(ValueError, match="got 6 images and 2 prompts"):
        audit(reward, photos, ["a", "b"])
    with pytest.raises(ValueError, match=r"gives all 6 images the score 0\.5, so there is no spread"):
        audit(reward, torch.full((6, 3, 4, 4), 0.5), PROMPTS)
    fails = lambda images, prompts: images.mean(dim=(1, 2, 3)) + (torch.nan if images.shape[-1] == 3 else 0.0)  # noqa: E731
    with pytest.raises(ValueError, match=r"images\[0\] the score nan after crop middle 75%; an audit needs finite scores"):
        audit(fails, torch.rand(3, 3, 4, 4), PROMPTS[:3], changes=[change for change in CHANGES if change.kind == "crop"][1:])
    with pytest.raises(TypeError, match=r"images\[1\] is str"):
        audit(reward, [photos[0], "a.png"], ["", ""])


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: f"{change.kind} {change.amount}")
@pytest.mark.parametrize("size", [(1, 1), (9, 5), (64, 48)])
def test_changes_give_pictures_of_every_size(change, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    changed = change.apply(images)
    assert changed.shape[:2] == (2, 3)
    assert 0 <= changed.min() <= changed.max() <= 1
    assert torch.equal(change.apply(images[1:])[0], changed[1]) or (change.apply(images[1:])[0] - changed[1]).abs().max() < 1e-5


def test_changes_do_what_they_say():
    images = tensor_of(photo(64, 48))
    grey = auditing.saturation(images, 0.0)
    assert (grey - grey[:, :1]).abs().max() < 1e-6
    assert auditing.blur(images, 0.012).std() < images.std() < auditing.sharpen(images, 0.004).std()
    assert 0 < (auditing.jpeg(images, 90) - images).abs().mean() < (auditing.jpeg(images, 20) - images).abs().mean() < 0.1
    assert auditing.crop(images, 0.75).shape == (1, 3, 48, 36)
    assert torch.equal(auditing.crop(images, 0.75), images[..., 8:56, 6:42])
    small = torch.from_numpy(np.array(Image.fromarray(photo(64, 48)).resize((24, 32), Image.Resampling.BICUBIC)))
    torch.testing.assert_close(auditing.resolution(images, 0.5)[0], small.permute(2, 0, 1) / 255, atol=1e-6, rtol=0)
