"""Samples per second of a training step: ours, and per cause, against transformers.Trainer and TRL.

    python benchmarks/train_step.py [--data ml-100k|FOLDER] [--model smollm2-135m] [--steps 3]
    python benchmarks/train_step.py --windows growing --batch 80 --template list --quantization none
    ... [--json] [--quick]

One process for each row, with the same base, LoRA initialisation, DeepSpeed ZeRO-3, samples per step and
token lengths, dropout 0 and objective sft, which is what the peers train. The loss of the first step is
checked equal before anything is compared. Rows, each with the cause that it adds:

    trainer          transformers.Trainer: padded rows, logits at every position
    trl              TRL's SFTTrainer on the same padded rows
    trl_packed       TRL with packing
    padded           ours, padded rows               -> the head on supervised positions only
    packed           the same without padding        -> packing
    shared_prefix    the prompt's constant start once per micro-batch
    prefix_tree      every common prefix once        -> the tree
    gdrt             prefix_tree (shared_prefix with sliding windows) with objective gdrt
    trainer_sliding  with --windows growing: transformers.Trainer on the sliding windows of the same targets,
                     which is what a user of Trainer has today

A row of ours can be changed behind an @: `prefix_tree@block2` cuts blocks of two targets, which are other
samples and so another loss; `prefix_tree@bfloat16` computes in that dtype.

With --windows growing all rows but the last train the same growing windows. Peers try every micro-batch of
--peer-micro with one step and take the fastest; all are printed. --cpu-time counts CPU seconds of the process
instead of the wall clock, for a machine that is shared. On a GPU the same command reports peak memory too;
--shape 7b takes a random-weight 7B Llama.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from queue import Empty

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from machine_line import machine

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("trainer", "trl", "trl_packed", "trainer_sliding")
DTYPES = ("float32", "bfloat16", "float16")
SHAPE_7B = dict(num_layers=32, hidden=4096, num_heads=32, num_key_value_heads=8, intermediate=14336)


class Bench:
    """Prepared data and a way to build a fresh engine for each row."""

    def __init__(self, options, folder: Path, windows: str, block: int | None):
        from gdrt_ds.config import load_config
        from gdrt_ds.runtime import start_runtime
        from gdrt_ds.training.preparation import prepare

        self.options, self.folder = options, folder
        self.clock = time.process_time if options.cpu_time else time.perf_counter
        base = [
            f"run.dir={folder}",
            f"data.path={options.data}",
            f"model.path={options.model}",
            f"model.quantization={options.quantization}",
            "model.lora.dropout=0",
            "objective=sft",
            f"train.global_batch={options.batch}",
            f"train.micro_batch={options.batch}",
            f"data.history_length={options.history}",
            f"data.windows={windows}",
            f"prompt.template={options.template}",
            f"model.dtype={options.dtype}",
            f"model.lora.targets={options.targets}",
            "train.warmup_steps=0",
            f"train.max_steps={options.steps + 1}",
        ]
        if block is not None:
            base.append(f"train.block_samples={block}")
        if options.model == "tiny-random":
            base.append("prompt.max_length=512")
        self.config = load_config(None, base)
        self.runtime = start_runtime()
        self.prepared = prepare(self.config)
        self.store = self.prepared.stores["train"]

    def load(self, attention):
        from gdrt_ds.models.load import load_model

        section = self.config.model.model_copy(update={"loading": "stock"})
        return load_model(
            section, self.runtime, train=True, path=self.prepared.model_folder, seed=0, attention=attention
        )

    def plan(self, packing: str):
        from gdrt_ds.training.preparation import plan_batches

        return plan_batches(self.config, self.store, 1, packing)

    def samples(self) -> list[np.ndarray]:
        return [self.plan("none").samples(step) for step in range(self.options.steps + 1)]

    def ours(self, packing: str, objective: str = "sft"):
        """Seconds per step (the first left out) and the first loss."""
        import deepspeed

        from gdrt_ds import dro
        from gdrt_ds.batches.tree_attention import ATTENTION_NAME
        from gdrt_ds.objectives import get_objective
        from gdrt_ds.training.deepspeed_config import fill_deepspeed_config, read_deepspeed_config
        from gdrt_ds.training.model_with_loss import FusedLossModel
        from gdrt_ds.training.step import StepRunner, TrainTokens
        from gdrt_ds.training.zero3_units import adapted_layers_as_units

        loaded = self.load(ATTENTION_NAME if packing != "none" else None)
        module, plan = FusedLossModel(loaded.model), self.plan(packing)
        hidden = self.prepared.model_config.get_text_config().hidden_size
        filled = fill_deepspeed_config(
            read_deepspeed_config("ds_configs/zero3_qlora.json"), self.config, plan, loaded.dtype, hidden
        )
        trainable = [p for p in module.parameters() if p.requires_grad]
        with adapted_layers_as_units(loaded.model, 3):
            engine, *_ = deepspeed.initialize(
                model=module,
                config=filled,
                model_parameters=trainable,
                optimizer=torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0),
            )
        engine.train()
        num_groups = 1 if objective == "sft" else 8
        groups = (np.arange(int(self.store.target_offsets[-1])) % num_groups).astype(np.int16)
        config = self.config.model_copy(update={"objective": objective})
        runner = StepRunner(
            engine,
            plan,
            TrainTokens(self.store, groups, num_groups),
            get_objective(objective),
            config,
            dro.DroState(num_groups).to(self.runtime.device),
            self.runtime,
            packing=packing,
            prefix_length=self.prepared.data.prefix_length,
            pad_id=self.prepared.tokenizer.pad_token_id,
        )
        seconds, first, tokens = [], None, 0
        for step in range(self.options.steps + 1):
            start = self.clock()
            result = runner.run(step, 1e-4)
            first = float(result.loss) if first is None else first
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(self.clock() - start)
            tokens += result.tokens
        engine.destroy()
        return seconds[1:], first, tokens

    def peer(self, name: str, micro: int):
        """transformers.Trainer or TRL's SFTTrainer on the same samples with the same ZeRO-3 settings.

        Args:
            micro: samples of a forward; the step accumulates over as many as it takes.
        """
        from accelerate.state import AcceleratorState
        from transformers import Trainer, TrainerCallback, TrainingArguments
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        loaded = self.load(None)
        rows, store = [], self.store
        for step in self.samples():
            for sample in step:
                ids = store.row(int(sample)).astype(np.int64)
                targets = int(store.num_target[store.sample_of(np.array([sample]))[0]])
                labels = np.full_like(ids, -100)
                labels[-targets:] = ids[-targets:]
                rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
        pad = self.prepared.tokenizer.pad_token_id

        def collate(batch):
            width = max(len(row["input_ids"]) for row in batch)

            def fill(key, value):
                return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in batch])

            mask = torch.tensor(
                [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]
            )
            return {
                "input_ids": fill("input_ids", pad),
                "labels": fill("labels", -100),
                "attention_mask": mask,
            }

        clock, marks, losses = self.clock, [], []

        class Clock(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                marks.append(clock())

            def on_step_end(self, *args, **kwargs):
                marks[-1] = clock() - marks[-1]

            def on_log(self, args, state, control, logs=None, **kwargs):
                if "loss" in (logs or {}):
                    losses.append(float(logs["loss"]))

        settings = dict(
            output_dir=str(self.folder / name),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=self.options.batch // micro,
            max_steps=self.options.steps + 1,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            deepspeed=str(self._peer_deepspeed()),
            remove_unused_columns=False,
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=loaded.dtype == torch.bfloat16,
        )
        order = torch.utils.data.SequentialSampler
        if name.startswith("trl"):
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer

            base_class = SFTTrainer
            arguments = SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
            data = Dataset.from_list(rows)
            extra = {"processing_class": self.prepared.tokenizer}
            if name == "trl_packed":
                from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

                # What TRL's packing gives a model: samples one behind the other, positions that start anew.
                collate = DataCollatorForLanguageModeling(pad_token_id=pad, padding_free=True)
        else:
            base_class, arguments, data, extra = Trainer, TrainingArguments(**settings), rows, {}

        class InOrder(base_class):
            def _get_train_sampler(self, *args, **kwargs):
                return order(data)

        trainer = InOrder(
            model=loaded.model,
            args=arguments,
            train_dataset=data,
            data_collator=collate,
            callbacks=[Clock()],
            **extra,
        )
        trainer.train()
        if getattr(trainer, "deepspeed", None) is not None:
            trainer.deepspeed.destroy()
        unset_hf_deepspeed_config()  # a later row must load its model without transformers' ZeRO-3 switch
        AcceleratorState._reset_state(reset_partial_state=True)
        return marks[1:], losses[0], 0

    def _peer_deepspeed(self) -> Path:
        from gdrt_ds.models.inventory import take_inventory
        from gdrt_ds.training.deepspeed_config import zero3_limits

        path = self.folder / "peer_zero3.json"
        config = json.loads((ROOT / "ds_configs" / "zero3_qlora.json").read_text())
        config.pop("optimizer", None)
        zero = config["zero_optimization"]
        zero["overlap_comm"] = torch.cuda.is_available()
        # accelerate does not know these keys as "auto": the peers get the limits that our rows have.
        inventory = take_inventory(self.config.model, self.prepared.model_config)
        limits = zero3_limits(inventory.hidden, inventory.layer_elements(self.config.model))
        zero.update({key: value for key, value in limits.items() if zero.get(key) == "auto"})
        path.write_text(json.dumps(config))
        return path


def changed_row(row: str, dtype: str) -> tuple[str, int | None, str]:
    """Splits `ROW@CHANGE` into the row, its targets per block (None: as many as fit) and its dtype.

    Raises:
        SystemExit: an unknown change, or one of a peer.
    """
    row, _, change = row.partition("@")
    if change and row in PEERS:
        raise SystemExit(f"{row}@{change}: only rows of ours can be changed")
    if not change:
        return row, None, dtype
    if change in DTYPES:
        return row, None, change
    if change.startswith("block") and change[5:].isdigit():
        return row, int(change[5:]), dtype
    raise SystemExit(f"{row}@{change}: allowed are @blockN and @{', @'.join(DTYPES)}")


def measure(options, folder: str, row: str, micro: int, queue) -> None:
    """One row in a process of its own: what earlier rows leave behind would slow the later ones."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    row, block, options.dtype = changed_row(row, options.dtype)
    windows = "sliding" if row == "trainer_sliding" else options.windows
    bench = Bench(options, Path(folder), windows, block)
    objective = "gdrt" if row == "gdrt" else "sft"
    if row in PEERS:
        result = bench.peer(row, micro)
    else:
        best = "prefix_tree" if windows == "growing" else "shared_prefix"
        result = bench.ours({"padded": "none", "gdrt": best}.get(row, row), objective)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    lengths = [len(bench.store.row(int(row))) for row in bench.samples()[0]]
    queue.put((*result, memory, float(np.mean(lengths))))


