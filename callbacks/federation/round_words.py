"""How a federation goes, in words: a line a round, and the faults of the run in a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from callbacks.federation.site_validation import mean_known


def round_line(last: dict[str, Any], rounds: int, seconds: float) -> str:
    """Return one line about a round: who took part, who did not and why, the mean and the worst site's score.

    Args:
        last: The round's entry in the history.
        rounds: Rounds asked for.
        seconds: How long it took, validation included.
    """
    words = [f"round {last['round'] + 1}/{rounds}", f"{len(last['sites'])} sites"]
    words += [f"without {fault['site']} ({fault['fault']})" for fault in last["faults"]]
    scores = {k.split("/")[1]: v for k, v in last.get("validation", {}).items() if k.endswith("/val/score")}
    known = {site: score for site, score in scores.items() if score == score}
    if known:
        worst = min(known, key=lambda site: known[site])
        words.append(f"score {mean_known(list(known.values())):.3f}, worst {worst} {known[worst]:.3f}")
    return " · ".join([*words, f"{seconds:.1f} s"])


def faults_in_words(history: Sequence[dict[str, Any]]) -> str:
    """Return how many rounds there were, and how often which site was missing."""
    counts = Counter(fault["site"] for entry in history for fault in entry.get("faults", []))
    told = ", ".join(f"{site} in {count}" for site, count in sorted(counts.items()))
    return f"{len(history)} rounds; missing: {told}" if told else f"{len(history)} rounds, no fault"


def say(trainer: L.Trainer, line: str) -> None:
    """Print a line above the progress bar, where there is one."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, ProgressBar):
        bar.print(line)
    else:
        print(line, flush=True)
