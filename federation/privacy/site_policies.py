"""Which site has which privacy policy, and whether they go together."""

from __future__ import annotations

from collections.abc import Sequence

from federation.aggregators.base import Aggregator
from federation.privacy.policy import PrivacyPolicy
from mtmedformer.errors import ConfigError


def by_site(
    privacy: PrivacyPolicy | dict[str, PrivacyPolicy] | None, sites: Sequence[str], aggregator: Aggregator
) -> dict[str, PrivacyPolicy]:
    """Return each site's policy by its name; sites without one are absent.

    Args:
        privacy: One policy for all sites, or one by site.
        sites: Names of all sites.
        aggregator: How updates are merged.

    Raises:
        ConfigError: When a name is no site's, or sites that send their counts would drown those that must not.
    """
    if not isinstance(privacy, dict):
        return {} if privacy is None else dict.fromkeys(sites, privacy)
    unknown = sorted(set(privacy) - set(sites))
    if unknown:
        raise ConfigError(f"federation.privacy: no site is called {', '.join(unknown)}; there are {', '.join(sites)}")
    guarded = [site for site, policy in privacy.items() if policy.guarantees]
    if 0 < len(guarded) < len(sites) and aggregator.power > 0:
        raise ConfigError(
            f"federation.privacy: {', '.join(guarded)} would weigh as one image each, because counts do not leave "
            "under a guarantee, and the others by theirs; set aggregator.weights: equal (a: 0 for the Bayesian one)"
        )
    return dict(privacy)
