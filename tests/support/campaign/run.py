"""Runs one program after the other, counts what came of them, and makes those that fail smaller.

To run one program, or as many as some minutes allow, outside of the tests:

    JLORA_TESTS_SEED=2030-01-31 python -m tests.support.campaign.run 17
    python -m tests.support.campaign.run --minutes 60
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from typing import IO

import jax

import tests.conftest  # noqa: F401, the settings under which every test runs
from tests.support.campaign.check import Verdict, judge
from tests.support.campaign.draw import draw_plan
from tests.support.campaign.plan import Plan
from tests.support.draw import SEED, VARIABLE

SHRINKING = 40  # plans that are tried to make a program smaller


class Campaign:
    """The programs of one seed.

    Attributes:
        outcomes: how many programs agree, were refused by JAX and so on.
        kinds: how many programs contain each step, use, wrapper and method.
        faults: the text of every fault, with the command that runs it again.
    """

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.kinds: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []

    def plan(self, number: int) -> Plan:
        return draw_plan(f"{self.seed} {number}")

    def run(self, number: int) -> Verdict:
        """Runs one program, and adds what came of it to the counts."""
        verdict = judge(self.plan(number))
        self.outcomes[verdict.outcome] += 1
        if verdict.outcome in ("agrees", "coarse", "fault"):
            self.kinds.update(set(verdict.kinds))
        if verdict.outcome == "fault":
            command = f"{VARIABLE}={self.seed} python -m tests.support.campaign.run {number}"
            self.faults.append(f"{command}\n{self.plan(number)}\n{verdict.text}")
        if sum(self.outcomes.values()) % 25 == 0:
            jax.clear_caches()
        return verdict

    def run_for(self, seconds: float, start: int = 0, out: IO[str] | None = None) -> None:
        """Runs programs from number `start` on, as long as there is time."""
        stop, number = time.monotonic() + seconds, start
        while time.monotonic() < stop:
            verdict = self.run(number)
            if verdict.outcome == "fault" and out:
                print(f"{self.faults[-1]}\n", file=out, flush=True)
            number += 1

    def summary(self) -> str:
        """What came of the programs, and how many contained what."""
        total = sum(self.outcomes.values())
        outcomes = ", ".join(f"{count} {name}" for name, count in self.outcomes.most_common())
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.kinds.items()))
        return f"{total} random programs of the seed {self.seed}: {outcomes}\nthey contained {kinds}"


def smallest(plan: Plan) -> tuple[Plan, Verdict]:
    """The smallest plan found that still fails."""
    verdict, tried = judge(plan), 0
    again = True
    while again and tried < SHRINKING:
        again = False
        for smaller in plan.smaller():
            tried += 1
            candidate = judge(smaller)
            if candidate.outcome == "fault":
                plan, verdict, again = smaller, candidate, True
                break
            if tried >= SHRINKING:
                break
    return plan, verdict


def main() -> None:
    parser = argparse.ArgumentParser(description="random programs under the law")
    parser.add_argument("numbers", type=int, nargs="*", help="of the programs")
    parser.add_argument("--minutes", type=float, default=0.0, help="how long to run, from the program --start on")
    parser.add_argument("--start", type=int, default=0, help="the first program")
    options = parser.parse_args()
    campaign = Campaign(SEED)
    for number in options.numbers:
        verdict = campaign.run(number)
        print(f"{campaign.plan(number)}\n{verdict.outcome} {verdict.text}")
        if verdict.outcome == "fault":
            plan, verdict = smallest(campaign.plan(number))
            print(f"the smallest program that fails:\n{plan}\n{verdict.text}")
    if options.minutes:
        campaign.run_for(60 * options.minutes, options.start, sys.stdout)
    print(campaign.summary())
    sys.exit(bool(campaign.faults))


if __name__ == "__main__":
    main()
