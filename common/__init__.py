"""The plumbing that is nobody's lesson: settings, devices and processes, checkpoints, optimizers, logs."""
