"""Who went how far: one lane a candidate, from the start to the gate where it was left behind."""

from __future__ import annotations

from downslope.report.log import Log
from downslope.report.text import number, plural, redact
from downslope.report.view import Gate, Lanes, Trial

MOST_LANES = 300


def lanes(log: Log) -> Lanes | None:
    """All candidates, best first; None for a race without gates."""
    if not log.plan.rungs:
        return None
    gates = [
        Gate(
            rung.fraction,
            f"{number(100 * rung.fraction)} %",
            f"{rung.runners or _arrived(log, rung.rung)} ran",
            minor=rung.fraction < 0.25,
        )
        for rung in log.plan.rungs
    ]
    if log.finalists and gates[-1].place < 1:
        gates.append(Gate(1.0, "100 %", f"{len(log.finalists)} in the final"))
    lead = (
        "At every gate a short cooldown is branched off and judged by its validation loss; the better part "
        "goes on from where it stood, the rest stops. Gates are parts of a full training, with how many ran "
        "to there."
    )
    if log.plan.left_out:
        lead += f" The budget had no room for {plural(len(log.plan.left_out), 'more candidate')}."
    if len(log.order) > MOST_LANES:
        lead += f" The best {MOST_LANES} of {len(log.order)} are drawn."
    return Lanes(lead, gates, [_lane(log, trial) for trial in log.order[:MOST_LANES]])


def _arrived(log: Log, rung: int) -> int:
    return sum(any(j.rung == rung for j in judged) for judged in log.judged.values())


def _lane(log: Log, trial: int) -> Trial:
    candidate = log.candidates[trial]
    judged = log.judged.get(trial, [])
    final = log.finals.get(trial, [])
    fraction = {rung.rung: rung.fraction for rung in log.plan.rungs}
    stops = [min(1.0, fraction.get(j.rung, j.step / candidate.steps)) for j in judged]
    if final:
        stops.append(1.0)
    fate, outcome = _fate(log, trial)
    row = next((r for r in log.rows if r.trial == trial), None)
    last = row or (judged[-1] if judged else None)
    return Trial(
        name=log.name(trial),
        hue=log.hue(trial),
        steps=max((m.step for m in [*judged, *final]), default=0),
        end=max(stops, default=0.0),
        stops=tuple(dict.fromkeys(stops)),
        loss=last.loss if last else None,
        metric=last.metric if last else None,
        fate=fate,
        outcome=outcome,
    )


def _fate(log: Log, trial: int) -> tuple[str, str]:
    winner = log.standings.winner
    judged = log.judged.get(trial, [])
    if trial in log.failed:
        return "failed", redact(log.failed[trial]) or "failed"
    if winner and trial == winner.trial:
        return "winner", "winner"
    if trial in log.finalists:
        row = next((r for r in log.rows if r.trial == trial), None)
        baseline = "baseline, " if trial == log.plan.baseline else ""
        return "finalist", baseline + ("tied" if row and row.tied else "final")
    if judged and judged[-1].outcome != "ok":
        return "failed", judged[-1].outcome
    if judged and (log.finalists or trial not in log.kept.get(judged[-1].rung, {trial})):
        fraction = next((rung.fraction for rung in log.plan.rungs if rung.rung == judged[-1].rung), None)
        return "cut", f"out at {number(100 * fraction)} %" if fraction else "out"
    return "running", "running"
