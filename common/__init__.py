"""Settings, files, devices, images: used everywhere, imports nothing above."""
