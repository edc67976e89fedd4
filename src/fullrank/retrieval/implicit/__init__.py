"""Retrieval learnt from who took what and nothing else: implicit feedback."""
