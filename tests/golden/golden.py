"""Golden figures: short runs whose losses, group weights and metrics are files beside this script.

    make golden                                  run everything again and compare
    make golden-update REASON="why they change"  write the files anew; the reason goes into reasons.md

A change that should not change numbers proves it by `make golden`. On the machine that wrote the files (same
processor, same versions of the libraries) every figure must be equal to the bit. Elsewhere the order of
floating-point sums differs, and figures may differ by 1e-5 relative to their size, the best temperature by
1e-4.

The runs go through the commands' own `main`, each in forked ranks, so that torch is imported once for all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONHASHSEED="0")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

RELATIVE_TOLERANCE = 1e-5  # between machines; nothing is tolerated on one machine
OF_A_MINIMUM = 1e-4
"""The same for the best temperature: a loss is flat at its minimum, which moves by the root of rounding."""
SMALLEST = 1e-5  # nats: a difference of two losses has no more digits than the losses have
LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "numpy", "scipy")
STEP_KEYS = (
    "step",
    "loss",
    "objective",
    "lr",
    "grad_norm",
    "tokens",
    "group_loss",
    "group_weight",
    "group_count",
)

PLANTED = (
    "--config",
    "configs/planted.yaml",
    "data.planted={num_train: 640, num_test: 160}",
    "train.max_steps=8",
    "train.warmup_steps=3",
    "train.eval_every=4",
    "train.log_every=8",
    "train.micro_batch=16",
    "model.dtype=float32",
)
SMOKE = (
    "--config",
    "configs/smoke.yaml",
    "train.max_steps=8",
    "train.save_every=4",
    "train.eval_every=8",
    "model.dtype=float32",
)


@dataclass(frozen=True)
class Run:
    """One training whose metrics are golden. `resume_at`.

    The run is cut back to this checkpoint and goes on from there.
    """

    name: str
    world: int
    arguments: tuple[str, ...]
    resume_at: int | None = None


RUNS = (
    Run("planted_sft", 1, (*PLANTED, "objective=sft")),
    Run("planted_gdrt", 1, (*PLANTED, "objective=gdrt")),
    Run("planted_gdrt_ema", 2, (*PLANTED, "objective=gdrt", "dro.estimate=ema")),
    Run("planted_msl", 1, (*PLANTED, "objective=msl", "train.packing=shared_prefix")),
    Run("smoke_nf4_zero3", 2, (*SMOKE, "model.lora.dropout=0.05"), resume_at=4),
)
EVALUATED = "planted_gdrt"  # the run that is evaluated and audited
AUDITS = "sensitivity,information,language,position,provider"


def machine() -> dict[str, str]:
    """What must be equal for figures to be equal to the bit."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        processor = " ".join(fields.get(key, "") for key in ("model name", "cpu family", "model", "stepping"))
    except OSError:
        pass
    capability = os.environ.get("ATEN_CPU_CAPABILITY", "default")
    versions = " ".join(f"{name}=={metadata.version(name)}" for name in LIBRARIES)
    return {
        "processor": processor,
        "kernels": capability,
        "python": platform.python_version(),
        "libraries": versions,
    }


def train(run: Run, folder: Path, logs: Path, *extra: str) -> None:
    """Runs one training to its end. Raises: RuntimeError with the ranks' output."""
    from tests.distributed.launch import play

    outcome = play(run.world, [*run.arguments, f"run.dir={folder}", *extra], logs)
    if any(status != 0 for status in outcome.statuses):
        raise RuntimeError(f"{run.name}: the ranks ended with {outcome.statuses}\n{outcome.text[-4000:]}")


def cut_back(folder: Path, step: int) -> None:
    """Leaves the run folder as a process that died after publishing `step` would."""
    for path in (folder / "checkpoints").iterdir():
        if path.name == f"step_{step}":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:  # the pointers `latest` and `best`
            path.unlink()
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "adapter")


