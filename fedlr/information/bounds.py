"""Estimators of mutual information from a matrix of critic scores.

``scores[i, j] = T(x_i, y_j)`` of n pairs: the diagonal holds the joint pairs, everything else the
negatives, which stand for the product of the marginals. `fedlr.information.critics` makes such
matrices. All estimates are in nats, larger means more information, and to train a critic one makes
its estimate larger. Estimate on pairs that the critic was not trained on: on the others it measures
what the critic remembers.

Every estimator takes a ``mask``:

* None: all n pairs are real and all n (n - 1) others are negatives.
* bool (n,): which pairs are real. Row and column of the others are left out: batches of unequal
  size, filled up to one length.
* bool (n, n): the diagonal says which pairs are real, the rest which entries may serve as
  negatives. Rows and columns of pairs that are not real are left out here too.

Masked scores may be NaN or huge and change neither a value nor a gradient. Without a real pair or
without negatives the estimate and its gradient are 0.

Negatives have to be draws from the product of the marginals. Where y takes few values, equal labels
are among them, and a matrix that leaves those pairs out makes a better loss for learning features,
but the estimates come out larger than the information.

What an estimate can show is limited: `info_nce_bound` never exceeds log n, and the variance of
`nwj` and `donsker_varadhan` grows like exp(information) / n. Report a spread over batches.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from fedlr import _checks, masking
from fedlr.information import _pairs

__all__ = [
    "barber_agakov",
    "club",
    "donsker_varadhan",
    "info_nce_bound",
    "jensen_shannon",
    "jensen_shannon_as_nwj",
    "jensen_shannon_as_smile",
    "mine",
    "nwj",
    "smile",
    "symmetric_info_nce_bound",
]

Mask = Bool[Array, " n"] | Bool[Array, "n n"] | None


def info_nce_bound(scores: Float[Array, "n n"], *, mask: Mask = None) -> Float[Array, ""]:
    """Bound the information from below by InfoNCE.

        mean_i [s_ii - log sum_j exp s_ij] + log n,   j over the pair i and its negatives

    Never above log n; within a few percent of it, it means "at least". A constant added to a row
    changes nothing. With a mask, n is the number of terms of the row's sum. As a loss it is
    `optax.losses.softmax_cross_entropy_with_integer_labels` with the labels 0, ..., n - 1, or
    `fedlr.information.info_nce` of embeddings.

    Args:
        scores: Scores T(x_i, y_j), shape (n, n), float32 or float64.
        mask: Real pairs (n,) or usable entries (n, n), bool; see the module.

    Returns:
        The estimate in nats, shape ().

    Raises:
        ValueError: If the scores are not floating or not square, or the mask is not bool or of
            another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> round(float(information.info_nce_bound(2 * jnp.eye(8))), 4)
        1.413

    Reference:
        van den Oord, Li, Vinyals 2018, arXiv 1807.03748, equation (4) and section 2.3; Poole et
        al. 2019, arXiv 1905.06922, I_NCE.
    """
    return _info_nce(_pairs.select("info_nce_bound", scores, mask))


def symmetric_info_nce_bound(scores: Float[Array, "n n"], *, mask: Mask = None) -> Float[Array, ""]:
    """Bound the information from below by the mean of InfoNCE over rows and over columns.

    Args:
        scores: Scores T(x_i, y_j), shape (n, n), float32 or float64.
        mask: Real pairs (n,) or usable entries (n, n), bool; see the module.

    Returns:
        The estimate in nats, shape (), never above log n.

    Raises:
        ValueError: If the scores are not floating or not square, or the mask is not bool or of
            another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> scores = jnp.array([[1.0, 0.0], [2.0, 3.0]])
        >>> round(float(information.symmetric_info_nce_bound(scores)), 4)
        0.1961

    Reference:
        Radford et al. 2021, arXiv 2103.00020, figure 3, as a loss.
    """
    pairs = _pairs.select("symmetric_info_nce_bound", scores, mask)
    return (_info_nce(pairs, 0) + _info_nce(pairs, 1)) / 2


def nwj(scores: Float[Array, "n n"], *, mask: Mask = None) -> Float[Array, ""]:
    """Bound the information from below as Nguyen, Wainwright and Jordan do.

        mean_i s_ii - mean_{i != j} exp(s_ij - 1)

    Unbiased, of large variance. The best critic is 1 + log ratio. A score beyond about 88 overflows
    in float32 and the estimate is -inf, so the critic must be bounded; `smile` clips.

    Args:
        scores: Scores T(x_i, y_j), shape (n, n), float32 or float64.
        mask: Real pairs (n,) or usable entries (n, n), bool; see the module.

    Returns:
        The estimate in nats, shape ().

    Raises:
        ValueError: If the scores are not floating or not square, or the mask is not bool or of
            another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> round(float(information.nwj(2 * jnp.eye(8))), 4)
        1.6321

    Reference:
        Nguyen, Wainwright, Jordan 2010, arXiv 0809.0853; Poole et al. 2019, arXiv 1905.06922,
        I_NWJ.
    """
    return _nwj(_pairs.select("nwj", scores, mask))


def donsker_varadhan(scores: Float[Array, "n n"], *, mask: Mask = None) -> Float[Array, ""]:
    """Estimate the information by the representation of Donsker and Varadhan.

        mean_i s_ii - log mean_{i != j} exp s_ij

    A lower bound for exact expectations only: from a batch it is biased upward, and so is its
    gradient, see `mine`. A constant added to all scores changes nothing.

    Args:
        scores: Scores T(x_i, y_j), shape (n, n), float32 or float64.
        mask: Real pairs (n,) or usable entries (n, n), bool; see the module.

    Returns:
        The estimate in nats, shape ().

    Raises:
        ValueError: If the scores are not floating or not square, or the mask is not bool or of
            another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> float(information.donsker_varadhan(2 * jnp.eye(8)))
        2.0

    Reference:
        Belghazi et al. 2018, arXiv 1801.04062, section 3.
    """
    return _donsker_varadhan(_pairs.select("donsker_varadhan", scores, mask))


def mine(
    scores: Float[Array, "n n"],
    ema: float | Float[Array, ""],
    *,
    rate: float = 0.01,
    mask: Mask = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Estimate as `donsker_varadhan`, with a gradient that small batches bias less (MINE).

        new_ema = (1 - rate) ema + rate mean_{i != j} exp s_ij
        gradient = that of mean_i s_ii - mean_{i != j} exp(s_ij) / new_ema,   new_ema held fixed

    A rate of 1 gives the gradient of `donsker_varadhan`. It is computed from logarithms, so it is
    finite where exp s_ij overflows; the state then stays at the largest number of its dtype.

    Args:
        scores: Scores T(x_i, y_j), shape (n, n), float32 or float64.
        ema: Moving average of the partition function, non-negative, shape (). 1 is a good start
            for an untrained critic; after that, what the last call returned.
        rate: Weight of this batch in the average, above 0 and at most 1; *static*. The authors'
            code has 0.01.
        mask: Real pairs (n,) or usable entries (n, n), bool; see the module.

    Returns:
        The estimate in nats, shape (), and the new average, shape (), which has no gradient and is
        the old one if there are no negatives.

    Raises:
        ValueError: If the scores are not floating or not square, the mask is not bool or of another
            shape, the average is negative, or the rate is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> estimate, ema = information.mine(2 * jnp.eye(8), 3.0, rate=0.5)
        >>> float(estimate), float(ema.round(4))
        (2.0, 2.0)

    Reference:
        Belghazi et al. 2018, arXiv 1801.04062, section 3.2.
    """
    _checks.check_non_negative("mine", "ema", ema)
    if not 0 < rate <= 1:
        raise _checks.fail("mine", f"rate {rate}", "a number above 0 and at most 1")
    pairs = _pairs.select("mine", scores, mask)
    ema, share = (jnp.asarray(x, pairs.joint.dtype) for x in (ema, rate))
    _checks.check_ndim("mine", "ema", ema, 0)
    log_mean = _pairs.log_mean_exp(pairs.product, pairs)
    log_ema = jnp.logaddexp(jnp.log1p(-share) + jnp.log(ema), jnp.log(share) + log_mean)
    log_ema = lax.stop_gradient(log_ema)
    joint = _pairs.mean_joint(pairs.joint, pairs)
    objective = joint - _pairs.mean_product(jnp.exp(pairs.product - log_ema), pairs)
    largest = jnp.finfo(ema.dtype).max
    some = jnp.any(pairs.counts[1] > 0)
    new_ema = jnp.where(some, jnp.minimum(jnp.exp(log_ema), largest), ema)
    return _straight_through(joint - log_mean, objective), lax.stop_gradient(new_ema)


