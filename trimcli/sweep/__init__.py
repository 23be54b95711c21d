"""A grid of settings from one calibration, measured on held-out samples."""