def evaluate(folder: Path, output: Path, log: Path) -> None:
    """Runs `python -m eval.run` with audits in a forked process. Raises: RuntimeError with its output."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            from eval.run import main

            main(
                [
                    "--run",
                    str(folder),
                    "--output",
                    str(output),
                    "--audit",
                    AUDITS,
                    "--audit-users",
                    "24",
                    "--bootstrap",
                    "200",
                    "--floors",
                    "popularity,markov",
                ]
            )
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        raise RuntimeError(f"the evaluation failed\n{log.read_text(encoding='utf-8')[-4000:]}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def training_figures(folder: Path) -> dict[str, Any]:
    steps = [{key: line[key] for key in STEP_KEYS} for line in read_lines(folder / "metrics.jsonl")]
    return {"steps": steps, "validation": read_lines(folder / "validation.jsonl")}


def numbers_only(node: Any) -> Any:
    """The numbers of a JSON tree; words and settings may be rewritten without a new golden file."""
    if isinstance(node, dict):
        kept = {key: numbers_only(value) for key, value in node.items()}
        return {key: value for key, value in kept.items() if value not in (None, {}, [])}
    if isinstance(node, list):
        kept = [numbers_only(value) for value in node]
        return [value for value in kept if value not in (None, {}, [])]
    return node if isinstance(node, (int, float)) and not isinstance(node, bool) else None


def evaluation_figures(output: Path) -> dict[str, Any]:
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    ranks = [
        {"rank": row["rank"], "target_nll": row["target_nll"]}
        for row in read_lines(output / "predictions.jsonl")
    ]
    # Figures repeat the tables beside them, as differences of differences that have fewer digits left.
    left_out = ("figures", "seconds")
    audits = {
        name: numbers_only({key: value for key, value in audit.items() if key not in left_out})
        for name, audit in results["audits"].items()
    }
    return {"metrics": numbers_only(results["metrics"]), "audits": audits, "first_users": ranks[:20]}


def measure(scratch: Path, say=print) -> dict[str, Any]:
    """All golden figures, by the name of their file."""
    from tests.distributed.ranks import preload

    preload()
    os.chdir(ROOT)
    os.environ["GDRT_CACHE"] = str(scratch / "cache")
    figures: dict[str, Any] = {}
    for run in RUNS:
        started = time.monotonic()
        folder, logs = scratch / run.name, scratch / "logs" / run.name
        train(run, folder, logs)
        figures[run.name] = training_figures(folder)
        if run.resume_at is not None:
            cut_back(folder, run.resume_at)
            train(run, folder, logs, "resume=auto")
            figures[f"{run.name}_resumed"] = training_figures(folder)
        say(f"golden: {run.name} in {time.monotonic() - started:.1f} s", flush=True)
    started = time.monotonic()
    evaluate(scratch / EVALUATED, scratch / "evaluation", scratch / "logs" / "evaluation.log")
    figures["evaluation"] = evaluation_figures(scratch / "evaluation")
    say(f"golden: evaluation of {EVALUATED} with audits in {time.monotonic() - started:.1f} s", flush=True)
    return figures


def differences(expected: Any, found: Any, exact: bool, place: str = "") -> list[str]:
    """One line per place where two JSON trees differ by more than is allowed."""
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = expected.keys() | found.keys()
        shared = sorted(expected.keys() & found.keys())
        missing = []
        for key in sorted(keys.difference(shared)):
            where = "the golden file" if key in expected else "this run"
            missing.append(f"{place}/{key}: only in {where}")
        return missing + [
            line for key in shared for line in differences(expected[key], found[key], exact, f"{place}/{key}")
        ]
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return [f"{place}: {len(expected)} entries in the golden file, {len(found)} in this run"]
        return [
            line
            for k, (a, b) in enumerate(zip(expected, found))
            for line in differences(a, b, exact, f"{place}[{k}]")
        ]
    if expected == found:
        return []
    numbers = isinstance(expected, (int, float)) and isinstance(found, (int, float))
    of_a_minimum = any(part.startswith("temperature") for part in place.split("/"))
    relative = OF_A_MINIMUM if of_a_minimum else RELATIVE_TOLERANCE
    if numbers and not exact and math.isclose(expected, found, rel_tol=relative, abs_tol=SMALLEST):
        return []
    return [f"{place}: golden {expected!r}, this run {found!r}"]


def compare(figures: dict[str, Any], say=print) -> int:
    """Number of places that differ; prints the first of each file."""
    written_on = json.loads((HERE / "machine.json").read_text(encoding="utf-8"))
    exact = written_on == machine()
    rule = (
        "to the bit: the machine that wrote the files"
        if exact
        else f"to {RELATIVE_TOLERANCE:g}: another machine or other versions"
    )
    count = 0
    for name, found in figures.items():
        path = HERE / f"{name}.json"
        lines = (
            differences(json.loads(path.read_text(encoding="utf-8")), found, exact)
            if path.is_file()
            else [": no golden file"]
        )
        for line in lines[:5]:
            say(f"golden: {name}{line}")
        count += len(lines)
    say(f"golden: {len(figures)} files compared {rule}; {count} figures differ", flush=True)
    return count


def write(figures: dict[str, Any], reason: str) -> None:
    for name, found in figures.items():
        (HERE / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (HERE / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n", encoding="utf-8")
    with open(HERE / "reasons.md", "a", encoding="utf-8") as stream:
        stream.write(f"- {time.strftime('%Y-%m-%d')}: {reason}\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--update", metavar="REASON", help="write the files anew; the reason is kept in reasons.md"
    )
    options = parser.parse_args()
    if options.update is not None and len(options.update.split()) < 3:
        parser.error("--update needs a reason in words: what changed, and why the new figures are right")
    with tempfile.TemporaryDirectory(prefix="gdrt-golden-") as scratch:
        figures = measure(Path(scratch))
    if options.update is not None:
        write(figures, options.update)
        return 0
    return 1 if compare(figures) else 0


if __name__ == "__main__":
    raise SystemExit(main())
