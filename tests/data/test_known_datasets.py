"""Data sets that are known by their files: MovieLens, the ML-100k of RecBole, Amazon reviews."""

import gzip
import importlib.metadata
import json
from collections import Counter

import pytest

from gdrt_ds.data.corpus import load_corpus
from gdrt_ds.errors import UserError
from tests.data.test_corpus import section, targets


def test_movielens_layouts_give_titles_genres_and_users(tmp_path):
    old, one, latest = (tmp_path / name for name in ("ml-100k", "ml-1m", "ml-latest-small"))
    for folder in (old, one, latest):
        folder.mkdir()
    events = [(1, 1, 5, 10), (1, 2, 4, 20), (1, 1, 3, 30), (1, 2, 4, 40)]
    flags = "|".join(["0"] * 5 + ["1"] + ["0"] * 13)
    (old / "u.data").write_text("".join("\t".join(map(str, e)) + "\n" for e in events))
    (old / "u.item").write_bytes(
        f"1|Misérables, Les (1995)|01-Jan-1995||url|{flags}\n2|B (1996)|x||url|{flags}\n".encode("latin-1")
    )
    (old / "u.user").write_text("1|24|M|technician|85711\n")
    (one / "ratings.dat").write_text("".join("::".join(map(str, e)) + "\n" for e in events))
    (one / "movies.dat").write_bytes(
        "1::Misérables, Les (1995)::Comedy\n2::B (1996)::Comedy\n".encode("latin-1")
    )
    (one / "users.dat").write_text("1::M::25::12::55117\n")
    (latest / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},{r},{t}\n" for u, i, r, t in events)
    )
    (latest / "movies.csv").write_text(
        'movieId,title,genres\n1,"Misérables, Les (1995)",Comedy\n2,B (1996),(no genres listed)\n',
        encoding="utf-8",
    )
    for folder, user in (
        (old, {"age": "24", "gender": "M", "occupation": "technician"}),
        (one, {"gender": "M", "age": "25", "occupation": "programmer"}),
        (latest, None),
    ):
        corpus = load_corpus(section(folder, split="leave_one_out"))
        assert (
            corpus.items["1"].title == "Misérables, Les (1995)"
            and corpus.items["1"].genres == ("Comedy",)
            and corpus.domain == "movie"
        )
        assert targets(corpus.split("test")) == [("1", ("1", "2", "1"), "2")]
        assert corpus.users == ({"1": user} if user else {})


def test_movielens_files_in_utf_8_are_read_as_such(tmp_path):
    """MovieLens-10M has the layout of 1M, and another encoding."""
    (tmp_path / "ratings.dat").write_text("1::1::5::10\n1::2::4::20\n1::1::4.5::30\n1::2::4::40\n")
    (tmp_path / "movies.dat").write_text("1::Misérables, Les (1995)::Comedy\n2::B (1996)::x\n", "utf-8")
    assert load_corpus(section(tmp_path, split="leave_one_out")).items["1"].title == "Misérables, Les (1995)"


def test_embedded_ml100k_has_directors_years_and_user_attributes():
    try:
        importlib.metadata.distribution("recbole")
    except importlib.metadata.PackageNotFoundError:
        with pytest.raises(UserError, match="recbole") as caught:
            load_corpus(section("ml-100k"))
        assert "pip install --no-deps recbole==1.2.1" in caught.value.fix
        return
    corpus = load_corpus(section("ml-100k"))
    assert len(corpus.items) == 1682 and sum(map(len, corpus.splits.values())) == 100_000 - 943
    assert corpus.items["1"].title == "Toy Story (1995)" and corpus.items["1"].genres == (
        "Animation",
        "Children's",
        "Comedy",
    )
    assert corpus.users["1"] == {"age": "24", "gender": "M", "occupation": "technician"}
    providers = Counter(item.provider for item in corpus.items.values())
    assert providers[None] == 92 and len(providers) > 1000
    folder = importlib.metadata.distribution("recbole").locate_file("recbole/dataset_example/ml-100k")
    film_of = {
        entity: film
        for film, entity in (line.split("\t") for line in (folder / "ml-100k.link").read_text().splitlines())
    }
    edges = [line.split("\t") for line in (folder / "ml-100k.kg").read_text().splitlines()]
    directed = {
        (film_of[film], person)
        for film, relation, person in edges
        if relation == "film.film.directed_by" and film in film_of
    }
    num_films = Counter(person for _, person in directed)
    assert all(num_films[person] <= num_films[corpus.items[film].provider] for film, person in directed)
    times = [s.timestamp for name in ("train", "valid", "test") for s in corpus.split(name)]
    assert times == sorted(times)


def test_missing_recbole_tells_how_to_install_it(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(UserError, match="recbole") as caught:
        load_corpus(section("ml-100k"))
    assert caught.value.fix == "pip install --no-deps recbole==1.2.1"


@pytest.mark.parametrize("year", [2018, 2023])
def test_amazon_reviews_of_both_releases(tmp_path, year):
    user, item, time, rating, provider = {
        2018: ("reviewerID", "asin", "unixReviewTime", "overall", "brand"),
        2023: ("user_id", "parent_asin", "timestamp", "rating", "store"),
    }[year]
    events = [
        ("A", "B1", 1, 5.0),
        ("A", "B2", 2, 1.0),
        ("A", "B3", 3, 5.0),
        ("A", "B1", 4, 4.0),
        ("A", "B3", 5, 5.0),
    ]
    with gzip.open(tmp_path / "Office_5.json.gz", "wt") as stream:
        stream.writelines(
            json.dumps({user: u, item: i, time: t, rating: r, "title": "my review"}) + "\n"
            for u, i, t, r in events
        )
    with gzip.open(tmp_path / "meta_Office.json.gz", "wt") as stream:
        stream.writelines(
            json.dumps(
                {item: i, "title": f"Pen &amp; {i}", provider: "Acme", "categories": ["Office", "Pens"]}
            )
            + "\n"
            for i in ("B1", "B2", "B3", "B4")
        )
    corpus = load_corpus(section(tmp_path, min_rating=3, split="leave_one_out"))
    assert targets(corpus.split("test")) == [("A", ("B1", "B3", "B1"), "B3")]
    assert (
        corpus.items["B1"].title == "Pen & B1"
        and corpus.items["B1"].provider == "Acme"
        and corpus.items["B1"].genres == ("Office", "Pens")
    )
    assert corpus.domain == "product" and set(corpus.items) == {"B1", "B3"}
    (tmp_path / "meta_Office.json.gz").unlink()
    with pytest.raises(UserError, match="no metadata file"):
        load_corpus(section(tmp_path))
