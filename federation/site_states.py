"""State of the data of a federation in its checkpoints: that of the data set of each site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L

from federation.site_loaders import Site


class SiteStates:
    """Saves and restores the states of the data sets of all sites.

    The state of a data set is the white level of its 16-bit images. A data set that is cut into sites has one for all
    of them; data sets of their own have one each.

    Attributes:
        named: Data sets by site name, or ``None``.
        data: The data set that is cut into sites, or ``None``.
    """

    named: dict[str, L.LightningDataModule] | None
    data: L.LightningDataModule | None
    _sites: dict[str, Site]

    def state_dict(self) -> dict[str, Any]:
        """Return the white level of each site; nothing if no site has one."""
        levels = {name: site.source.state_dict().get("white_level") for name, site in self._sites.items()}
        return {"white_level": levels} if any(level is not None for level in levels.values()) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the white level of each site; a site that the state lacks takes the level common to all.

        Before ``setup`` it decides how images are read.
        """
        levels = state_dict.get("white_level")
        for name, source in self._sources():
            own = levels.get(name, levels) if isinstance(levels, Mapping) else levels
            source.load_state_dict({"white_level": own})

    def _sources(self) -> Iterator[tuple[str, L.LightningDataModule]]:
        """Yield each data set with the name of its site; one that is cut into sites has none."""
        if self.data is not None:
            yield "", self.data
        yield from (self.named or {}).items()
        yield from ((name, site.source) for name, site in self._sites.items())
