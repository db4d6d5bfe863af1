"""The law for random programs: steps, uses, wrappers, methods, dtypes and shardings, adapted against merged."""

from __future__ import annotations

import os
import sys

import pytest

from tests.support.campaign.run import Campaign
from tests.support.draw import SEED

MINUTES = "JLORA_CAMPAIGN_MINUTES"  # how long the nightly run takes
PROGRAMS = 8  # of the default run


def verdict_of(campaign: Campaign) -> None:
    print(campaign.summary())
    assert not campaign.faults, "\n\n".join(campaign.faults[:5])


def test_a_few_random_programs() -> None:
    campaign = Campaign(SEED)
    for number in range(PROGRAMS):
        campaign.run(number)
    verdict_of(campaign)
    outcomes = campaign.outcomes  # of so few programs all may be coarse
    assert outcomes["agrees"] + outcomes["coarse"] > outcomes["refused"], campaign.summary()


@pytest.mark.nightly
def test_random_programs_for_an_hour(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints how many programs of which kinds ran, whether they agreed or not."""
    campaign = Campaign(SEED)
    campaign.run_for(60 * float(os.environ.get(MINUTES, "60")), start=PROGRAMS)
    with capsys.disabled():
        print(campaign.summary(), file=sys.stderr)
    verdict_of(campaign)
    assert campaign.outcomes["agrees"] > campaign.outcomes["refused"], campaign.summary()
