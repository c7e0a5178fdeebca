"""The loop of a run: step, validation, checkpoint, until the end, an early stop or an interruption."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from gdrt_ds.dro.groups import EmptyGroups
from gdrt_ds.runtime import Watchdog
from gdrt_ds.training import checkpoint
from gdrt_ds.training.broken_numbers import LOWER_RATE, NonFiniteLoss
from gdrt_ds.training.flops import training_flops_per_token
from gdrt_ds.training.grouping import Grouped, group_tokens, save_groups
from gdrt_ds.training.job import Job, is_asked_to_stop
from gdrt_ds.training.loading import Loaded
from gdrt_ds.training.optimizer import learning_rate
from gdrt_ds.training.preparation import Prepared
from gdrt_ds.training.resuming import Resumed, client_state
from gdrt_ds.training.step import StepResult, StepRunner
from gdrt_ds.training.telemetry import Telemetry
from gdrt_ds.training.validation import Best, TitleLosses, Validation, validate


class Interrupted(Exception):
    """A signal came in a pass that trains nothing; all ranks leave it after the same micro-batch."""


@dataclass(frozen=True)
class Result:
    """How the loop ended.

    Attributes:
        step: optimizer steps that are done.
        best: the best validation.
        last: the latest validation of this start.
        tokens: tokens that this rank computed since the start, padding not counted.
        interrupted: a signal ended it; `step` is saved and the run can go on.
        stopped_early: train.patience ended it.
    """

    step: int
    best: Best
    last: Validation | None = None
    tokens: int = 0
    interrupted: bool = False
    stopped_early: bool = False


def train(
    job: Job,
    prepared: Prepared,
    loaded: Loaded,
    resumed: Resumed,
    grouped: Grouped,
    runner: StepRunner,
    watchdog: Watchdog,
) -> Result:
    """Takes the steps that are left. Every rank calls it.

    Raises:
        NonFiniteLoss: NaN or inf with train.on_nonfinite=stop; nothing of that step is published.
        StorageError: a checkpoint could not be written.
    """
    telemetry = Telemetry(
        job.folder,
        job.config,
        job.runtime,
        loaded.total_steps,
        resumed.first_step,
        training_flops_per_token(loaded.base.model),
    )
    with telemetry:
        titles = TitleLosses.of(job, prepared)
        loop = _Loop(job, prepared, loaded, telemetry, watchdog, titles, resumed.named)
        # A run that has stopped early may have been killed before it published its adapter.
        stopped_early = resumed.best.is_given_up(job.config.train.patience)
        result = Result(resumed.first_step, resumed.best, stopped_early=stopped_early)
        if stopped_early:
            loop.tell_early_stop(result.step)
        if resumed.validation_due:
            result = loop.catch_up(result, runner, grouped)
        while result.step < loaded.total_steps and not (result.interrupted or result.stopped_early):
            if _groups_are_due(job, result.step):
                telemetry.flush()
                try:
                    grouped = group_tokens(job, prepared, loaded, loop.beat)
                except Interrupted:
                    # The groups of before are saved, and the resumed run begins with this refresh.
                    result = loop.leave(result, runner, grouped)
                    break
                except EmptyGroups as problem:  # on all ranks, which have the same scores
                    telemetry.note(f"groups: those of the last refresh stay, because now {problem.problem}")
                else:
                    save_groups(job, prepared, grouped)
                    runner = runner.with_groups(grouped.groups["train"])
            result = loop.advance(result, runner, grouped)
        return result


def _groups_are_due(job: Job, step: int) -> bool:
    """groups.reference=live.

    Relevance is scored again by the model in training, every `refresh_every` steps.
    """
    section = job.config.groups
    live = section.reference == "live" and section.by == "relevance"
    return live and step > 0 and step % section.refresh_every == 0


@dataclass(frozen=True)
class _Loop:
    """What stays the same from step to step."""

    job: Job
    prepared: Prepared
    loaded: Loaded
    telemetry: Telemetry
    watchdog: Watchdog
    titles: TitleLosses | None
    named: dict[str, str]

    def advance(self, before: Result, runner: StepRunner, grouped: Grouped) -> Result:
        """One optimizer step, and the validation and checkpoint that follow it where they are due."""
        self.watchdog.beat()
        job, total = self.job, self.loaded.total_steps
        lr = learning_rate(before.step, job.config, total)
        stepped = runner.run(before.step, lr)
        gradient_norm = None if stepped.skipped else self.loaded.engine.get_global_grad_norm()
        done = before.step + 1
        self._record(done, lr, gradient_norm, stepped)

        result = replace(before, step=done, tokens=before.tokens + stepped.tokens)
        is_best = False
        if self._validation_is_due(done):
            self._tell_dead_gradient(done, gradient_norm)
            try:
                result, is_best = self._validate(result, grouped)
            except Interrupted:
                self._refuse_broken_weights(done, gradient_norm)
                return self.leave(result, runner, grouped, validation_due=True)
        finished = done == total or result.stopped_early
        # The best validation keeps its checkpoint, because the adapter is made of it at the end.
        if is_best or self._checkpoint_is_due(done) or finished or stepped.stop:
            self._refuse_broken_weights(done, gradient_norm)
            self._save(result, runner, grouped)
        if stepped.stop and not finished:
            return replace(result, interrupted=True)
        if result.stopped_early:
            self.tell_early_stop(done)
        return result

    def catch_up(self, before: Result, runner: StepRunner, grouped: Grouped) -> Result:
        """The validation in which a signal ended the run; its checkpoint is written anew with it."""
        try:
            result, _ = self._validate(before, grouped)
        except Interrupted:
            return replace(before, interrupted=True)  # the checkpoint still says that it is due
        self._save(result, runner, grouped)
        if result.stopped_early:
            self.tell_early_stop(result.step)
        return result

    def leave(
        self, result: Result, runner: StepRunner, grouped: Grouped, *, validation_due: bool = False
    ) -> Result:
        """Saves the last step when a signal came after it."""
        if validation_due:
            self.telemetry.note(
                f"validation at step {result.step}: left because of a signal; the resumed run begins with it"
            )
        self._save(result, runner, grouped, validation_due)
        return replace(result, interrupted=True)

    def beat(self) -> None:
        """Called after every micro-batch that trains nothing: the watchdog sees it, and a signal is heard.

        A validation can take longer than a job has left after its warning.

        Raises:
            Interrupted: on all ranks.
        """
        self.watchdog.beat()
        if is_asked_to_stop(self.job):
            raise Interrupted

    def tell_early_stop(self, step: int) -> None:
        train = self.job.config.train
        self.telemetry.note(
            f"early stop at step {step}: no better validation {train.select_by} "
            f"in {train.patience} validations"
        )

    def _record(self, done: int, lr: float, gradient_norm, stepped: StepResult) -> None:
        self.telemetry.step(
            {
                "step": done,
                "loss": stepped.loss,
                "lr": lr,
                "grad_norm": gradient_norm,
                "tokens": stepped.all_tokens,
                "group_loss": stepped.group_loss,
                "group_weight": stepped.group_weight,
                "group_count": stepped.group_count,
                "objective": stepped.objective,
                "skipped": stepped.skipped,
            }
        )

    def _validation_is_due(self, done: int) -> bool:
        if "valid" not in self.prepared.stores:
            return False
        train = self.job.config.train
        steps_per_epoch = -(-len(self.prepared.stores["train"]) // train.global_batch)
        every = train.eval_every or max(1, steps_per_epoch)
        return done % every == 0 or done == self.loaded.total_steps

    def _checkpoint_is_due(self, done: int) -> bool:
        every = self.job.config.train.save_every
        return every is not None and done % every == 0

    def _validate(self, result: Result, grouped: Grouped) -> tuple[Result, bool]:
        """(the result with its new best, whether this validation is the best)."""
        train = self.job.config.train
        found = validate(self.job, self.prepared, self.loaded, grouped, result.step, self.beat, self.titles)
        self._tell_not_finite(found)
        is_best = result.best.is_beaten_by(found, train.select_by)
        best = result.best.after(found, train.select_by)
        self.telemetry.validation({"step": result.step, **found.figures(), "group_loss": found.group_loss})
        self.telemetry.note(
            f"validation at step {result.step}: nll {found.nll:.4f}  worst group {found.worst_group:.4f}"
            + ("" if found.catalogue_nll is None else f"  among titles {found.catalogue_nll:.4f}")
            + ("  (best so far)" if is_best else "")
        )
        stopped_early = best.is_given_up(train.patience)
        return replace(result, best=best, last=found, stopped_early=stopped_early), is_best

    def _tell_dead_gradient(self, done: int, gradient_norm) -> None:
        """Weights that are far too large can leave finite losses that no longer depend on them."""
        if gradient_norm is not None and float(gradient_norm) == 0:
            self.telemetry.note(
                f"warning: the gradient of step {done} is exactly 0, so nothing is learned: train.lr may be "
                "far too large, or all groups of this batch have weight 0"
            )

    def _tell_not_finite(self, found: Validation) -> None:
        """With on_nonfinite=stop a validation that is not finite ends the run, before it is published."""
        if found.is_finite:
            return
        told = f"validation at step {found.step} is not finite (nll {found.nll}): the weights are broken"
        if self.job.config.train.on_nonfinite == "stop":
            raise NonFiniteLoss(
                f"{told}; this step is not published",
                LOWER_RATE,
            )
        self.telemetry.note(f"warning: {told}; it never counts as the best")

    def _refuse_broken_weights(self, done: int, gradient_norm) -> None:
        """A finite loss can have a gradient that is not. The next step would notice.

        A checkpoint must not come first.
        """
        if gradient_norm is not None and not math.isfinite(float(gradient_norm)):
            raise NonFiniteLoss(
                f"step {done - 1}: the gradient norm is {float(gradient_norm)} though the loss is finite; "
                "this step is not published",
                LOWER_RATE,
            )

    def _save(
        self, result: Result, runner: StepRunner, grouped: Grouped, validation_due: bool = False
    ) -> None:
        self.telemetry.flush()
        started = time.time()
        job, store = self.job, self.prepared.stores["train"]
        state = client_state(
            job.config,
            result.step,
            result.best,
            runner.state,
            store.fingerprint,
            grouped,
            self.named,
            validation_due,
        )
        checkpoint.save(
            self.loaded.engine,
            job.folder,
            result.step,
            state,
            life=job.life,
            fingerprint=self.loaded.base.fingerprint,
            keep=job.config.train.keep_checkpoints,
            best_step=None if result.best.figures is None else result.best.figures["step"],
        )
        self.watchdog.beat()
        self.telemetry.note(f"checkpoint: step {result.step} published in {time.time() - started:.1f} s")
