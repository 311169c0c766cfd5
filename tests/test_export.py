"""An exported model, opened by diffusers: the same slices there as here."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from safetensors import SafetensorError

import modules
from modules import Denoiser, LabelConfig, NoiseScheduler, UNet, noise_levels, seeded_noise
from predict import Model, Slice, generate, load_model
from tools.export import export
from utils.checkpoint import SHIPPED
from utils.cli import UserError
from utils.configs import QUALITY, SamplerConfig, SchedulerConfig, UNetConfig
from utils.pictures import to_uint8

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["64", "native"])
def exported(request, tmp_path_factory):
    """A shipped model, and the pipeline that diffusers makes of its folder, with one call."""
    folder = tmp_path_factory.mktemp("export") / "brains"
    model = load_model(SHIPPED[request.param], CPU)
    export(model, folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return model, pipeline, folder


@pytest.mark.parametrize("sampler, cls", [("ddim", DDIMScheduler),
                                          ("dpmpp", DPMSolverMultistepScheduler)])
def test_the_same_noise_gives_the_same_slices(exported, monkeypatch, sampler, cls):
    model, pipeline, _ = exported
    conditions = {"position": 20 / 31, "label": "CDR 1"} if model.labels.dim else {}
    slices = [Slice(seed, conditions.get("position"), conditions.get("label")) for seed in (3, 4)]
    noise = seeded_noise([3, 4], (1, *model.net.config.sample_size))()
    scheduler = cls.from_config(pipeline.scheduler.config)
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    # Steps that divide 1000: otherwise their DDIM steps to timesteps where it is not called next.
    theirs = pipeline(**conditions, latents=noise, num_inference_steps=5, output_type="np").images
    timesteps = [*scheduler.timesteps.tolist(), -1]
    monkeypatch.setattr(modules, "noise_levels",
                        lambda scheduler, *_: [scheduler.level(t) for t in timesteps])
    denoise = Denoiser(model.net, model.scheduler, patch_size=model.net.config.patch_size)
    (ours, _), = generate(model, slices, SamplerConfig(sampler, 5), denoise, batch_size=2)
    difference = np.abs(theirs.astype(int) - to_uint8(ours)[:, 0].numpy().astype(int))
    assert difference.max() <= 1
    assert to_uint8(ours).float().std() > 30  # there is something to see


def test_steps_are_those_of_predict(exported):
    model, pipeline, _ = exported
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    steps = inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default
    ours = [level.timestep for level in noise_levels(model.scheduler, QUALITY["default"])[:-1]]
    np.testing.assert_allclose(pipeline.timesteps(steps), ours, atol=0.51)


def test_conditions_and_guidance_change_the_slice_and_wrong_ones_are_named(exported):
    model, pipeline, _ = exported
    if not model.labels.dim:
        with pytest.raises(ValueError, match="without heights"):
            pipeline(position=0.5)
        return
    with pytest.raises(ValueError, match="0 to 1"):
        pipeline(position=1.5)
    with pytest.raises(ValueError, match="CDR 0.5"):
        pipeline(label="old")

    def draw(**options):
        image, = pipeline(**options, num_inference_steps=2,
                          generator=torch.Generator().manual_seed(0)).images
        assert image.mode == "L" and image.size == model.net.config.sample_size[::-1]
        return np.asarray(image).astype(int)
    low, high = draw(position=0.1), draw(position=0.9)
    assert np.abs(low - high).mean() > 2
    assert np.abs(draw(position=0.1, guidance_scale=3.0) - low).mean() > 0.5


def test_layers_at_full_resolution_are_exported(tmp_path):
    """A random net, whose last layers are not zero as they are before training."""
    torch.manual_seed(0)
    config = UNetConfig((32, 24), block_out_channels=(32, 32), layers_per_block=1, patch_size=4,
                        attention_resolutions=(), norm_num_groups=8, final_channels=4,
                        refine_channels=8, label_dim=LabelConfig((0.0, 3.0), ("a", "b")).dim)
    net = UNet(config).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.normal_(0, 0.1)
    model = Model(net, NoiseScheduler(SchedulerConfig(clip_sample=False)), tmp_path, 0,
                  LabelConfig((0.0, 3.0), ("a", "b")))
    export(model, tmp_path / "m")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "m", trust_remote_code=True)
    x, level = torch.randn(2, 1, 32, 24), model.scheduler.level(400)
    denoise = Denoiser(net, model.scheduler, patch_size=4)
    denoise.labels = model.labels.encode(torch.full((2,), 1 / 3), ["b", "b"])
    theirs = pipeline.predict(x, torch.tensor(400), pipeline.row(1 / 3, "b"))
    torch.testing.assert_close(theirs, denoise(x, level)[0], rtol=1e-4, atol=1e-4)


def test_the_card_has_the_header_of_model_hubs(exported):
    _, header, text = (exported[2] / "README.md").read_text().split("---\n", 2)
    fields = dict(line.split(": ") for line in header.splitlines() if ": " in line)
    assert fields == {"library_name": "diffusers",
                      "pipeline_tag": "unconditional-image-generation"}
    assert "No diagnostic use" in text and "from_pretrained" in text


@pytest.mark.parametrize("what, error", [
    ("shutil.copyfile", OSError(28, "No space left on device")),
    ("os.fsync", OSError(28, "No space left on device")),  # of the last file
    ("diffusers.UNet2DModel.save_pretrained", SafetensorError("I/O error: No space left"))])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, what, error):
    def full(*args, **kwargs):
        raise error
    monkeypatch.setattr(what, full)
    with pytest.raises(UserError, match="brains.*: cannot be written .*No space left.*free some"):
        export(load_model(SHIPPED["64"], CPU), tmp_path / "brains")
    assert not any(tmp_path.iterdir())


def test_wrong_use_is_one_line(tmp_path, rejected):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    rejected("tools.export", ["64", tmp_path / "full"], "full", "holds other files")
    rejected("tools.export", ["nowhere", tmp_path / "new"], "nowhere")
    assert not (tmp_path / "new").exists()