def jensen_shannon(scores: Float[Array, "n n"], *, mask: Mask = None) -> Float[Array, ""]:
    """Compute the variational objective of the Jensen-Shannon divergence of joint and product.

        -mean_i softplus(-s_ii) - mean_{i != j} softplus(s_ij)

    A stable objective for critics and encoders. The best critic reaches 2 JS - 2 log 2, which is
    -2 log 2 for independent variables and 0 for disjoint distributions. It is **no** estimate of
    the mutual information; `jensen_shannon_as_nwj` and `jensen_shannon_as_smile` read one off the
    same critic.
    The terms are minus `optax.losses.sigmoid_binary_cross_entropy` with labels 1 and 0.

    Args:
        scores: Scores T(x_i, y_j), shape (n, n), float32 or float64. The best ones are the log
            ratio.
        mask: Real pairs (n,) or usable entries (n, n), bool; see the module.

    Returns:
        The objective, to be maximized, shape ().

    Raises:
        ValueError: If the scores are not floating or not square, or the mask is not bool or of
            another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> round(float(information.jensen_shannon(2 * jnp.eye(8))), 4)
        -0.8201

    Reference:
        Hjelm et al. 2019, arXiv 1808.06670, equation (4).
    """
    return _jensen_shannon(_pairs.select("jensen_shannon", scores, mask))


