"""Losses on embeddings of two views, to be minimized: contrastive ones and two that whiten.

`info_nce` takes the other pairs of a batch as negatives, `model_contrastive` a set that is given;
`barlow_twins` and `vicreg` have no negatives and forbid collapse by the statistics of the batch.
Embeddings are normalized by the contrastive losses, so no gradient is NaN at zero.

All of them couple the examples of a batch: there are no gradients of single examples to clip.
Further losses are in optax and not repeated here: `optax.losses.ntxent` for the 2 n views of SimCLR
(with labels of two members each), `optax.losses.triplet_margin_loss`, and
`optax.losses.cosine_similarity`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fedlr import _checks, _precision, masking
from fedlr.information import _pairs

__all__ = ["barlow_twins", "info_nce", "model_contrastive", "symmetric_info_nce", "vicreg"]

Rows = Bool[Array, " n"] | None
Mask = Bool[Array, " n"] | Bool[Array, "n n"] | None


@_precision.highest
def info_nce(
    anchors: Float[Array, "n d"],
    positives: Float[Array, "n d"],
    *,
    negatives: Float[Array, "m d"] | Float[Array, "n m d"] | None = None,
    temperature: float | Float[Array, ""] = 0.1,
    mask: Mask = None,
) -> Float[Array, ""]:
    """Compute the InfoNCE loss of a batch, the other rows' positives being the negatives.

        mean_i [log sum_j exp(a_i . p_j / t) - a_i . p_i / t],   |a_i| = |p_j| = 1

    It is `optax.losses.softmax_cross_entropy_with_integer_labels` of the similarities with labels
    0, ..., n - 1, and log n minus `fedlr.information.info_nce_bound`.

    Args:
        anchors: Embeddings a_i, shape (n, d), float32 or float64. They are normalized here.
        positives: Embeddings p_i that belong to them, shape (n, d), of the anchors' dtype.
        negatives: More negatives beside those of the batch, shape (m, d) for all anchors or
            (n, m, d), of the anchors' dtype; a queue of earlier embeddings, for example.
        temperature: The number t, positive. The default is of SimCLR.
        mask: Real pairs, bool, shape (n,); or (n, n) with the diagonal for the real pairs and the
            rest for the positives j that may be negatives of anchor i, which leaves out equal
            labels, for example. What is masked may be NaN.

    Returns:
        The loss, shape (); 0 without a real pair.

    Raises:
        ValueError: If an array is not floating, shapes or dtypes do not fit, or the temperature is
            not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> views = jnp.eye(4)
        >>> round(float(information.info_nce(views, views, temperature=0.5)), 4)
        0.3408

    Reference:
        van den Oord, Li, Vinyals 2018, arXiv 1807.03748, equation (4); He et al. 2020, arXiv
        1911.05722, equation (1), for a queue of negatives.
    """
    _check_views("info_nce", anchors, positives)
    if negatives is not None:
        _check_negatives("info_nce", anchors, negatives)
    pairs, own = _batch("info_nce", anchors, positives, temperature, mask)
    normalizers = _pairs.log_normalizers(pairs)
    if negatives is not None:
        logits = _similarities(own, _directions(jnp.asarray(negatives)))
        more = jax.nn.logsumexp(logits / jnp.asarray(temperature, logits.dtype), axis=1)
        normalizers = jnp.logaddexp(normalizers, more)
    return masking.masked_mean(normalizers - pairs.joint, pairs.real)


@_precision.highest
def symmetric_info_nce(
    anchors: Float[Array, "n d"],
    positives: Float[Array, "n d"],
    *,
    temperature: float | Float[Array, ""] = 0.1,
    mask: Mask = None,
) -> Float[Array, ""]:
    """Average `info_nce` over both directions, the loss of CLIP.

    CLIP learns the logarithm of the temperature and keeps the temperature above 0.01; parameter and
    clipping are the caller's.

    Args:
        anchors: Embeddings a_i, shape (n, d), float32 or float64. They are normalized here.
        positives: Embeddings p_i that belong to them, shape (n, d), of the anchors' dtype.
        temperature: The number t, positive. CLIP starts at 0.07.
        mask: As for `info_nce`.

    Returns:
        The loss, shape (); 0 without a real pair.

    Raises:
        ValueError: If an array is not floating, shapes or dtypes do not fit, or the temperature is
            not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> images, texts = jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 0.0]])
        >>> round(float(information.symmetric_info_nce(images, texts, temperature=1.0)), 4)
        0.7532

    Reference:
        Radford et al. 2021, arXiv 2103.00020, figure 3.
    """
    _check_views("symmetric_info_nce", anchors, positives)
    pairs, _ = _batch("symmetric_info_nce", anchors, positives, temperature, mask)
    by_column, by_row = (_pairs.log_normalizers(pairs, axis) for axis in (0, 1))
    return masking.masked_mean((by_row + by_column) / 2 - pairs.joint, pairs.real)


@_precision.highest
def model_contrastive(
    anchors: Float[Array, "n d"],
    positives: Float[Array, "n d"],
    negatives: Float[Array, "m d"] | Float[Array, "n m d"],
    *,
    temperature: float | Float[Array, ""] = 0.5,
    mask: Bool[Array, " m"] | Bool[Array, "n m"] | None = None,
    rows: Rows = None,
) -> Float[Array, ""]:
    """Compute the contrastive loss with given negatives.

        mean_i -log(exp(a_i . p_i / t) / (exp(a_i . p_i / t) + sum_m exp(a_i . n_m / t)))

    In model-contrastive learning the anchors come from the client's model, the positives from the
    server's and the negatives from the client's earlier models; only the anchors are
    differentiated, which `jax.lax.stop_gradient` around the others says.

    Args:
        anchors: Embeddings a_i, shape (n, d), float32 or float64. All embeddings are normalized
            here.
        positives: Embeddings p_i, shape (n, d), of the anchors' dtype.
        negatives: Embeddings n_m for all anchors, shape (m, d), or of each anchor, (n, m, d), of
            the anchors' dtype.
        temperature: The number t, positive. The default is the paper's.
        mask: Negatives to use, bool, shape (m,) or (n, m). Others may be NaN.
        rows: Anchors that are real, bool, shape (n,). Others may be NaN.

    Returns:
        The loss, shape (). Exactly 0 with a zero gradient if no negative is used or no anchor real.

    Raises:
        ValueError: If an array is not floating, shapes or dtypes do not fit, or the temperature is
            not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> anchors = jnp.array([[1.0, 0.0]])
        >>> negatives = jnp.array([[0.0, 1.0], [0.0, -1.0], [jnp.nan, 0.0]])
        >>> mask = jnp.array([True, True, False])
        >>> round(float(information.model_contrastive(anchors, anchors, negatives, mask=mask)), 4)
        0.2395

    Reference:
        Li, He, Song 2021, arXiv 2103.16257, equation (3), for one negative.
    """
    _check_views("model_contrastive", anchors, positives)
    _check_negatives("model_contrastive", anchors, negatives)
    _check_temperature("model_contrastive", temperature)
    size, count = jnp.shape(anchors)[0], jnp.shape(negatives)[-2]
    rows = _rows("model_contrastive", rows, size)
    mask = jnp.ones(count, dtype=bool) if mask is None else mask
    _checks.check_ndim("model_contrastive", "mask", mask, 1, 2)
    _checks.check_mask("model_contrastive", mask, (size, count)[-jnp.ndim(mask) :])
    used = jnp.broadcast_to(jnp.atleast_2d(mask), (size, count)) & rows[:, None]
    needed = used if jnp.ndim(negatives) == 3 else jnp.any(used, axis=0)

    own, other = _directions(_keep(anchors, rows)), _directions(_keep(positives, rows))
    temperature = jnp.asarray(temperature, own.dtype)
    positive = jnp.sum(own * other, axis=1, keepdims=True) / temperature
    logits = _similarities(own, _directions(_keep(negatives, needed))) / temperature
    # the positive is always in the sum, so no row is all -inf
    logits = jnp.concatenate([positive, jnp.where(used, logits, -jnp.inf)], axis=1)
    return masking.masked_mean(jax.nn.logsumexp(logits, axis=1) - positive[:, 0], rows)


@_precision.highest
def barlow_twins(
    a: Float[Array, "n d"],
    b: Float[Array, "n d"],
    *,
    redundancy: float | Float[Array, ""] = 5e-3,
    mask: Rows = None,
) -> Float[Array, ""]:
    """Compute the loss of Barlow Twins: correlate a feature with itself and with no other.

        sum_i (1 - C_ii)^2 + redundancy sum_{i != j} C_ij^2

    C is the cross-correlation (d, d) of the features of both views, each standardized by mean and
    variance + 1e-5 of the batch.

    Args:
        a: Embeddings of the first view, shape (n, d), float32 or float64.
        b: Embeddings of the second, shape (n, d), of the same dtype.
        redundancy: Weight of the other features. The default is the paper's.
        mask: Real rows, bool, shape (n,). Others may be NaN.

    Returns:
        The loss, shape (); 0 without a real row.

    Raises:
        ValueError: If an array is not floating, or shapes or dtypes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> a = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> round(float(information.barlow_twins(a, -a)), 3)
        8.0

    Reference:
        Zbontar et al. 2021, arXiv 2103.03230, equations (1) and (2).
    """
    _check_views("barlow_twins", a, b)
    rows = _rows("barlow_twins", mask, jnp.shape(a)[0])
    first, second = (_standardize(view, rows) for view in (a, b))
    correlation = first.T @ second / _count(rows, first.dtype)
    eye = jnp.eye(correlation.shape[0], dtype=bool)
    alignment = jnp.sum((1 - jnp.diagonal(correlation)) ** 2)
    others = jnp.sum(jnp.where(eye, 0, correlation) ** 2)
    loss = alignment + jnp.asarray(redundancy, first.dtype) * others
    return jnp.where(jnp.any(rows), loss, 0)


@_precision.highest
def vicreg(
    a: Float[Array, "n d"],
    b: Float[Array, "n d"],
    *,
    invariance: float | Float[Array, ""] = 25.0,
    variance: float | Float[Array, ""] = 25.0,
    covariance: float | Float[Array, ""] = 1.0,
    mask: Rows = None,
) -> Float[Array, ""]:
    """Compute the loss of VICReg: views agree, features vary and do not covary.

        invariance mean (a - b)^2 + sum over views z of
            variance mean_i max(0, 1 - sqrt(V_ii + 1e-4)) + covariance sum_{i != j} V_ij^2 / d

    V is the covariance (d, d) of the view's features, divided by n - 1.

    Args:
        a: Embeddings of the first view, shape (n, d), float32 or float64.
        b: Embeddings of the second, shape (n, d), of the same dtype.
        invariance: Weight of the distance of the views.
        variance: Weight of the features' standard deviations.
        covariance: Weight of their covariances. The defaults are the paper's.
        mask: Real rows, bool, shape (n,). Others may be NaN.

    Returns:
        The loss, shape (); 0 without a real row.

    Raises:
        ValueError: If an array is not floating, or shapes or dtypes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> a = 2 * jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> float(information.vicreg(a, a)), float(information.vicreg(a, -a))
        (0.0, 400.0)

    Reference:
        Bardes, Ponce, LeCun 2022, arXiv 2105.04906, equations (1) to (6). The distance of the views
        is divided by d too, as in the authors' code; the terms of the views are added, as in the
        paper, where the code halves the variance term.
    """
    _check_views("vicreg", a, b)
    rows = _rows("vicreg", mask, jnp.shape(a)[0])
    first, second = (_keep(view, rows) for view in (a, b))
    weights = (jnp.asarray(x, first.dtype) for x in (invariance, variance, covariance))
    by_distance, by_spread, by_covariance = weights
    loss = by_distance * masking.masked_mean((first - second) ** 2, rows)
    for view in (first, second):
        spread, redundancy = _spread_and_redundancy(view, rows)
        loss += by_spread * spread + by_covariance * redundancy
    return jnp.where(jnp.any(rows), loss, 0)


def _batch(
    function: str, anchors: Array, positives: Array, temperature: Any, mask: Array | None
) -> tuple[_pairs.Pairs, Array]:
    """Return the similarities of a batch over the temperature, and the anchors' directions."""
    _check_temperature(function, temperature)
    real = _pairs.real_pairs(function, mask, jnp.shape(anchors)[0])
    own, other = _directions(_keep(anchors, real)), _directions(_keep(positives, real))
    scores = _similarities(own, other) / jnp.asarray(temperature, own.dtype)
    return _pairs.select(function, scores, mask), own


