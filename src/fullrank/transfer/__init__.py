"""From one foundation model to many small served models: labels, and embeddings of what users did, that it leaves."""
