"""The run folder: lock, checkpoints, resume, drift, model card, loss curve."""
