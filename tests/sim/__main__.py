"""Run the simulator by hand: `python -m tests.sim --seed 7`, `python -m tests.sim --seeds 0-100000`."""

import argparse
import sys
import time
import traceback
from dataclasses import fields

from tests.sim.simulation import Report, Simulation


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description="Seeded simulation of the scheduler.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, help="replay one seed, with its configuration and report")
    which.add_argument("--seeds", metavar="A-B", help="run every seed from A to B, print the failing ones")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return replay(arguments.seed)
    first, _, last = arguments.seeds.partition("-")
    return sweep(int(first), int(last or first))


def replay(seed: int) -> int:
    """One seed with all it has to say; a failure raises with its traceback."""
    simulation = Simulation(seed)
    sys.stdout.write(f"{simulation.world}\n")
    sys.stdout.write(f"{simulation.run()}\n")
    return 0


def sweep(first: int, last: int) -> int:
    """Many seeds; returns 1 if any failed."""
    total = Report()
    failed: list[int] = []
    began = time.monotonic()
    for seed in range(first, last + 1):
        try:
            report = Simulation(seed).run()
        except Exception:  # noqa: BLE001 - whatever a seed raises is the finding
            failed.append(seed)
            sys.stdout.write(f"seed {seed} failed, replay with `make sim SEED={seed}`\n{traceback.format_exc()}\n")
            continue
        for name in (item.name for item in fields(Report) if item.name != "trace"):
            setattr(total, name, getattr(total, name) + getattr(report, name))
    seconds = time.monotonic() - began
    sys.stdout.write(f"{last - first + 1} seeds in {seconds:.1f} s, {len(failed)} failed {failed[:20]}\n{total}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
