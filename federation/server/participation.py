"""Which sites take part in a round: a share drawn with the seed, or a schedule."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from mtmedformer.errors import ConfigError

Participation = float | list[list[str]]


def check_participation(
    participation: Participation, names: Sequence[str] | None = None, training: Collection[str] | None = None
) -> None:
    """Check a share or a schedule.

    Args:
        participation: Share of the sites in (0, 1], or a list of rounds, each a list of site names.
        names: All sites, once they are known.
        training: The sites that have labelled training images, once they are known.

    Raises:
        ConfigError: The share is out of range; or the schedule is empty, or has a site that is unknown, does not train
            or comes twice in a round.
    """
    if not isinstance(participation, list):
        if not 0 < participation <= 1:
            raise ConfigError(f"federation.participation is {participation}; give a share in (0, 1], or lists of sites")
        return
    if not participation or not all(participation):
        raise ConfigError("federation.participation has no site for some round; give a list of names for each round")
    for i, listed in enumerate(participation):
        twice = sorted({name for name in listed if listed.count(name) > 1})
        if twice:
            raise ConfigError(f"federation.participation: {', '.join(twice)} comes twice in entry {i + 1}; remove one")
    unknown = sorted({name for listed in participation for name in listed} - set(names or ()))
    if names is not None and unknown:
        raise ConfigError(f"federation.participation: no site is called {', '.join(unknown)}")
    idle = sorted({name for listed in participation for name in listed} - set(training or ()))
    if training is not None and idle:
        raise ConfigError(f"federation.participation: no labelled training image at {', '.join(idle)}; remove it there")


def taking_part(participation: Participation, round: int, names: Sequence[str], seed: int) -> list[str]:
    """Return the sites that take part in a round, in the order of their names; at least one.

    Args:
        participation: Share of the sites, drawn in every round; or a schedule, which is repeated.
        round: Number of the round, from 0.
        names: All sites.
        seed: Seed of the run.
    """
    if isinstance(participation, list):
        return sorted(participation[round % len(participation)])
    count = max(1, int(participation * len(names) + 0.5))
    drawn = np.random.default_rng([seed, round]).permutation(len(names))[:count]
    return [names[i] for i in sorted(drawn)]
