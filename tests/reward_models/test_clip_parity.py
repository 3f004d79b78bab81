"""The CLIP family against the original architectures on the same random weights, or the published formula worked by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from diffalign import reward_models
from diffalign.reward_models.checkpoints import collapse
from diffalign.reward_models.mps import OVERALL, related, rotate
from tests.reward_models import tiny_clips
from tests.reward_models.conftest import PROMPTS
from tests.reward_models.test_pixels import photo, tensor_of
from tests.reward_models.tiny_clips import MEAN, SIZE, STD

FAMILY = list(tiny_clips.WRITERS)
EXACT = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def small() -> torch.Tensor:
    """Images of the towers' own size, which no geometry changes."""
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))


def normalised(images: torch.Tensor) -> torch.Tensor:
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# ---- CLIPScore -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip-l14", "clip-h14", "clip-bigg14"])
@torch.no_grad()
def test_clip_score_is_a_hundred_cosines_of_the_model_open_clip_loads(weights, load, small, name):
    model, process = open_clip.create_model_from_pretrained(f"local-dir:{weights / name}")
    image, text = model.encode_image(normalised(small)), model.encode_text(open_clip.tokenize(PROMPTS))
    assert image.std() > 0.05
    assert text.std() > 0.05
    expected = F.cosine_similarity(image, text)
    torch.testing.assert_close(load(name)(small, PROMPTS) / 100, expected, **EXACT)
    picture = photo(50, 90)
    theirs = model.encode_image(process(Image.fromarray(picture))[None])
    score = load(name)(tensor_of(picture), PROMPTS[:1]) / 100
    torch.testing.assert_close(score, F.cosine_similarity(theirs, text[:1]), atol=2e-3, rtol=0)  # PIL rounds to 8 bits


@pytest.mark.parametrize(("name", "seed", "quick"), [("clip-l14", 1, True), ("clip-h14", 0, False)])
def test_both_layouts_of_the_same_weights_score_alike(tmp_path, load, small, name, seed, quick):
    tiny_clips.write_transformers(tmp_path, seed, quick)
    other = reward_models.load(name, source=tmp_path)
    torch.testing.assert_close(other(small, PROMPTS) / 100, load(name)(small, PROMPTS) / 100, **EXACT)
    other.drop_text_encoder()
    assert not any("text_model" in key for key in other.state_dict())


def test_the_activation_is_the_one_each_model_was_trained_with(tmp_path, small):
    """OpenAI's is quick_gelu, also where a file says nothing; LAION's is gelu. Mistaking one for the other goes unnoticed by any loader."""
    tiny_clips.write_open_clip(tmp_path / "silent", seed=1)
    tiny_clips.write_open_clip(tmp_path / "says", seed=1, quick_gelu=True)
    (tmp_path / "says" / "open_clip_model.safetensors").write_bytes((tmp_path / "silent" / "open_clip_model.safetensors").read_bytes())
    scores = {
        (name, folder): reward_models.load(name, source=tmp_path / folder)(small, PROMPTS)
        for name in ("clip-l14", "clip-h14")
        for folder in ("silent", "says")
    }
    assert torch.equal(scores["clip-l14", "silent"], scores["clip-l14", "says"])
    assert torch.equal(scores["clip-l14", "silent"], scores["clip-h14", "says"])
    assert (scores["clip-l14", "silent"] - scores["clip-h14", "silent"]).abs().max() > 0.1


@pytest.mark.parametrize(("name", "cleaned"), [("clip-h14", True), ("hpsv2", True), ("pickscore", False), ("mps", False)])
def test_who_cleans_prompts_as_open_clip_does(load, small, name, cleaned):
    reward = load(name)
    scores = [reward(small[:1], [prompt]).item() for prompt in ("salt &amp; pepper", "salt & pepper")]
    assert (scores[0] == scores[1]) is cleaned


