"""Runs whose weights become NaN, behind test_broken_weights.py: late, early, and in the last step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.distributed.launch import play
from tests.distributed.planting import broken_weights
from tests.distributed.ranks import preload
from tests.distributed.scenario_mistakes import SMALL

SKIP = ["train.on_nonfinite=skip"]
CASES = {
    "late, skipping": (5, SKIP),
    "early, skipping": (1, SKIP),
    "in the last step": (6, []),
    "a rate far too large": (None, ["train.lr=1000000", "train.warmup_steps=0"]),
}
"""Case -> the optimizer step that breaks the weights, of six with validations after 2, 4 and 6; settings."""


def main(output: str, folder: str) -> None:
    preload()
    report = {}
    for number, (case, (step, settings)) in enumerate(CASES.items()):
        run = Path(folder) / f"run{number}"
        arguments = [*SMALL, f"run.dir={run}", "train.eval_every=2", *settings]
        fault = None if step is None else broken_weights(step)
        done = play(1, arguments, Path(folder) / "logs" / run.name, fault, timeout_s=180)
        report[case] = {
            "status": done.statuses[0],
            "output": done.outputs[0],
            "summary": json.loads((run / "summary.json").read_text()),
            "adapter": (run / "adapter").is_dir(),
            "checkpoints": sorted(path.name for path in (run / "checkpoints").glob("step_*")),
        }
    Path(output).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
