"""The run folder: lock, checkpoints, resume, what has changed, model card, loss curve."""