# ---- PickScore and HPS -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pickscore_is_the_logit_of_the_model_transformers_loads(weights, load, small):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(weights / "pickscore", dtype=torch.float32).eval()
    logits = model(input_ids=open_clip.tokenize(PROMPTS), pixel_values=normalised(small)).logits_per_image
    torch.testing.assert_close(load("pickscore")(small, PROMPTS), logits.diagonal(), **EXACT)
    picture = photo(50, 90)
    probabilities = load("pickscore")(torch.cat([tensor_of(picture), tensor_of(picture[::-1].copy())]), PROMPTS[:1] * 2).softmax(0)
    assert probabilities.sum() == pytest.approx(1)


def test_the_logit_scale_is_not_rounded_with_the_backbone(load):
    assert load("pickscore", dtype="bfloat16").scale == pytest.approx(1 / 0.07, rel=1e-6)
    assert math.exp(torch.tensor(math.log(1 / 0.07)).bfloat16().item()) != pytest.approx(1 / 0.07, rel=1e-3)


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
@torch.no_grad()
def test_hps_is_the_plain_cosine_of_open_clips_model(weights, load, small, name):
    """The published code: the state dict into the architecture, features normalised, their product without logit scale."""
    model = open_clip.create_model("tiny-h", pretrained=None)
    file = weights / name / reward_models.SPECS[name].options["file"]
    model.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    image, text = model.eval()(normalised(small), open_clip.tokenize(PROMPTS))[:2]
    torch.testing.assert_close(load(name)(small, PROMPTS), (image @ text.T).diagonal(), **EXACT)


@torch.no_grad()
def test_hps_sees_a_black_border(load):
    """A wide white picture equals the same picture on a black square, and differs from its centre crop."""
    reward = load("hpsv2")
    wide = torch.ones(1, 3, 12, SIZE)
    square = torch.zeros(1, 3, SIZE, SIZE)
    square[:, :, 8:20] = 1.0
    torch.testing.assert_close(reward(wide, PROMPTS[:1]), reward(square, PROMPTS[:1]))
    assert not torch.allclose(reward(wide, PROMPTS[:1]), reward(torch.ones(1, 3, SIZE, SIZE), PROMPTS[:1]), atol=1e-3)


# ---- aesthetics ------------------------------------------------------------------------------------------------------------------


