"""fullrank: the whole ads and recommendation ranking funnel."""

__version__ = "0.1.0"
