"""Hierarchical retrieval: networks over towers, and an index of items that is learnt with them."""
