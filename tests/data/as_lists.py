"""A reader's columns as the lists that the references take."""

from __future__ import annotations

from gdrt_ds.data.readers.base import InteractionColumns, Interactions


def as_lists(events: Interactions | InteractionColumns) -> Interactions:
    """Returns the same events as `Interactions`."""
    if isinstance(events, Interactions):
        return events
    names = list(events.items)
    return Interactions(
        [events.user_names[user] for user in events.users_of.tolist()],
        [names[item] for item in events.items_of.tolist()],
        None if events.times is None else events.times.tolist(),
        None if events.ratings is None else events.ratings.tolist(),
        events.items,
        events.users,
        events.domain,
        list(events.notes),
    )
