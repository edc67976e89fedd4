"""The funnel: its stages, its lists and what they are worth."""
