"""The table of methods under test, a file a family: test_conformance.py runs every check on every row.

A row names a method with small hyper-parameters, a tiny random base and a batch of four examples.
"""

from tests.zoo import additive, hybrid, lifecycle, reparameterized, selective

ROWS = [*reparameterized.ROWS, *additive.ROWS, *selective.ROWS, *lifecycle.ROWS, *hybrid.ROWS]
