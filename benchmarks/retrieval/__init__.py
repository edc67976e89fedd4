"""Indexes of the first stage: what they find, cost and stand."""
