"""Sampling speed against diffusers' pipeline and denoising-diffusion-pytorch, at equal steps.

    python tests/benchmarks/sample_speed.py

Slices per second from noise to image by DDIM, with the same net (diffusers: the very shapes;
denoising-diffusion-pytorch: FLOPs as near as its widths allow) and the same batch.
"""

import bench  # first: it puts the scripts on the path
import torch
from bench import Contender, draw_bars, facts, print_table, save_json, take_turns
from contenders import ddp_sampling, diffusers_sampling, our_sampling
from utils.cli import UserError, run_cli
from utils.device import choose_dtype
from utils.distributed import local_device


def compare(size: int, batch_size: int, steps: int, device: torch.device, repeats: int,
            compiled: bool) -> dict:
    print(f"{size} px, batch {batch_size}, {steps} steps", flush=True)
    dtype = str(choose_dtype("auto", device)).removeprefix("torch.")
    same = dict(size=size, batch_size=batch_size, steps=steps)
    contenders = [Contender("ours", our_sampling, device, dtype=dtype, **same)]
    for kind in dict.fromkeys(("float32", dtype)):
        contenders += [Contender(f"diffusers, {kind}{', channels last' if last else ''}",
                                 diffusers_sampling, device, dtype=kind, channels_last=last,
                                 **same) for last in (False, True)]
    if compiled:
        contenders.append(Contender(f"diffusers, {dtype}, compiled", diffusers_sampling, device,
                                    dtype=dtype, compiled=True, **same))
    contenders += [Contender(f"denoising-diffusion-pytorch, {kind}", ddp_sampling, device,
                             dtype=kind, **same) for kind in dict.fromkeys(("float32", dtype))]
    take_turns(contenders, repeats, seconds=1.0)
    rows = [dict(name=c.name, slices_per_second=batch_size / c.seconds, peak_gib=c.memory,
                 start_seconds=c.start_seconds) for c in contenders if c.alive]
    for row in rows:
        row["ours_is_faster_by"] = rows[0]["slices_per_second"] / row["slices_per_second"]
    return {**same, "contenders": rows}


def main() -> None:
    parser = bench.make_parser("Sampling speed against others'.", "sample_speed", repeats=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64], metavar="S",
                        help="sides in pixels (default: 64)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B",
                        help="slices at once (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, metavar="N",
                        help="DDIM steps; the time goes with them (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true",
                        help="leave out the compiled contender")
    args = parser.parse_args()
    device = local_device(args.device)
    results = []
    for size in args.sizes:
        result = compare(size, args.batch_size, args.steps, device, args.repeats,
                         not args.no_compile)
        results.append(result)
        print(f"\n{size} px, batch {args.batch_size}, {args.steps} DDIM steps\n")
        print_table(["sampling", "slices/s", "peak GiB", "start s", "ours is faster by"],
                    [[r["name"], f"{r['slices_per_second']:.2f}", f"{r['peak_gib']:.2f}",
                      f"{r['start_seconds']:.0f}", f"{r['ours_is_faster_by']:.2f}x"]
                     for r in result["contenders"]])
        print()
    if not results:
        raise UserError("--sizes: give at least one")
    print(facts(device))
    draw_bars(args.plot, {f"{r['size']} px": {c["name"]: c["slices_per_second"]
                                              for c in r["contenders"]} for r in results},
              "slices/s", f"{args.steps} DDIM steps, {facts(device)['hardware']}")
    save_json(args.json, {**facts(device), "results": results})


if __name__ == "__main__":
    run_cli(main)
