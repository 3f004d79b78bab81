"""Mask2Former as mmdet runs it: pixels in, instances out, and mmdet's weights in transformers' model."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.swin.modeling_swin import SwinPatchMerging

from diffalign.benchmarks.models.mask2former import Mask2FormerDetector, instances, padded, resize_bilinear, resized, to_pixels
from diffalign.benchmarks.models.mask2former_checkpoint import config_of, convert, from_mmdet, load_mmdet, merge_order
from tests.benchmarks import recorded
from tests.benchmarks.tiny_mask2former import CLASSES, mmdet_layout, tiny_mask2former

# --- in -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected", "with_padding"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((768, 512), (1200, 800), (1216, 800)),
        ((512, 1024), (667, 1333), (672, 1344)),  # the long side is the limit: 512 * 1333 / 1024 = 666.5, rounded up
        ((427, 640), (800, 1199), (800, 1216)),
    ],
)
def test_sizes(size, expected, with_padding):
    assert resized(size) == expected
    assert padded(expected) == with_padding


def pattern() -> np.ndarray:
    return (np.arange(60).reshape(4, 5, 3) * 37 % 256).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (
            (6, 7),
            [
                [0, 63, 143, 222, 118, 124, 188],
                [22, 85, 128, 116, 103, 146, 210],
                [50, 113, 120, 16, 95, 156, 195],
                [79, 142, 148, 45, 124, 112, 53],
                [108, 171, 177, 74, 153, 122, 40],
                [129, 192, 199, 95, 174, 144, 61],
            ],
        ),
        ((3, 3), [[44, 186, 158], [102, 31, 130], [159, 88, 102]]),
        ((4, 5), [[0, 111, 222, 77, 188], [43, 154, 9, 120, 231], [86, 197, 52, 163, 18], [129, 240, 95, 206, 61]]),
    ],
)
def test_resize_is_opencvs_to_the_bit(size, expected):
    """What cv2.resize(..., INTER_LINEAR) of OpenCV 5.0.0 gave for the first channel."""
    assert resize_bilinear(pattern(), size)[..., 0].tolist() == expected


def test_halving_is_a_mean_of_four():
    image = np.array([[1, 2], [3, 4]], dtype=np.uint8)[..., None].repeat(3, axis=2)
    assert resize_bilinear(image, (1, 1)).tolist() == [[[3, 3, 3]]]  # (1 + 2 + 3 + 4 + 2) >> 2


def test_a_large_image_is_not_antialiased():
    """Single-pixel stripes go from 60 columns to 20: each new pixel is its centre's column alone, where a filter would give grey."""
    image = np.zeros((60, 60, 3), dtype=np.uint8)
    image[:, 1::3] = 255
    assert (resize_bilinear(image, (20, 20)) == 255).all()


def test_pixels_are_padded_with_grey_and_then_normalised():
    """mmdet 2.x's instance configurations pad with 128 before Normalize: (128 - 123.675) / 58.395 = 0.074, and so on; not 0."""
    pixels = to_pixels(np.full((64, 128, 3), (124, 116, 104), dtype=np.uint8))  # 667 x 1333 -> 672 x 1344
    assert pixels.shape == (3, 672, 1344)
    expected = torch.tensor([(124 - 123.675) / 58.395, (116 - 116.28) / 57.12, (104 - 103.53) / 57.375])
    torch.testing.assert_close(pixels[:, 0, 0], expected)
    grey = torch.tensor([0.0741, 0.2052, 0.4265])[:, None, None]
    for padding in (pixels[:, 667:], pixels[:, :, 1333:]):
        torch.testing.assert_close(padding, grey.expand_as(padding), atol=1e-4, rtol=0)
    torch.testing.assert_close(pixels[:, 666, 1332], expected)


@pytest.mark.parametrize("side", [64, 512, 1000])
def test_square_images_have_no_padding(side):
    pixels = to_pixels(np.full((side, side, 3), 124, dtype=np.uint8))
    assert pixels.shape == (3, 800, 800)
    assert (pixels == pixels[:, :1, :1]).all()