def layers_of(head: dict[str, torch.Tensor], prefix: str, places: tuple[int, ...]) -> list[nn.Linear]:
    layers = []
    for place in places:
        weight, bias = head[f"{prefix}.{place}.weight"].float(), head[f"{prefix}.{place}.bias"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return layers


@torch.no_grad()
def test_laion_aesthetic_is_the_published_layers_on_openais_tower(weights, load, small):
    from transformers import CLIPVisionModelWithProjection

    tower = CLIPVisionModelWithProjection.from_pretrained(weights / "laion-aesthetic-v2" / "encoder", dtype=torch.float32).eval()
    head = torch.load(weights / "laion-aesthetic-v2" / "head" / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    features = F.normalize(tower(pixel_values=normalised(small)).image_embeds, dim=-1)
    expected = nn.Sequential(*layers_of(head, "layers", (0, 2, 4, 6, 7)))(features).squeeze(1)
    assert expected.std() > 0.01
    torch.testing.assert_close(load("laion-aesthetic-v2")(small, PROMPTS), expected, **EXACT)


def test_laion_aesthetic_takes_its_encoder_from_either_layout(weights, tmp_path, load, small):
    tiny_clips.write_open_clip(tmp_path, seed=6)  # weights of the activation gelu, which clip-l14's option overrules
    torch.save(tiny_clips.clip_weights(6, quick_gelu=True), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_model.safetensors").unlink()
    places = {"encoder": tmp_path, "head": weights / "laion-aesthetic-v2" / "head"}
    other = reward_models.load("laion-aesthetic-v2", source=places)
    torch.testing.assert_close(other(small, PROMPTS), load("laion-aesthetic-v2")(small, PROMPTS), **EXACT)


@torch.no_grad()
def test_aesthetic_v25_is_the_published_layers_on_siglip(weights, load, small):
    from transformers import SiglipModel

    model = SiglipModel.from_pretrained(weights / "aesthetic-v2.5" / "encoder", dtype=torch.float32).eval()
    head = torch.load(weights / "aesthetic-v2.5" / "head" / "aesthetic_predictor_v2_5.pth", weights_only=True)
    features = F.normalize(model.vision_model(pixel_values=(small - 0.5) / 0.5).pooler_output, dim=-1)
    expected = nn.Sequential(*layers_of(head, "scoring_head", (0, 2, 4, 6, 8)))(features).squeeze(1)
    assert expected.std() > 0.01
    torch.testing.assert_close(load("aesthetic-v2.5")(small, PROMPTS), expected, **EXACT)


@torch.no_grad()
def test_multiplied_out_layers_are_the_layers():
    """By hand: 2 (3 x + 1) - 1 = 6 x + 1; and layers of the published widths."""
    by_hand = [nn.Linear(1, 1), nn.Linear(1, 1)]
    for layer, (weight, bias) in zip(by_hand, ((3.0, 1.0), (2.0, -1.0)), strict=True):
        layer.load_state_dict({"weight": torch.tensor([[weight]]), "bias": torch.tensor([bias])})
    assert collapse(by_hand)(torch.tensor([[0.5]])).item() == 4.0
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise((768, *tiny_clips.HEAD_WIDTHS))]
    x = torch.randn(5, 768, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(collapse(layers)(x), nn.Sequential(*layers)(x), **EXACT)


@pytest.mark.parametrize("name", ["laion-aesthetic-v2", "aesthetic-v2.5", "shapes-aesthetic"])
def test_image_rewards_hold_no_text_tower(load, name):
    text = ("text_", "token_embedding", "ln_final", "clip.transformer", "clip.positional_embedding")
    assert not [key for key in load(name).state_dict() if any(word in key for word in text)]


# ---- MPS -------------------------------------------------------------------------------------------------------------------------


def mps_by_hand(tensors: dict[str, torch.Tensor], model, pixels: torch.Tensor, prompt: str, threshold: float) -> float:
    """One sample and one head at a time: no batch, attention written out, rotary positions as complex numbers."""
    ids = open_clip.tokenize([prompt, OVERALL])
    ids[ids.eq(0) & (ids.eq(49407).cumsum(1) > 0)] = 49407  # transformers pads with the end token, open_clip with zeros
    text, condition = model.text_projection(model.text_model(input_ids=ids).last_hidden_state)
    image = model.visual_projection(model.vision_model(pixel_values=pixels[None]).last_hidden_state)[0]
    greatest = torch.einsum("id,jd->ij", text, condition).max(dim=1).values
    mask = torch.where(greatest / greatest.max() > threshold, 0.0, -math.inf)
    for i in range(4):
        cross = {key.split(".fn.")[1]: t for key, t in tensors.items() if f"layers.{i}.0." in key and "cross_model" in key}
        own = {key.split(".fn.")[1]: t for key, t in tensors.items() if f"layers.{i}.1." in key and "cross_model" in key}
        x = F.layer_norm(image, image.shape[-1:], cross["norm.weight"], cross["norm.bias"])
        keys, values = (text @ cross["to_kv.weight"].T).split(64, dim=1)
        heads = [one_head(query, keys, values, mask) for query in (x @ cross["to_q.weight"].T).split(64, dim=1)]
        image = image + torch.cat(heads, dim=1) @ cross["to_out.weight"].T + gated(x @ cross["ff.0.weight"].T) @ cross["ff.2.weight"].T
        x = F.layer_norm(image, image.shape[-1:], own["norm.weight"], own["norm.bias"])
        queries, keys, values, inner = (x @ own["fused_attn_ff_proj.weight"].T).split((1024, 64, 64, 8 * image.shape[1]), dim=1)
        turned = turn(keys, own["rotary_emb.inv_freq"])
        heads = [one_head(turn(query, own["rotary_emb.inv_freq"]), turned, values) for query in queries.split(64, dim=1)]
        image = image + torch.cat(heads, dim=1) @ own["attn_out.weight"].T + gated(inner) @ own["ff_out.1.weight"].T
    end = text[ids[0].tolist().index(49407)]
    return (model.logit_scale.exp() * (image[0] @ end) / (image[0].norm() * end.norm())).item()


def one_head(query, keys, values, mask=0.0):
    return ((query @ keys.T) / 8 + mask).softmax(dim=1) @ values


def gated(x):
    value, gate = x.chunk(2, dim=1)
    return gate * torch.sigmoid(gate) * value


def turn(x, frequencies):
    numbers = torch.complex(*x.chunk(2, dim=1))
    angles = torch.arange(len(x))[:, None] * frequencies
    turned = numbers * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"threshold": 0.95}])
