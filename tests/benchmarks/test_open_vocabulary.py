"""Open-vocabulary detectors in the frame of T2I-CompBench's rules: boxes, thinning, and real OWLv2 and Grounding DINO code at tiny size."""

import numpy as np
import pytest
import torch

from diffalign.benchmarks.models.open_vocabulary import GroundingDino, Owlv2, corners, labelled, load_detector, thinned
from diffalign.benchmarks.t2i_compbench.detections import FRAME, Labelled
from tests.benchmarks.tiny_clip import tiny_clip
from tests.benchmarks.tiny_t2i import tiny_owlv2


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((40, 40, 3), (30, 50, 3))]


def test_corners():
    assert corners(torch.tensor([[0.5, 0.5, 0.2, 0.4]]))[0].tolist() == pytest.approx([0.4, 0.3, 0.6, 0.7])


def test_each_box_goes_under_its_best_word_in_the_frame():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.6], [0.15, 0.1]])
    boxes = torch.tensor([[0.0, 0, 20, 20], [20, 0, 60, 60], [0, 0, 5, 5]])
    found = labelled(scores, boxes, ["dog", "cup"], 0.2, np.zeros((40, 80, 3), dtype=np.uint8))
    scale = FRAME / 40
    assert [(f.label, round(f.score, 3)) for f in found] == [("dog", 0.9), ("cup", 0.6)]
    assert found[0].box == pytest.approx((0, 0, 20 * scale, 20 * scale))
    assert found[1].box == pytest.approx((20 * scale, 0, 60 * scale, 40 * scale))  # cut to the image


def test_boxes_outside_the_image_are_dropped():
    found = labelled(torch.tensor([[0.9]]), torch.tensor([[50.0, 0, 60, 10]]), ["dog"], 0.2, np.zeros((40, 40, 3), dtype=np.uint8))
    assert found == []


def test_scores_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="not finite"):
        labelled(torch.tensor([[float("nan")]]), torch.zeros(1, 4), ["dog"], 0.2, np.zeros((4, 4, 3), dtype=np.uint8))


def test_thinning_is_by_label_and_keeps_the_better():
    a, b = Labelled("dog", 0.9, (0.0, 0.0, 10.0, 10.0)), Labelled("dog", 0.8, (0.0, 0.0, 10.0, 8.0))
    apart, cat = Labelled("dog", 0.7, (6.0, 0.0, 16.0, 10.0)), Labelled("cat", 0.6, (0.0, 0.0, 10.0, 10.0))
    assert thinned([a, b, apart, cat]) == [a, apart, cat]


def check(detector, images):
    """What any detector owes: its words only, best first, inside the frame, the same alone as together, nothing for no words."""
    words = [["dog", "red cup"], ["bench"]]
    found = detector(images, words)
    assert found[0]
    for objects, wanted, image in zip(found, words, images, strict=True):
        assert {f.label for f in objects} <= set(wanted)
        assert [f.score for f in objects] == sorted((f.score for f in objects), reverse=True)
        width = FRAME * image.shape[1] / min(image.shape[:2])
        assert all(0 <= f.box[0] < f.box[2] <= width + 1e-3 for f in objects)
        assert detector([image], [wanted]) == [objects]
    assert detector(images[:1], [[]]) == [[]]


def test_owlv2(images):
    check(Owlv2(*tiny_owlv2(), "tiny", threshold=0.1), images)


def test_owlv2_boxes_are_those_of_transformers_own_post_processing(images):
    model, processor = tiny_owlv2()
    image = images[1]
    inputs = processor(text=[["a photo of a dog"]], images=image, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    (theirs,) = processor.post_process_grounded_object_detection(output, threshold=0.0, target_sizes=[image.shape[:2]])
    best = int(theirs["scores"].argmax())
    (ours, *_) = Owlv2(model, processor, "tiny", threshold=0.0)([image], [["dog"]])[0]
    assert ours.score == pytest.approx(theirs["scores"][best].item(), abs=1e-5)
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (v * FRAME / min(height, width) for v in theirs["boxes"][best].tolist())
    cut = (max(x1, 0), max(y1, 0), min(x2, FRAME * width / height), min(y2, FRAME))
    assert ours.box == pytest.approx(cut, abs=0.05)


def test_detectors_are_loaded_by_their_architecture(tmp_path, images):
    model, processor = tiny_owlv2()
    model.save_pretrained(tmp_path / "owl")
    processor.save_pretrained(tmp_path / "owl")
    detector = load_detector(str(tmp_path / "owl"))
    assert isinstance(detector, Owlv2)
    assert detector.version == f"open-vocabulary detector {tmp_path / 'owl'}"
    tiny_clip()[0].save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"must be an OWLv2 or a Grounding DINO; .* is a clip"):
        load_detector(str(tmp_path / "clip"))


@pytest.fixture(scope="module")
def tiny_grounding_dino():
    from tests.benchmarks.tiny_grounding_dino import tiny_grounding_dino as build

    return build()


def test_grounding_dino(tiny_grounding_dino, images):
    check(GroundingDino(*tiny_grounding_dino, "tiny", threshold=0.01), images)


def test_a_words_tokens_are_its_own(tiny_grounding_dino):
    detector = GroundingDino(*tiny_grounding_dino, "tiny")
    tokens = detector._tokens("dog. red cup. bench.", ["dog", "red cup", "bench"])
    words = detector.processor.tokenizer("dog. red cup. bench.", return_offsets_mapping=True).input_ids
    names = [[detector.processor.tokenizer.convert_ids_to_tokens(words[i]) for i in row] for row in tokens]
    assert names == [["dog"], ["red", "cup"], ["bench"]]
