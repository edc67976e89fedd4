"""Quality, size and speed of the rankers, and the tables of their pages."""
