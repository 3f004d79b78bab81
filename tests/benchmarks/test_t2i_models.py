"""T2I-CompBench's models at tiny size: what goes in, what comes out, and that a batch is its members."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import BertTokenizer

from diffalign.benchmarks.geneval.colors import MEAN, STD
from diffalign.benchmarks.t2i_compbench.detections import FRAME
from diffalign.benchmarks.t2i_compbench.models import (
    BlipVqa,
    ClipScore,
    Depth,
    load_blip,
    load_clip_score,
    load_depth,
    squashed,
    to_frame_depth,
)
from tests.benchmarks.tiny_clip import tiny_clip
from tests.benchmarks.tiny_t2i import WORDS, tiny_blip, tiny_dpt

ASKED = [["a red cup?", "the bowl?"], [], ["a dog?", "a blue bench?", "the red red red bowl?"]]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((40, 40, 3), (30, 50, 3), (64, 32, 3))]


@pytest.fixture(scope="module")
def blip():
    return BlipVqa(*tiny_blip(), "tiny", size=48)


def test_pixels_are_squashed_as_the_original_does(images):
    expected = Compose([Resize((48, 48), InterpolationMode.BICUBIC), ToTensor(), Normalize(MEAN, STD)])(Image.fromarray(images[1]))
    torch.testing.assert_close(squashed(images[1], 48), expected, rtol=0, atol=1e-5)


def test_answers_do_not_depend_on_the_batch(blip, images):
    together = blip(images, ASKED)
    assert [len(row) for row in together] == [2, 0, 3]
    small = BlipVqa(blip.model, blip.tokenizer, "tiny", size=48, batch_size=2)
    for image, asked, answers in zip(images, ASKED, together, strict=True):
        assert answers == pytest.approx([blip([image], [[question]])[0][0] for question in asked], abs=1e-5)
    assert [p for row in small(images, ASKED) for p in row] == pytest.approx([p for row in together for p in row], abs=1e-5)
    assert all(0 < p < 1 for row in together for p in row)
    assert len({round(p, 4) for row in together for p in row}) == 5


def test_p_yes_by_hand(blip, images):
    """[ENC] first in the question, [DEC] alone in the answer, and yes against no only."""
    question = "a red cup?"
    ids = blip.tokenizer([question], return_tensors="pt").input_ids
    ids[:, 0] = len(WORDS) + 1
    with torch.no_grad():
        seen = blip.model.vision_model(squashed(images[0], 48)[None], interpolate_pos_encoding=True).last_hidden_state
        understood = blip.model.text_encoder(input_ids=ids, encoder_hidden_states=seen).last_hidden_state
        logits = blip.model.text_decoder(input_ids=torch.tensor([[len(WORDS)]]), encoder_hidden_states=understood).logits[0, 0]
    yes, no = logits[WORDS.index("yes")].exp(), logits[WORDS.index("no")].exp()
    ((answer,),) = blip([images[0]], [[question]])
    assert answer == pytest.approx((yes / (yes + no)).item(), abs=1e-5)


def test_the_version_says_where_positions_are_interpolated(blip):
    assert blip.version == "tiny, positions interpolated to 48 pixels"
    assert BlipVqa(blip.model, blip.tokenizer, "tiny", size=32).version == "tiny"


def test_broken_weights_are_an_error_not_a_zero(images):
    model, tokenizer = tiny_blip()
    torch.nn.init.constant_(model.text_decoder.cls.predictions.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        BlipVqa(model, tokenizer, "tiny", size=48)(images[:1], [["a dog?"]])


def test_a_tokenizer_without_yes_and_no_is_refused():
    other = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS[:5])})
    with pytest.raises(ValueError, match="yes and no"):
        BlipVqa(tiny_blip()[0], other, "tiny")


def test_clip_score_is_the_plain_cosine(images):
    model, tokenizer = tiny_clip()
    scorer = ClipScore(model, tokenizer, "tiny")
    texts = ["a red cup", "dogs", "a red cup"]
    scores = scorer(images, texts)
    assert scores == pytest.approx([scorer([image], [text])[0] for image, text in zip(images, texts, strict=True)], abs=1e-5)
    assert all(-1 <= score <= 1 for score in scores)
    with torch.no_grad():
        ids = tokenizer(["dogs"], return_tensors="pt").input_ids
        text = model.get_text_features(input_ids=ids).pooler_output[0]
    torch.testing.assert_close(scorer.text("dogs"), text / text.norm(), rtol=1e-5, atol=1e-6)


def test_depth_fills_the_frame_in_256_steps(images):
    maps = Depth(tiny_dpt(), "tiny", size=32)(images)
    assert [each.shape for each in maps] == [(FRAME, FRAME), (FRAME, round(FRAME * 50 / 30)), (2 * FRAME, FRAME)]
    for each in maps:
        assert each.min() == 0.0
        assert each.max() >= np.float32(254 / 255)  # cut, so a rounding below 1 is 254
        assert np.allclose(each * 255, np.round(each * 255), atol=1e-3)


def test_depth_is_cut_to_whole_steps_not_rounded():
    depth = to_frame_depth(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), (FRAME, FRAME))
    assert depth[0, 1] == 0.0  # 1 / 478 is half a step of 1 / 255
    assert depth[0, 2] == np.float32(1 / 255)
    assert (to_frame_depth(torch.ones(2, 2), (FRAME, FRAME)) == 0).all()


def test_models_are_loaded_from_folders_and_a_missing_tensor_is_an_error(tmp_path):
    blip, words = tiny_blip()
    clip, tokenizer = tiny_clip()
    for name, parts in {"blip": (blip, words), "clip": (clip, tokenizer), "dpt": (tiny_dpt(),)}.items():
        for part in parts:
            part.save_pretrained(tmp_path / name)
    assert load_blip(str(tmp_path / "blip")).answer_ids == [WORDS.index("yes"), WORDS.index("no")]
    assert load_clip_score(str(tmp_path / "clip")).version == f"CLIPScore {tmp_path / 'clip'}"
    assert load_depth(str(tmp_path / "dpt")).size == 480
    weights = {name: tensor for name, tensor in clip.state_dict().items() if name != "text_projection.weight"}
    clip.save_pretrained(tmp_path / "clip", state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks 1 tensors of CLIPModel, such as text_projection\.weight"):
        load_clip_score(str(tmp_path / "clip"))
