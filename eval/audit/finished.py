"""Audits that an evaluation has finished so far: on disk, so that a killed evaluation need not repeat them.

Audits take hours where the model is large or its checkpoints are many, and results.json is the last file of
an evaluation. Until then every finished audit stands in OUTPUT/audits.json. The same command started again
takes it from there; a finished evaluation has no such file, so that asking again means computing again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from eval.audit.options import AuditOptions
from gdrt_ds.files import write_json
from gdrt_ds.runtime import Runtime
from gdrt_ds.training.run_folder import git_hash, versions

FILE = "audits.json"


class FinishedAudits:
    """The audits of an interrupted evaluation, and those that this one finishes.

    Args:
        output: the evaluation folder; it exists.
        key: what predictions depend on, from `scoring_key`.
        options: settings of the audits.
        runtime: of this process. Every rank makes this object; rank 0 reads and writes.

    Audits of other predictions, other settings or another version of the code are left out.
    """

    def __init__(self, output: Path, key: dict[str, Any], options: AuditOptions, runtime: Runtime):
        self.path = output / FILE
        self.runtime = runtime
        asked = {
            "scoring_key": key,
            "options": asdict(options),
            "git_hash": git_hash(),
            "versions": versions(),
        }
        self.asked = json.loads(json.dumps(asked))  # as it reads after a file: tuples are lists
        self.found = self._shared(self._read() if runtime.is_main else {})

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none was finished, or the process was killed while it wrote
            return {}
        return saved["audits"] if saved.get("asked") == self.asked else {}

    def _shared(self, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """What rank 0 read: all ranks must leave out the same audits."""
        if self.runtime.world == 1:
            return found
        shared = [found]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def add(self, name: str, audit: dict[str, Any]) -> None:
        """Writes an audit down as finished."""
        self.found[name] = audit
        if self.runtime.is_main:
            write_json(self.path, {"asked": self.asked, "audits": self.found})

    def drop(self) -> None:
        """Forgets all: results.json has them now, or they are not wanted."""
        self.found = {}
        if self.runtime.is_main:
            self.path.unlink(missing_ok=True)
