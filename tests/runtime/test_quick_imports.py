"""Libraries that compile while they are imported: the compiler comes with the first call, and not before."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gdrt_ds.runtime.quick_imports import compiled_when_called

COMMANDS = {
    "a training": """
from gdrt_ds import train
sys.argv = ["train", "--config", "configs/smoke.yaml", f"run.dir={sys.argv[1]}/run", "train.max_steps=1"]
train.main()
assert "deepspeed.runtime.zero.muon.original_muon" in sys.modules
assert "pyarrow" in sys.modules and "pandas" not in sys.modules
""",
    "a rank of the tests": """
import os
from tests.distributed.ranks import preload
preload()
assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the other threads"
held = {name.partition(".")[0] for name in sys.modules}
assert len(sys.modules) > 3000, len(sys.modules)
pid = os.fork()
if pid == 0:
    before = len(sys.modules)
    from gdrt_ds import train
    status = train.main(["--config", "configs/smoke.yaml", f"run.dir={sys.argv[1]}/run", "train.max_steps=1"])
    found = {name.partition(".")[0] for name in sys.modules} - held
    heavy = found & {"deepspeed", "peft", "transformers", "bitsandbytes", "scipy", "sympy", "pandas"}
    if status != 0 or heavy or len(sys.modules) - before > 300:
        print(status, heavy, len(sys.modules) - before, file=sys.stderr)
        os._exit(1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
""",
    "an evaluation": """
from eval import run
sys.argv = ["run", "--run", f"{sys.argv[1]}/nowhere"]
try:
    run.main()
except SystemExit as end:
    assert end.code == 2
assert "eval.loading" in sys.modules
""",
    "a study": """
from pathlib import Path
from gdrt_ds.studies.runner import train_in_process
assert train_in_process(None, Path(sys.argv[1]), []) == 0
assert "gdrt_ds.training.run" in sys.modules
""",
}


def test_a_function_is_compiled_at_its_first_call_and_once(monkeypatch):
    asked = []

    def compile_now(function, **settings):
        asked.append(settings)
        return lambda *values: ("compiled", function(*values))

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiled_when_called():

        @torch.compile
        def double(x):
            return 2 * x

        @torch.compile(dynamic=False)
        def half(x):
            return x / 2

        layer = torch.nn.Linear(1, 1)
        torch.compile(layer, mode="default")
    assert torch.compile is compile_now
    assert asked == [{"mode": "default"}] and double.__name__ == "double"
    assert [double(3), double(4), half(2)] == [("compiled", 6), ("compiled", 8), ("compiled", 1)]
    assert asked == [{"mode": "default"}, {}, {"dynamic": False}]


def test_torch_compile_comes_back_after_an_import_that_fails():
    before = torch.compile
    with pytest.raises(ImportError), compiled_when_called():
        raise ImportError
    assert torch.compile is before


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_does_not_import_the_compiler(command, tmp_path):
    """It took a second of six, for functions that nobody calls."""
    program = f"""
import sys, torch
before = torch.compile
{COMMANDS[command]}
assert "bitsandbytes" in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules
assert torch.compile is before
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
