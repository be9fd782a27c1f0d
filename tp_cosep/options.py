"""Options of the selector and of the pruner, checked before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from math import inf
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from tp_cosep.attention import ATTENTION_JS
from tp_cosep.class_checks import TAPS
from tp_cosep.costs import UNITS
from tp_cosep.errors import InputError
from tp_cosep.medoids import BACKENDS
from tp_cosep.reader_spaces import READER_SPACES
from tp_cosep.separability import PairMetric, resolve_metric
from tp_cosep.silhouette import MSS_FORMS
from tp_cosep.tracing import TRACE_OPTIONS

__all__ = [
    "DEFAULT_METHODS",
    "MODES",
    "check_compensator",
    "check_fit_keywords",
    "check_heads",
    "check_pruner",
    "check_selector",
    "check_target",
    "default_space",
]

#: How a compensator repairs: one fit per group on what was measured of the unpruned model, or another one on what the
#: pruned model computes.
MODES = ("one-shot", "sequential")
_REPRESENTATIVES = ("medoid", "max_norm", "reconstruction")
_METHODS = ("k-medoids", "column-subset")
#: How channels are chosen in every space unless told otherwise.
DEFAULT_METHODS = {
    "separability": "k-medoids",
    "correlation": "k-medoids",
    "class-means": "column-subset",
    "reconstruction": "column-subset",
    "joint": "column-subset",
}


def check_selector(
    *,
    metric: str | PairMetric,
    tap: str,
    scope: str,
    mss_form: str,
    backend: str,
    representative: str | Callable[[Any], Tensor | None] | None,
    space: str,
    method: str | None,
    n_keep: int | None,
    keep_ratio: float | None,
    max_class_pairs: int | None,
) -> None:
    """Check the options of :class:`tp_cosep.CoSePSelector`.

    Raises:
        InputError: If one is unknown or out of range, or two contradict each other.
    """
    if metric != ATTENTION_JS:
        resolve_metric(metric)
    for name, value, known in (
        ("tap", tap, list(TAPS)),
        ("mss_form", mss_form, sorted(MSS_FORMS)),
        ("backend", backend, sorted(BACKENDS)),
        ("space", space, ["separability", *READER_SPACES]),
    ):
        if value not in known:
            raise InputError(f"CoSePSelector: expected {name} of {known}, got {value!r}.")
    if scope not in ("layer", "model"):
        raise InputError(f"CoSePSelector: expected scope 'layer' or 'model', got {scope!r}.")
    if representative is not None and not callable(representative) and representative not in _REPRESENTATIVES:
        raise InputError(
            f"CoSePSelector: expected representative of {list(_REPRESENTATIVES)} or an importance, got "
            f"{representative!r}."
        )
    _check_space(space, method, metric, tap, representative)
    _check_count(n_keep, keep_ratio)
    if max_class_pairs is not None and not _is_count(max_class_pairs):
        raise InputError(
            f"CoSePSelector: expected max_class_pairs to be an integer ≥ 1 or None, got {max_class_pairs!r}."
        )


def _check_count(n_keep: int | None, keep_ratio: float | None) -> None:
    if n_keep is not None and keep_ratio is not None:
        raise InputError("CoSePSelector: expected n_keep or keep_ratio, got both.")
    if n_keep is not None and not _is_count(n_keep):
        raise InputError(f"CoSePSelector: expected n_keep to be an integer ≥ 1 or None, got {n_keep!r}.")
    if keep_ratio is not None and not (_is_number(keep_ratio) and 0 < keep_ratio <= 1):
        raise InputError(f"CoSePSelector: expected keep_ratio in (0, 1] or None, got {keep_ratio!r}.")


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def default_space(*, metric: str | PairMetric, tap: str, representative: object | None, method: str | None) -> str:
    """The space if none is named: joint, unless an option is about clusters in separability space.

    Returns:
        Its name.
    """
    is_about_clusters = metric != "jm" or tap != "producers" or representative is not None or method == "k-medoids"
    return "separability" if is_about_clusters else "joint"


def _check_space(
    space: str, method: str | None, metric: str | PairMetric, tap: str, representative: object | None
) -> None:
    if method is not None and method not in _METHODS:
        raise InputError(f"CoSePSelector: expected method of {list(_METHODS)} or None, got {method!r}.")
    if space == "separability":
        if method == "column-subset":
            raise InputError(
                "CoSePSelector: method='column-subset' asks what readers can do without, which separability profiles "
                f"do not tell; use it with a space of {list(READER_SPACES)}."
            )
        return
    for name, value, default in (("metric", metric, "jm"), ("tap", tap, "producers")):
        if value != default:
            raise InputError(f"CoSePSelector: {name}={value!r} belongs to space='separability', got space={space!r}.")
    if representative is not None and (method or DEFAULT_METHODS[space]) != "k-medoids":
        raise InputError(
            f"CoSePSelector: representative={representative!r} chooses among the members of a cluster, and "
            f"space={space!r} makes no clusters; add method='k-medoids', or leave one of them out."
        )


def check_compensator(
    *,
    mode: str,
    max_positions: int | None,
    max_features: int,
    ridge: float | None,
    memory_budget: int,
    seed: int,
    forward_fn: object,
    trace_options: Mapping[str, Any],
) -> None:
    """Check options of :class:`tp_cosep.Compensator`.

    Raises:
        InputError: If one is unknown or out of range.
    """
    if mode not in MODES:
        raise InputError(f"Compensator: expected mode of {list(MODES)}, got {mode!r}.")
    if max_positions is not None and not _is_count(max_positions):
        raise InputError(f"Compensator: expected max_positions ≥ 1 or None, got {max_positions!r}.")
    if not (_is_count(max_features) or (isinstance(max_features, Integral) and max_features == 0)):
        raise InputError(f"Compensator: expected max_features ≥ 0, a whole number, got {max_features!r}.")
    if ridge is not None and not (_is_number(ridge) and 0 < ridge < inf):
        raise InputError(f"Compensator: expected ridge > 0 or None, got {ridge!r}.")
    if not (_is_number(memory_budget) and memory_budget > 0):
        raise InputError(f"Compensator: expected memory_budget > 0, in bytes, got {memory_budget!r}.")
    if not isinstance(seed, Integral):
        raise InputError(f"Compensator: expected seed to be a whole number, got {seed!r}.")
    if forward_fn is not None and not callable(forward_fn):
        raise InputError(f"Compensator: expected forward_fn to be a function or None, got {forward_fn!r}.")
    if unknown := set(trace_options) - set(TRACE_OPTIONS):
        raise InputError(
            f"Compensator: got unknown options {sorted(unknown)}; for tracing it takes {sorted(TRACE_OPTIONS)}."
        )


def check_pruner(
    pruning_ratio: float | None,
    *,
    global_pruning: bool,
    is_ranked: bool,
    automatic: bool,
    metric: str | PairMetric,
    on_failure: str,
    calls: Mapping[str, object],
    options: Mapping[str, Any],
) -> None:
    """Check options of :class:`tp_cosep.CoSePPruner` against each other.

    Raises:
        InputError: If one is unknown or out of range, or two contradict each other.
    """
    for name, is_on in (("global_pruning", global_pruning), ("isomorphic", options.get("isomorphic"))):
        if automatic and is_on:
            raise InputError(
                f"CoSePPruner: {name} compares layers for one overall ratio, so it needs a pruning_ratio, got None; "
                "without it every layer has its own count, and target={'macs': 0.5} shares out over all layers."
            )
    if pruning_ratio is not None and not (_is_number(pruning_ratio) and 0 <= pruning_ratio <= 1):
        raise InputError(f"CoSePPruner: expected pruning_ratio in [0, 1] or None, got {pruning_ratio!r}.")
    if is_ranked and metric == ATTENTION_JS:
        raise InputError(
            "CoSePPruner: metric='attention-js' compares heads only, it cannot rank channels of several layers; "
            "use head_pruning_ratio= without global_pruning or isomorphic."
        )
    if on_failure not in ("raise", "skip"):
        raise InputError(f"CoSePPruner: expected on_failure 'raise' or 'skip', got {on_failure!r}.")
    for name, call in calls.items():
        if call is not None and not callable(call):
            raise InputError(f"CoSePPruner: expected {name} to be a function of the model or None, got {call!r}.")
    _check_numbers(options)


def _check_numbers(options: Mapping[str, Any]) -> None:
    step, n_steps = options.get("round_to"), options.get("iterative_steps", 1)
    if step is not None and not _is_count(step):
        raise InputError(f"CoSePPruner: expected round_to to be an integer ≥ 1 or None, got {step!r}.")
    if not _is_count(n_steps):
        raise InputError(f"CoSePPruner: expected iterative_steps to be an integer ≥ 1, got {n_steps!r}.")
    most = options.get("max_pruning_ratio", 1.0)
    if not (_is_number(most) and 0 < most <= 1):
        raise InputError(f"CoSePPruner: expected max_pruning_ratio in (0, 1], got {most!r}.")
    ratios = options.get("pruning_ratio_dict")
    if not isinstance(ratios, Mapping | None):
        raise InputError(f"CoSePPruner: expected pruning_ratio_dict to map layers to ratios, got {ratios!r}.")
    for layers, ratio in (ratios or {}).items():
        # Counts are told to stock pruners by ratios a little below 0, see CoSePSelector.pruning_ratio_dict.
        if not (_is_number(ratio) and -1 < ratio <= 1):
            raise InputError(f"CoSePPruner: expected pruning_ratio_dict of {layers!r} in [0, 1], got {ratio!r}.")


def check_fit_keywords(options: Mapping[str, Any] | None, fit: Callable[..., object]) -> dict[str, Any]:
    """Check ``fit_options=`` of :class:`tp_cosep.CoSePPruner` before anything is measured with them.

    Returns:
        The options, a copy.

    Raises:
        InputError: If they are no keywords of ``fit``.
    """
    if options is None:
        return {}
    known = [name for name, p in signature(fit).parameters.items() if p.kind is Parameter.KEYWORD_ONLY]
    if not isinstance(options, Mapping):
        raise InputError(f"CoSePPruner: expected fit_options to map keywords to values, got {options!r}.")
    if unknown := [name for name in options if name not in known]:
        raise InputError(f"CoSePPruner: expected fit_options of {known}, got {unknown}.")
    return dict(options)


def check_target(
    target: Mapping[str, float] | None, *, automatic: bool, options: Mapping[str, Any]
) -> tuple[str, float] | None:
    """Check ``target=`` of :class:`tp_cosep.CoSePPruner`.

    Returns:
        The unit and the value.

    Raises:
        InputError: If it names no known unit or not one alone, is out of range, or contradicts another option.
    """
    if target is None:
        return None
    if not isinstance(target, Mapping) or len(target) != 1 or not target.keys() <= set(UNITS):
        raise InputError(
            f"CoSePPruner: expected target with one of {list(UNITS)}, such as {{'macs': 0.5}}, got {target!r}."
        )
    ((unit, value),) = target.items()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf") or value == 1:
        raise InputError(
            f"CoSePPruner: expected a target in {unit} between 0 and 1, a share of the model as it is, or above, the "
            f"number itself (of a latency milliseconds), got {value!r}."
        )
    for name, is_given in (("pruning_ratio", not automatic), ("prune_num_heads", options.get("prune_num_heads"))):
        if is_given:
            raise InputError(f"CoSePPruner: target= decides how much goes, and of channels; leave out {name}.")
    return unit, float(value)


def check_heads(model: nn.Module, num_heads: Mapping[nn.Module, int]) -> None:
    """Check numbers of heads by layer.

    Raises:
        InputError: If a layer is not one of the model's that can have heads, or its channels do not divide.
    """
    names = {m: name for name, m in model.named_modules()}
    for layer, n in num_heads.items():
        if layer not in names:
            raise InputError(f"num_heads: expected modules of the model, got a {type(layer).__name__} that is not.")
        if isinstance(layer, nn.MultiheadAttention):
            raise InputError(
                f"layer {names[layer]!r}: expected layers that make queries, keys and values, got a "
                "MultiheadAttention, whose heads Torch-Pruning cannot take apart; leave it out of num_heads: the same "
                "dimensions go in each of them."
            )
        width = getattr(layer, "out_features", getattr(layer, "out_channels", None))
        if n < 1 or (width is not None and width % n):
            raise InputError(f"layer {names[layer]!r}: expected num_heads to divide its {width} channels, got {n}.")
