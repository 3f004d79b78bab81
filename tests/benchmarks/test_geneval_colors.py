"""GenEval's colour classifier on a tiny random CLIP: what it looks at, what it compares with, and the answer."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from diffalign.benchmarks.geneval.colors import MEAN, STD, ClipColors, cut_out, to_pixels
from diffalign.rules import COLORS, Detection
from tests.benchmarks.tiny_clip import tiny_clip


@pytest.fixture(scope="module")
def colors():
    return ClipColors(*tiny_clip(), "tiny")


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def test_outside_the_mask_is_grey_and_the_box_is_cut(image):
    mask = np.zeros((30, 40), dtype=bool)
    mask[5:9, 10:20] = True
    cut = np.asarray(cut_out(image, Detection((8.0, 4.0, 20.0, 10.0), 0.9, mask)))
    assert cut.shape == (6, 12, 3)
    assert (cut[1:5, 2:] == image[5:9, 10:20]).all()
    assert (cut[0] == 153).all()
    assert (cut[:, :2] == 153).all()


def test_without_a_mask_the_whole_box_is_seen(image):
    assert (np.asarray(cut_out(image, Detection((8.0, 4.0, 20.0, 10.0), 0.9))) == image[4:10, 8:20]).all()


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (7, 100), (100, 9), (224, 224), (3, 3), (225, 600)])
def test_pixels_are_those_of_clips_transform(size):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    expected = Compose([Resize(224, InterpolationMode.BICUBIC), CenterCrop(224), ToTensor(), Normalize(MEAN, STD)])(picture)
    torch.testing.assert_close(to_pixels(picture, 224), expected, rtol=0, atol=1e-5)


def test_an_empty_box_is_grey():
    pixels = to_pixels(Image.new("RGB", (0, 5)), 16)
    torch.testing.assert_close(pixels[:, 0, 0], (torch.tensor(153 / 255) - torch.tensor(MEAN)) / torch.tensor(STD))


def test_a_colours_vector_is_the_mean_of_three_unit_vectors_made_unit_again(colors):
    prompts = ["a photo of a blue cat", "a photo of a blue-colored cat", "a photo of a blue object"]
    ids = colors.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        features = colors.model.get_text_features(input_ids=ids).pooler_output
    mean = (features / features.norm(dim=1, keepdim=True)).mean(0)
    torch.testing.assert_close(colors.text("cat")[COLORS.index("blue")], mean / mean.norm(), rtol=1e-5, atol=1e-6)
    assert colors.text("cat") is colors.text("cat")
    assert colors.text("cat").shape == (10, 24)


def test_the_answer_is_the_nearest_colour_whatever_the_batch(colors, image):
    rng = np.random.default_rng(2)
    objects = []
    for _ in range(7):
        x, y = rng.integers(0, 20, 2)
        mask = rng.random((30, 40)) > 0.3
        objects.append(Detection((float(x), float(y), float(x + 15), float(y + 9)), 0.9, mask))
    answers = colors(image, "cat", objects)
    with torch.no_grad():
        for found, answer in zip(objects, answers, strict=True):
            features = colors.model.get_image_features(pixel_values=to_pixels(cut_out(image, found), 16)[None]).pooler_output
            assert answer == COLORS[int((features @ colors.text("cat").T).argmax())]
    small = ClipColors(colors.model, colors.tokenizer, "tiny", batch_size=2)
    assert small(image, "cat", objects) == answers
    assert len(set(answers)) > 1
    assert colors(image, "cat", []) == []
