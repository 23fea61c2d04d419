"""Hard negatives and clustered batches, mined from the model as it is."""
