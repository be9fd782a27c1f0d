"""Utilities without any pruning: data loaders, processes, files, sampled positions, snapshots, timing, checks."""
