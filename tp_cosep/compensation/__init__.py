"""Keeping the accuracy: refits of consumers, BatchNorm re-estimation, recovery around a pruning step."""
