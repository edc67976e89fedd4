"""Raw logs in, encoded Parquet out: public formats, encoders, splits, histories, loaders and the simulator."""
