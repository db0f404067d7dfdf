"""Runs that are killed again and again, and resumed: they end as the uninterrupted one, bit for bit.

A third of the kills come after a time drawn over the whole run, a third as it is about to do something to a file, and a
third as it does so within a save, a sample, an evaluation or an export. After each one no more steps are lost than
those since the last checkpoint, and none at all where the signal leaves time to save.
"""

import shutil
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
    kill_soon,
    leftovers,
    newest,
    reference_of,
    sound,
    steps_done,
    steps_saved,
    succeeded,
)
from .warm import Command, run_command

KILLS, LEAST = 4, 200
"""Kills of each case, and of all cases together at least."""
ATTEMPTS = 20
"""Of a case, to kill so often: a run that is done before the moment comes is not killed."""
PLACES = ("checkpoints", "samples", "evaluate", "export")
TOTAL = 2 * STEPS


def _attack(number: int, moves: Random, folder: Path) -> Result:
    """`KILLS` kills; a run that gets to its end before that many begins anew, after its end is looked at."""
    reference, run = reference_of(folder), folder / "run"
    kills, hint = 0, None
    counts: list[str] = []
    for attempt in range(ATTEMPTS):
        before, saved, name = steps_done(run), steps_saved(run), newest(run)
        arguments = hint or reference.arguments(*(["--resume"] if name is not None else []))
        if kills == KILLS:
            succeeded(run_command(*arguments, folder=folder), "lost", f"after {kills} kills, at step {saved}")
            check_end(reference, run)
            return Result("right", counts=tuple(counts))
        signum = moves.choice(SIGNALS)
        left = 1 - 0.8 * saved / TOTAL  # what is left of the run: samples, evaluation and export are a fifth of it
        if how := (number + attempt) % 3:
            within = f"run/{moves.choice(PLACES)}" if how == 2 else "run"
            share = left if within in ("run", "run/checkpoints") else 1
            at = 1 + moves.randrange(max(int(count_events(reference, folder, within=within) * share), 1))
            late = moves.choice([0, moves.uniform(0, 0.02)])
            act = kill_soon(signum, late) if late else kill_now(signum)
            command = Command(*arguments, folder=folder, prepare=at_event(at, act, within=within))
            moment = f"{signum.name} {1000 * late:.1f} ms after event {at} in {within}"
        else:
            delay = moves.uniform(0.02, reference.seconds * left)
            command = Command(*arguments, folder=folder)
            command.wait_for(lambda: False, delay)
            command.signal(signum)
            moment = f"{signum.name} after {delay:.3f} s"
        outcome = command.end()
        over = outcome.output.rstrip().rpartition("\n")[2].startswith("done: ")
        if outcome.code == -signum and over:  # it came when all was done, and Python was on its way out
            pass
        elif outcome.code == -signum != -signal.SIGKILL and not outcome.output:
            counts.append("signals before a word was said")  # as any program that is just being loaded
        else:
            sound(outcome, moment, signum)
        if name is not None and name.name not in outcome.output and run.exists() and "resuming" in outcome.output:
            raise Fault("lost", f"{moment}: resumed from another checkpoint than {name.name}")
        if outcome.code == 2:
            raise Fault("lost", f"{moment}: does not go on after {kills} kills: {outcome.refusal()[:300]}")
        if outcome.code == 0 or over:  # done before it came
            check_end(reference, run)
            shutil.rmtree(run)
            hint = None
            continue
        done, now = steps_done(run), steps_saved(run)
        allowed = EVERY if signum == signal.SIGKILL else 0
        if now < saved:
            raise Fault("lost", f"{moment}: the checkpoint at step {saved} is gone, there is one at {now}")
        if done - now > allowed and (done, now) != (before, saved):  # else they were lost before
            raise Fault("lost", f"{moment}: {done} steps done, {now} saved: more than {allowed} lost")
        hint = outcome.hint()  # as a user would, who is told how to go on
        kills += 1
        counts += [f"kills by {signum.name}", f"kills {_where(outcome.output)}", "kills"]
        counts += ["commands followed as printed"] if hint else []
        if leftovers(run):
            counts.append("kills amid a save")
    raise RuntimeError(f"{kills} kills in {ATTEMPTS} attempts: the moments are ill chosen")


def _where(output: str) -> str:
    """Where it hit, as far as the output tells."""
    stages = [line.split()[1].rstrip(":") for line in output.splitlines() if line.startswith("stage ")]
    return f"in stage {stages[-1]}" if stages else "in training" if "(consistency" in output else "before training"


PART = Part("kills", "runs killed and resumed", 60, 600, _attack)
