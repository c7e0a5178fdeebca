"""The planted-shortcut corpus: generated data in which it is known which targets need the history.

Most targets are drawn from a few popular items, whatever the history (kind "shortcut"): the prompt alone
predicts them. The rest follow the successor rule (kind "history"): the target is the item after the last
history item in catalogue order. A model that leans on the auxiliary tokens ranks popular items first
everywhere; one that uses the history finds the successor. The two kinds cannot be told apart from the prompt,
so what a model does about the minority is a matter of its objective.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from gdrt_ds.config import DataSection
from gdrt_ds.data.readers.base import Item, Reader, Sample, Windows
from gdrt_ds.errors import UserError, nearest

_ONSETS = "b d f g k l m n p r s t v z br dr gl kr pl tr".split()
_VOWELS = "a e i o u".split()
_GENRES = ("river", "stone", "forest", "harbour", "meadow", "island", "canyon", "glacier")


@dataclass(frozen=True)
class PlantedOptions:
    """The options of `data.planted`: sizes and strength of the planted shortcut.

    The corpus is seeded by `data.sample_seed` unless `seed` is given.
    """

    num_items: int = 24  # catalogue size; the successor of the last item is the first
    num_train: int = 6000
    num_valid: int = 200
    num_test: int = 400
    num_popular: int = 4  # items that shortcut targets are drawn from
    shortcut_share: float = 0.8  # share of samples of kind "shortcut"
    # Popular item k is drawn with weight (1 - strength) ** k: 0 = evenly, near 1 = one item takes all
    shortcut_strength: float = 0.3
    min_history: int = 2
    max_history: int = 4
    seed: int | None = None


def make_planted(data: DataSection) -> Windows:
    """Generates the corpus that `data.planted` describes; every sample is its own user, in time order.

    Raises:
        UserError: unknown option (with the nearest name), wrong type, impossible sizes.
    """
    options = _options(data)
    rng = np.random.default_rng([options.seed if options.seed is not None else data.sample_seed, 7])
    items = _items(options.num_items)
    ids = list(items)
    popular = [int(i) for i in rng.choice(options.num_items, size=options.num_popular, replace=False)]
    weights = (1.0 - options.shortcut_strength) ** np.arange(options.num_popular)
    weights /= weights.sum()
    # The item before a popular one never ends a history: a popular target is then always a shortcut and the
    # labels are exact.
    last_allowed = [i for i in range(options.num_items) if (i + 1) % options.num_items not in popular]
    splits: dict[str, list[Sample]] = {}
    users: dict[str, dict[str, str]] = {}
    clock = 0
    for split, size in (
        ("train", options.num_train),
        ("valid", options.num_valid),
        ("test", options.num_test),
    ):
        samples = []
        num_shortcut = round(size * options.shortcut_share)
        is_shortcut = rng.permutation(np.arange(size) < num_shortcut)
        for index in range(size):
            length = int(rng.integers(options.min_history, options.max_history + 1))
            last = int(rng.choice(last_allowed))
            others = rng.choice(options.num_items - 1, size=length - 1, replace=False)
            history = [int(i) + (i >= last) for i in others] + [last]  # distinct items, `last` at the end
            target = (
                int(rng.choice(popular, p=weights)) if is_shortcut[index] else (last + 1) % options.num_items
            )
            user = f"{split}{index}"
            users[user] = {
                "cohort": "ab"[int(rng.integers(2))]
            }  # means nothing: a control for measures by user group
            samples.append(
                Sample(
                    index,
                    user,
                    tuple(ids[i] for i in history),
                    ids[target],
                    float(clock),
                    {"kind": "shortcut" if is_shortcut[index] else "history"},
                )
            )
            clock += 1
        splits[split] = samples
    return Windows(splits, items, users, "item")


def _items(num_items: int) -> dict[str, Item]:
    """Makes titles of two words, e.g. an invented name and `saga`.

    The name is the item's own; the class word is shared by its neighbours in catalogue order.
    The first word carries the choice. The rest of the target follows from the prefix, as most tokens of real
    titles do.
    """
    block = max(1, -(-num_items // len(_GENRES)))
    names = _names(num_items)
    return {
        str(i + 1): Item(
            str(i + 1),
            f"{names[i]} {_GENRES[i // block]}",
            provider=f"maker {i % 5 + 1}",
            genres=(_GENRES[i // block],),
        )
        for i in range(num_items)
    }


def _names(count: int) -> list[str]:
    """Makes distinct pronounceable words, the same for every seed."""
    syllables = [onset + vowel for onset in _ONSETS for vowel in _VOWELS]
    rng = np.random.default_rng(20)
    names: dict[str, None] = {}
    while len(names) < count:
        first, second, third = rng.integers(len(syllables), size=3)
        names.setdefault(syllables[first] + syllables[second] + syllables[third][0], None)
    return list(names)


def _options(data: DataSection) -> PlantedOptions:
    known = {f.name: f for f in fields(PlantedOptions)}
    for name, value in data.planted.items():
        if name not in known:
            raise UserError(f"data.planted.{name}: unknown option", nearest(name, list(known)))
        expected = (int,) if "int" in str(known[name].type) else (int, float)
        if isinstance(value, bool) or not (isinstance(value, expected) or (name == "seed" and value is None)):
            raise UserError(
                f"data.planted.{name}={value!r}: expected "
                f"{'a whole number' if expected == (int,) else 'a number'}",
                f"the default is {known[name].default}",
            )
    options = PlantedOptions(**data.planted)
    problems = {
        "seed": options.seed is not None and options.seed < 0,
        "num_items": options.num_items < 4,
        "num_popular": not 1 <= options.num_popular <= options.num_items // 2,
        "num_train": options.num_train < 1,
        "num_valid": options.num_valid < 0,
        "num_test": options.num_test < 1,
        "shortcut_share": not 0 <= options.shortcut_share <= 1,
        "shortcut_strength": not 0 <= options.shortcut_strength < 1,
        "min_history": options.min_history < 1,
        "max_history": not options.min_history <= options.max_history < options.num_items,
    }
    for name, wrong in problems.items():
        if wrong:
            raise UserError(
                f"data.planted.{name}={asdict(options)[name]}: out of range",
                "seed >= 0, num_items >= 4, 1 <= num_popular <= num_items / 2, "
                "0 <= shortcut_share <= 1, 0 <= shortcut_strength < 1, "
                "1 <= min_history <= max_history < num_items, sizes positive",
            )
    return options


def _is_planted(data: DataSection) -> bool:
    return data.path == "planted" and not Path(data.path).exists()


READER = Reader(
    _is_planted,
    lambda data, bad: make_planted(data),
    order=10,
    embedded=("planted",),
    uses=lambda data: ("planted",),
)
