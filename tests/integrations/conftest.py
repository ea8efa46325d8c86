"""A Trainer collects garbage before it trains, through everything that the libraries have imported: that is set aside once."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="package")
def _imported_objects_are_not_gone_through():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
