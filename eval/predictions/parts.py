"""Finished samples on disk: one file per rank, what they depend on, and predictions.jsonl at the end.

Every rank appends finished samples to its own file in OUTPUT/parts/. A restart reads all parts, whatever the
number of ranks was, and goes on with what is missing. `scoring.json` beside them names what the scores depend
on; parts of another model, prompt, catalogue or mode are refused, never mixed. At the end rank 0 writes
predictions.jsonl in the split's order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from eval.folders import PREDICTIONS, current_scoring_key
from gdrt_ds.errors import UserError
from gdrt_ds.files import sha256_of, write_json, write_text
from gdrt_ds.runtime import Runtime

Sample = TypeVar("Sample")


def adapter_hash(adapter: Path | None) -> str:
    """SHA-256 of an adapter's weights; empty without an adapter."""
    return "" if adapter is None else sha256_of(adapter / "adapter_model.safetensors")


def claim_output(output: Path, key: dict[str, Any], overwrite: bool) -> None:
    """Makes OUTPUT ready: fresh, or with parts of the same job.

    Args:
        key: from `scoring_key`. overwrite: drop the parts of another job instead of refusing them.
    Raises:
        UserError: it holds another job's results, or cannot be written.
    """
    try:
        (output / "parts").mkdir(parents=True, exist_ok=True)
        saved = output / "scoring.json"
        if overwrite:
            for path in (output / "parts").glob("rank_*.jsonl"):
                path.unlink()
        elif saved.is_file():
            _refuse_other_job(output, json.loads(saved.read_text(encoding="utf-8")), key)
        write_json(saved, key)
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be written ({error.strerror or error})",
            "choose another folder, or free space",
        ) from None


def _refuse_other_job(output: Path, saved: dict[str, Any], key: dict[str, Any]) -> None:
    before = current_scoring_key(saved)
    if before != saved:
        print(
            f"{output}/scoring.json of an earlier version: its `objective` is read as `scoring`", flush=True
        )
    differing = [name for name in key if before.get(name) != key[name]]
    if differing:
        raise UserError(
            f"--output {output} holds predictions with another {', '.join(differing)}",
            "choose another --output, or give --overwrite",
        )


def read_parts(folder: Path, required: str | None = None) -> dict[int, dict[str, Any]]:
    """Finished samples of all parts by sample id.

    Left out are a torn line (the process was killed while it wrote) and rows without the key `required` (an
    earlier version wrote them).
    """
    found = {}
    for path in sorted(folder.glob("rank_*.jsonl")):
        # Bytes: a torn line may end within a letter.
        for line in path.read_bytes().split(b"\n"):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if required is None or required in row:
                found[row["sample_id"]] = row
    return found


def score_into(
    output: Path,
    batches: Iterable[Sequence[Sample]],
    score: Callable[[Sequence[Sample]], list[dict[str, Any]]],
    runtime: Runtime,
    progress: Callable[[int, int], None],
    total: int,
) -> None:
    """Appends predictions to this rank's part, batch by batch.

    Args:
        score: from the samples of a batch to their objects of predictions.jsonl.
        progress: called with (finished, all) samples of this rank.
        total: samples in all batches.

    Raises:
        KeyboardInterrupt: the process was asked to stop; what is finished is on disk.
    """
    part = output / "parts" / f"rank_{runtime.rank}.jsonl"
    torn = part.is_file() and part.stat().st_size > 0 and not part.read_bytes().endswith(b"\n")
    finished = 0
    with open(part, "a", encoding="utf-8") as stream:
        if torn:
            # A killed process left half a line: what follows must not be glued to it.
            stream.write("\n")
        for batch in batches:
            stream.write(_json_lines(score(batch)))
            stream.flush()
            finished += len(batch)
            progress(finished, total)
            if runtime.stop_signal is not None:
                raise KeyboardInterrupt


def join_parts(
    output: Path,
    sample_ids: Sequence[int],
    what: str,
    required: str | None = None,
    renew: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Writes predictions.jsonl from all parts and returns its objects.

    Args:
        sample_ids: of the split, in its order. what: "samples", for the message. required: see `read_parts`.
        renew: gives an object with what its scores do not depend on written anew.

    Raises:
        UserError: some are missing, because a rank ended early.
    """
    done = read_parts(output / "parts", required)
    absent = [sample_id for sample_id in sample_ids if sample_id not in done]
    if absent:
        raise UserError(
            f"{len(absent)} {what} have no predictions (a rank ended early), e.g. number {absent[0]}",
            "start the same command again: it goes on where it ended",
        )
    found = [done[sample_id] for sample_id in sample_ids]
    if renew is not None:
        found = [renew(row) for row in found]
    write_text(output / PREDICTIONS, _json_lines(found))
    return found


def _json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
