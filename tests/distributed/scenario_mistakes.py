"""Wrong uses of the training command behind test_train_cli.py.

Each in its own forked process, with what it printed and what it changed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from tests.distributed.launch import SMOKE, play
from tests.distributed.ranks import preload

SETTINGS = [
    "train.max_steps=6",
    "train.save_every=3",
    "train.eval_every=6",
    "train.log_every=1",
    "train.warmup_steps=1",
    "data.planted={num_train: 160, num_valid: 20, num_test: 20}",
]
SMALL = ["--config", SMOKE, *SETTINGS]


KEPT = {"life", ".life.lock", "logs", "cache"}  # what a failed start may leave
COUNTED = ("life", "config.yaml", "logs/stacks_rank_0.txt")  # a start counts its life


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


class Mistakes:
    """Runs wrong commands below a folder and reports what each printed and changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.fresh = f"run.dir={folder / 'fresh'}"
        self.report: dict[str, dict] = {}

    def run(self, case: str, arguments: list[str], watched: Path | None = None) -> dict:
        """Runs one command; `watched` is the folder that may lose nothing."""
        before = contents(watched) if watched else {}
        done = play(1, arguments, self.folder / "logs" / case.replace(" ", "_"), timeout_s=120)
        after = contents(watched) if watched else {}
        text = done.outputs[0]
        start = text.find("error: ")
        fresh = self.folder / "fresh"
        left = {p.name for p in fresh.iterdir()} if fresh.is_dir() else set()
        self.report[case] = {
            "status": done.statuses[0],
            "output": text,
            "error": text[start:] if start >= 0 else "",
            "left": sorted(left - KEPT),
            "lost": [name for name in before if after.get(name) != before[name] and name not in COUNTED],
        }
        return self.report[case]


def starts(mistakes: Mistakes) -> None:
    """Commands that are wrong by themselves: nothing was there before."""
    folder, fresh, run = mistakes.folder, mistakes.fresh, mistakes.run
    folder.mkdir(parents=True)
    (folder / "empty_model").mkdir()
    (folder / "a_file").write_text("")
    (folder / "batch.json").write_text(
        json.dumps({"train_batch_size": 64, "zero_optimization": {"stage": 3}})
    )
    run("missing config", ["--config", "nowhere.yaml", fresh])
    run("unknown key", [*SMALL, fresh, "dro.taus=1"])
    run("wrong type", [*SMALL, fresh, "train.lr=fast"])
    run("tau not positive", [*SMALL, fresh, "dro.tau=0"])
    run("unknown objective", [*SMALL, fresh, "objective=gdrtt"])
    run("missing deepspeed config", [*SMALL, fresh, "--deepspeed_config", "ds_configs/zer3.json"])
    run("missing model folder", [*SMALL, fresh, f"model.path={folder / 'no_model_here'}"])
    run("unreadable model folder", [*SMALL, fresh, f"model.path={folder / 'empty_model'}"])
    run("missing data file", [*SMALL, fresh, f"data.path={folder / 'no_data_here.csv'}"])
    run("batch sizes of the two configs", [*SMALL, fresh, "--deepspeed_config", str(folder / "batch.json")])
    run("micro-batch over global batch", ["--plan", "--world", "2", *SMALL, fresh, "train.micro_batch=24"])
    run("more ranks than batch", ["--plan", "--world", "4", *SMALL, fresh, "train.global_batch=2"])
    run("folder not writable", [*SMALL, f"run.dir={folder / 'a_file' / 'run'}"])
    run("more groups than tokens", [*SMALL, f"run.dir={folder / 'many_groups'}", "groups.num=5000"])
    planned = folder / "planned"
    found = run("plan", ["--plan", "--world", "4", *SMALL, f"run.dir={planned}"])
    found["folder_made"] = (planned / "config.yaml").exists()


def folders(mistakes: Mistakes) -> None:
    """Commands that name a folder with something in it: a finished run, or files that are no run."""
    folder, run = mistakes.folder, mistakes.run
    finished, foreign = folder / "finished", folder / "foreign"
    folder.mkdir(parents=True)
    first = play(1, [*SMALL, f"run.dir={finished}"], folder / "logs" / "first")
    assert first.statuses == [0], first.text[-4000:]
    mistakes.report["one rank"] = {
        "output": first.text,
        "metrics": [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()],
    }
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("three years of work")
    run("folder of a finished run", [*SMALL, f"run.dir={finished}"], finished)
    run("resume of a finished run", [*SMALL, f"run.dir={finished}", "resume=auto"], finished)
    run("folder with other files", [*SMALL, f"run.dir={foreign}"], foreign)
    run("overwrite of other files", [*SMALL, f"run.dir={foreign}", "run.overwrite=true"], foreign)
    (finished / "summary.json").rename(folder / "summary.json")
    kept = contents(finished)
    changed = [*SMALL, f"run.dir={finished}", "resume=auto", "train.lr=0.5"]
    run("resume with other settings", changed)["lost"] = _changed(kept, finished)
    missing = [*SMALL, f"run.dir={finished}", "resume=step_77"]
    run("resume of a missing checkpoint", missing)["lost"] = _changed(kept, finished)
    (folder / "summary.json").rename(finished / "summary.json")
    over = [*SMALL, f"run.dir={finished}", "run.overwrite=true"]
    found = run("overwrite with a mistake", [*over, f"data.path={folder / 'no_data_here.csv'}"], finished)
    found["hidden"] = [p.name for p in finished.iterdir() if p.name == ".overwritten"]
    found = run("overwrite of a finished run", [*over, "train.max_steps=2"])
    records = (finished / "metrics.jsonl").read_text().splitlines()
    found["steps"] = [json.loads(line)["step"] for line in records]
    found["summary"] = json.loads((finished / "summary.json").read_text())["status"]
    found["checkpoints"] = sorted(p.name for p in (finished / "checkpoints").glob("step_*"))


PARTS = {"starts": starts, "folders": folders}


def main(output: str, folder: str, part: str) -> None:
    preload()
    mistakes = Mistakes(Path(folder) / part)
    PARTS[part](mistakes)
    Path(output).write_text(json.dumps(mistakes.report))


def _changed(before: dict[str, str], folder: Path) -> list[str]:
    after = contents(folder)
    return [name for name in before if after.get(name) != before[name] and name not in COUNTED]


if __name__ == "__main__":
    main(*sys.argv[1:])