def test_mps_is_the_published_formula_sample_by_sample(weights, load, small, options):
    from transformers import CLIPConfig, CLIPModel

    tensors = load_file(weights / "mps" / "model.safetensors")
    model = CLIPModel(CLIPConfig.from_dict(tiny_clips.hf_config())).eval()
    own = {key.removeprefix("mps.model."): t for key, t in tensors.items() if key.startswith("mps.model.") and "position_ids" not in key}
    model.load_state_dict(own)
    threshold = options.get("threshold", 0.01)
    expected = torch.tensor([mps_by_hand(tensors, model, *sample, threshold) for sample in zip(normalised(small), PROMPTS, strict=True)])
    assert expected.std() > 0.01
    torch.testing.assert_close(load("mps", **options)(small, PROMPTS), expected, **EXACT)


@torch.no_grad()
def test_the_threshold_of_mps_decides_which_tokens_are_kept(load, small):
    kept = {threshold: load("mps", threshold=threshold).encode_text(PROMPTS)[:, 1:, -1].sum() for threshold in (0.01, 0.95)}
    assert kept[0.95] < kept[0.01]
    with pytest.raises(ValueError, match=r"option threshold must be at least 0 and below 1, got 30"):
        load("mps", threshold=30)
    with pytest.raises(ValueError, match=r"'mps' has no option 'treshold'; it has architecture, threshold"):
        load("mps", treshold=0.3)
    with pytest.raises(ValueError, match=r"'brightness' has no option 'threshold'; it has none"):
        load("brightness", threshold=0.3)


@torch.no_grad()
def test_the_condition_of_mps_is_encoded_once_for_each_place_and_dtype(load, small):
    reward, encoded = load("mps"), []
    reward.clip.text_model.register_forward_hook(lambda module, arguments, output: encoded.append(len(output.last_hidden_state)))
    exact = [reward(small[:1], [prompt]) for prompt in ("a red ring", "a blue ring", "a ring")]
    assert encoded == [1, 1, 1, 1]  # a prompt, the condition, and two prompts
    encoded.clear()
    assert reward.bfloat16()(small[:1], ["a ring"]) != exact[-1]
    assert encoded == [1, 1]


@torch.no_grad()
def test_tokens_that_are_not_kept_are_not_seen(load, small):
    reward = load("mps")
    texts = reward.encode_text(PROMPTS)
    assert texts[:, 1:, -1].unique().tolist() == [1.0]  # these weights keep all
    fewer = texts.clone()
    fewer[:, 8:, -1] = 0
    torch.testing.assert_close(reward.score(small, fewer), reward.score(small, texts[:, :8]), **EXACT)
    assert (reward.score(small, fewer) - reward.score(small, texts)).abs().max() > 0.01


def test_tokens_are_kept_by_their_own_prompts_measure():
    """Similarities (4, 0.02, -1) and (400, 5, 2): of the greatest of each, 1, 0.005, less than 0; and 1, 0.0125, 0.005."""
    condition = torch.eye(2)
    tokens = torch.tensor([[[4.0, 0.0], [0.0, 0.02], [-1.0, -2.0]], [[400.0, 0.0], [5.0, 1.0], [2.0, -9.0]]])
    assert related(tokens, condition, 0.01).tolist() == [[True, False, False], [True, True, False]]


def test_rotary_positions_are_relative():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(2))
    products = rotate(query.expand(9, 64)) @ rotate(key.expand(9, 64)).T
    torch.testing.assert_close(products[2, 5], products[4, 7], atol=1e-4, rtol=0)
    torch.testing.assert_close(products[3, 3], query @ key, atol=1e-4, rtol=0)
    assert abs(products[2, 5] - products[2, 6]) > 0.1