def jensen_shannon_as_nwj(scores: Float[Array, "n n"], *, mask: Mask = None) -> Float[Array, ""]:
    """Read the information off a critic that is trained by `jensen_shannon`.

    The value is ``nwj(scores + 1)``, a lower bound; the gradient is that of `jensen_shannon`.

    Args:
        scores: Scores T(x_i, y_j), shape (n, n), float32 or float64.
        mask: Real pairs (n,) or usable entries (n, n), bool; see the module.

    Returns:
        The estimate in nats, shape ().

    Raises:
        ValueError: If the scores are not floating or not square, or the mask is not bool or of
            another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> float(information.jensen_shannon_as_nwj(2 * jnp.eye(8)))
        2.0

    Reference:
        Poole et al. 2019, arXiv 1905.06922, and Song and Ermon 2020, arXiv 1910.06222: there called
        NWJ trained by JS.
    """
    pairs = _pairs.select("jensen_shannon_as_nwj", scores, mask)
    shifted = pairs._replace(joint=pairs.joint + 1, product=pairs.product + 1)
    return _straight_through(_nwj(shifted), _jensen_shannon(pairs))


def jensen_shannon_as_smile(
    scores: Float[Array, "n n"], *, clip: float | Float[Array, ""] = 5.0, mask: Mask = None
) -> Float[Array, ""]:
    """Read `smile` off a critic that is trained by `jensen_shannon`, as the authors of SMILE do.

    Args:
        scores: Scores T(x_i, y_j), shape (n, n), float32 or float64.
        clip: Scores of negatives are clipped to ``[-clip, clip]`` in the value.
        mask: Real pairs (n,) or usable entries (n, n), bool; see the module.

    Returns:
        The value of `smile` with the gradient of `jensen_shannon`, shape ().

    Raises:
        ValueError: If the scores are not floating or not square, the mask is not bool or of another
            shape, or `clip` is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> float(information.jensen_shannon_as_smile(2 * jnp.eye(8)))
        2.0

    Reference:
        Song and Ermon 2020, arXiv 1910.06222, I_SMILE as in the authors' code.
    """
    pairs = _pairs.select("jensen_shannon_as_smile", scores, mask)
    return _straight_through(_smile("jensen_shannon_as_smile", pairs, clip), _jensen_shannon(pairs))


def smile(
    scores: Float[Array, "n n"], *, clip: float | Float[Array, ""] = 5.0, mask: Mask = None
) -> Float[Array, ""]:
    """Estimate as `donsker_varadhan` with clipped scores of the negatives (SMILE).

        mean_i s_ii - log mean_{i != j} exp clip(s_ij, -c, c)

    Of bounded variance. No bound: biased upward where the log ratio exceeds c.

    Args:
        scores: Scores T(x_i, y_j), shape (n, n), float32 or float64.
        clip: The number c. The paper tries 1, 5 and infinity.
        mask: Real pairs (n,) or usable entries (n, n), bool; see the module.

    Returns:
        The estimate in nats, shape ().

    Raises:
        ValueError: If the scores are not floating or not square, the mask is not bool or of another
            shape, or `clip` is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> float(information.smile(100 * jnp.eye(8)[::-1], clip=0.0))
        0.0

    Reference:
        Song and Ermon 2020, arXiv 1910.06222, I_SMILE.
    """
    return _smile("smile", _pairs.select("smile", scores, mask), clip)