# --- out ----------------------------------------------------------------------------------------------------------------------


def case(seed: int, queries: int = 10):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(queries, CLASSES + 1, generator=generator) * 2, torch.randn(queries, 8, 8, generator=generator) * 3


def test_one_query_by_hand():
    """One query, two classes: probabilities (3/4, 1/8, 1/8 nothing). Its mask is the left half; the logit there is 2, sigmoid 0.8808."""
    class_logits = torch.tensor([[6.0, 1.0, 1.0]]).log()
    mask_logits = torch.full((1, 4, 4), -2.0)
    mask_logits[:, :, :2] = 2.0
    seen = instances(class_logits, mask_logits, (4, 4), (4, 4), (4, 4))
    assert seen.labels.tolist() == [0, 1]
    assert seen.queries.tolist() == [0, 0]  # one query gives both classes
    torch.testing.assert_close(seen.scores, torch.tensor([0.75, 0.125]) * torch.tensor(2.0).sigmoid(), rtol=1e-5, atol=1e-6)
    assert seen.boxes.tolist() == [[0, 0, 2, 4]] * 2
    assert seen.masks[0].sum() == 8


def test_an_empty_mask_has_score_and_box_zero():
    seen = instances(torch.tensor([[5.0, 0.0]]), torch.full((1, 4, 4), -1.0), (4, 4), (4, 4), (8, 8))
    assert seen.scores.tolist() == [0.0]
    assert seen.boxes.tolist() == [[0, 0, 0, 0]]


def test_padding_is_cut_before_the_mask_is_enlarged():
    """The right half of the padded input is padding; what the mask says there is not seen in the image."""
    logits = torch.full((1, 8, 8), -1.0)
    logits[..., 4:] = 5.0
    seen = instances(torch.tensor([[5.0, 0.0]]), logits, (32, 32), (32, 14), (64, 28))
    assert seen.masks.shape == (1, 64, 28)
    assert not seen.masks.any()


def test_dropping_unlikely_pairs_first_changes_nothing_above_the_cut():
    for seed in range(5):
        classes, masks = case(seed)
        everything = instances(classes, masks, (32, 32), (32, 32), (40, 40))
        early = instances(classes, masks, (32, 32), (32, 32), (40, 40), least_class_score=0.3)
        above = everything.scores > 0.3
        assert above.any()
        assert early.scores[early.scores > 0.3].tolist() == pytest.approx(everything.scores[above].tolist(), rel=1e-6)
        assert early.boxes[early.scores > 0.3].tolist() == everything.boxes[above].tolist()
        assert len(early.scores) < len(everything.scores)


def test_nothing_likely_enough_is_no_instance():
    classes, masks = case(0)
    seen = instances(classes, masks, (32, 32), (32, 32), (40, 40), least_class_score=1.0)
    assert seen.masks.shape == (0, 40, 40)
    assert len(seen.scores) == 0


def test_agreement_with_mmdets_post_processing():
    for given in recorded.load("mask2former_postprocess_golden.json")["cases"]:
        sizes = [tuple(given[name]) for name in ("pad_hw", "img_hw", "ori_hw")]
        seen = instances(torch.tensor(given["class_logits"]), torch.tensor(given["mask_logits"]), *sizes, given["max_per_image"])
        assert len(seen.scores) == len(given["expected"])
        for i, expected in enumerate(given["expected"]):
            assert (seen.labels[i], seen.queries[i]) == (expected["label"], expected["query"])
            assert seen.class_scores[i].item() == pytest.approx(expected["class_score"], abs=1e-4)
            assert seen.mask_scores[i].item() == pytest.approx(expected["mask_score"], abs=1e-4)
            assert seen.scores[i].item() == pytest.approx(expected["score"], abs=1e-4)
            assert seen.boxes[i].tolist() == pytest.approx(expected["box"], abs=1)
            assert seen.masks[i].sum().item() == pytest.approx(expected["mask_area"], abs=1)


