"""Networks of several modalities: an encoder for each, their fusion, a head and a critic.

A sample has M modalities, of which some may be missing. Each encoder maps one to a Gaussian or a
point in the same q dimensions; the fusion makes d features of what is there; the head predicts
from the features, and a critic scores how well features and targets go together. All parts are
Equinox modules of ONE sample, so any other module with the same call takes their place, and the
arrays of a network, ``equinox.filter(network, equinox.is_inexact_array)``, are the params of every
federated algorithm.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from fedlr import _checks, information

__all__ = [
    "ConvolutionEncoder",
    "DenseEncoder",
    "Encoded",
    "GatedFusion",
    "Gaussian",
    "GaussianEncoder",
    "Modalities",
    "Network",
    "PrecisionFusion",
    "TokenEncoder",
    "all_present",
    "dense_network",
    "features",
    "predictions",
]

LOG_VARIANCES = (-8.0, 4.0)


class Modalities(NamedTuple):
    """What is known of a sample, or of many along leading axes.

    Attributes:
        values: One array for each of the M modalities, of shape (..., *shape of the modality). What
            the array of a missing modality holds does not matter.
        present: Which modalities are there, bool, shape (..., M).
    """

    values: tuple[Array, ...]
    present: Bool[Array, "... modalities"]


class Gaussian(NamedTuple):
    """Diagonal Gaussian that an encoder may return in place of a point.

    Attributes:
        mean: Mean, shape (q,).
        log_var: Logarithms of the variances, shape (q,).
    """

    mean: Float[Array, " q"]
    log_var: Float[Array, " q"]


class Encoded(NamedTuple):
    """What the encoders and the fusion make of a sample.

    Attributes:
        means: Points or means of the modalities, zero where missing, shape (M, q).
        log_vars: Logarithms of the variances, zero where missing, shape (M, q); None where the
            encoders return points.
        fused: Features, shape (d,).
    """

    means: Float[Array, "modalities q"]
    log_vars: Float[Array, "modalities q"] | None
    fused: Float[Array, " d"]


def all_present(values: Sequence[Array], *, batch_ndim: int = 1) -> Modalities:
    """Make the modalities of samples of which nothing is missing.

    Args:
        values: One array for each modality, with the same `batch_ndim` leading axes.
        batch_ndim: Number of leading axes, 1 for (samples,), 2 for (clients, samples). *Static.*

    Returns:
        The modalities.

    Raises:
        ValueError: If there is none, or they have different numbers of samples.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import multimodal
        >>> multimodal.all_present([jnp.ones((5, 3)), jnp.ones((5, 8, 8))]).present.shape
        (5, 2)
    """
    values = tuple(jnp.asarray(value) for value in values)
    shapes = {value.shape[:batch_ndim] for value in values}
    if len(shapes) != 1 or any(value.ndim < batch_ndim for value in values):
        got = f"values of shapes {[value.shape for value in values]}"
        raise _checks.fail("all_present", got, f"the same {batch_ndim} leading axes for all")
    return Modalities(values, jnp.ones((*shapes.pop(), len(values)), bool))


class DenseEncoder(eqx.Module):
    """Encode a vector: dense, GELU, dense, layer normalization.

    Batch normalization is left out on purpose: its statistics do not average over clients.

    Attributes:
        hidden: The first layer.
        last: The second layer.
        norm: Normalization of the code.

    Args:
        size: Length of the vector, *static*.
        width: q, the size of the code, *static*.
        hidden: Units of the hidden layer, *static*.
        key: Random key of the weights.
        dtype: float32 or float64, *static*.
    """

    hidden: eqx.nn.Linear
    last: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(
        self, size: int, width: int, *, hidden: int = 64, key: Key[Array, ""], dtype=jnp.float32
    ):
        first_key, last_key = jax.random.split(key)
        self.hidden = eqx.nn.Linear(size, hidden, key=first_key, dtype=dtype)
        self.last = eqx.nn.Linear(hidden, width, key=last_key, dtype=dtype)
        self.norm = eqx.nn.LayerNorm(width, dtype=dtype)

    def __call__(self, x: Float[Array, " size"]) -> Float[Array, " width"]:
        """Encode one vector."""
        return self.norm(self.last(jax.nn.gelu(self.hidden(x))))


class ConvolutionEncoder(eqx.Module):
    """Encode a sequence of vectors or a spectrum by convolutions along it and their mean.

    Two convolutions with GELU, 64 channels of kernel 3 and 128 of kernel 5, the mean over the
    positions, dense, layer normalization.

    Attributes:
        first: Convolution of kernel 3.
        second: Convolution of kernel 5.
        last: Layer from the mean of its maps to the code.
        norm: Normalization of the code.

    Args:
        channels: Length of the vectors, 1 for a spectrum, *static*.
        width: q, the size of the code, *static*.
        hidden: Channels of the two convolutions, *static*.
        key: Random key of the weights.
        dtype: float32 or float64, *static*.
    """

    first: eqx.nn.Conv1d
    second: eqx.nn.Conv1d
    last: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        hidden: tuple[int, int] = (64, 128),
        key: Key[Array, ""],
        dtype=jnp.float32,
    ):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Conv1d(channels, hidden[0], 3, padding=1, key=keys[0], dtype=dtype)
        self.second = eqx.nn.Conv1d(*hidden, 5, padding=2, key=keys[1], dtype=dtype)
        self.last = eqx.nn.Linear(hidden[1], width, key=keys[2], dtype=dtype)
        self.norm = eqx.nn.LayerNorm(width, dtype=dtype)

    def __call__(
        self, x: Float[Array, " length"] | Float[Array, "length channels"]
    ) -> Float[Array, " width"]:
        """Encode one sequence; a spectrum (length,) has one channel."""
        rows = x[None] if x.ndim == 1 else x.T
        maps = jax.nn.gelu(self.second(jax.nn.gelu(self.first(rows))))
        return self.norm(self.last(jnp.mean(maps, axis=1)))


class TokenEncoder(eqx.Module):
    """Encode a set or sequence of categories: the mean of their embeddings, dense, normalization.

    Negative tokens are padding. A sample of nothing but padding has the embedding zero.

    Attributes:
        embeddings: Embeddings of the tokens 0, 1, ..., shape (tokens, hidden).
        last: Layer from the mean to the code, after a GELU.
        norm: Normalization of the code.

    Args:
        num_tokens: Number of tokens, *static*.
        width: q, the size of the code, *static*.
        hidden: Size of the embeddings, *static*.
        key: Random key of the weights.
        dtype: float32 or float64, *static*.
    """

    embeddings: Float[Array, "tokens hidden"]
    last: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(
        self,
        num_tokens: int,
        width: int,
        *,
        hidden: int = 64,
        key: Key[Array, ""],
        dtype=jnp.float32,
    ):
        first_key, last_key = jax.random.split(key)
        self.embeddings = jax.random.normal(first_key, (num_tokens, hidden), dtype)
        self.last = eqx.nn.Linear(hidden, width, key=last_key, dtype=dtype)
        self.norm = eqx.nn.LayerNorm(width, dtype=dtype)

    def __call__(self, tokens: Int[Array, " length"]) -> Float[Array, " width"]:
        """Encode one sequence of tokens."""
        real = tokens >= 0
        rows = self.embeddings[jnp.maximum(tokens, 0)]
        count = jnp.maximum(jnp.sum(real, dtype=rows.dtype), 1.0)
        mean = jnp.sum(jnp.where(real[:, None], rows, 0.0), axis=0) / count
        return self.norm(self.last(jax.nn.gelu(mean)))


class GaussianEncoder(eqx.Module):
    """Make a diagonal Gaussian of what another encoder finds.

    The logarithms of the variances are clipped to -8 .. 4.

    Attributes:
        encoder: The other encoder, ``(value) -> (q,)``.
        mean: Layer to the mean.
        log_var: Layer to the logarithms of the variances.

    Args:
        encoder: The other encoder.
        width: q, of the other encoder and of the Gaussian, *static*.
        key: Random key of the weights.
        dtype: float32 or float64, *static*.
    """

    encoder: Callable
    mean: eqx.nn.Linear
    log_var: eqx.nn.Linear

    def __init__(self, encoder: Callable, width: int, *, key: Key[Array, ""], dtype=jnp.float32):
        mean_key, log_var_key = jax.random.split(key)
        self.encoder = encoder
        self.mean = eqx.nn.Linear(width, width, key=mean_key, dtype=dtype)
        self.log_var = eqx.nn.Linear(width, width, key=log_var_key, dtype=dtype)

    def __call__(self, x: Array) -> Gaussian:
        """Encode one sample of the modality."""
        hidden = self.encoder(x)
        return Gaussian(self.mean(hidden), jnp.clip(self.log_var(hidden), *LOG_VARIANCES))


class GatedFusion(eqx.Module):
    """Weigh the modalities by learned shares, put them side by side, and map them to d features.

    The shares are a softmax over the modalities that are there, times their number, so that equal
    gates scale nothing. Missing modalities are zeros.

    Attributes:
        gates: Logits of the shares, zeros at first, shape (M,).
        mixing: MLP from the M q scaled entries to the features.

    Args:
        num_modalities: M, *static*.
        width: q, the size of a code, *static*.
        num_features: d, *static*.
        hidden: Units of the hidden layer, *static*.
        key: Random key of the weights.
        dtype: float32 or float64, *static*.
    """

    gates: Float[Array, " modalities"]
    mixing: eqx.nn.MLP

    def __init__(
        self,
        num_modalities: int,
        width: int,
        num_features: int,
        *,
        hidden: int = 64,
        key: Key[Array, ""],
        dtype=jnp.float32,
    ):
        self.gates = jnp.zeros(num_modalities, dtype)
        self.mixing = eqx.nn.MLP(
            num_modalities * width,
            num_features,
            hidden,
            1,
            activation=jax.nn.gelu,
            dtype=dtype,
            key=key,
        )

    def __call__(
        self,
        means: Float[Array, "modalities q"],
        log_vars: Float[Array, "modalities q"] | None,
        present: Bool[Array, " modalities"],
    ) -> Float[Array, " d"]:
        """Fuse the modalities of one sample; variances are not used."""
        del log_vars
        # Without any modality the softmax would be that of nothing.
        counts = present | ~jnp.any(present)
        shares = jax.nn.softmax(jnp.where(counts, self.gates, -jnp.inf))
        scaled = jnp.sum(present, dtype=means.dtype) * shares[:, None] * means
        return self.mixing(jnp.where(present[:, None], scaled, 0.0).reshape(-1))


class PrecisionFusion(eqx.Module):
    """Take the product of the modalities' Gaussians, and map its mean to d features.

        precision = sum_m exp(-log_var_m),   mean = sum_m exp(-log_var_m) mean_m / precision

    over the modalities that are there.

    Attributes:
        mixing: MLP from the mean to the features.

    Args:
        width: q, the size of a code, *static*.
        num_features: d, *static*.
        hidden: Units of the hidden layer, *static*.
        key: Random key of the weights.
        dtype: float32 or float64, *static*.
    """

    mixing: eqx.nn.MLP

    def __init__(
        self,
        width: int,
        num_features: int,
        *,
        hidden: int = 64,
        key: Key[Array, ""],
        dtype=jnp.float32,
    ):
        self.mixing = eqx.nn.MLP(
            width, num_features, hidden, 1, activation=jax.nn.gelu, dtype=dtype, key=key
        )

    def mean(
        self,
        means: Float[Array, "modalities q"],
        log_vars: Float[Array, "modalities q"] | None,
        present: Bool[Array, " modalities"],
    ) -> Float[Array, " q"]:
        """Return the mean of the product; zeros without any modality. Points count equally."""
        logs = jnp.zeros_like(means) if log_vars is None else log_vars
        precisions = jnp.where(present[:, None], jnp.exp(-logs), 0.0)
        total = jnp.sum(precisions, axis=0)
        return jnp.sum(precisions * means, axis=0) / jnp.where(total > 0, total, 1.0)

    def __call__(
        self,
        means: Float[Array, "modalities q"],
        log_vars: Float[Array, "modalities q"] | None,
        present: Bool[Array, " modalities"],
    ) -> Float[Array, " d"]:
        """Fuse the modalities of one sample."""
        return self.mixing(self.mean(means, log_vars, present))


class Network(eqx.Module):
    """The parts of a multimodal regression.

    Attributes:
        encoders: One module for each modality, ``(value) -> (q,)`` or ``-> Gaussian``.
        fusion: ``(means, log_vars, present) -> (d,)``.
        head: ``(features) -> (1,)``.
        critic: ``(features (N, d), targets (N, 1)) -> scores (N, N)``, see `information.critics`;
            None where no information term is wanted.
    """

    encoders: tuple[Callable, ...]
    fusion: Callable
    head: Callable
    critic: Callable | None

    def encode(self, sample: Modalities) -> Encoded:
        """Encode and fuse one sample. Missing modalities are zeros for their encoder, and after."""
        if len(sample.values) != len(self.encoders):
            raise _checks.fail(
                "encode",
                f"{len(sample.values)} modalities",
                f"{len(self.encoders)}, one an encoder",
            )
        _checks.check_mask("encode", sample.present, (len(self.encoders),))
        found = []
        for encoder, value, there in zip(self.encoders, sample.values, sample.present, strict=True):
            code = encoder(jnp.where(there, value, jnp.zeros_like(value)))
            found.append(jax.tree.map(lambda leaf, there=there: jnp.where(there, leaf, 0.0), code))
        gaussians = [code for code in found if isinstance(code, Gaussian)]
        if gaussians and len(gaussians) < len(found):
            raise _checks.fail("encode", "points and Gaussians", "encoders of one kind")
        if gaussians:
            means, log_vars = (jnp.stack(leaves) for leaves in zip(*gaussians, strict=True))
        else:
            means, log_vars = jnp.stack(found), None
        return Encoded(means, log_vars, self.fusion(means, log_vars, sample.present))

    def predict(self, fused: Float[Array, " d"]) -> Float[Array, ""]:
        """Predict the target from the features of one sample."""
        return self.head(fused)[0]

    def scores(
        self, fused: Float[Array, "n d"], targets: Float[Array, " n"]
    ) -> Float[Array, "n n"]:
        """Score every pair of features and target of a batch."""
        if self.critic is None:
            raise _checks.fail("scores", "a network without critic", "one with a critic")
        return self.critic(fused, targets[:, None])


def dense_network(
    sizes: Sequence[int],
    *,
    width: int = 32,
    num_features: int = 8,
    gaussian: bool = False,
    critic_width: int | None = 64,
    key: Key[Array, ""],
    dtype=jnp.float32,
) -> Network:
    """Make the network for modalities that are vectors.

    Encoders p - 64 - q with layer normalization, fusion to d features, head d - 32 - 1 with a last
    layer near zero, critic (d + 1) - 64 - 64 - 1 or none.

    Args:
        sizes: Length of the vector of each modality.
        width: q, what every encoder returns.
        num_features: d.
        gaussian: Whether the encoders return Gaussians, which `PrecisionFusion` joins; else points,
            which `GatedFusion` joins. *Static.*
        critic_width: Units of each of the critic's two hidden layers, *static*; None for no critic,
            which only an information term needs and all clients would send.
        key: Random key of the weights.
        dtype: float32 or float64. *Static.*

    Returns:
        The network.

    Raises:
        ValueError: If there is no modality, or a size is not a positive integer.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import multimodal
        >>> network = multimodal.dense_network((40, 30), key=jax.random.key(0))
        >>> samples = multimodal.all_present([jnp.ones((5, 40)), jnp.ones((5, 30))])
        >>> multimodal.features(network, samples).shape
        (5, 8)

    Reference:
        FDRMFL, arXiv 2512.02076, has no sizes for regression on vectors; these are our choice.
    """
    if not sizes:
        raise _checks.fail("dense_network", "no sizes", "at least one modality")
    for size in sizes:
        _checks.check_count("dense_network", "size", size)
    _checks.check_count("dense_network", "width", width)
    _checks.check_count("dense_network", "num_features", num_features)
    if critic_width is not None:
        _checks.check_count("dense_network", "critic_width", critic_width)
    encoder_key, fusion_key, head_key, critic_key = jax.random.split(key, 4)
    encoders = []
    for size, one in zip(sizes, jax.random.split(encoder_key, len(sizes)), strict=True):
        first, second = jax.random.split(one)
        encoder = DenseEncoder(size, width, key=first, dtype=dtype)
        encoders.append(
            GaussianEncoder(encoder, width, key=second, dtype=dtype) if gaussian else encoder
        )
    if gaussian:
        fusion = PrecisionFusion(width, num_features, key=fusion_key, dtype=dtype)
    else:
        fusion = GatedFusion(len(sizes), width, num_features, key=fusion_key, dtype=dtype)
    head = eqx.nn.MLP(num_features, 1, 32, 1, activation=jax.nn.gelu, dtype=dtype, key=head_key)
    # Predictions start near the mean of standardized targets.
    head = eqx.tree_at(
        lambda mlp: (mlp.layers[-1].weight, mlp.layers[-1].bias),
        head,
        (0.1 * head.layers[-1].weight, jnp.zeros(1, dtype)),
    )
    critic = None
    if critic_width is not None:
        critic = information.joint_critic(
            num_features, 1, width=critic_width, dtype=dtype, key=critic_key
        )
    return Network(tuple(encoders), fusion, head, critic)


def features(network: Network, samples: Modalities) -> Float[Array, "samples d"]:
    """Compute the features of many samples.

    Args:
        network: The network.
        samples: Modalities with a leading axis of samples.

    Returns:
        Features, shape (samples, d).

    Raises:
        ValueError: If the modalities are not those of the network.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import multimodal
        >>> network = multimodal.dense_network((3,), num_features=2, key=jax.random.key(0))
        >>> multimodal.features(network, multimodal.all_present([jnp.ones((4, 3))])).shape
        (4, 2)
    """
    return jax.vmap(lambda sample: network.encode(sample).fused)(samples)


def predictions(network: Network, samples: Modalities) -> Float[Array, " samples"]:
    """Predict the targets of many samples by the head of the network.

    Args:
        network: The network.
        samples: Modalities with a leading axis of samples.

    Returns:
        Predictions, shape (samples,).

    Raises:
        ValueError: If the modalities are not those of the network.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import multimodal
        >>> network = multimodal.dense_network((3,), key=jax.random.key(0))
        >>> multimodal.predictions(network, multimodal.all_present([jnp.ones((4, 3))])).shape
        (4,)
    """
    return jax.vmap(lambda sample: network.predict(network.encode(sample).fused))(samples)
