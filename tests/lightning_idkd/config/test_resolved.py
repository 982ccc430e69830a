"""How two resolved configs are compared."""

import pytest

from lightning_idkd.config.resolved import difference


@pytest.mark.parametrize(
    ("stored", "now", "differs"),
    [
        ({}, {"new": None}, False),
        ({}, {"new": False}, False),
        ({}, {"new": 0.5}, True),
        ({}, {"new": True}, True),
        ({"new": True}, {}, True),
        ({"own": None}, {"own": False}, True),  # both are given, so they are two values
        ({"own": False}, {"own": False}, False),
    ],
)
def test_a_stored_run_may_be_older_than_an_argument_that_is_off(stored, now, differs):
    a, b = ({"gossip": {"class_path": "X", "init_args": arguments}} for arguments in (stored, now))
    assert (difference(a, b, ("gossip",)) is not None) == differs
