"""The training and sampling loops that are compared, as their projects document them.

Each `make` function takes a device and settings and returns a function that does one step.
Ours is train.py itself. The others get the same net where they can (diffusers: the very weights),
the same uint8 slices, and their own loop, optimiser and EMA weights.
"""

from collections.abc import Callable
from typing import NamedTuple

import modules
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dataset import Slices
from modules import Denoiser, NoiseScheduler, UNet, sample
from references import diffusers_net
from train import Run, make_configs, parse_args
from utils.configs import SamplerConfig, UNetConfig, make_scheduler_config
from utils.device import keep_freed_memory
from utils.phantoms import phantom_slices

TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def comparable(size: int) -> list[str]:
    """Options of train.py for a net that the others can have as well, trained without extras."""
    channels = {128: "64 128 192 256", 256: "64 64 128 192 256"}.get(size, "96 128 128")
    return ["--preset", "64", "--image-size", str(size), "--block-out-channels", *channels.split(),
            "--layers-per-block", "2", "--patch-size", "4" if size == 256 else "2",
            "--attention-up-to", "8" if size < 128 else "16", "--final-channels", "0",
            "--refine-channels", "0", "--dropout", "0", "--augment", "0", "--p-std", "1.2"]


def our_configs(size: int, batch_size: int, device: torch.device, *options: str):
    """The three configs that train.py makes of its options."""
    args = parse_args([*comparable(size), "--batch-size", str(batch_size), *options])
    return make_configs(args, (size, size), device, 0)


def uint8_slices(size: int) -> np.ndarray:
    return phantom_slices(size, 0, 4)[0]


def count_flops(net: torch.nn.Module, channels: int, size: int) -> int:
    """Of one image forward and backward, two per multiply-add, through convolutions and matrix
    products alone, as every such count goes."""
    with FlopCounterMode(display=False) as counter:
        out = net(torch.randn(1, channels, size, size), torch.tensor([1]))
        getattr(out, "sample", out).sum().backward()
    return counter.get_total_flops()


# Training --------------------------------------------------------------------------------------


def ours(device: torch.device, size: int, batch_size: int, options: tuple[str, ...] = (),
         without: tuple[str, ...] = ()):
    """train.py's own step; `without` some of what makes it fast, to see what each brings."""
    if "memory" not in without:
        keep_freed_memory()
    if "norm" in without:
        modules.GroupNorm.forward = torch.nn.GroupNorm.forward
    if "attention" in without:
        modules.attend = F.scaled_dot_product_attention
    images = uint8_slices(size)
    data = {"train": Slices(images, [f"phantom_{i}" for i in range(len(images))], device)}
    run = Run("unused", *our_configs(size, batch_size, device, *options), data, device,
              "--compile" in options)
    return run.train_step


class Training(NamedTuple):
    """A loop of another project: one step, and what is needed to sample from its EMA weights.

    net: the EMA model, a callable as `Denoiser` takes it; scheduler: its noise levels;
    parameters: how many it has; patch: side of the pixel blocks that are folded into channels.
    """

    step: Callable[[], float]
    net: Callable[[], Callable]
    scheduler: NoiseScheduler
    parameters: int
    patch: int


def _random_batch(images: torch.Tensor, batch_size: int, patch: int, device) -> torch.Tensor:
    """A batch in [-1, 1], pixel blocks folded: what a DataLoader of theirs would have ready."""
    batch = images[torch.randint(len(images), (batch_size,))].to(device)[:, None]
    return F.pixel_unshuffle(batch.float() / 127.5 - 1, patch)


def _unfolded(net: Callable, patch: int) -> Callable:
    """A net on folded pixels, as one on images."""
    return lambda x, t: F.pixel_shuffle(net(F.pixel_unshuffle(x, patch), t), patch)


def diffusers_own_net(size: int) -> torch.nn.Module:
    """The net of train_unconditional.py, for one channel."""
    from diffusers import UNet2DModel
    return UNet2DModel(
        sample_size=size, in_channels=1, out_channels=1, layers_per_block=2,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4)