def _directions(vectors: Array) -> Array:
    """Normalize along the last axis; zero stays zero, with a finite gradient."""
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))


def _similarities(anchors: Array, others: Array) -> Float[Array, "n m"]:
    if others.ndim == 2:
        return anchors @ others.T
    return jnp.einsum("nd,nmd->nm", anchors, others)


def _keep(vectors: Array, rows: Array) -> Array:
    """Put zeros for the vectors that are masked."""
    return jnp.where(masking.spread(rows, jnp.shape(vectors)), vectors, 0)


def _rows(function: str, mask: Array | None, size: int) -> Bool[Array, " n"]:
    if mask is None:
        return jnp.ones(size, dtype=bool)
    _checks.check_mask(function, mask, (size,))
    return mask


def _count(rows: Array, dtype: Any) -> Array:
    return jnp.maximum(jnp.sum(rows), 1).astype(dtype)


def _center(view: Array, rows: Array) -> Array:
    """Subtract the mean of the real rows; the others become zero."""
    return _keep(view - masking.masked_mean(view, rows, axis=0)[None], rows)


def _standardize(view: Array, rows: Array) -> Array:
    centered = _center(_keep(view, rows), rows)
    variances = jnp.sum(centered**2, axis=0) / _count(rows, centered.dtype)
    return centered * jax.lax.rsqrt(variances + 1e-5)[None]