def run_row(options, folder: str, row: str, micro: int):
    """Seconds of each step, first loss, tokens, peak memory and mean tokens of a sample.

    Raises:
        SystemExit: the process of this row ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(options, folder, row, micro, queue))
    process.start()
    try:
        while True:
            with contextlib.suppress(Empty):
                return queue.get(timeout=5)
            if process.exitcode is not None:
                raise SystemExit(f"row {row} ended with status {process.exitcode}; its messages are above")
    finally:
        process.kill()
        process.join()


def measure_row(options, folder: str, row: str):
    """The result of a row, its micro-batch, and seconds of a step by micro-batch tried.

    A peer takes the fastest of --peer-micro: each of several is tried with one timed step.
    """
    if row not in PEERS:
        return run_row(options, folder, row, options.batch), options.batch, {}
    sizes = [size for size in options.peer_micro if options.batch % size == 0] or [options.batch]
    tried = {}
    if len(sizes) > 1:
        one_step = argparse.Namespace(**{**vars(options), "steps": 1})
        tried = {size: min(run_row(one_step, folder, row, size)[0]) for size in sizes}
        sizes = [min(tried, key=tried.get)]
    return run_row(options, folder, row, sizes[0]), sizes[0], tried


def check_loss(row: str, loss: float, reference: float, dtype: str) -> None:
    """Raises SystemExit if a row's first loss is another one: it would not be the same computation.

    The peers round the loss that they log to four decimals. In bfloat16 the order of sums shows.
    """
    tolerance = 1e-4 * abs(reference) + 5e-5
    if dtype == "bfloat16":
        tolerance = 5e-3 * abs(reference)
    if abs(loss - reference) > tolerance:
        raise SystemExit(
            f"{row}: first loss {loss:.6f} differs from {reference:.6f}: not the same computation"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--windows", default="sliding", choices=("sliding", "growing"))
    parser.add_argument("--template", default="alpaca", help="prompt.template of all rows, e.g. list")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--targets", default="[q_proj, v_proj]", help="model.lora.targets")
    parser.add_argument("--history", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--peer-micro", type=int, nargs="+", default=[], help="micro-batches that peers try")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--quantization", default="nf4", choices=("nf4", "none"))
    parser.add_argument("--rows")
    parser.add_argument("--shape", choices=("7b",))
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="tiny random model, under a minute on 2 cores")
    options = parser.parse_args()
    if options.quick:
        options.model = "tiny-random"
        options.rows = options.rows or "trainer,padded,packed,shared_prefix,gdrt"
        options.steps = 4
    if options.rows is None:
        options.rows = "trainer,trl,padded,packed,shared_prefix,prefix_tree,gdrt"
        if options.windows == "growing":
            options.rows = "trainer,trl_packed,padded,packed,shared_prefix,prefix_tree,gdrt,trainer_sliding"
    for row in options.rows.split(","):
        changed_row(row, options.dtype)  # a mistake ends here, before minutes of other rows
    return options


def make_7b(folder: str, data: str) -> str:
    """A random Llama in the shape of 7B, with a tokenizer of the data's titles."""
    from gdrt_ds.config import load_config
    from gdrt_ds.data.corpus import load_corpus
    from gdrt_ds.models.built_in import make_tiny_model

    items = load_corpus(load_config(None, [f"data.path={data}"]).data).items
    titles = [item.title for item in items.values()]
    path = Path(folder) / "shape"
    return str(make_tiny_model(path, titles, max_vocab=128256, vocab_multiple=128256, **SHAPE_7B))


