r"""Test whether two variants differ by more than chance: intervals over patients and seeds, and verdicts.

The quantity is the mean over runs (seeds, folds) of a function of the test images: the mean over sites, or the worst
site. Two sources of variance are resampled: the patients at each site, and the seeds. The resamples are **paired**:
each contains the same patients and the same runs for every variant.

1. Patients are drawn with replacement within each site, all images of a patient together; runs are drawn with
   replacement. Of $n$ units $n - 1$ are drawn (Rao and Wu 1988), which makes the variance of a mean unbiased, where
   drawing $n$ would make it too small by $(n-1)/n$: a fifth with five seeds.
2. The interval is $\hat d \pm t_{\nu}\, s$. $s^2$ combines three resampled variances: of patients alone, $v_P$, of
   runs alone, $v_R$ (in closed form), and of both, $v_{PR}$. Patients and runs are crossed, and their interaction is
   contained once in each of the first two and three times in the third, so that $2 (v_P + v_R) - v_{PR}$ is unbiased;
   it is never taken below the larger of the two. $\nu$ is Satterthwaite's, which accounts for the small number of
   seeds. Percentiles would be too narrow, because resamples of few runs never lie outside these runs.
3. Sites are fixed: a verdict holds for these sites.

`scipy.stats.bootstrap` draws from one level only, and `n` of `n`; the test compares the two where they agree.
`tests/mtmedformer/commands/compare/test_statistics.py` also simulates the rate of false positives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Summary = Literal["mean", "worst"]
Verdict = Literal["better", "worse", "no difference shown", "not determined"]


@dataclass(frozen=True)
class MetricPanel:
    """One metric of one variant, on the data and on resamples of patients; NaN where it is undefined.

    Attributes:
        runs: Names of the runs: a seed, a fold.
        sites: Names of the sites.
        patients: Number of patients.
        value: (runs, sites).
        resampled: (R, runs, sites), with the same resamples of patients in every panel of a study.
        whole: (runs,) over all images together, for means over images; ``None`` for means over sites.
        whole_resampled: (R, runs) likewise.
    """

    runs: tuple[str, ...]
    sites: tuple[str, ...]
    patients: int
    value: Floats
    resampled: Floats
    whole: Floats | None = None
    whole_resampled: Floats | None = None

    def of(self, runs: Sequence[str]) -> MetricPanel:
        """Return the panel of some of the runs, in the given order."""
        rows = [self.runs.index(run) for run in runs]
        whole = None if self.whole is None else self.whole[rows]
        resampled = None if self.whole_resampled is None else self.whole_resampled[:, rows]
        return MetricPanel(
            tuple(runs), self.sites, self.patients, self.value[rows], self.resampled[:, rows], whole, resampled
        )


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: The number.
        low: Lower end of the interval; NaN if there is nothing to resample.
        high: Upper end.
        p: Two-sided p-value of the hypothesis that it is 0.
        error: Standard error.
        freedom: Degrees of freedom.
        from_runs: Share of the variance that is due to runs and not to patients; NaN with one run.
    """

    value: float
    low: float = float("nan")
    high: float = float("nan")
    p: float = float("nan")
    error: float = float("nan")
    freedom: float = float("nan")
    from_runs: float = float("nan")


_Evaluate = Callable[[Floats, "MetricPanel | None"], Floats]


def draw_patients(sites: Mapping[str, Sequence[str]], replicates: int, seed: int) -> dict[str, NDArray[np.int32]]:
    """Draw $n - 1$ of the $n$ patients of each site with replacement, for every resample.

    A site with one patient keeps it, so that its variance is not estimated.

    Args:
        sites: Patients of each site.
        replicates: Number of resamples R.
        seed: Seed of the draw; the draw of a site depends only on the seed and the site's position and patient count.

    Returns:
        By site (R, patients): the number of times each patient is drawn, in the given order.
    """
    found = {}
    for i, (site, patients) in enumerate(sorted(sites.items())):
        n = len(patients)
        rng = np.random.default_rng([seed, i])
        drawn = rng.multinomial(max(n - 1, 1), np.full(n, 1 / n), size=replicates)
        found[site] = drawn.astype(np.int32)
    return found


def draw_runs(runs: int, replicates: int, seed: int) -> Floats:
    """Draw $n - 1$ of the $n$ runs with replacement, as weights (R, runs) that sum to 1; one run has weight 1."""
    if runs < 2:
        return np.ones((replicates, runs))
    rng = np.random.default_rng([seed, 1_000_003])
    return rng.multinomial(runs - 1, np.full(runs, 1 / runs), size=replicates) / (runs - 1)