def club(log_conditional: Float[Array, "n n"], *, mask: Mask = None) -> Float[Array, ""]:
    """Bound the information from above by CLUB.

        mean_i log q(y_i | x_i) - mean_{i != j} log q(y_j | x_i)

    An upper bound if q is the true conditional distribution, none else. Fit q by maximum likelihood
    in a step of its own, never through this value. The paper averages over all j; its form times
    n / (n - 1) is this one.

    Args:
        log_conditional: Entry (i, j) is log q(y_j | x_i), shape (n, n), float32 or float64. A term
            that depends on y_j alone cancels.
        mask: Real pairs (n,) or usable entries (n, n), bool; see the module.

    Returns:
        The estimate in nats, shape ().

    Raises:
        ValueError: If the matrix is not floating or not square, or the mask is not bool or of
            another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> round(float(information.club(jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9]])))), 4)
        2.1972

    Reference:
        Cheng et al. 2020, arXiv 2006.12013, I_CLUB and I_vCLUB.
    """
    pairs = _pairs.select("club", log_conditional, mask)
    return _pairs.mean_joint(pairs.joint, pairs) - _pairs.mean_product(pairs.product, pairs)


def barber_agakov(
    log_likelihoods: Float[Array, " n"],
    entropy: float | Float[Array, ""],
    *,
    mask: Bool[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """Bound the information from below as Barber and Agakov do: ``H(y) + mean_i log q(y_i | x_i)``.

    For a Gaussian q of fixed variance this is the mean squared error up to constants: added to a
    regression's loss it says nothing new.

    Args:
        log_likelihoods: log q(y_i | x_i), shape (n,), float32 or float64.
        entropy: H(y) in nats, shape ().
        mask: Real pairs, bool, shape (n,).

    Returns:
        The estimate in nats, shape (); 0 without a real pair.

    Raises:
        ValueError: If the likelihoods are not floating or not a vector, the entropy is no scalar,
            or the mask is not bool or of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> round(float(information.barber_agakov(jnp.log(jnp.array([0.9, 0.9])), jnp.log(2.0))), 4)
        0.5878

    Reference:
        Barber and Agakov 2003, The IM algorithm; Poole et al. 2019, arXiv 1905.06922, I_BA.
    """
    _checks.check_floating("barber_agakov", log_likelihoods=log_likelihoods)
    _checks.check_ndim("barber_agakov", "log_likelihoods", log_likelihoods, 1)
    values = jnp.asarray(log_likelihoods)
    entropy = jnp.asarray(entropy, values.dtype)
    _checks.check_ndim("barber_agakov", "entropy", entropy, 0)
    mask = jnp.ones(values.shape, dtype=bool) if mask is None else mask
    _checks.check_mask("barber_agakov", mask, values.shape)
    return masking.masked_mean(jnp.where(mask, values, 0) + entropy, mask)


def _info_nce(pairs: _pairs.Pairs, axis: int = 1) -> Array:
    sizes = 1 + pairs.counts[axis]
    shares = pairs.joint - _pairs.log_normalizers(pairs, axis)
    return _pairs.mean_joint(shares + jnp.log(sizes.astype(shares.dtype)), pairs)


def _donsker_varadhan(pairs: _pairs.Pairs) -> Array:
    return _pairs.mean_joint(pairs.joint, pairs) - _pairs.log_mean_exp(pairs.product, pairs)


def _nwj(pairs: _pairs.Pairs) -> Array:
    joint = _pairs.mean_joint(pairs.joint, pairs)
    return joint - _pairs.mean_product(jnp.exp(pairs.product - 1), pairs)


def _jensen_shannon(pairs: _pairs.Pairs) -> Array:
    joint = _pairs.mean_joint(jax.nn.softplus(-pairs.joint), pairs)
    return -joint - _pairs.mean_product(jax.nn.softplus(pairs.product), pairs)


def _smile(function: str, pairs: _pairs.Pairs, clip: float | Array) -> Array:
    _checks.check_non_negative(function, "clip", clip)
    limit = jnp.asarray(clip, pairs.joint.dtype)
    _checks.check_ndim(function, "clip", limit, 0)
    return _donsker_varadhan(pairs._replace(product=jnp.clip(pairs.product, -limit, limit)))


def _straight_through(value: Array, objective: Array) -> Array:
    """Return the value with the gradient of the objective."""
    return lax.stop_gradient(value) + (objective - lax.stop_gradient(objective))
