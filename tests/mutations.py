"""Plants errors in the package, one at a time, and demands that a named test fails: `make test-mutations`.

    python tests/mutations.py [--only WORD] [--list]

The changed source is planted by an import hook in a forked process, the files stay as they are. The eleven
known Group DRO errors run on real ranks (tests/distributed/named_errors.py); the others run the unit tests
of their file. Exit status 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.machinery
import io
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.mutation_table import MUTATIONS  # noqa: E402  the path is set first
from tests.planting_source import LostPlace, plant  # noqa: E402


def path_of(file: str) -> Path:
    """A file of a change: in gdrt_ds, or in eval where its path begins so."""
    return ROOT / file if file.startswith("eval/") else ROOT / "gdrt_ds" / file


class Planter(importlib.abc.MetaPathFinder):
    """Compiles the changed source in place of the file's."""

    def __init__(self, changes):
        self.changes: dict[str, list[tuple[str, str, str]]] = {}
        for file, *change in changes:
            self.changes.setdefault(str(path_of(file)), []).append(tuple(change))

    def find_spec(self, name, path=None, target=None):
        if not name.startswith(("gdrt_ds.", "eval.")):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.origin not in self.changes:
            return None
        source = Path(spec.origin).read_text(encoding="utf-8")
        for change in self.changes[spec.origin]:
            source = plant(source, *change)

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname):
                return compile(source, spec.origin, "exec")

        spec.loader = Loader(name, spec.origin)
        return spec


def lost_places(mutations=MUTATIONS) -> list[str]:
    """Mutations whose old text does not occur exactly once, or that leave no valid Python.

    The code moved on and they would plant nothing.
    """
    lost = []
    for mutation in mutations:
        sources = {file: path_of(file).read_text(encoding="utf-8") for file, *_ in mutation.changes}
        for file, *change in mutation.changes:
            try:
                sources[file] = plant(sources[file], *change)
            except LostPlace as error:
                lost.append(f"{mutation.what}: {file}: {error}")
        for file, source in sources.items():
            try:
                compile(source, file, "exec")
            except SyntaxError as error:
                lost.append(f"{mutation.what}: {file}: does not compile when planted ({error})")
    return lost


def run_test(test: str, folder: Path) -> str | None:
    """None when the test passes, else its first line of failure."""
    import pytest

    if "::" in test:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            status = pytest.main(
                [
                    str(ROOT / "tests" / test),
                    "-q",
                    "-x",
                    "-p",
                    "no:cacheprovider",
                    "--no-header",
                    "-o",
                    "addopts=",
                ]
            )
        if status == 0:
            return None
        failed = [line for line in output.getvalue().splitlines() if line.startswith(("E ", "FAILED"))]
        return (
            failed[0][:140]
            if status == 1 and failed
            else f"pytest ended with {status}: not a failing test"
            if status != 1
            else "failed"
        )
    from tests.distributed import named_errors, test_named_errors

    name = "_".join(test.split("_")[1:3])
    try:
        getattr(test_named_errors, test)({name: named_errors.MEASUREMENTS[name](folder)})
    except AssertionError:
        return traceback.format_exc().strip().splitlines()[-3].strip()[:140]
    except RuntimeError as error:  # a rank that raised
        return str(error).splitlines()[0][:140]
    return None


def _child(changes, test, folder, queue):
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    warnings.simplefilter("ignore")
    for name in [
        n for n in sys.modules if n.split(".")[0] in ("gdrt_ds", "eval") or n.startswith("tests.distributed.")
    ]:
        del sys.modules[name]
    sys.meta_path.insert(0, Planter(changes))
    try:
        queue.put(run_test(test, folder))
    except BaseException as error:
        queue.put(f"BROKEN {type(error).__name__}: {error}"[:200])
    queue.close()
    queue.join_thread()
    os._exit(0)


def in_fork(changes, test: str, folder: Path, timeout_s: float = 300.0) -> str | None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(changes, test, folder, queue))
    process.start()
    try:
        return queue.get(timeout=timeout_s)
    finally:
        process.join(timeout=10)
        if process.is_alive():
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="run mutations whose description or test contains this")
    parser.add_argument("--list", action="store_true", help="print the mutations and exit")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if not arguments.only or arguments.only in m.what + m.test]
    if arguments.list:
        print("\n".join(f"{m.what}  ->  {m.test}" for m in chosen))
        return 0
    if lost_places(chosen):
        print("these mutations no longer find their place in the source:\n" + "\n".join(lost_places(chosen)))
        return 1

    print("| planted error | test | result | s |\n|---|---|---|---|", flush=True)
    survivors, tests = 0, {}
    with tempfile.TemporaryDirectory() as folder:
        for mutation in chosen:
            started = time.perf_counter()
            if mutation.test not in tests:
                tests[mutation.test] = in_fork((), mutation.test, Path(folder))
            problem = (
                in_fork(mutation.changes, mutation.test, Path(folder))
                if tests[mutation.test] is None
                else None
            )
            if tests[mutation.test] is not None:
                result = f"NOT TESTED: the test fails without it ({tests[mutation.test]})"
            elif problem is None or problem.startswith(("BROKEN", "pytest ended")):
                result = f"SURVIVED {problem or ''}"
            else:
                result = "killed"
            survivors += result != "killed"
            print(
                f"| {mutation.what} | `{mutation.test.split('::')[-1]}` | {result} | "
                f"{time.perf_counter() - started:.0f} |",
                flush=True,
            )
    print(f"\n{len(chosen)} planted, {len(chosen) - survivors} killed, {survivors} not")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