# --- the weights --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_mask2former()


@pytest.fixture(scope="module")
def weights(model):
    return mmdet_layout(model)


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def test_the_mapped_model_equals_the_direct_one(model, weights, pixels):
    mapped = from_mmdet(weights)
    ours, theirs = mapped.state_dict(), model.state_dict()
    assert set(ours) == set(theirs)
    used = [name for name in theirs if "swin.layernorm" not in name and "empty_weight" not in name]
    assert all(torch.equal(ours[name], theirs[name]) for name in used)
    with torch.no_grad():
        a, b = mapped(pixel_values=pixels), model(pixel_values=pixels)
    assert torch.equal(a.class_queries_logits, b.class_queries_logits)
    assert torch.equal(a.masks_queries_logits, b.masks_queries_logits)
    assert not mapped.training


def test_the_architecture_is_read_off_the_shapes(model, weights):
    found, expected = config_of(weights).to_dict(), model.config.to_dict()
    for name in ("feature_size", "mask_feature_size", "hidden_dim", "encoder_layers", "encoder_feedforward_dim", "decoder_layers"):
        assert found[name] == expected[name], name
    for name in ("dim_feedforward", "num_attention_heads", "num_queries"):
        assert found[name] == expected[name], name
    for name in ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "patch_size"):
        assert found["backbone_config"][name] == expected["backbone_config"][name], name


def test_the_key_map_is_complete_at_the_real_size():
    """Swin-S and everything else as GenEval's detector has it, without memory: names and shapes alone."""
    swin = SwinConfig(
        embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7, out_features=[f"stage{s}" for s in (1, 2, 3, 4)]
    )
    config = Mask2FormerConfig(backbone_config=swin, num_labels=80, num_queries=100)
    with torch.device("meta"):
        direct = Mask2FormerForUniversalSegmentation(config)
    assert 68e6 < sum(parameter.numel() for parameter in direct.parameters()) < 70e6
    layout = mmdet_layout(direct)
    own, mapped = direct.state_dict(), convert(layout)
    assert set(mapped) <= set(own)
    assert all("swin.layernorm" in name or "empty_weight" in name for name in set(own) - set(mapped))  # used by no detection
    assert all(mapped[name].shape == own[name].shape for name in mapped)
    found = config_of(layout)
    assert (found.backbone_config.depths, found.num_labels, found.num_queries) == ([2, 2, 18, 2], 80, 100)
    assert (found.decoder_layers, found.encoder_layers, found.hidden_dim) == (10, 6, 256)


def test_patch_merging_after_the_reordering_is_that_of_mmdet():
    """mmdet merges with Unfold (channels x 2 x 2); with the columns reordered, transformers' merging gives the same."""
    torch.manual_seed(0)
    merging = SwinPatchMerging(5)
    norm, reduction = torch.nn.LayerNorm(20), torch.nn.Linear(20, 10, bias=False)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    image = torch.randn(2, 5, 6, 8)
    theirs = reduction(norm(F.unfold(image, 2, stride=2).transpose(1, 2)))
    merging.norm.load_state_dict({name: merge_order(tensor) for name, tensor in norm.state_dict().items()})
    merging.reduction.load_state_dict({"weight": merge_order(reduction.weight.detach())})
    ours = merging(image.flatten(2).transpose(1, 2), (6, 8))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_every_tensor_of_the_file_is_used(weights):
    names = [name for name in weights if not name.endswith("relative_position_index")]
    total = sum(weights[name].numel() for name in names)
    assert sum(tensor.numel() for tensor in convert(weights).values()) == total


@pytest.mark.parametrize("name", ["panoptic_head.query_feat.bias", "backbone.stages.0.blocks.0.attn.w_msa.gate"])
def test_a_tensor_without_counterpart_is_named(weights, name):
    with pytest.raises(ValueError, match=name):
        from_mmdet({**weights, name: torch.zeros(1)})


