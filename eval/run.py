"""Evaluates a run, its base model, or a model trained elsewhere.

Computes exact scores, metrics with intervals, floors and a report. A run on rows of prompt and completion
(data.format=sft) is recognised; its completions and listed answers are scored over the vocabulary.

    python -m eval.run --run RUN_DIR [--split test] [--mode MODE] [--output DIR] [--limit N]
    python -m eval.run --run RUN_DIR --base       the run's base model under the same prompt and catalogue
    python -m eval.run --model PATH [--adapter PATH] --prompt FILE --data PATH
    torchrun --nproc_per_node 2 -m eval.run --run-dir RUN_DIR
                                                  samples are split over ranks (deepspeed and srun likewise)

torchrun takes --run for an abbreviation of its own --run-path, hence --run-dir. MODE is renormalised, full,
best_first or beam. Settings of the run can be overridden with key.sub=value, e.g. model.dtype=float32.
Started again, it goes on where it ended.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.modes import EXACT, MODES
from gdrt_ds import __version__
from gdrt_ds.completion import offer_completion
from gdrt_ds.invocation import command_name

if TYPE_CHECKING:
    from eval.audit.options import AuditOptions
    from eval.predictions.options import ScoringOptions
    from gdrt_ds.runtime import Runtime


INTERRUPTED = (
    "samples that are scored and audits that are finished are saved; the same command goes on from them"
)


class FormerName(argparse.Action):
    """An option under its former name: it is taken, and one line says what it is called now."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"{option_string} is called --{self.dest} now; the former name is still read", flush=True)
        setattr(namespace, self.dest, values)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("python -m eval.run"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = Path(__file__).resolve().parent
    parser.add_argument(
        "--version", action="version", version=f"eval of gdrt-ds {__version__}, from the folder {here}"
    )
    parser.add_argument("--run", "--run-dir", dest="run", help="run folder of a training")
    parser.add_argument("--base", action="store_true", help="with --run: leave the adapter out")
    parser.add_argument("--model", help="folder or hub name of a model trained elsewhere (or smollm2-135m)")
    parser.add_argument("--adapter", help="PEFT adapter folder for --model")
    parser.add_argument("--prompt", help="template file (JSON) for --model, or alpaca, plain, chat")
    parser.add_argument("--data", help="data folder for --model, or ml-100k")
    parser.add_argument("--split", default="test", choices=("train", "valid", "test"))
    parser.add_argument(
        "--mode",
        default="renormalised",
        choices=MODES,
        help="exact over the catalogue's tokens (default) or over the whole vocabulary; certified top-k; "
        "beam search",
    )
    parser.add_argument(
        "--scoring",
        choices=EXACT,
        help="for best_first and beam: probabilities over the catalogue's tokens (renormalised, the default) "
        "or over the whole vocabulary (full)",
    )
    parser.add_argument("--objective", dest="scoring", action=FormerName, help=argparse.SUPPRESS)
    parser.add_argument("--k", type=int, default=50, help="length of the lists (default 50)")
    parser.add_argument("--beams", type=int, default=10, help="width of beam mode")
    parser.add_argument(
        "--length-penalty", type=float, default=0.0, help="beam mode; transformers' default is 1"
    )
    parser.add_argument(
        "--max-nodes", type=int, help="best_first: stop certifying after this many nodes per sample"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="samples scored at once")
    parser.add_argument(
        "--max-score-bytes",
        type=int,
        default=2 << 30,
        help="bound on working memory beside weights and prompts",
    )
    parser.add_argument(
        "--limit",
        type=int,
        help="this many samples, drawn alike for every model; marks the output `not a result`",
    )
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of the intervals")
    parser.add_argument(
        "--floors",
        default="auto",
        metavar="NAMES",
        help="recommenders to show beside the model, with commas between them: popularity, markov, sasrec. "
        "auto (default): all, but sasrec only where it is cached or trains in about two minutes; none",
    )
    parser.add_argument(
        "--no-floors", dest="floors", action="store_const", const="none", help="the same as --floors none"
    )
    parser.add_argument("--audit", default="", help="comma-separated audits, or all; see docs/audits.md")
    parser.add_argument("--audit-users", type=int, help="users per audit; default: each audit's own")
    parser.add_argument(
        "--permutations", type=int, default=8, help="position audit: orders of the history per user"
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="DIR",
        help="other run or evaluation folders, for audits over several of them",
    )
    parser.add_argument("--output", help="evaluation folder; default RUN/eval/SPLIT-MODE")
    parser.add_argument("--overwrite", action="store_true", help="drop other predictions in --output")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings of the run's config to override"
    )
    offer_completion(parser)
    return parser.parse_intermixed_args(arguments)