def main() -> None:
    options = parse()
    found = {}
    tokens_of = {}
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        if options.shape:
            options.model = make_7b(folder, options.data)
        print(
            f"# {options.data}, {options.windows} windows, history {options.history}, {options.template}; "
            f"batch {options.batch}; "
            f"{options.model}, {options.quantization}, {options.dtype}; "
            f"{machine()}{', CPU seconds' if options.cpu_time else ''}"
        )
        for row in options.rows.split(","):
            if row.startswith("trl") and importlib.util.find_spec("trl") is None:
                print("trl                 not installed: pip install trl==1.16.0")
                continue
            (seconds, first, _, memory, mean_tokens), micro, tried = measure_row(options, folder, row)
            if tried:
                shown = ", ".join(f"{size}: {options.batch / spent:.2f}" for size, spent in tried.items())
                print(f"{row:<20} samples/s by micro-batch, one step each: {shown}")
            found[row] = min(seconds)
            tokens_of[row] = mean_tokens
            name, block, dtype = changed_row(row, options.dtype)
            if name != "trainer_sliding" and block is None:  # else other samples, so another loss
                reference = first if reference is None else reference
                check_loss(row, first, reference, dtype)
            peak = f"  peak {memory / 2**30:.2f} GiB" if memory else ""
            print(
                f"{row:<20} {options.batch / found[row]:8.2f} samples/s   first loss {first:.5f}   "
                f"{mean_tokens:.0f} tokens a sample, micro-batch {micro}{peak}",
                flush=True,
            )
    for ours in [row for row in found if row not in PEERS]:
        for peer in [row for row in found if row in PEERS]:
            ratio = found[peer] / found[ours]
            record = {
                "name": f"train_step/{ours}",
                "ours": options.batch / found[ours],
                "peer": options.batch / found[peer],
                "peer_name": peer,
                "ratio": ratio,
                "shape": {
                    "model": options.model,
                    "data": options.data,
                    "windows": options.windows,
                    "template": options.template,
                    "history": options.history,
                    "batch": options.batch,
                    "dtype": options.dtype,
                    "quantization": options.quantization,
                    "mean_tokens": tokens_of[ours],
                },
                "machine": machine(),
            }
            print(json.dumps(record) if options.json else f"{ours} is {ratio:.2f} x {peer}")


if __name__ == "__main__":
    main()
