"""Scaling on paper: step time and communication of QLoRA under ZeRO-3 and ZeRO-2 from 1 to 1,024 GPUs,
from stated constants.

    python benchmarks/scaling.py [--parameters 8e9] [--tokens 4800] [--flops 400e12] [--intra 400e9]
    [--inter 45e9] [--node 8] [--json] [--quick]
A model, not a measurement: give it the constants of your cluster. What is counted, per micro-batch and rank:
  compute   6 P T flops with activation recomputation, 4 P T without (frozen base: forward 2 P T, gradient
  of activations 2 P T, recompute 2 P T) gather    ZeRO-3 all-gathers the packed 4-bit base twice (forward,
  backward): 2 * P * 0.5 bytes * (n-1)/n, over the slowest link of the ring reduce    LoRA gradients and
  the one packed float64 buffer of the DRO weights: latency, not volume
Gathers overlap with compute by prefetching: the step takes the longer of the two plus what cannot overlap
(the first layer's gather).
"""

from __future__ import annotations

import argparse
import json
import math

# One collective step on a data-centre network; the ring of n ranks takes about log2(n) of
# them for small messages
LATENCY_S = 20e-6


def predict(options, ranks: int, stage: int) -> dict:
    base_bytes = options.parameters * 0.5 * (1 + 0.127 / 4)
    compute = (6 if options.recompute else 4) * options.parameters * options.tokens / options.flops
    link = options.intra if ranks <= options.node else options.inter
    volume = 2 * base_bytes * (ranks - 1) / ranks if stage == 3 else 0.0
    gather = volume / link
    lora = options.lora_parameters * 4 * 2 * (ranks - 1) / ranks
    reduce = lora / link + (LATENCY_S * math.ceil(math.log2(ranks)) * 2 if ranks > 1 else 0.0)
    step = max(compute, gather) + gather / options.layers + reduce
    memory = base_bytes / (ranks if stage == 3 else 1)
    return {
        "gpus": ranks,
        "stage": stage,
        "compute_s": compute,
        "gather_s": gather,
        "gather_GB": volume / 1e9,
        "dro_bytes": 8 * (2 * options.groups + 2),
        "step_s": step,
        "efficiency": compute / step,
        "base_GiB": memory / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=8e9)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--lora-parameters", type=float, default=3.4e6, help="r 8 on q_proj and v_proj of an 8B Llama"
    )
    parser.add_argument(
        "--tokens", type=float, default=4800, help="tokens of a micro-batch per GPU, e.g. 16 samples of 300"
    )
    parser.add_argument("--flops", type=float, default=400e12, help="sustained bf16 flops of one GPU")
    parser.add_argument("--intra", type=float, default=400e9, help="bytes/s of an all-gather inside a node")
    parser.add_argument(
        "--inter", type=float, default=45e9, help="bytes/s per GPU between nodes (400 Gbit/s per GPU)"
    )
    parser.add_argument("--node", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--no-recompute", dest="recompute", action="store_false")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the same: it is arithmetic")
    options = parser.parse_args()
    if not options.json:
        print(
            "| GPUs | ZeRO | base per GPU | gathered per micro-batch | compute | gather | step | efficiency "
            "|\n|---|---|---|---|---|---|---|---|"
        )
    for ranks in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        rows = {stage: predict(options, ranks, stage) for stage in (2, 3)}
        for stage, row in rows.items():
            if options.json:
                print(
                    json.dumps(
                        {
                            "name": f"scaling/zero{stage}/{ranks}",
                            "ours": row["step_s"],
                            "floor": row["compute_s"],
                            "ratio": row["step_s"] / row["compute_s"],
                            "shape": vars(options) | {"gpus": ranks},
                            "machine": "arithmetic from the constants in `shape`",
                        }
                    )
                )
            else:
                print(
                    f"| {ranks} | {stage} | {row['base_GiB']:.2f} GiB | {row['gather_GB']:.1f} GB | "
                    f"{row['compute_s']:.3f} s | {row['gather_s']:.3f} s | "
                    f"{row['step_s']:.3f} s | {row['efficiency']:.0%} |"
                )


if __name__ == "__main__":
    main()
