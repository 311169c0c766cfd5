"""The pipeline file of an exported model: needs diffusers and torch alone.

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    pipeline(position=0.6, label="CDR 1").images[0].save("slice.png")
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image


class BrainSlicePipeline(DiffusionPipeline):
    """Samples brain slices: a `UNet2DModel` on patches of pixels, and what surrounds it.

    unet: works on images whose patches are folded into channels; its class embedding is a table of
        the conditions, see `row`.
    scheduler: DPMSolverMultistepScheduler, DDIMScheduler or DDPMScheduler.
    patch_size: side of the patches.
    final_layers: weights by name of the layers at full resolution behind the patches; may be empty.
    labels: names of the classes; heights: rows of the table for heights, evenly from 0 to 1.
    clip: whether the predicted x_0 is clipped to [-1, 1].
    """

    def __init__(self, unet, scheduler, patch_size=1, final_layers=None, labels=(), heights=0,
                 clip=True):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(patch_size=patch_size, final_layers=final_layers or {},
                                labels=list(labels), heights=heights, clip=clip)

    def row(self, position=None, label=None) -> int:
        """Row of the table: (height or none) x (class or none); row 0 is unconditional."""
        names, heights = self.config.labels, self.config.heights
        if position is not None and not (heights and 0 <= position <= 1):
            raise ValueError(f"position {position}: " + (
                "give a height from 0 to 1" if heights else "it was trained without heights"))
        if label is not None and label not in names:
            raise ValueError(f"label {label!r}: the model's classes are {names or 'none'}")
        height = 0 if position is None else 1 + round(position * (heights - 1))
        return height * (len(names) + 1) + (0 if label is None else 1 + names.index(label))

    def predict(self, x, timestep, row):
        """x_t, (B, 1, H, W) -> x_0 predicted from it, without the patches' grid, and clipped."""
        patch = self.config.patch_size
        rows = torch.full((len(x),), row, device=x.device)
        output = self.unet(F.pixel_unshuffle(x, patch), timestep,
                           class_labels=rows if self.unet.config.num_class_embeds else None).sample
        output = F.pixel_shuffle(output, patch)
        if self.config.final_layers:
            output = self.finish(torch.cat([F.silu(output), x], dim=1), timestep, rows)
        signal, noise = self.signal_and_noise(timestep)
        clean = {"epsilon": lambda: (x - noise * output) / signal, "sample": lambda: output,
                 "v_prediction": lambda: signal * x - noise * output}[self.kind]()
        if patch > 1:  # GroupNorm hides this part of the noise from the net
            means = F.pixel_unshuffle(clean, patch).mean((2, 3), keepdim=True)
            grid = F.pixel_shuffle(means, patch)
            grid = grid - grid.mean((2, 3), keepdim=True)
            clean = clean - grid.repeat(1, 1, *(side // patch for side in x.shape[2:]))
        return clean.clamp(-1, 1) if self.config.clip else clean

    def finish(self, x, timestep, rows):
        """The layers at full resolution: a convolution and, if there is one, a residual block."""
        def weights(name):
            return (torch.tensor(self.config.final_layers[f"{name}.{part}"], dtype=x.dtype,
                                 device=x.device) for part in ("weight", "bias"))

        def conv(name, h):
            return F.conv2d(h, *weights(name), padding=1)

        def norm(name, h):
            return F.silu(F.group_norm(h, 8, *weights(name)))
        output = conv("conv_final", x)
        if "refine_in.weight" in self.config.final_layers:
            temb = self.unet.time_embedding(self.unet.time_proj(timestep.reshape(1)).to(x.dtype))
            if self.unet.config.num_class_embeds:
                temb = temb + self.unet.class_embedding(rows)
            x = conv("refine_in", x)
            h = conv("refine.conv1", norm("refine.norm1", x))
            h = h + F.linear(F.silu(temb), *weights("refine.time_emb_proj"))[:, :, None, None]
            h = conv("refine.conv2", norm("refine.norm2", h))
            output = output + conv("refine_out", F.silu(x + h))
        return output

    @property
    def kind(self):
        return self.scheduler.config.prediction_type

    def signal_and_noise(self, timestep):
        alpha_bar = self.scheduler.alphas_cumprod[int(timestep)].double()
        return alpha_bar.sqrt().item(), (1 - alpha_bar).sqrt().item()

    def timesteps(self, count):
        """Up to `count` timesteps, whole numbers that lie evenly in log sigma.

        sigma, the noise of x_t over its signal, falls from 500 to 0.01, or where the table ends.
        """
        alpha_bar = self.scheduler.alphas_cumprod.double().numpy()
        log_sigma = np.log((1 - alpha_bar) / alpha_bar) / 2
        ends = np.log([0.01, 500]).clip(log_sigma[0], log_sigma[-1])
        places = np.interp(np.linspace(*ends, count), log_sigma, np.arange(len(log_sigma)))
        return np.unique(places.round())[::-1]

    @torch.no_grad()
    def __call__(self, batch_size=1, position=None, label=None, guidance_scale=1.0,
                 num_inference_steps=15, generator=None, latents=None, output_type="pil"):
        """Samples `batch_size` slices.

        position: height in the head, 0 to 1; label: a class; None for none.
        guidance_scale: weight of classifier-free guidance; 1 is none.
        latents: unit noise (B, 1, H, W) to start from instead of the generator's.
        output_type: "pil", "np", uint8 (B, H, W), or "pt", (B, 1, H, W) in [-1, 1].
        """
        patch, row = self.config.patch_size, self.row(position, label)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        x = latents
        if x is None:
            x = randn_tensor((batch_size, 1, height * patch, width * patch), generator,
                             self.device, self.unet.dtype)
        if isinstance(self.scheduler, DPMSolverMultistepScheduler):
            self.scheduler.set_timesteps(timesteps=self.timesteps(num_inference_steps),
                                         device=x.device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=x.device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            clean = self.predict(x, timestep, row)
            if guidance_scale != 1:
                weak = self.predict(x, timestep, 0)
                clean = weak + guidance_scale * (clean - weak)
                clean = clean.clamp(-1, 1) if self.config.clip else clean
            signal, noise = self.signal_and_noise(timestep)
            epsilon = (x - signal * clean) / noise
            output = {"epsilon": epsilon, "sample": clean,
                      "v_prediction": signal * epsilon - noise * clean}[self.kind]
            x = self.scheduler.step(output, timestep, x).prev_sample
        if output_type == "pt":
            return ImagePipelineOutput(images=x)
        levels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()[:, 0].cpu().numpy()
        return ImagePipelineOutput(images=levels if output_type == "np" else [
            Image.fromarray(np.ascontiguousarray(image)) for image in levels])
