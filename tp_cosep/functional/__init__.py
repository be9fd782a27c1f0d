"""The method on tensors: class moments, separability, k-medoids, silhouettes, knees, elimination, least squares.

All functions take tensors and return tensors or values, without modules, hooks or Torch-Pruning.

Example:
    >>> import torch
    >>> x = torch.randn(100, 6, 4, generator=torch.Generator().manual_seed(0))  # [samples, components, cells]
    >>> x, labels = torch.cat([x, 2 * x], 1), torch.arange(100) % 5  # every component has a copy
    >>> distances = distances_from_gram(profile_gram(ClassMoments.from_batch(x, labels)))
    >>> path = k_medoids_path(distances)
    >>> find_knee([solution.k for solution in path], mss_curve(distances, path).tolist()).k
    6
    >>> select_channels(distances).keep_idxs
    (0, 1, 2, 3, 4, 5)
"""

from tp_cosep.functional.attention_distances import jensen_shannon_distances
from tp_cosep.functional.class_moments import ClassMoments, to_cells
from tp_cosep.functional.elimination import Consumer, Elimination, backward_elimination
from tp_cosep.functional.head_selection import heads_of_layer, heads_of_model
from tp_cosep.functional.kmedoids import KMedoids, k_medoids, k_medoids_path
from tp_cosep.functional.knee import Knee, difference_curve, find_knee, guarded_count
from tp_cosep.functional.least_squares import LinearFit, fit_linear, refit_to_kept, refit_to_others
from tp_cosep.functional.second_moments import SecondMoments
from tp_cosep.functional.selection import ChannelSelection, nested_scores, select_by_elimination, select_channels
from tp_cosep.functional.separability import PairMetric, distances_from_gram, pooled_gram, profile_gram, profiles
from tp_cosep.functional.silhouette import mean_simplified_silhouette, mss_curve, non_medoid_silhouette

__all__ = [
    "ChannelSelection",
    "ClassMoments",
    "Consumer",
    "Elimination",
    "KMedoids",
    "Knee",
    "LinearFit",
    "PairMetric",
    "SecondMoments",
    "backward_elimination",
    "difference_curve",
    "distances_from_gram",
    "find_knee",
    "fit_linear",
    "guarded_count",
    "heads_of_layer",
    "heads_of_model",
    "jensen_shannon_distances",
    "k_medoids",
    "k_medoids_path",
    "mean_simplified_silhouette",
    "mss_curve",
    "nested_scores",
    "non_medoid_silhouette",
    "pooled_gram",
    "profile_gram",
    "profiles",
    "refit_to_kept",
    "refit_to_others",
    "select_by_elimination",
    "select_channels",
    "to_cells",
]