def estimate(
    panel: MetricPanel,
    reference: MetricPanel | None = None,
    of: Summary = "mean",
    higher_is_better: bool = True,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Estimate the value of a variant, or its difference from the reference on the runs that both have.

    Args:
        panel: The variant.
        reference: The variant to subtract; ``None`` for the value itself.
        of: The mean (over sites, or over images if the panels have ``whole``), or the worst site.
        higher_is_better: Which site is the worst.
        seed: Seed of the draw of runs.
        level: Probability mass of the interval.
    """
    if reference is not None:
        runs = [run for run in panel.runs if run in reference.runs]
        panel, reference = panel.of(runs), reference.of(runs)
    pair = [panel] if reference is None else [panel, reference]
    number = len(panel.runs)
    known = ~np.any([np.isnan(p.value).any(axis=0) for p in pair], axis=0)
    if not number or not (known.any() or (of == "mean" and panel.whole is not None)):
        return Estimate(float("nan"))
    replicates = len(panel.resampled)
    drawn = draw_runs(number, replicates, seed)
    as_it_is, both, patients_only = [], [], []
    for p in pair:
        summary = _summary(p, known, of, higher_is_better)
        as_it_is.append(summary(np.full((1, number), 1 / number), None)[0])
        both.append(summary(drawn, p))
        patients_only.append(summary(np.full((replicates, number), 1 / number), p))
    value = float(_minus([np.asarray(v) for v in as_it_is]))
    by_run = _minus([per_run(p, known, of, higher_is_better) for p in pair])
    freedom_patients = min(p.patients for p in pair) - int(known.sum())
    return _interval(value, _minus(both), _minus(patients_only), by_run, freedom_patients, level)


def _minus(parts: Sequence[Floats]) -> Floats:
    """Return the only part, or the difference of two."""
    return parts[0] if len(parts) == 1 else parts[0] - parts[1]


def _summary(panel: MetricPanel, known: NDArray[np.bool_], of: str, higher: bool) -> _Evaluate:
    """Return the function of run weights (R, runs) that evaluates a panel, resampled or not."""

    def evaluate(weights: Floats, resampled: MetricPanel | None) -> Floats:
        if of == "mean" and panel.whole is not None:
            values = panel.whole[None] if resampled is None else resampled.whole_resampled
            return _weighted(weights[:, :, None], np.asarray(values)[:, :, None])[:, 0]
        values = panel.value[None] if resampled is None else resampled.resampled
        sites = _weighted(weights[:, :, None], np.asarray(values)[:, :, known])
        return _over_sites(sites, of, higher)

    return evaluate


def _weighted(weights: Floats, values: Floats) -> Floats:
    """Average (R, runs, sites) over the runs with a known value."""
    there = ~np.isnan(values)
    total = (weights * there).sum(axis=1)
    top = (weights * np.where(there, values, 0)).sum(axis=1)
    result: Floats = np.where(total > 0, top / np.where(total > 0, total, 1), np.nan)
    return result


def _over_sites(sites: Floats, of: str, higher: bool) -> Floats:
    """Return the mean or the worst of (R, sites) over the sites that are known in each resample."""
    there = ~np.isnan(sites)
    if of == "mean":
        return _weighted(np.ones((1, sites.shape[1], 1)), sites[:, :, None])[:, 0]
    worst = np.where(there, sites, np.inf if higher else -np.inf)
    result: Floats = np.where(there.any(axis=1), worst.min(axis=1) if higher else worst.max(axis=1), np.nan)
    return result


def per_run(panel: MetricPanel, known: NDArray[np.bool_], of: str, higher: bool) -> Floats:
    """Return the value of each run: the mean or the worst of the known sites, or the mean over all images."""
    if of == "mean" and panel.whole is not None:
        return panel.whole
    if of == "mean":
        return _over_sites(panel.value[:, known], of, higher)
    sites = panel.value[:, known].mean(axis=0)  # in every run, the site that is worst on average
    return panel.value[:, known][:, int(sites.argmin() if higher else sites.argmax())]


def _interval(
    value: float, samples: Floats, by_patient: Floats, by_run: Floats, freedom_patients: int, level: float
) -> Estimate:
    samples, by_patient = samples[~np.isnan(samples)], by_patient[~np.isnan(by_patient)]
    known = by_run[~np.isnan(by_run)]
    patients = float(by_patient.var()) if len(by_patient) > 1 and freedom_patients > 0 else 0.0
    runs = float(known.var(ddof=1) / len(known)) if len(known) > 1 else 0.0
    if len(samples) < 2 or not (freedom_patients > 0 or len(known) > 1):
        return Estimate(value)
    # runs and patients are crossed: their interaction is in each part once, in the joint resamples three times
    error = max(runs, patients, 2 * (runs + patients) - float(samples.var())) ** 0.5
    if error < 1e-12:  # the same model under two names
        alike = abs(value) < 1e-12
        return Estimate(value, value, value, 1.0 if alike else 0.0, error, float("nan"))
    parts = [(runs, len(known) - 1), (patients, freedom_patients)]
    freedom = (runs + patients) ** 2 / sum(v**2 / n for v, n in parts if v > 0 and n > 0)
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(value) / error, freedom))
    share = runs / (runs + patients) if len(known) > 1 else float("nan")
    return Estimate(value, value - half, value + half, p, error, float(freedom), share)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values for their number by Holm's step-down procedure; NaN stays NaN and is not counted.

    Reference:
        Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    known = sorted((p, name) for name, p in p_values.items() if p == p)
    corrected = {name: float("nan") for name in p_values}
    largest = 0.0
    for i, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - i)))
        corrected[name] = largest
    return corrected


def verdict(difference: float, corrected: float, higher_is_better: bool = True, alpha: float = 0.05) -> Verdict:
    """Return the verdict on a difference with its corrected p-value."""
    if corrected != corrected:
        return "not determined"
    if corrected >= alpha or difference == 0:
        return "no difference shown"
    return "better" if (difference > 0) == higher_is_better else "worse"
