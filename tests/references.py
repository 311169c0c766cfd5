"""What others wrote, set up to do the same work as ours: for the tests and the benchmarks."""

from diffusers import UNet2DModel

from utils.configs import UNetConfig


def diffusers_net(config: UNetConfig) -> UNet2DModel:
    """diffusers' net of the same shape: it takes our state_dict (strict), and works on images
    whose pixel blocks are folded into channels already (`pixel_unshuffle` by `patch_size`)."""
    attention = [side in config.attention_resolutions for side in config.resolutions]
    return UNet2DModel(
        sample_size=[side // config.patch_size for side in config.sample_size],
        in_channels=config.in_channels * config.patch_size**2,
        out_channels=config.out_channels * config.patch_size**2,
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        attention_head_dim=config.attention_head_dim, norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        num_class_embeds=config.label_dim or None,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]])
