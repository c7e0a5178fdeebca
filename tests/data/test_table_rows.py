"""Item, user and window tables: the library gives the rows and line numbers of the reader by lines."""

import gzip
import random

import pytest

from gdrt_ds.data.readers import _rows
from gdrt_ds.data.readers.base import BadRows
from gdrt_ds.errors import UserError

CELLS = [
    "1",
    "007",
    "NA",
    "nan",
    "",
    " a ",
    "Ü",
    "日本",
    '"x, y"',
    '"He said ""no"""',
    '12" ruler',
    "1e5",
    "true",
    "[1, 2]",
]


def outcome(read, path, skip):
    """(rows with their lines, notes) or the error of one way of reading."""
    bad = BadRows(skip=skip)
    try:
        return list(read(path, bad)), bad.notes()
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz"])
def test_both_ways_of_reading_give_the_same(tmp_path, monkeypatch, suffix):
    monkeypatch.setenv("GDRT_CACHE", str(tmp_path / "cache"))
    separator = "\t" if ".tsv" in suffix else ","
    by_library = 0
    for seed in range(60):
        draw = random.Random(seed)
        width = draw.randint(1, 4)
        lines = [separator.join(f"column{k}" for k in range(width))]
        for _ in range(draw.randint(0, 6)):
            lines.append(separator.join(draw.choice(CELLS) for _ in range(width)))
        if draw.random() < 0.5:  # one thing that is not in order
            odd = [separator.join(["z"] * (width + 1)), "z", "", '"two\nlines"' + separator + "z", '"open']
            lines.insert(draw.randint(1, len(lines)), draw.choice(odd))
        text = draw.choice(["\n", "\r\n"]).join(lines) + draw.choice(["", "\n"])
        data = draw.choice([b"", b"\xef\xbb\xbf"]) + text.encode()
        path = tmp_path / f"table{seed}{suffix}"
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
        skip = draw.random() < 0.5
        wanted = outcome(_rows.read_rows, path, skip)
        assert outcome(_rows.rows_of_table, path, skip) == wanted, (seed, data)
        header = _rows.header_of(path)
        by_library += _rows.rows_in_order(path, _rows.suffix_of(path), header) is not None
    assert 10 < by_library < 50
