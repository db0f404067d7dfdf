"""Attacks on the command: mutated recipes, damaged checkpoints, hostile data, kills, full disks, folders used twice.

    python benchmarks/attack.py                      # all of it, within an hour of one core
    python benchmarks/attack.py --part kills         # one part
    python benchmarks/attack.py --case kills/17      # one case, with what it leaves: see the line it prints

Nothing may end in a traceback or a hang, no step may be lost beyond the last checkpoint, and nothing may be done on
wrong bits without a word. The exit code is 1 if anything was, or if a whole run has fewer than 200 kills. Results are
kept in runs/attack, in a folder for each state of the code and seed: what was interrupted goes on where it was.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process with threads must not fork
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "plugins")]  # this tree, whatever is installed

from attacks import damage, data, disk, folders, hints, kills, recipes, weights  # noqa: E402
from attacks.case import VERDICTS, Fault, Part, Result  # noqa: E402
from attacks.warm import warm_up  # noqa: E402

PARTS: Sequence[Part] = (
    *recipes.PARTS,
    *damage.PARTS,
    data.PART,
    weights.PART,
    kills.PART,
    disk.PART,
    folders.PART,
    hints.PART,
)
FAULTS = VERDICTS[2:]
HOUR = 3600
HEADINGS = ("refused in one screen", "done and right", "tracebacks", "hangs", "lost steps", "silent acceptances")


def main() -> None:
    options = _options()
    folder = Path(options.output).resolve()
    cases = list(_cases(options.case, options.part, options.cases, options.every))
    folder = folder / f"{_fingerprint()}-{options.seed}"
    results = folder / "results.jsonl"
    done = _read(results)
    to_do = [(part, number) for part, number in cases if options.case or (part.name, number) not in done]
    if to_do:
        warm_up()
    begun, skipped = time.monotonic(), 0
    for part, number in to_do:
        if options.seconds is not None and time.monotonic() - begun > options.seconds:
            skipped += 1
            continue
        row = _attack(part, number, options.seed, folder / "cases", keep=bool(options.case))
        done[part.name, number] = row
        with _made(results).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if row["verdict"] in FAULTS:
            print(f"{row['case']}: {row['verdict']}: {row['reason']}", flush=True)
        if options.case:
            print(f"{row['case']}: {row['verdict']}; left in {folder / 'cases' / str(row['case']).replace('/', '-')}")
    rows = [done[part.name, number] for part, number in cases if (part.name, number) in done]
    print("\n" + "\n".join(_table(rows)))
    print("\n" + "\n".join(_afterwards(rows, skipped, options.seed, results)))
    whole = len([row for row in rows if row["part"] == kills.PART.name]) >= kills.PART.cases
    if too_few := whole and _kills(rows) < kills.LEAST:
        print(f"{_kills(rows)} kills are fewer than {kills.LEAST}: this attack is none")
    raise SystemExit(int(too_few or any(row["verdict"] in FAULTS for row in rows)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument(
        "--part", action="append", choices=names, metavar="NAME", help=f"{', '.join(names)}; repeatable"
    )
    parser.add_argument("--case", action="append", metavar="PART/N", help="one case, anew; also PART/N-M; repeatable")
    parser.add_argument("--cases", type=int, metavar="N", help="at most so many of each part")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th of each part")
    parser.add_argument("--seconds", type=float, metavar="S", help="begin no case after so many seconds")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other cases; 0 if not given")
    parser.add_argument("--output", default=ROOT / "runs" / "attack", metavar="DIR", help="runs/attack if not given")
    return parser.parse_args()


def _cases(
    named: Iterable[str] | None, parts: Sequence[str] | None, limit: int | None, every: int
) -> Iterator[tuple[Part, int]]:
    by_name = {part.name: part for part in PARTS}
    for name in named or ():
        part, _, numbers = name.partition("/")
        first, _, last = numbers.partition("-")
        if part not in by_name or not first.isdigit() or not (last.isdigit() or not last):
            raise SystemExit(f"--case {name}: must look like kills/17 or kills/3-9; parts: {', '.join(by_name)}")
        yield from ((by_name[part], number) for number in range(int(first), int(last or first) + 1))
    if not named:
        for part in PARTS:
            if not parts or part.name in parts:
                yield from ((part, number) for number in list(range(0, part.cases, every))[:limit])


def _attack(part: Part, number: int, seed: int, cases: Path, *, keep: bool) -> dict[str, object]:
    folder = cases / f"{part.name}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begun = time.monotonic()
    try:
        result = part.attack(number, Random(f"{seed}/{part.name}/{number}"), folder)
    except Fault as fault:
        result = Result(fault.verdict, str(fault))
    except Exception as error:  # the other cases go on
        result = Result("traceback", f"the attack itself failed: {type(error).__name__}: {str(error)[:300]}")
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = round(time.monotonic() - begun, 2)
    return {"part": part.name, "number": number, "case": f"{part.name}/{number}", "seconds": seconds} | vars(result)


def _table(rows: Sequence[dict[str, object]]) -> Iterator[str]:
    budget = sum(part.seconds for part in PARTS)
    assert budget <= HOUR
    yield f"| part | cases | {' | '.join(HEADINGS)} | seconds (all: at most {budget} on one busy core) |"
    yield f"|---|{'---|' * (len(HEADINGS) + 2)}"
    for part in PARTS:
        mine = [row for row in rows if row["part"] == part.name]
        if mine:
            killed = f" ({_kills(mine)} kills)" if part is kills.PART else ""
            yield _line(part.title + killed, mine, f" of {part.seconds * len(mine) // part.cases}")
    yield _line("all", rows)


def _line(title: str, rows: Sequence[dict[str, object]], budget: str = "") -> str:
    counts = [sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS]
    seconds = sum(float(str(row["seconds"])) for row in rows)
    return f"| {title} | {len(rows)} | {' | '.join(map(str, counts))} | {seconds:.0f}{budget} |"


def _kills(rows: Iterable[dict[str, object]]) -> int:
    """Of the cases that ended well; what a faulty one has killed until then is not known."""
    return sum(row["counts"].count("kills") for row in rows)  # type: ignore[attr-defined]


def _afterwards(rows: Sequence[dict[str, object]], skipped: int, seed: int, results: Path) -> Iterator[str]:
    counts: dict[str, int] = {}
    for row in rows:
        for what in row["counts"]:  # type: ignore[attr-defined]
            counts[what] = counts.get(what, 0) + 1
    if counts:
        yield "counted: " + ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
    if skipped:
        yield f"{skipped} cases were not begun: the time was over; the same command goes on with them"
    yield f"results: {results}"
    for row in rows:
        if row["verdict"] in FAULTS:
            again = f"python benchmarks/attack.py --case {row['case']}" + (f" --seed {seed}" if seed else "")
            yield f"{again}   # {row['verdict']}: {row['reason']}"


def _read(results: Path) -> dict[tuple[str, int], dict[str, object]]:
    if not results.exists():
        return {}
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {(row["part"], row["number"]): row for row in rows}


def _made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _fingerprint() -> str:
    """Of the code that is attacked, and of what attacks it."""
    digest = hashlib.sha256()
    for place in ("moedistill", "plugins", "recipes", "benchmarks/attacks"):
        for path in sorted((ROOT / place).rglob("*")):
            if path.suffix in (".py", ".yaml", ".txt"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    main()
