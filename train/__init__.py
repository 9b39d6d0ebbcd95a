"""The training loop that all stages share: optimizer, schedule, checkpoints, resume, logging."""
