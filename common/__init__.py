"""The plumbing that is nobody's lesson: settings, processes, checkpoints, optimizers, logs."""
