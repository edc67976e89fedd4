"""Stages of a funnel: what they keep, lose and cost."""
