"""The method on tensors: class moments, separability, k-medoids, silhouettes, knees, elimination, least squares.

Every function takes tensors and returns tensors or values; nothing here knows of modules, hooks or Torch-Pruning.
"""
