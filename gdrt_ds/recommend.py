"""Recommends from a run folder: the K most probable titles of the catalogue for a history, with exact scores.

    python -m gdrt_ds.recommend --run RUN_DIR --history "Toy Story (1995); Heat (1995)" [--k 10] [--json]
    python -m gdrt_ds.recommend --run RUN_DIR --file histories.txt      (one history per line, titles
    separated by `;`)
Titles are separated by `; `. A title that the catalogue does not have is used as text, and announced.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

SEPARATOR = ";"


def parse_history(text: str, known: set[str]) -> list[str]:
    """Titles of one line. A catalogue title that holds the separator itself is kept whole (the longest match
    wins).
    """
    parts, titles, start = [part.strip() for part in text.split(SEPARATOR)], [], 0
    while start < len(parts):
        for stop in range(len(parts), start, -1):
            title = f"{SEPARATOR} ".join(parts[start:stop])
            if stop == start + 1 or title in known:
                break
        if title:
            titles.append(title)
        start = stop
    return titles


def read_histories(history: str | None, file: str | None, known: set[str]) -> list[list[str]]:
    """From --history or --file.

    Raises:
        UserError: neither or both, unreadable file, a line without titles.
    """
    from gdrt_ds.errors import UserError

    if (history is None) == (file is None):
        raise UserError(
            "give either --history or --file",
            '--history "title; title; ..." or --file FILE with one history per line',
        )
    if history is not None:
        lines = [("--history", history)]
    else:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--file {file}: cannot be read ({error})", "give a UTF-8 text file with one history per line"
            ) from None
        lines = [
            (f"{file}, line {number}", line)
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip()
        ]
    histories = [parse_history(line, known) for _, line in lines]
    empty = [where for (where, _), titles in zip(lines, histories) if not titles]
    if empty or not histories:
        raise UserError(f"{empty[0] if empty else file}: no title found", "separate titles by `; `")
    return histories


def recommend(
    recommender, histories: list[list[str]], k: int = 10, batch_size: int = 8
) -> list[list[dict[str, Any]]]:
    """Top-k of each history.

    Args:
        recommender: of `gdrt_ds.inference.recommender.open_run`.
        histories: titles, oldest first.
    Returns:
        per history the k best {"rank", "item_id", "title", "log_prob", "probability"}; k larger than the
        catalogue gives all.
    """
    from gdrt_ds.inference.catalogue_scoring import CatalogueScorer

    scorer, entries, lists = (
        CatalogueScorer(recommender.reader, recommender.trie),
        recommender.catalogue.entries,
        [],
    )
    for start in range(0, len(histories), batch_size):
        scores = scorer.score(
            [recommender.prompt_of_titles(titles) for titles in histories[start : start + batch_size]]
        )
        for row in scores:
            values, places = row.nan_to_num(nan=-float("inf")).sort(descending=True, stable=True)
            lists.append(
                [
                    {
                        "rank": rank,
                        "item_id": entries[place].item_id,
                        "title": entries[place].text,
                        "log_prob": value,
                        "probability": math.exp(value),
                    }
                    for rank, (value, place) in enumerate(zip(values[:k].tolist(), places[:k].tolist()), 1)
                ]
            )
    return lists


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gdrt_ds.recommend",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", required=True, help="run folder of a training")
    parser.add_argument("--history", help='titles, oldest first: "title; title; ..."')
    parser.add_argument("--file", help="text file with one such history per line")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="one JSON object per history")
    parser.add_argument("--base", action="store_true", help="the run's base model, without its adapter")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings of the run's config to override"
    )
    options = parser.parse_intermixed_args(arguments)
    from gdrt_ds.runtime import report_user_errors

    with report_user_errors():
        from gdrt_ds.errors import UserError
        from gdrt_ds.inference.recommender import open_run
        from gdrt_ds.runtime import single_process_runtime

        if options.k < 1:
            raise UserError(f"--k {options.k} is too small", "give at least 1")
        recommender = open_run(options.run, single_process_runtime(), options.overrides, base=options.base)
        known = {entry.text for entry in recommender.catalogue.entries}
        histories = read_histories(options.history, options.file, known)
        unknown = list(dict.fromkeys(title for titles in histories for title in titles if title not in known))
        for title in unknown:
            print(f"note: {title!r} is not in the catalogue; its text is used as it is", file=sys.stderr)
        for titles, found in zip(histories, recommend(recommender, histories, options.k)):
            if options.json:
                print(
                    json.dumps(
                        {
                            "history": titles,
                            "unknown": [t for t in titles if t not in known],
                            "recommendations": found,
                        },
                        ensure_ascii=False,
                    )
                )
                continue
            print("history: " + "; ".join(titles))
            for row in found:
                print(f"{row['rank']:4d}  {row['log_prob']:9.4f}  {row['probability']:8.2%}  {row['title']}")


if __name__ == "__main__":
    main()