def diffusers_training(device: torch.device, size: int, batch_size: int, precision: str,
                       compiled: bool = False, channels_last: bool = False,
                       images: torch.Tensor | None = None, own_net: bool = False) -> Training:
    """examples/unconditional_image_generation/train_unconditional.py with --use_ema.

    images: uint8 (N, H, W), for None phantoms; own_net: its default net rather than one like ours.
    """
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
    config = our_configs(size, batch_size, device)[0]
    patch = 1 if own_net else config.patch_size
    model = diffusers_own_net(size) if own_net else diffusers_net(config)
    parameters = sum(p.numel() for p in model.parameters())
    images = torch.from_numpy(uint8_slices(size)) if images is None else images
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0,
                   power=0.75)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999),
                                  weight_decay=1e-6, eps=1e-8)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=500,
                                 num_training_steps=100 * -(-len(images) // batch_size))
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    ema.to(device)
    if compiled:
        model = torch.compile(model)
    scheduler, weight_dtype = DDPMScheduler(), TYPES[precision]

    def step():
        clean = _random_batch(images, batch_size, patch, device).to(weight_dtype)
        noise = torch.randn(clean.shape, dtype=weight_dtype, device=device)
        timesteps = torch.randint(0, 1000, (batch_size,), device=device).long()
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with accelerator.accumulate(model):
            output = model(noisy, timesteps).sample
            loss = F.mse_loss(output.float(), noise.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        ema.step(model.parameters())
        return loss.detach().item()  # their progress bar

    def averaged() -> Callable:
        ema.copy_to(model.parameters())
        model.eval().requires_grad_(False)
        return _unfolded(lambda x, t: model(x, t).sample, patch)
    linear = NoiseScheduler(make_scheduler_config("linear", 1000, "epsilon"))
    return Training(step, averaged, linear, parameters, patch)


def ddp_net(config: UNetConfig):
    """denoising-diffusion-pytorch's Unet with FLOPs nearest to our net's, on folded pixels too."""
    from denoising_diffusion_pytorch import Unet
    channels, size = config.patch_size**2, config.sample_size[0] // config.patch_size
    levels = len(config.block_out_channels)
    wanted = count_flops(UNet(config), 1, config.sample_size[0])

    def build(dim: int) -> Unet:
        return Unet(dim, dim_mults=[2**i for i in range(levels)], channels=channels)
    dim = min(range(16, 161, 8), key=lambda d: abs(count_flops(build(d), channels, size) - wanted))
    net = build(dim)
    return net, channels, size, count_flops(net, channels, size)


def ddp_training(device: torch.device, size: int, batch_size: int, precision: str,
                 images: torch.Tensor | None = None, own_net: bool = False) -> Training:
    """denoising-diffusion-pytorch's Trainer.train, its defaults; its amp for other precisions.

    images: uint8 (N, H, W), for None phantoms; own_net: the net of its README rather than one of
    the FLOPs of ours.
    """
    from accelerate import Accelerator
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
    config = our_configs(size, batch_size, device)[0]
    net, _, side, _ = (Unet(64, dim_mults=(1, 2, 4, 8), channels=1), 1, size, 0) if own_net else \
        ddp_net(config)
    patch = size // side
    diffusion = GaussianDiffusion(net, image_size=side)
    parameters, betas = sum(p.numel() for p in net.parameters()), diffusion.betas.double()
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10).to(device)
    diffusion, optimizer = accelerator.prepare(diffusion, optimizer)
    images = torch.from_numpy(uint8_slices(size)) if images is None else images
    images = torch.cat([images, images.flip(-1)])  # its augment_horizontal_flip

    def step():
        data = (_random_batch(images, batch_size, patch, device) + 1) / 2
        with accelerator.autocast():
            loss = diffusion(data)
        total = loss.item()  # theirs, for the progress bar
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        return total

    def averaged() -> Callable:
        return _unfolded(ema.ema_model.model.eval().requires_grad_(False), patch)
    sigmoid = NoiseScheduler(make_scheduler_config("cosine"), betas)
    return Training(step, averaged, sigmoid, parameters, patch)


def convolution(device: torch.device, channels: int, size: int, batch_size: int, dtype: str):
    """A 3x3 convolution with both its gradients: what the machine gives, channels last."""
    keep_freed_memory()
    kind = getattr(torch, dtype)
    x, w = (torch.randn(shape, device=device, dtype=kind).contiguous(
        memory_format=torch.channels_last).requires_grad_()
        for shape in ((batch_size, channels, size, size), (channels, channels, 3, 3)))
    grad = torch.randn_like(x)
    return lambda: torch.autograd.grad(F.conv2d(x, w, padding=1), (x, w), grad)


def matrix_product(device: torch.device, side: int, dtype: str):
    """A square matrix product."""
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return lambda: a @ b


# Sampling --------------------------------------------------------------------------------------


def our_sampling(device: torch.device, size: int, batch_size: int, steps: int, dtype: str):
    """predict.py's way from noise to slices."""
    keep_freed_memory()
    config = our_configs(size, batch_size, device)[0]
    net = UNet(config).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    scheduler = NoiseScheduler(make_scheduler_config("cosine"))
    kind = getattr(torch, dtype)

    def step():
        denoise = Denoiser(net, scheduler, dtype=kind)
        for _ in sample(denoise, list(range(batch_size)), (1, size, size),
                        SamplerConfig("ddim", steps, "trailing"), batch_size, device):
            pass
    return step


def diffusers_sampling(device: torch.device, size: int, batch_size: int, steps: int, dtype: str,
                       compiled: bool = False, channels_last: bool = False):
    """DDIMPipeline, bfloat16 through autocast: it cannot turn bfloat16 weights' slices to numpy."""
    from diffusers import DDIMPipeline, DDIMScheduler
    net = diffusers_net(our_configs(size, batch_size, device)[0]).to(device).eval()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    if compiled:
        net.forward = torch.compile(net.forward)
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing",
                              beta_schedule="squaredcos_cap_v2")
    pipeline = DDIMPipeline(net, scheduler).to(device)
    pipeline.set_progress_bar_config(disable=True)
    kind = getattr(torch, dtype)

    def step():
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            pipeline(batch_size=batch_size, num_inference_steps=steps, output_type="np")
    return step


def ddp_sampling(device: torch.device, size: int, batch_size: int, steps: int, dtype: str):
    """GaussianDiffusion.sample by DDIM, under autocast where its Trainer would have it."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    net, _, side, _ = ddp_net(our_configs(size, batch_size, device)[0])
    diffusion = GaussianDiffusion(net, image_size=side, sampling_timesteps=steps).to(device).eval()
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as module
    module.tqdm = lambda iterable, **_: iterable
    kind = getattr(torch, dtype)

    def step():
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            diffusion.sample(batch_size=batch_size)
    return step
