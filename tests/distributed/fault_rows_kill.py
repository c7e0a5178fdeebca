"""Rows about kill -9: before and after every file operation of a save, on each rank, torn writes, and random
moments.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

from tests.distributed.fault_site import STEPS, Row, Site, need, need_same, newest, wait_for
from tests.distributed.planting import file_operations, pause

KEEP_ONE = {
    "train__keep_checkpoints": 1,
    "train__eval_every": 1,
}  # every save also moves `best` and removes the checkpoint before
WORLD = 2


def operations(site: Site) -> list[list[str]]:
    """Per rank, the file operations of the second save of a run (which already has something to remove)."""
    log = site.folder / "operations"
    if not Path(f"{log}_0").is_file():
        run = site.fresh("counted")
        for steps in (1, 2):  # two lives: a save is counted from the start of its process
            for rank in range(WORLD):
                Path(f"{log}_{rank}").unlink(missing_ok=True)
            job = site.start(
                run,
                WORLD,
                file_operations(log, victim=-1),
                **KEEP_ONE,
                **({"resume": "auto"} if steps == 2 else {}),
            )
            saved = [Path(f"{log}_{rank}") for rank in range(WORLD)]
            wait_for(
                lambda: (
                    job.poll()
                    or all(path.is_file() and "end of a save" in path.read_text() for path in saved)
                ),
                300,
                "no checkpoint",
            )
            job.signal(signal.SIGKILL)
            job.wait()
            need(newest(run) >= steps, f"no checkpoint came\n{job.output(0)[-3000:]}")
    texts = [Path(f"{log}_{rank}").read_text().split("end of a save")[0] for rank in range(WORLD)]
    return [[line.split(" ", 1)[1] for line in text.splitlines()] for text in texts]


def moments(site: Site, rank: int) -> list[tuple[int, str]]:
    """Before each operation and after the last (between two of them nothing touches a file), and every write
    cut in half.
    """
    names = operations(site)[rank]
    whole = [(index, "before") for index in range(len(names))] + [(len(names) - 1, "after")]
    return whole + [(index, "torn") for index, name in enumerate(names) if name.startswith("write")]


class Chain:
    """A run that is killed, checked and resumed again and again.

    At its end it must equal the undisturbed run.
    """

    def __init__(self, site: Site, straight: Path):
        self.site, self.straight, self.lives, self.ends = site, straight, 0, 0
        self.run = site.fresh("killed")

    def kill(self, fault, words: str, rank: int) -> None:
        from gdrt_ds.training import checkpoint

        before = newest(self.run)
        done = self.site.play(
            self.run, WORLD, fault, **KEEP_ONE, **({"resume": "auto"} if self.run.is_dir() else {})
        )
        self.lives += 1
        need(
            done.statuses[rank] == -9,
            f"{words}: the rank was not killed: {done.statuses}\n{done.text[-2000:]}",
        )
        need(
            all(status not in (0, None) for status in done.statuses),
            f"{words}: a rank did not end, or ended well: {done.statuses}",
        )
        after = newest(self.run)
        need(
            after >= before,
            f"{words}: step {before} was published, afterwards the newest valid one is step {after}",
        )
        pointer = self.run / "checkpoints" / "latest"
        if pointer.is_file():
            named = self.run / "checkpoints" / pointer.read_text().strip()
            need(checkpoint.verify(named) is None, f"{words}: latest names {named.name}, which is not valid")
        if after >= STEPS - 2:
            self.end()

    def end(self) -> None:
        if self.run.is_dir() and newest(self.run):
            self.site.finish(self.run, WORLD, **KEEP_ONE)
            need_same(self.run, self.straight, f"after {self.lives} deaths")
            left = [p.name for p in (self.run / "checkpoints").glob(".*")]
            need(not left, f"leftovers of dead saves: {left}")
            self.ends += 1
        self.run = self.site.fresh("killed")


def every_moment(site: Site, quick: bool) -> str:
    straight = site.straight(WORLD, **KEEP_ONE)
    chain, counts = Chain(site, straight), []
    for rank in range(WORLD):
        chosen = moments(site, rank)
        if quick:
            chosen = chosen[1 :: max(1, len(chosen) // 3)]
        for index, when in chosen:
            name = operations(site)[rank][index]
            chain.kill(
                file_operations(site.folder / "deaths", rank, index, when),
                f"rank {rank} killed {when} operation {index} ({name})",
                rank,
            )
        counts.append(f"rank {rank}: {len(operations(site)[rank])} operations, {len(chosen)} deaths")
    chain.end()
    return f"{'; '.join(counts)}; resumed after each; {chain.ends} chains ended equal to the undisturbed run"


def random_moments(site: Site, quick: bool) -> str:
    straight, rng = site.straight(WORLD, **KEEP_ONE), random.Random(6)
    run, deaths = site.fresh("random"), []
    for _ in range(2 if quick else 10):
        if run.is_dir() and newest(run) >= STEPS - 2:
            site.finish(run, WORLD, **KEEP_ONE)
            need_same(run, straight, "after random deaths")
            shutil.rmtree(run)
        before, rank = newest(run), rng.randrange(WORLD)
        job = site.start(
            run, WORLD, train__timeout_s=30, **KEEP_ONE, **({"resume": "auto"} if run.is_dir() else {})
        )
        marker = rng.choice(
            ["engine: DeepSpeed", "groups:", "checkpoint: step", "checkpoint: step"]
        )  # `groups:` is in the plan: before the ranks meet
        need(job.until(marker), f"`{marker}` did not come: {job.output(0)[-2000:]}")
        time.sleep(rng.uniform(0, 0.4))
        job.signal(signal.SIGKILL, rank)
        done = job.wait(120)
        deaths.append(f"{newest(run)}")
        if done.statuses == [0] * WORLD:
            continue  # it was faster
        need(
            None not in done.statuses,
            f"after kill -9 of rank {rank} at `{marker}` the ranks ended with {done.statuses}: "
            f"{' | '.join(o[-700:] for o in done.outputs)}",
        )
        need(
            newest(run) >= before,
            f"step {before} was published, afterwards the newest valid one is step {newest(run)}",
        )
    if newest(run) and not (run / "adapter").is_dir():
        site.finish(run, WORLD, **KEEP_ONE)
        need_same(run, straight, "after random deaths")
    return f"{len(deaths)} deaths, newest valid step after each: {' '.join(deaths)}; the run ends equal"


def dead_rank(site: Site, quick: bool) -> str:
    waited = []
    for rank, phase in (
        [(1, "")] if quick else [(0, ""), (1, ""), (0, "data loading"), (1, "relevance scoring")]
    ):
        run = site.fresh("dead_rank")
        job = site.start(run, WORLD, pause(phase) if phase else None, train__timeout_s=30)
        marker = f"PHASE {phase}" if phase else "step 2/"
        need(
            job.until(marker, rank=rank if phase else 0), f"`{marker}` did not come: {job.output(0)[-2000:]}"
        )
        job.signal(signal.SIGKILL, rank)
        struck = time.monotonic()
        done = job.wait(60)
        waited.append(time.monotonic() - struck)
        other = 1 - rank
        need(done.statuses[other] == 70, f"the live rank ended with {done.statuses[other]}")
        need(
            "a peer is dead or hung" in done.outputs[other], f"no clear words: {done.outputs[other][-1500:]}"
        )
        need((run / "logs" / f"stacks_rank_{other}.txt").is_file(), "no stacks of the live rank")
    return (
        f"the live rank ends with status 70 and its stacks after {max(waited):.1f} s, without a launcher's "
        "help"
    )


ROWS = [
    Row(
        "kill-in-save",
        "kill -9 before and after every write, fsync, rename, `latest` and removal of a save, each rank, "
        "and torn writes: the newest "
        "valid checkpoint loads, nothing published is lost",
        every_moment,
    ),
    Row("kill-random", "kill -9 of a random rank at random moments", random_moments),
    Row(
        "dead-rank",
        "a rank killed -9 in training: the job ends non-zero within train.timeout_s, with stacks",
        dead_rank,
    ),
]
