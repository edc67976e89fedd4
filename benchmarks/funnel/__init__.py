"""Stages of a funnel: what they find, are worth and cost."""
