"""Training speed against diffusers and denoising-diffusion-pytorch, and the machine's limit.

    python tests/benchmarks/train_speed.py
    python tests/benchmarks/train_speed.py --sizes 64 --scaling

Images per second of whole training steps (data, noise, forward, backward, clipping, optimiser,
EMA weights), FLOP/s of the net's counted work, peak memory, and the share of the rate that
this machine's own 3x3 convolutions reach in the same run in the same type.
"""

import bench  # first: it puts the scripts on the path
import torch
from bench import Contender, draw_bars, facts, print_table, save_json, take_turns
from contenders import (convolution, count_flops, ddp_net, ddp_training, diffusers_training,
                        matrix_product, our_configs, ours)
from modules import UNet
from utils.cli import UserError, run_cli
from utils.device import choose_dtype
from utils.distributed import local_device


ABLATIONS = {"kept memory": ("memory",), "GroupNorm": ("norm",), "attention": ("attention",),
             "any of the three": ("memory", "norm", "attention")}


def build(size: int, batch_size: int, device: torch.device, compiled: bool, ablate: bool
          ) -> tuple[dict, list[Contender], dict]:
    """FLOPs per image by contender's name, the contenders, and the machine's own kernels."""
    dtype = choose_dtype("auto", device)
    name, low = str(dtype).removeprefix("torch."), "no" if dtype == torch.float32 else "bf16"
    config = our_configs(size, batch_size, device)[0]
    flops = count_flops(UNet(config), 1, size)
    same = dict(size=size, batch_size=batch_size)
    contenders = [Contender("ours", ours, device, **same)]
    if ablate:
        contenders += [Contender(f"ours without {key}", ours, device, without=without, **same)
                       for key, without in ABLATIONS.items()]
    if compiled:
        contenders.append(Contender("ours, compiled", ours, device, options=("--compile",),
                                    **same))
    settings = {"diffusers, float32": dict(precision="no")}
    if low != "no":
        settings |= {"diffusers, bf16": dict(precision=low),
                     "diffusers, bf16, channels last": dict(precision=low, channels_last=True)}
    if compiled:
        settings["diffusers, compiled"] = dict(precision=low, compiled=True)
    contenders += [Contender(key, diffusers_training, device, **same, **values)
                   for key, values in settings.items()]
    contenders += [Contender(f"denoising-diffusion-pytorch, {'float32' if p == 'no' else p}",
                             ddp_training, device, precision=p, **same)
                   for p in dict.fromkeys(("no", low))]
    per_image = {c.name: flops for c in contenders}
    their_flops = ddp_net(config)[3]
    per_image |= {c.name: their_flops for c in contenders if c.name.startswith("denoising")}
    channels, side = config.block_out_channels[0], size // config.patch_size
    limits = {
        "3x3 convolution": (Contender("3x3 convolution", convolution, device, channels=channels,
                                      size=side, batch_size=batch_size, dtype=name),
                            3 * 2 * 9 * channels**2 * side**2 * batch_size),
        "matrix product": (Contender("matrix product", matrix_product, device, side=2048,
                                     dtype=name), 2 * 2048**3),
    }
    return per_image, contenders, limits


def compare(size: int, batch_size: int, device: torch.device, repeats: int, compiled: bool,
            ablate: bool) -> dict:
    print(f"{size} px, batch {batch_size}", flush=True)
    per_image, contenders, limits = build(size, batch_size, device, compiled, ablate)
    take_turns(contenders + [kernel for kernel, _ in limits.values()], repeats)
    rates = {name: work / kernel.seconds / 1e9 for name, (kernel, work) in limits.items()}
    rows = []
    for c in contenders:
        if not c.alive:
            continue
        speed = batch_size / c.seconds
        rate = speed * per_image[c.name] / 1e9
        rows.append(dict(name=c.name, images_per_second=speed,
                         gflop_per_image=per_image[c.name] / 1e9, gflop_per_second=rate,
                         share=rate / rates["3x3 convolution"], peak_gib=c.memory,
                         start_seconds=c.start_seconds))
    own = rows[0]
    for row in rows:
        row["ours_is_faster_by"] = own["gflop_per_second"] / row["gflop_per_second"]
    return {"size": size, "batch_size": batch_size, "limits_gflop_per_second": rates,
            "contenders": rows}


def show(result: dict) -> None:
    limits = ", ".join(f"{k} {v:.0f}" for k, v in result["limits_gflop_per_second"].items())
    print(f"\n{result['size']} px, batch {result['batch_size']}; this machine's own GFLOP/s: "
          f"{limits}\n")
    print_table(["training", "images/s", "GFLOP/image", "GFLOP/s", "of the convolution's rate",
                 "peak GiB", "start s", "ours at equal FLOPs"],
                [[r["name"], f"{r['images_per_second']:.1f}", f"{r['gflop_per_image']:.1f}",
                  f"{r['gflop_per_second']:.0f}", f"{r['share']:.0%}", f"{r['peak_gib']:.2f}",
                  f"{r['start_seconds']:.0f}", f"{r['ours_is_faster_by']:.2f}x"]
                 for r in result["contenders"]])
    print()


def main() -> None:
    parser = bench.make_parser("Training speed against others' and the machine's limit.",
                               "train_speed", repeats=7)
    parser.add_argument("--sizes", type=int, nargs="+", metavar="S",
                        help="sides in pixels (default: 32 64 128 on a CPU, 64 128 256 on a GPU)")
    parser.add_argument("--batch-size", type=int, metavar="B",
                        help="slices per step (default: as many pixels as 16 slices of 64 px on a "
                             "CPU, as 64 slices of 128 px on a GPU)")
    parser.add_argument("--no-compile", action="store_true",
                        help="leave out the compiled contenders (minutes each at start on a CPU)")
    parser.add_argument("--ablate", action="store_true",
                        help="ours also without each of what makes it fast on a CPU")
    args = parser.parse_args()
    device = local_device(args.device)
    on_cpu = device.type == "cpu"
    results = []
    for size in args.sizes or ((32, 64, 128) if on_cpu else (64, 128, 256)):
        batch = args.batch_size or max(1, (16 * 64**2 if on_cpu else 64 * 128**2) // size**2)
        results.append(compare(size, batch, device, args.repeats, not args.no_compile,
                               args.ablate))
        show(results[-1])
    if not results:
        raise UserError("--sizes: give at least one")
    print(facts(device))
    draw_bars(args.plot, {f"{r['size']} px": {c["name"]: c["gflop_per_second"]
                                              for c in r["contenders"]}
                          | {"this machine's convolution":
                             r["limits_gflop_per_second"]["3x3 convolution"]} for r in results},
              "GFLOP/s of whole training steps", facts(device)["hardware"])
    save_json(args.json, {**facts(device), "results": results})


if __name__ == "__main__":
    run_cli(main)
