"""Runs that are killed again and again, and resumed: they end as the uninterrupted one, bit for bit.

Half of the kills come after a time drawn over the whole run, half as it is about to do something to a file: within a
save, a sample, an evaluation, an export. After each one no more steps are lost than those since the last checkpoint,
and none at all where the signal leaves time to save.
"""

import signal
from pathlib import Path
from random import Random

from .case import (
    EVERY,
    SIGNALS,
    STEPS,
    Fault,
    Part,
    Result,
    at_event,
    check_end,
    count_events,
    kill_now,
    leftovers,
    newest,
    reference_of,
    sound,
    steps_done,
    steps_saved,
    succeeded,
)
from .warm import Command

KILLS = 5
"""At most so many in one run."""
TOTAL = 2 * STEPS


def _attack(number: int, moves: Random, folder: Path) -> Result:
    reference, run = reference_of(folder), folder / "run"
    events = count_events(reference, folder)
    counts: list[str] = []
    for kill in range(KILLS + 1):
        saved, name = steps_saved(run), newest(run)
        arguments = reference.arguments(*(["--resume"] if name is not None else []))
        if kill == KILLS:
            outcome = Command(*arguments, folder=folder).end()
            succeeded(outcome, "lost", f"after {kill} kills, at step {saved}")
            break
        signum = moves.choice(SIGNALS)
        left = 1 - 0.8 * saved / TOTAL  # what is left of the run: samples, evaluation and export are a fifth of it
        if (number + kill) % 2:
            at = 1 + moves.randrange(max(int(events * left), 1))
            command = Command(*arguments, folder=folder, prepare=at_event(at, kill_now(signum)))
            moment = f"{signum.name} at event {at}"
        else:
            delay = moves.uniform(0.02, reference.seconds * left)
            command = Command(*arguments, folder=folder)
            command.wait_for(lambda: False, delay)
            command.signal(signum)
            moment = f"{signum.name} after {delay:.3f} s"
        outcome = command.end()
        if outcome.code == -signum != -signal.SIGKILL and not outcome.output:
            counts.append("signals before a word was said")  # as any program that is just being loaded
        else:
            sound(outcome, moment, signum)
        if name is not None and name.name not in outcome.output and run.exists() and "resuming" in outcome.output:
            raise Fault("lost", f"{moment}: resumed from another checkpoint than {name.name}")
        if outcome.code == 0:
            break
        if outcome.code == 2:
            raise Fault("lost", f"{moment}: does not go on after {kill} kills: {outcome.refusal()[:300]}")
        done, now = steps_done(run), steps_saved(run)
        allowed = EVERY if signum == signal.SIGKILL else 0
        if now < saved:
            raise Fault("lost", f"{moment}: the checkpoint at step {saved} is gone, there is one at {now}")
        if done - now > allowed:
            raise Fault("lost", f"{moment}: {done} steps done, {now} saved: more than {allowed} lost")
        counts += [f"kills by {signum.name}", f"kills {_where(outcome.output)}"]
        if leftovers(run):
            counts.append("kills amid a save")
    check_end(reference, run)
    return Result("right", counts=tuple(counts))


def _where(output: str) -> str:
    """Where it hit, as far as the output tells."""
    stages = [line.split()[1].rstrip(":") for line in output.splitlines() if line.startswith("stage ")]
    return f"in stage {stages[-1]}" if stages else "in training" if "(consistency" in output else "before training"


PART = Part("kills", "runs killed and resumed", 60, 700, _attack)