# ---- all of them -----------------------------------------------------------------------------------------------------------------


def pil_tensor(picture: Image.Image, mean=MEAN, std=STD) -> torch.Tensor:
    levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return (levels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def as_transformers(picture: Image.Image) -> torch.Tensor:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE)
    return torch.as_tensor(np.asarray(processor(picture)["pixel_values"][0]))


def as_torchvision(picture: Image.Image) -> torch.Tensor:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    return pil_tensor(Compose([Resize(SIZE, InterpolationMode.BICUBIC), CenterCrop(SIZE)])(picture))


def as_hps(picture: Image.Image) -> torch.Tensor:
    """The one original that resizes a tensor of floats, which keep what overshoots."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import normalize, resize

    scale = SIZE / max(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    square = torch.zeros(3, SIZE, SIZE)
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    square[:, top : top + height, left : left + width] = resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
    return normalize(square, MEAN, STD)


def as_siglip(picture: Image.Image) -> torch.Tensor:
    from transformers import SiglipImageProcessor

    return torch.as_tensor(np.asarray(SiglipImageProcessor(size={"height": SIZE, "width": SIZE})(picture)["pixel_values"][0]))


ORIGINALS = {
    "clip-l14": as_torchvision,
    "clip-h14": as_torchvision,
    "clip-bigg14": as_torchvision,
    "pickscore": as_transformers,
    "hpsv2": as_hps,
    "hpsv2.1": as_hps,
    "laion-aesthetic-v2": as_torchvision,
    "aesthetic-v2.5": as_siglip,
    "mps": as_transformers,
}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("size", [(120, 90), (61, 140), (SIZE, 31), (31, SIZE), (SIZE, SIZE), (20, 20)])  # 31: a margin of 1.5
def test_preprocessing_is_the_originals_on_a_pil_image(load, name, size):
    """To the byte; transformers' own resizing of bytes, where it takes torchvision's, has coarser weights than Pillow's."""
    picture = photo(*size)
    theirs = ORIGINALS[name](Image.fromarray(picture))
    ours = load(name).pixels(tensor_of(picture))[0]
    assert ours.shape == theirs.shape
    std = (0.5, 0.5, 0.5) if name == "aesthetic-v2.5" else STD
    levels = (ours - theirs).abs() * torch.tensor(std).view(3, 1, 1) * 255
    assert levels.mean() < 1e-2
    assert levels.max() < 1.001


def test_an_odd_margin_tells_the_two_crops_apart(load):
    """A picture of 31 beside 28: transformers cuts 1 on the left, torchvision rounds 1.5 to 2."""
    columns = torch.linspace(0.2, 0.8, 31).expand(1, 3, SIZE, 31)
    by_transformers, by_torchvision = (load(name).pixels(columns)[0, 0, 0, 0] * STD[0] + MEAN[0] for name in ("pickscore", "clip-h14"))
    torch.testing.assert_close(torch.stack([by_transformers, by_torchvision]), columns[0, 0, 0, 1:3])


@pytest.mark.parametrize("name", FAMILY)
def test_a_bfloat16_backbone_gives_float32_products(load, small, name):
    reward = load(name, dtype="bfloat16")
    exact, rough = load(name)(small, PROMPTS), reward(small, PROMPTS)
    assert {p.dtype for key, p in reward.named_parameters() if not key.startswith("head.")} == {torch.bfloat16}
    assert rough.dtype == torch.float32
    assert (rough != rough.bfloat16()).any()  # finer than the steps of bfloat16
    torch.testing.assert_close(rough, exact, atol=0.03 * float(exact.abs().max()) + 0.02, rtol=0)


@pytest.mark.parametrize("name", FAMILY)
def test_nothing_is_left_without_memory(load, name):
    reward = load(name)
    assert not [key for key, tensor in [*reward.named_parameters(), *reward.named_buffers()] if tensor.is_meta]
    assert {p.dtype for p in reward.parameters()} == {torch.float32}
