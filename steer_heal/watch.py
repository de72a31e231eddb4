"""Watching a run while it is worked on: what went wrong in a round, and whether to go on.

    early stop   a run is done before N when `patience` rounds in a row, the first round apart,
                 brought no larger trait shift than the best coherent round before them; 0: never

Both are read off saved files alone, as the page is, so a run that was stopped anywhere decides as
one that was not.
"""

from __future__ import annotations

from loguru import logger

from eval.processes import on_main
from steer_heal.guards import alarms
from steer_heal.round_table import LEGEND, round_table
from steer_heal.rounds import Round, Run
from steer_heal.saved import read_saved_run
from steer_heal.summary import Summary, summarise
from steer_heal.wording import nats


class Watch:
    """A run's rounds as they are finished; what is read off them is read once a round."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._summary: Summary | None = None  # of the finished rounds when it was asked for last

    @on_main
    def tell(self, round: Round) -> None:
        """Says what a finished round came to, beside the controls, and what went wrong in it."""
        table = "\n".join(round_table(self._so_far()))
        logger.info("what round {} came to ({})\n{}", round.index + 1, LEGEND, table)
        for alarm in alarms(self._so_far()):
            if alarm.round == round.index + 1:
                logger.warning("{}", alarm)

    @on_main
    def why_stop(self) -> str | None:
        """Why no round is to follow those that are finished; None: go on."""
        return early_stop(self._so_far()) if self._run.done_rounds() else None

    def _so_far(self) -> Summary:
        num_done = len(self._run.done_rounds())
        if self._summary is None or len(self._summary.rounds) != num_done:
            self._summary = summarise(read_saved_run(self._run.path))
        return self._summary


def early_stop(summary: Summary) -> str | None:
    """Why no round is to follow, and what goes further; None: `patience` has not run out."""
    config, since = summary.run.description.config, summary.rounds_without_gain
    if not 0 < config["patience"] <= since:
        return None
    if summary.best is None:
        why = f"no coherent round in {since + 1}"
    else:
        shift = nats(summary.best.healed.trait_shift)
        rounds = "1 round" if since == 1 else f"{since} rounds"
        why = f"no gain over round {summary.best.number}'s trait shift of {shift} in {rounds} since"
    further = f"N={max(config['rounds'], len(summary.rounds) + 1)} patience={since + 1}"
    return f"{why}; {further} goes further, a larger N alone does not"
