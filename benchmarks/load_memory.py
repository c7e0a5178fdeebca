"""Host memory per rank while a model is loaded into ZeRO-3 shards: this loader against transformers +
DeepSpeed, in one run.

    python benchmarks/load_memory.py [--model DIR] [--world 1 2 3 4] [--quick] [--json]

Each way runs in fresh processes (gloo ranks). `peak` is the growth of the high-water mark of resident
memory (VmHWM) over its value after all imports and after the process group is up; `bound` is
    quantised weights / world + whole quant_state + unquantised parameters / world + the largest tensor's
    slice work + a constant.
Weights and quant_state of both ways are compared by a checksum over every rank's slices: a faster wrong
loader fails here.
Device memory is printed beside it where a GPU is used. Without --model a random Llama of about 150 M
parameters is made (--quick: 40 M).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import multiprocessing
import os
import platform
import socket
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: forked ranks must not inherit a thread pool
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CONSTANT_BYTES = 48 << 20  # allocator slack, gloo buffers, Python objects of the module tree


def load(way: str, path: Path, rank: int, world: int):
    import deepspeed
    import torch

    from gdrt_ds.config import ModelSection
    from gdrt_ds.models.sharded_loading import load_sharded
    from gdrt_ds.models.source import read_model_config
    from gdrt_ds.models.stock_loading import load_stock

    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    section = ModelSection(path=str(path), loading="sharded")
    dtype = torch.bfloat16
    config = read_model_config(path)
    setup = {"train_batch_size": world, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    if way == "sharded":
        return load_sharded(path, config, section, dtype, "sdpa", device, setup)
    model = load_stock(path, config, section, dtype, "sdpa", device)
    deepspeed.zero.Init(module=model, config_dict_or_path=setup, dtype=dtype)
    return model


def measure(way: str, path: Path, warm_path: Path, rank: int, world: int, port: int, queue) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    sys.stdout = sys.stderr
    import deepspeed
    import torch

    from gdrt_ds.training.memory_use import PeakMemory

    torch.set_num_threads(1)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    load(way, warm_path, rank, world)  # lazy imports and kernels are not part of a model's memory
    gc.collect()
    memory = PeakMemory(torch.device("cpu"))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model = load(way, path, rank, world)
    peak = memory.bytes_here()
    device_peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    digest, quantised, state_bytes, plain, largest = hashlib.sha256(), 0, 0, 0, 0
    for name, parameter in model.named_parameters():
        size = parameter.ds_tensor.numel()
        own = max(0, min(size, parameter.ds_numel - size * rank))
        digest.update(
            name.encode() + parameter.ds_tensor[:own].contiguous().view(torch.uint8).cpu().numpy().tobytes()
        )
        full = parameter.ds_numel * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is None:
            plain += full
            largest = max(largest, full)
            continue
        quantised += full
        largest = max(largest, state.shape.numel() * 4)
        for key, value in state.as_dict(packed=True).items():
            digest.update(key.encode() + value.contiguous().view(torch.uint8).cpu().numpy().tobytes())
            state_bytes += value.numel() * value.element_size()
    queue.put((rank, peak, device_peak, digest.hexdigest(), quantised, state_bytes, plain, largest))
    queue.close()
    queue.join_thread()
    os._exit(0)


def run(way: str, path: Path, warm_path: Path, world: int) -> list[tuple]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    import torch

    context = multiprocessing.get_context(
        "spawn" if torch.cuda.is_available() else "forkserver"
    )  # imports are paid once, by a process that made no model
    if not torch.cuda.is_available():
        context.set_forkserver_preload(
            ["torch", "transformers", "bitsandbytes", "deepspeed", "gdrt_ds.models.sharded_loading"]
        )
    queue = context.Queue()
    processes = [
        context.Process(target=measure, args=(way, path, warm_path, rank, world, port, queue))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        return sorted(queue.get(timeout=600) for _ in range(world))
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def make_model(folder: Path, layers: int, hidden: int, vocab: int) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model (safetensors); default: a random Llama")
    parser.add_argument("--world", type=int, nargs="+", default=None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    worlds = options.world or ([2] if options.quick else [1, 2, 3, 4])
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        made = make_model(Path(scratch) / "made", *((6, 640, 16000) if options.quick else (12, 1024, 16000)))
        warm = make_model(Path(scratch) / "warm", 1, 64, 300)
        path = Path(options.model) if options.model else made
        if not options.json:
            print(f"{'world':>5} {'ours MiB':>9} {'stock MiB':>10} {'ratio':>6} {'bound MiB':>10}  bitwise")
        for world in worlds:
            ours, stock = run("sharded", path, warm, world), run("stock", path, warm, world)
            _, _, _, _, quantised, state_bytes, plain, largest = ours[0]
            bound = quantised // world + state_bytes + plain // world + largest + CONSTANT_BYTES
            peak, peer = max(r[1] for r in ours), max(r[1] for r in stock)
            equal = [r[3] for r in ours] == [r[3] for r in stock]
            failures += not equal or peak > bound
            record = {
                "name": "load_memory",
                "ours": peak,
                "peer": peer,
                "ratio": round(peak / peer, 3),
                "bound": bound,
                "within_bound": peak <= bound,
                "bitwise_equal": equal,
                "unit": "bytes of host memory per rank (peak, maximum over ranks)",
                "device_ours": max(r[2] for r in ours),
                "device_peer": max(r[2] for r in stock),
                "shape": {
                    "world": world,
                    "quantised_bytes": quantised,
                    "quant_state_bytes": state_bytes,
                    "unquantised_bytes": plain,
                },
                "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            }
            if options.json:
                print(json.dumps(record), flush=True)
            else:
                print(
                    f"{world:>5} {peak / 2**20:>9.0f} {peer / 2**20:>10.0f} {peak / peer:>6.2f} "
                    f"{bound / 2**20:>10.0f}  {'yes' if equal else 'NO'}",
                    flush=True,
                )
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
