"""The outer loop and what surrounds it: settings, checkpoints, several processes, logs, evaluation, reports."""