def _spread_and_redundancy(view: Array, rows: Array) -> tuple[Array, Array]:
    """Return VICReg's variance and covariance terms of one view."""
    centered = _center(view, rows)
    degrees = jnp.maximum(_count(rows, centered.dtype) - 1, 1)
    products = centered.T @ centered / degrees
    spread = jnp.mean(jax.nn.relu(1 - jnp.sqrt(jnp.diagonal(products) + 1e-4)))
    eye = jnp.eye(products.shape[0], dtype=bool)
    return spread, jnp.sum(jnp.where(eye, 0, products) ** 2) / products.shape[0]


def _check_views(function: str, first: Array, second: Array) -> None:
    """Refuse two arrays that are not both (n, d) and of one dtype."""
    _checks.check_floating(function, **{"embeddings": first, "other embeddings": second})
    _checks.check_ndim(function, "embeddings", first, 2)
    _checks.check_shape(function, "other embeddings", second, jnp.shape(first))
    _check_dtype(function, first, second)


def _check_negatives(function: str, anchors: Array, negatives: Array) -> None:
    _checks.check_floating(function, negatives=negatives)
    _checks.check_ndim(function, "negatives", negatives, 2, 3)
    size, features = jnp.shape(anchors)
    wanted = (*(size,) * (jnp.ndim(negatives) - 2), jnp.shape(negatives)[-2], features)
    _checks.check_shape(function, "negatives", negatives, wanted)
    _check_dtype(function, anchors, negatives)


def _check_dtype(function: str, first: Array, second: Array) -> None:
    dtypes = jnp.result_type(first), jnp.result_type(second)
    if dtypes[0] != dtypes[1]:
        raise _checks.fail(function, f"embeddings of dtypes {dtypes[0]}, {dtypes[1]}", "one dtype")


def _check_temperature(function: str, temperature: Any) -> None:
    """Refuse a concrete temperature that is no positive scalar; tracers pass."""
    _checks.check_ndim(function, "temperature", temperature, 0)
    _checks.check_positive(function, "temperature", temperature)