def checked_options(options: argparse.Namespace) -> tuple[ScoringOptions, AuditOptions]:
    """How to score, and the settings of audits; a number that cannot be meant is refused before scoring.

    Raises:
        UserError: it names the option, its value and what is allowed.
    """
    from eval.audit.options import AuditOptions
    from eval.numbers import refuse_below
    from eval.predictions.options import ScoringOptions

    refuse_below(1, "--limit", options.limit, "or leave it out")
    scoring = ScoringOptions(
        options.mode,
        options.scoring or "",
        options.k,
        options.batch_size,
        options.max_score_bytes,
        options.beams,
        options.length_penalty,
        options.max_nodes,
    )
    audits = AuditOptions(
        options.audit_users,
        options.permutations,
        tuple(options.runs),
        options.bootstrap,
        batch_size=options.batch_size,
        max_score_bytes=options.max_score_bytes,
    )
    return scoring, audits


def without_effect(options: argparse.Namespace, scoring: ScoringOptions, audits: AuditOptions) -> list[str]:
    """Options that were given and change nothing in this evaluation, each with what it belongs to."""
    given = {
        ("--beams", "--mode beam"): scoring.beams != type(scoring).beams,
        ("--length-penalty", "--mode beam"): scoring.length_penalty != type(scoring).length_penalty,
        ("--max-nodes", "--mode best_first"): scoring.max_nodes is not None,
        ("--audit-users", "--audit"): audits.users is not None,
        ("--permutations", "--audit"): audits.permutations != type(audits).permutations,
        ("--runs", "--audit"): bool(audits.runs),
    }
    in_force = {f"--mode {scoring.mode}"}
    if options.audit.strip(" ,"):
        in_force.add("--audit")
    return [
        f"{name} (belongs to {owner})"
        for (name, owner), is_given in given.items()
        if is_given and owner not in in_force
    ]


def say_without_effect(
    options: argparse.Namespace, scoring: ScoringOptions, audits: AuditOptions, runtime: Runtime
) -> None:
    """One line on rank 0 about options without effect, if there are any."""
    names = without_effect(options, scoring, audits)
    if names and runtime.is_main:
        print(f"not used: {', '.join(names)}", flush=True)


def evaluate_run_on_rows(
    options: argparse.Namespace, scoring: ScoringOptions, audit_options: AuditOptions
) -> None:
    """Evaluates a model of rows of prompt and completion (`data.format=sft`); see eval/rows/."""
    from eval.pipeline import evaluation_runtime
    from eval.rows.pipeline import check_mode, evaluate_rows, wants_floors
    from eval.rows.subject import load_rows

    check_mode(options.mode)
    floors = wants_floors(options.floors)
    runtime = evaluation_runtime()
    say_without_effect(options, scoring, audit_options, runtime)
    subject = load_rows(runtime, **what_is_evaluated(options))
    evaluate_rows(
        subject,
        runtime,
        output=Path(options.output) if options.output else None,
        overwrite=options.overwrite,
        floors=floors,
        num_bootstrap=options.bootstrap,
        batch_size=options.batch_size,
        audits=options.audit.split(","),
        audit_options=audit_options,
    )


def what_is_evaluated(options: argparse.Namespace) -> dict[str, Any]:
    """The options that name a model and its data; `load_subject` and `load_rows` take the same."""
    names = ("run", "base", "model", "adapter", "prompt", "data", "split", "limit", "overrides")
    return {name: getattr(options, name) for name in names}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    from gdrt_ds.runtime import prepare_libraries, report_user_errors

    prepare_libraries()  # before the imports below bring them
    with report_user_errors(interrupted=INTERRUPTED):
        from eval.rows.subject import is_about_rows

        scoring, audit_options = checked_options(options)
        if is_about_rows(options.run, options.data, options.model, options.prompt, options.overrides):
            evaluate_run_on_rows(options, scoring, audit_options)
            return
        from eval.loading import load_subject
        from eval.pipeline import evaluation_runtime, run_evaluation

        runtime = evaluation_runtime()
        say_without_effect(options, scoring, audit_options, runtime)
        subject = load_subject(runtime, **what_is_evaluated(options))
        run_evaluation(
            subject,
            scoring,
            runtime,
            output=Path(options.output) if options.output else None,
            overwrite=options.overwrite,
            floors=options.floors,
            num_bootstrap=options.bootstrap,
            audits=[name for name in options.audit.split(",") if name.strip()],
            audit_options=audit_options,
        )


if __name__ == "__main__":
    main()