@pytest.mark.parametrize("name", ["panoptic_head.mask_embed.4.bias", "backbone.norm2.weight"])
def test_a_missing_tensor_is_an_error(weights, name):
    with pytest.raises(ValueError, match="1 tensors missing"):
        from_mmdet({key: tensor for key, tensor in weights.items() if key != name})


def test_the_two_convolutions_may_bring_a_zero_bias_only(weights):
    name = "panoptic_head.pixel_decoder.lateral_convs.0.conv.bias"
    from_mmdet({**weights, name: torch.zeros(32)})
    with pytest.raises(ValueError, match="is not zero"):
        from_mmdet({**weights, name: torch.full((32,), 0.1)})


def test_weights_of_something_else_are_refused():
    with pytest.raises(ValueError, match="not the weights of mmdet"):
        from_mmdet({"backbone.conv1.weight": torch.zeros(1)})


def test_a_file_is_read_and_its_name_checked(model, weights, pixels, tmp_path):
    meta = {"epoch": 50, "CLASSES": ("person", "dog"), "hook_msgs": {"best_score": np.float64(0.461)}}
    plain = tmp_path / "detector.pth"
    torch.save({"state_dict": weights, "meta": meta}, plain)
    digest = hashlib.sha256(plain.read_bytes()).hexdigest()[:8]
    loaded, version = load_mmdet(plain)
    assert version == digest
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=pixels).class_queries_logits, model(pixel_values=pixels).class_queries_logits)

    named = plain.rename(tmp_path / f"mask2former-{digest}.pth")
    assert load_mmdet(named)[1] == digest
    with pytest.raises(ValueError, match="is damaged"):
        load_mmdet(named.rename(tmp_path / "mask2former-0123abcd.pth"))


def test_the_file_for_mmdet_3_is_refused_by_name(tmp_path):
    path = tmp_path / "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-c9d0c4f2.pth"
    path.write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"mmdet 3\.x"):
        load_mmdet(path)


def test_a_file_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_mmdet(path)


# --- the detector -------------------------------------------------------------------------------------------------------------

NAMES = ("person", "dog", "cat", "cup", "tv", "bus")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8), rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)]


def test_a_batch_of_different_sizes_equals_single_images(model, images, monkeypatch):
    monkeypatch.setattr("diffalign.benchmarks.models.mask2former.SHORT_SIDE", 64)
    monkeypatch.setattr("diffalign.benchmarks.models.mask2former.LONG_SIDE", 107)
    detector = Mask2FormerDetector(model, NAMES, "tiny", least_score=0.1)
    together = detector([images[0], images[1], images[0]])
    assert any(together)
    for image, found in zip([images[0], images[1], images[0]], together, strict=True):
        (alone,) = detector([image])
        assert list(found) == list(alone)
        for name, objects in found.items():
            assert [d.box for d in objects] == [d.box for d in alone[name]]
            assert [d.score for d in objects] == pytest.approx([d.score for d in alone[name]], abs=1e-5)
            assert all(d.mask.shape == image.shape[:2] for d in objects)
            assert [d.score for d in objects] == sorted((d.score for d in objects), reverse=True)


def test_names_must_fit_the_model(model):
    with pytest.raises(ValueError, match="6 classes and there are 2 names"):
        Mask2FormerDetector(model, ("dog", "cat"), "tiny")


def test_logits_that_are_not_finite_are_an_error_not_an_empty_image(images, monkeypatch):
    monkeypatch.setattr("diffalign.benchmarks.models.mask2former.SHORT_SIDE", 64)
    monkeypatch.setattr("diffalign.benchmarks.models.mask2former.LONG_SIDE", 107)
    broken = tiny_mask2former()
    torch.nn.init.constant_(broken.class_predictor.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        Mask2FormerDetector(broken, NAMES, "tiny")(images)
