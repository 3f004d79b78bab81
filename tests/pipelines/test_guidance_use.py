"""Guidance methods where people use them: as plugins, with LoRA, rescaling, other schedulers and compilation; and what is refused."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch

import diffalign
from diffalign.methods.adaptive_guidance import AdaptiveGuidance
from diffalign.methods.guidance_rivals import FixedFraction
from diffalign.methods.guidance_search import SearchedGuidance
from diffalign.methods.linear_guidance import LinearCoefficients, LinearGuidance, LinearSettings
from diffalign.methods.linear_guidance_fit import LinearFit
from diffalign.pipelines.guidance.hook import guide
from diffalign.pipelines.guidance.layouts import LAYOUTS, REFUSED, Layout
from diffalign.pipelines.schedule import levels, prediction_of
from tests.pipelines.methods import Redraw
from tests.tiny_families import FAMILIES, VP

HALF = FixedFraction(fraction=0.5)
RECORD = AdaptiveGuidance(threshold=math.inf)
SD = FAMILIES["sd"]


@pytest.fixture
def sd():
    return SD.pipeline()


# --- plugins ------------------------------------------------------------------------------------------------------------------------

CALL = {"seed": 3, "num_inference_steps": 6, "guidance_scale": 4.0, "output_type": "pt"}
PROMPTS = ["a red circle", "two blue squares"]


def test_as_a_plugin(pipe, stock):
    plain = pipe(PROMPTS, **CALL)
    assert plain.guidance is None
    recorded = pipe(PROMPTS, plugins=[RECORD], **CALL)
    assert torch.equal(recorded.images, plain.images)
    assert recorded.guidance.method == "adaptive"
    halved = pipe(PROMPTS, plugins=[HALF], **CALL)
    assert halved.guidance.evaluations == [9, 9]
    assert halved.guidance.saved == 0.25
    assert halved.guidance.settings == {"fraction": 0.5}
    with diffalign.guided(stock, HALF) as run:
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        theirs = stock(PROMPTS, generator=generators, **{name: value for name, value in CALL.items() if name != "seed"}).images
    assert torch.equal(halved.images, theirs)
    assert run.report == halved.guidance
    assert torch.equal(pipe(PROMPTS, **CALL).images, plain.images)


def test_inside_a_search_over_noise(pipe):
    out = pipe(PROMPTS, plugins=[Redraw(), HALF], **CALL)
    torch.testing.assert_close(out.initial_images, pipe(PROMPTS, plugins=[HALF], **CALL).images, rtol=0, atol=1e-4)
    assert out.guidance.evaluations == [9] * 4  # the search evaluates two noises of each sample in one batch


def test_the_pipeline_brings_its_threshold(pipe, caplog):
    pipe.cosine_threshold = -0.99
    out = pipe(PROMPTS, plugins=[AdaptiveGuidance(warm_up=0.0)], **CALL)
    assert out.guidance.evaluations == [7, 7]
    assert not caplog.records


# --- company ------------------------------------------------------------------------------------------------------------------------


def test_guidance_rescale_is_neutral_afterwards(sd):
    stock = SD(sd, [1, 2], guidance_rescale=0.7)
    with guide(sd, RECORD):
        assert torch.equal(SD(sd, [1, 2], guidance_rescale=0.7), stock)

    def switch_off(pipeline, i, t, values):
        if i == 2:
            pipeline._guidance_scale = 1.0
            return {"prompt_embeds": values["prompt_embeds"].chunk(2)[1]}
        return {}

    inputs = ["latents", "prompt_embeds"]
    oracle = SD(sd, [1, 2], guidance_rescale=0.7, callback_on_step_end=switch_off, callback_on_step_end_tensor_inputs=inputs)
    with guide(sd, HALF):
        torch.testing.assert_close(SD(sd, [1, 2], guidance_rescale=0.7), oracle, rtol=1e-4, atol=1e-5)


LORA_LAYERS = r".*attn.*\.(to_q|to_v)"


@pytest.mark.parametrize("name", FAMILIES)
def test_with_lora(name):
    peft = pytest.importorskip("peft")
    family = FAMILIES[name]
    pipe = family.pipeline()
    plain = family(pipe, [1, 2])
    network = getattr(pipe, family.attribute)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        # what `load_lora_weights` does; PixArt has none
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=LORA_LAYERS, init_lora_weights=False), network)
    network.eval()
    layers = [module for module in network.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    stock = family(pipe, [1, 2])
    assert not torch.equal(stock, plain)
    with guide(pipe, RECORD):
        assert torch.equal(family(pipe, [1, 2]), stock)
    with guide(pipe, HALF) as guided:
        halved = family(pipe, [1, 2])
        for layer in layers:
            layer.enable_adapters(False)
        without = family(pipe, [1, 2])
        for layer in layers:
            layer.enable_adapters(True)
        assert torch.equal(family(pipe, [1, 2]), halved)
    assert not torch.equal(halved, without)
    assert [report.evaluations for report in guided.reports] == [[9, 9]] * 3


def test_lora_files_load_and_leave_under_a_method(sd, tmp_path):
    peft = pytest.importorskip("peft")
    other = SD.pipeline()
    other.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    tuned = SD(other, [1, 2])
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(other.unet))
    plain = SD(sd, [1, 2])
    with guide(sd, RECORD):
        sd.load_lora_weights(tmp_path)
        assert torch.equal(SD(sd, [1, 2]), tuned)
        sd.unload_lora_weights()
        assert torch.equal(SD(sd, [1, 2]), plain)


SCHEDULERS = {
    "euler-karras": diffusers.EulerDiscreteScheduler(**VP, use_karras_sigmas=True),
    "ancestral": diffusers.EulerAncestralDiscreteScheduler(**VP),
    "heun": diffusers.HeunDiscreteScheduler(**VP),
    "pndm": diffusers.PNDMScheduler(**VP, skip_prk_steps=True, steps_offset=1),
    "dpm": diffusers.DPMSolverMultistepScheduler(**VP, prediction_type="v_prediction"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, sd):
    """Also those that call the network more often than there are steps."""
    sd.scheduler = SCHEDULERS[name]
    torch.manual_seed(0)
    stock = SD(sd, [1, 2])
    with guide(sd, RECORD) as guided:
        torch.manual_seed(0)
        assert torch.equal(SD(sd, [1, 2]), stock)
    calls = len(sd.scheduler.timesteps)
    assert guided.report.steps == calls
    with guide(sd, HALF) as guided:
        SD(sd, [1, 2])
    assert guided.report.evaluations == [calls + round(calls / 2)] * 2


def test_image_to_image_begins_in_the_middle(sd):
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    start = torch.zeros(1, 4, 8, 8)  # an image with the channels of a latent is taken as one
    call = {**SD.conditioning([1]), "image": start, "strength": 0.5, "num_inference_steps": 8, "output_type": "latent"}
    with guide(pipe, HALF) as guided:
        pipe(**call, generator=torch.Generator().manual_seed(0))
    assert guided.report.steps == 4
    assert guided.report.evaluations == [6]


def test_skip_layer_guidance_is_passed_through():
    family = FAMILIES["sd3"]
    pipe = family.pipeline()
    more = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    stock = family(pipe, [1, 2], **more)
    with guide(pipe, RECORD):
        assert torch.equal(family(pipe, [1, 2], **more), stock)
    with guide(pipe, HALF) as guided:
        family(pipe, [1, 2], **more)
    assert guided.report.evaluations == [9, 9]


def test_two_networks_share_one_run():
    """Wan 2.2 changes its network in the middle; a latch holds across the change."""
    family = FAMILIES["wan"]
    pipe = family.pipeline()
    second = family.pipeline().transformer
    both = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=pipe.transformer, transformer_2=second,
                                 scheduler=pipe.scheduler, boundary_ratio=0.8)  # fmt: skip
    both.set_progress_bar_config(disable=True)
    stock = family(both, [1, 2])
    with guide(both, RECORD) as guided:
        assert torch.equal(family(both, [1, 2]), stock)
    with guide(both, AdaptiveGuidance(threshold=-0.99, warm_up=0.0)) as guided:
        family(both, [1, 2])
    assert guided.report.evaluations == [7, 7]


# --- LinearAG on real networks ------------------------------------------------------------------------------------------------------


def fit(family, pipe, settings=None, **more):
    method = LinearFit(settings or LinearSettings(limit=100.0))
    with guide(pipe, method, **more):
        for start in (0, 4):
            family(pipe, [start, start + 1, start + 2, start + 3], steps=8)
    return method.solve()


@pytest.mark.parametrize("name", ["sd", "flux", "wan", "pixart"])
def test_linear_guidance(name, tmp_path):
    family = FAMILIES[name]
    pipe = family.pipeline()
    scale = {"guidance_scale": 4.0} if name in ("flux", "pixart") else {}
    coefficients = fit(family, pipe, **scale)
    assert set(coefficients.by_step) == {1, 3}
    coefficients.save(tmp_path / "fit")
    method = LinearGuidance(LinearCoefficients.load(tmp_path / "fit"))
    with guide(pipe, method, **scale) as guided:
        found = family(pipe, [1, 2], steps=8)
    assert guided.report.evaluations == [10, 10]
    undo = predicted_by_hand(getattr(pipe, family.attribute), family, coefficients)
    try:
        torch.testing.assert_close(found, family(pipe, [1, 2], steps=8), rtol=1e-3, atol=1e-3)
    finally:
        undo()


def predicted_by_hand(network, family, coefficients):
    """The oracle: evaluates both branches at all 8 steps, and then writes the formula out at steps 1 and 3, and no guidance from step 4."""
    original, past, calls, seen = network.forward, [], [0], []

    def replaced(c, u, step):
        channels = 4 if family.name != "flux" else c.shape[1]
        if step in (0, 2):
            past.insert(0, (c, c - u))
            return u
        if step > 3:
            return c
        if step == 1:  # noqa: SIM108
            columns = [past[0][1], c - past[0][0], c]
        else:
            columns = [past[0][1], past[1][1], c - past[0][0], past[0][0] - past[1][0], c]
        d = sum(float(weight) * column for weight, column in zip(coefficients.by_step[step], columns, strict=True))
        return torch.cat([(c - d)[:, :channels], c[:, channels:]], dim=1)

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        calls[0] += 1
        if not family.two_calls:
            u, c = output[0].chunk(2)
            return (torch.cat([replaced(c, u, calls[0] - 1), c]), *output[1:])
        seen.append(output[0])
        return output if calls[0] % 2 else (replaced(seen[-2], seen[-1], calls[0] // 2 - 1), *output[1:])

    network.forward = forward
    return lambda: network.__dict__.pop("forward")


def test_linear_guidance_is_refused_with_the_reasons(sd):
    method = LinearGuidance(fit(SD, sd))

    def refused(message, pipe=sd, prompts=(1, 2), **more):
        with pytest.raises(ValueError, match=message), guide(pipe, method):
            SD(pipe, list(prompts), **{"steps": 8, **more})

    refused("timesteps: 8 numbers when it was made, 6 numbers now", steps=6)
    refused("guidance_scale: 4.0 when it was made, 3.0 now", scale=3.0)
    refused("guidance_rescale: 0.0 when it was made, 0.5 now", guidance_rescale=0.5)
    refused("negative: 32 numbers", negative_prompt_embeds=torch.randn(2, 4, 8))
    refused("negative: 32 numbers when it was made, several now", negative_prompt_embeds=torch.stack([torch.zeros(4, 8), torch.ones(4, 8)]))
    refused("latent_shape", height=32, width=64, latents=torch.randn(2, 4, 4, 8))
    sd.scheduler = diffusers.DDIMScheduler.from_config(sd.scheduler.config, eta=0.1, clip_sample=True)
    refused("scheduler: DDIMScheduler")
    tuned = SD.pipeline()
    next(tuned.unet.parameters()).data += 1
    refused("network: UNet2DConditionModel", pipe=tuned)
    lora = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["to_q"])
    adapted = SD.pipeline()
    adapted.unet.add_adapter(lora)
    refused("adapters", pipe=adapted)


# --- wrong use ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_that_is_off_gets_a_sentence(name):
    family = FAMILIES[name]
    pipe = family.pipeline()
    with pytest.raises(ValueError, match=r"runs without classifier-free guidance.* nothing to save"), guide(pipe, HALF):
        family(pipe, [1, 2], scale=1.0)
    stock = family(pipe, [1, 2], scale=1.0)
    assert torch.equal(family(pipe, [1, 2], scale=1.0), stock)


def test_a_scale_that_is_not_told_is_asked_for():
    pixart = FAMILIES["pixart"]
    pipe = pixart.pipeline()
    with pytest.raises(ValueError, match=r"pass guidance_scale= to guided\(\)"), guide(pipe, SearchedGuidance((4.0,) * 6)):
        pixart(pipe, [1])


def test_pipelines_that_cannot_be_served(sd):
    pix2pix = type("StableDiffusionInstructPix2PixPipeline", (), {})()
    with pytest.raises(ValueError, match="evaluates three branches"), guide(pix2pix, HALF):
        pass
    custom = type("Custom", (), {})()
    with pytest.raises(ValueError, match="how Custom evaluates its branches; they know StableDiffusionPipeline"), guide(custom, HALF):
        pass
    with pytest.raises(TypeError, match="method must be a guidance method"), guide(sd, 0.5):
        pass
    with pytest.raises(ValueError, match="planned 1 samples, and 2 are being made"), guide(sd, Mistaken()):
        SD(sd, [1, 2])


class Mistaken(FixedFraction):
    def begin(self, run):
        policy = super().begin(run)
        policy.plan = lambda step: ["both"]
        return policy


def test_a_block_without_a_call_is_told(sd, caplog):
    with guide(sd, HALF):
        pass
    assert "nothing was denoised" in caplog.text


def test_a_layout_of_ones_own(sd):
    class Mine(diffusers.DiffusionPipeline):
        """A loop that puts the conditional half first."""

        do_classifier_free_guidance, guidance_scale = True, 4.0

        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, x, embeddings):
            self.scheduler.set_timesteps(6)
            for t in self.scheduler.timesteps:
                c, u = self.unet(torch.cat([x, x]), t, encoder_hidden_states=embeddings).sample.chunk(2)
                x = self.scheduler.step(u + 4.0 * (c - u), t, x).prev_sample
            return x

    given = SD.conditioning([1, 2])
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mine = Mine(sd.unet, sd.scheduler)
    first = torch.cat([given["prompt_embeds"], given["negative_prompt_embeds"]])
    with guide(mine, HALF, layout=Layout(networks=("unet",), conditional_first=True)):
        found = mine(noise, first)
    with guide(sd, HALF):
        torch.testing.assert_close(found, SD(sd, [1, 2], latents=noise), rtol=1e-4, atol=1e-5)


def test_the_tables_name_what_diffusers_has():
    for name in (*LAYOUTS, *REFUSED):
        assert hasattr(diffusers, name), name


# --- schedules ----------------------------------------------------------------------------------------------------------------------


def test_levels_of_karras_are_its_sigmas():
    """a and s of fractional timesteps give back sigma = s / a."""
    scheduler = diffusers.EulerDiscreteScheduler(**VP, use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    signal, noise = levels(scheduler, scheduler.timesteps.tolist())
    found = torch.tensor(noise) / torch.tensor(signal)
    torch.testing.assert_close(found, scheduler.sigmas[:-1].to(found.dtype), rtol=1e-3, atol=1e-4)


def test_levels_of_flow_are_its_sigmas():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    signal, noise = levels(scheduler, scheduler.timesteps.tolist())
    torch.testing.assert_close(torch.tensor(noise), scheduler.sigmas[:-1])
    torch.testing.assert_close(torch.tensor(signal), 1 - scheduler.sigmas[:-1])


def test_levels_of_ddim_and_of_the_unknown():
    scheduler = diffusers.DDIMScheduler(**VP)
    signal, noise = levels(scheduler, [999.0, 0.0])
    assert signal[0] ** 2 == pytest.approx(float(scheduler.alphas_cumprod[999]))
    assert noise[1] ** 2 == pytest.approx(1 - float(scheduler.alphas_cumprod[0]))
    assert prediction_of(diffusers.EDMEulerScheduler()) == "unknown"
    assert levels(diffusers.EDMEulerScheduler(), [1.0]) == ((), ())
    assert prediction_of(diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)) == "flow"
