"""Random programs under the law: what `tests/law/test_campaign.py` runs for an hour every night.

A plan is drawn from a seed and is data, so that a program that fails can be made smaller. To run one again:

    JLORA_TESTS_SEED=2030-01-31 python -m tests.support.campaign.run 17
"""
