"""Recommends from a run folder: the K most probable titles of the catalogue for a history, with exact scores.

    python -m gdrt_ds.recommend --run RUN_DIR --history "Toy Story (1995); Heat (1995)" [--k 10] [--json]
    python -m gdrt_ds.recommend --run RUN_DIR --file histories.txt

Titles are separated by `; `, oldest first. A file has one history per line. A title that the catalogue does
not have is used as text, and announced.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from gdrt_ds.completion import offer_completion
from gdrt_ds.files import finite
from gdrt_ds.inference.recommending import (
    KnownTitles,
    cut_note,
    histories_of,
    history_lines,
    parse_history,
    read_histories,
    recommend,
    unknown_titles,
)
from gdrt_ds.invocation import command_name

__all__ = ["main", "parse_history", "read_histories", "recommend"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("python -m gdrt_ds.recommend"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", required=True, help="run folder of a training")
    parser.add_argument("--history", help='titles, oldest first: "title; title; ..."')
    parser.add_argument("--file", help="text file with one such history per line")
    parser.add_argument("--k", type=int, default=10, help="length of the list")
    parser.add_argument("--json", action="store_true", help="one JSON object per history")
    parser.add_argument("--base", action="store_true", help="the run's base model, without its adapter")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings of the run's config to override"
    )
    offer_completion(parser)
    return parser.parse_intermixed_args(argv)


def print_list(titles: list[str], found: list[dict[str, Any]]) -> None:
    """A history and its recommendations as a table for people.

    Log-probabilities are in nats. The probabilities of all titles of the catalogue sum to 1.
    """
    print("history: " + "; ".join(titles))
    print("rank   log-prob  probability  title")
    for row in found:
        print(f"{row['rank']:4d}  {row['log_prob']:9.4f}  {row['probability']:11.2%}  {shown(row)}")


def shown(row: dict[str, Any]) -> str:
    """The title; behind another text (data.item_text) the name that people know."""
    if "name" in row:
        return f"{row['title']}  {row['name']}"
    return row["title"]


def print_json(titles: list[str], unknown: list[str], dropped: int, found: list[dict[str, Any]]) -> None:
    """The same as one JSON object on one line; minus infinity becomes null, which JSON can hold."""
    answer = {"history": titles, "unknown": unknown, "dropped": dropped, "recommendations": found}
    print(json.dumps(finite(answer), ensure_ascii=False, allow_nan=False))


def tell(text: str) -> None:
    """A line about the work on stderr: stdout has the recommendations alone."""
    print(text, file=sys.stderr, flush=True)


def tell_progress(finished: int, total: int) -> None:
    """Progress of a file of histories; a single batch needs no line."""
    if total > finished or total > 8:
        tell(f"{finished}/{total} histories")


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    from gdrt_ds.runtime import prepare_libraries, report_user_errors, single_process_runtime

    prepare_libraries()  # before the imports below bring them
    with report_user_errors():
        from gdrt_ds.errors import UserError
        from gdrt_ds.inference.recommender import open_run

        if options.k < 1:
            raise UserError(f"--k {options.k} is too small", "give at least 1")
        lines = history_lines(options.history, options.file)
        histories_of(lines, set())  # wrong uses are told before the model is loaded
        tell(f"loading the model of {options.run}")
        recommender = open_run(options.run, single_process_runtime(), options.overrides, base=options.base)
        tell(recommender.precision)
        titles_known = KnownTitles(recommender.catalogue.entries)
        known = titles_known.texts
        given = histories_of(lines, titles_known)
        histories = [titles_known.texts_of(titles) for titles in given]
        for title in unknown_titles(histories, known):
            print(f"note: {title!r} is not in the catalogue; its text is used as it is", file=sys.stderr)
        dropped = [recommender.encode_titles(titles).num_dropped for titles in histories]
        if any(dropped):
            tell(cut_note(recommender.config, dropped))
        what = "1 history" if len(histories) == 1 else f"{len(histories)} histories"
        tell(f"scoring {what} against {len(known)} titles")
        lists = recommend(recommender, histories, options.k, on_batch=tell_progress)
        for titles, left_out, found in zip(histories, dropped, lists):
            if options.json:
                print_json(titles, unknown_titles([titles], known), left_out, found)
            else:
                print_list(titles, found)


if __name__ == "__main__":
    main()
