"""Speed and memory of the fused group loss beside its peers and its floor, in one run:

    python benchmarks/group_loss.py [--json] [--quick] [--cpu-time] [--model NAME] [--no-slow]
    [--chunk-rows R ...]

Forward and backward with the head frozen for everyone and per-group weights that are known only after the
forward (a DRO weight is known after an all-reduce), so each contender hands out unreduced losses and gets
its weights in the backward. The floor is the two
matrix products alone: logits = x W^T and dx = g W, in the same chunks and with nothing between them;
"unchunked" is over all rows.

Repeats are interleaved and the least time of each is taken. On CPUs OMP_NUM_THREADS decides the threads (2
if unset). Peak memory: what torch's allocator handed out beyond the inputs, from the profiler on CPUs and
from the CUDA allocator on GPUs.
On a machine that others use at the same time, wall clocks of two threads say little: --cpu-time counts CPU
seconds on one thread.
A contender that cannot run here is a line with `skipped` and the reason. Exit status 0 whatever the ratios
are.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import warnings
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))

import torch
import torch.nn.functional as F
from machine_line import machine

from gdrt_ds.loss import describe, group_cross_entropy
from gdrt_ds.loss.group_loss import default_chunk_bytes

NUM_GROUPS = 8
SLOW_S, SLOW_QUICK_S = 15.0, 4.0  # a contender slower than this runs once, and its memory is not asked for
FAR = 2.5  # times ours
# (name, hidden size H, vocabulary V, tokens on a GPU, tokens on CPUs, tokens with --quick on CPUs or None)
SHAPES = [
    ("SmolLM2-135M", 576, 49_152, 16_384, 512, 512),
    ("Gemma-2-2B", 2_304, 256_000, 8_192, 256, None),
    ("Qwen2.5-7B", 3_584, 152_064, 8_192, 256, None),
    ("Llama-3-8B", 4_096, 128_256, 8_192, 256, None),
]


class Problem:
    """Inputs of one shape and the weights of the backward. Shapes.

    Hidden[N, H], head[V, H], labels[N], groups[N].
    """

    def __init__(self, hidden_size: int, vocabulary: int, num_tokens: int, device: str, dtype: torch.dtype):
        generator = torch.Generator(device=device).manual_seed(0)
        self.hidden = (
            torch.randn(num_tokens, hidden_size, device=device, generator=generator)
            .to(dtype)
            .requires_grad_()
        )
        # Rows repeat every 4,096 tokens: a product's time does not depend on it, and half a billion normal
        # deviates take long to draw.
        rows = (
            torch.randn(min(vocabulary, 4096), hidden_size, device=device, generator=generator)
            .mul_(hidden_size**-0.5)
            .to(dtype)
        )
        self.head = rows.repeat(-(-vocabulary // len(rows)), 1)[:vocabulary].contiguous()
        self.labels = torch.randint(vocabulary, (num_tokens,), device=device, generator=generator)
        self.groups = torch.randint(NUM_GROUPS, (num_tokens,), device=device, generator=generator)
        self.group_weights = torch.rand(NUM_GROUPS, device=device, generator=generator) / num_tokens
        self.device = device
        self.chunk_bytes = default_chunk_bytes(device, vocabulary, self.head.element_size())

    def backward_of_losses(self, losses_N: torch.Tensor) -> None:
        (losses_N.float() * self.group_weights[self.groups]).sum().backward()


def ours(problem: Problem, **options) -> None:
    out = group_cross_entropy(
        problem.hidden, problem.head, problem.labels, problem.groups, NUM_GROUPS, **options
    )
    (out.loss_sums * problem.group_weights).sum().backward()


def budget_of(problem: Problem, rows: int) -> int:
    """A chunk budget that holds this many rows, on CPUs with the scratch of a 2-byte head."""
    return rows * problem.head.shape[0] * problem.head.element_size() + (8 << 20)


def full_logits(problem: Problem) -> None:
    logits_NV = F.linear(problem.hidden, problem.head)
    problem.backward_of_losses(F.cross_entropy(logits_NV.float(), problem.labels, reduction="none"))


def torch_fused(problem: Problem, options) -> None:
    losses_N = F.linear_cross_entropy(
        problem.hidden, problem.head, problem.labels, reduction="none", options=options
    )
    problem.backward_of_losses(losses_N)


def torch_fused_sum(problem: Problem, options) -> None:
    """An easier task: one weight for all tokens, known before the forward."""
    F.linear_cross_entropy(
        problem.hidden, problem.head, problem.labels, reduction="sum", options=options
    ).backward()


def liger(problem: Problem) -> None:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    arguments = (problem.hidden, problem.head, problem.labels, None, None, -100, 0.0, 0.0, "none")
    result = LigerFusedLinearCrossEntropyFunction.apply(*arguments)
    problem.backward_of_losses(result[0] if isinstance(result, tuple) else result)


def cut_cross_entropy(problem: Problem, implementation: str) -> None:
    from cut_cross_entropy import linear_cross_entropy

    problem.backward_of_losses(
        linear_cross_entropy(
            problem.hidden, problem.head, problem.labels, reduction="none", impl=implementation
        )
    )


class Floor:
    """The two products alone, with buffers allocated beforehand."""

    def __init__(self, problem: Problem, chunked: bool):
        num_tokens, vocabulary = len(problem.hidden), problem.head.shape[0]
        rows = (
            max(1, problem.chunk_bytes // (vocabulary * problem.head.element_size()))
            if chunked
            else num_tokens
        )
        self.rows = -(-num_tokens // -(-num_tokens // rows))
        self.logits = torch.empty(self.rows, vocabulary, dtype=problem.head.dtype, device=problem.device)
        self.gradient = torch.empty_like(problem.hidden)

    @torch.no_grad()
    def __call__(self, problem: Problem) -> None:
        for start in range(0, len(problem.hidden), self.rows):
            hidden_CH = problem.hidden[start : start + self.rows]
            logits_CV = self.logits[: len(hidden_CH)]
            torch.mm(hidden_CH, problem.head.T, out=logits_CV)
            torch.mm(logits_CV, problem.head, out=self.gradient[start : start + self.rows])


def contenders(problem: Problem, quick: bool, no_slow: bool, chunk_rows: list[int]) -> dict:
    """name -> (what one forward and backward does, its group: ours, peer or floor)."""

    def torch_chunks(rows=None):
        return torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

    table = {
        "ours, one pass": (lambda p: ours(p), "ours"),
        **{
            f"ours, chunks of {rows} rows": (partial(ours, chunk_bytes=budget_of(problem, rows)), "ours")
            for rows in chunk_rows
        },
        "ours, recompute": (lambda p: ours(p, frozen_weight=False), "ours"),
        "full logits": (full_logits, "peer"),
        "torch linear_cross_entropy": (lambda p: torch_fused(p, None), "peer"),
        "same, chunks of 256 rows": (lambda p: torch_fused(p, torch_chunks(256)), "peer"),
        "Liger": (liger, "peer"),
        "CCE": (lambda p: cut_cross_entropy(p, "cce"), "peer"),
        "products, same chunks": (Floor(problem, chunked=True), "floor"),
        "products, unchunked": (Floor(problem, chunked=False), "floor"),
    }
    if not quick:
        table["CCE torch_compile"] = (lambda p: cut_cross_entropy(p, "torch_compile"), "peer")
    if not quick and not no_slow:
        table["same, chunks chosen by torch"] = (lambda p: torch_fused(p, torch_chunks()), "peer")
        table["same, chunks by torch, plain sum"] = (
            lambda p: torch_fused_sum(p, torch_chunks()),
            "easier task",
        )
    return table


def once(problem: Problem, run, clock=time.perf_counter) -> float:
    """Seconds of one forward and backward."""
    problem.hidden.grad = None
    if problem.device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        run(problem)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin = clock()
    run(problem)
    return clock() - begin


def peak_bytes(problem: Problem, run) -> int:
    """Bytes that torch's allocator handed out at the same time during one forward and backward, inputs not
    counted.
    """
    problem.hidden.grad = None
    gc.collect()
    if problem.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(problem)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(problem)
    alive = peak = 0
    for event in sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def measure(
    name: str, problem: Problem, repeats: int, quick: bool, no_slow: bool, clock, chunk_rows: list[int]
) -> list[dict]:
    """One JSON object per contender that is not the one-pass op: its time and memory beside ours."""
    dtype = str(problem.head.dtype).removeprefix("torch.")
    num_tokens, (vocabulary, hidden_size) = len(problem.hidden), problem.head.shape
    shape = {"model": name, "N": num_tokens, "H": hidden_size, "V": vocabulary, "dtype": dtype}
    table, times, peaks, skipped = contenders(problem, quick, no_slow, chunk_rows), {}, {}, {}
    limit = SLOW_QUICK_S if quick else SLOW_S
    for label, (run, kind) in table.items():
        print(f"  {name} {dtype}: {label}", file=sys.stderr, flush=True)
        try:
            first = once(problem, run, clock)
            if first > limit:  # perhaps it compiled: the second run decides
                first = once(problem, run, clock)
            slow = first > limit  # this one run is then its time
            peaks[label] = (
                None if kind == "floor" or slow and label != "ours, one pass" else peak_bytes(problem, run)
            )
            times[label] = [first] if slow else []
        except (
            Exception
        ) as error:  # a peer without a CPU version fails in many ways; the reason is reported, not hidden
            skipped[label] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    for _ in range(repeats):
        for label in times:
            # Far behind after one round, or slow: more rounds would not tell anything.
            far = times[label] and min(times[label]) > FAR * min(times["ours, one pass"])
            if not far and not (times[label] and max(times[label]) > limit):
                times[label].append(once(problem, table[label][0], clock))
    best = {label: min(values) for label, values in times.items()}
    mine, budget = (
        best["ours, one pass"],
        problem.chunk_bytes + problem.hidden.numel() * problem.hidden.element_size(),
    )
    rows = []
    for label, (_, kind) in table.items():
        row = {
            "name": f"group_loss: ours one-pass / {label}",
            "shape": shape,
            "machine": machine(),
            "kind": kind,
        }
        if label == "ours, one pass":
            row |= {"name": "group_loss: memory of one-pass / (chunk budget + N*H)", "kind": "memory"}
            row |= {
                "ours": peaks[label],
                "floor": budget,
                "ratio": round(peaks[label] / budget, 3),
                "unit": "bytes",
            }
        elif label in skipped:
            row |= {"ours": mine, "peer": None, "ratio": None, "skipped": skipped[label]}
        else:
            row |= {
                "ours": mine,
                "floor" if kind == "floor" else "peer": best[label],
                "ratio": round(mine / best[label], 3),
                "unit": "s",
            }
            row |= {"ours_peak_bytes": peaks["ours, one pass"], "peer_peak_bytes": peaks[label]}
        rows.append(row)
    return rows


def print_table(rows: list[dict]) -> None:
    shape = rows[0]["shape"]
    print(
        f"\n{shape['model']}: N {shape['N']}, H {shape['H']}, V {shape['V']}, {shape['dtype']}; "
        f"{rows[0]['machine']}"
    )
    print(
        f"{'ours one-pass beside':38} {'ours':>10} {'other':>10} {'ratio':>7}  {'ours MiB':>9} "
        f"{'other MiB':>9}"
    )
    for row in rows:
        other, label = row.get("peer", row.get("floor")), row["name"].split(" / ")[1]
        if row.get("skipped"):
            print(f"{label:38} does not run here: {row['skipped'][:80]}")
        elif row["kind"] == "memory":
            print(
                f"{'memory: ' + label:38} {row['ours'] / 2**20:8.1f} M {other / 2**20:8.1f} M "
                f"{row['ratio']:7.3f}"
            )
        else:
            peaks = (row["ours_peak_bytes"], row["peer_peak_bytes"])
            memory = "" if None in peaks else " ".join(f"{peak / 2**20:9.1f}" for peak in peaks)
            print(f"{label:38} {row['ours'] * 1e3:8.1f}ms {other * 1e3:8.1f}ms {row['ratio']:7.3f}  {memory}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument(
        "--quick", action="store_true", help="within a minute on 2 cores: the small shape only on CPUs"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=None,
        help="interleaved repeats, the least counts (default 7, quick 3, GPU 20)",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU seconds on one thread: for a machine that others use, too (CPUs only)",
    )
    parser.add_argument("--model", default=None, help="only the shape with this name")
    parser.add_argument(
        "--no-slow",
        action="store_true",
        help="leave out torch's own choice of chunks: minutes with a large head on CPUs",
    )
    parser.add_argument(
        "--chunk-rows", type=int, nargs="+", default=[], help="also ours in chunks of about so many rows"
    )
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    repeats = arguments.repeats or (20 if device == "cuda" else 3 if arguments.quick else 7)
    dtypes = [torch.bfloat16] if device == "cuda" else [torch.float32, torch.bfloat16]
    for dtype in dtypes if not arguments.json else ():
        print(describe(device, dtype))
    for name, hidden_size, vocabulary, gpu_tokens, cpu_tokens, quick_tokens in SHAPES:
        num_tokens = gpu_tokens if device == "cuda" else quick_tokens if arguments.quick else cpu_tokens
        if num_tokens is None or arguments.model not in (None, name):
            continue
        for dtype in dtypes:
            rows = measure(
                name,
                Problem(hidden_size, vocabulary, num_tokens, device, dtype),
                repeats,
                arguments.quick,
                arguments.no_slow,
                clock,
                arguments.chunk_rows,
            )
            for row in rows if arguments.json else ():
                print(json.dumps(row), flush=True)
            if not arguments.json:
                print_table(rows)
                sys.stdout.flush()


if __name__ == "__main__":
    main()
