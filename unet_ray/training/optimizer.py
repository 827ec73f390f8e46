"""The optimizer: Adam or AdamW, with learning rates of their own for parts of a network, and its schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import keras
from keras import ops


class PartwiseAdam(keras.optimizers.Adam):
    """Adam and AdamW, whose learning rate may be lower for parts of a network.

    AdamW's weight decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, as Keras and PyTorch have it)
    takes `learning_rate * weight_decay` of a weight. A part's factor scales that, too, as a parameter group's learning
    rate does in PyTorch: an encoder at a tenth of the rate is pulled to zero at a tenth of the pace.

    Only weights decay that multiply a whole input: kernels. A bias, a normalisation's gamma and beta, LayerScale's
    gamma, each with one dimension, do not, nor what is called a bias and has more (attention's).
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule,
        *,
        decay: float = 0.0,
        rate_factors: Mapping[str, float] | None = None,
        ema_momentum: float = 0.0,
        name: str,
    ):
        super().__init__(learning_rate, use_ema=ema_momentum > 0, ema_momentum=ema_momentum, name=name)
        self._decay, self._rate_factors = decay, dict(rate_factors or {})

    def build(self, variables: list[keras.Variable]) -> None:
        """Makes the moments; raises ValueError for a part that no variable is in."""
        paths = [variable.path for variable in variables]
        for prefix in self._rate_factors:
            if not any(path.startswith(prefix) for path in paths):
                raise ValueError(
                    f"no trained variable's path begins with {prefix!r}, which is to have a learning rate of its own; "
                    f"the first path is {paths[0] if paths else 'missing'}"
                )
        self._factors = [self._factor(path) for path in paths]
        self._decays = [self._decay > 0 and _decays(variable) for variable in variables]
        super().build(variables)

    def _factor(self, path: str) -> float:
        """The factor of the longest prefix that the path has, else 1."""
        prefixes = [prefix for prefix in self._rate_factors if path.startswith(prefix)]
        return self._rate_factors[max(prefixes, key=len)] if prefixes else 1.0

    def update_step(self, gradient, variable, learning_rate) -> None:
        """Decays the variable, then takes Adam's step."""
        index = self._get_variable_index(variable)
        rate = ops.cast(learning_rate, variable.dtype)
        if self._factors[index] != 1.0:
            rate = rate * ops.cast(self._factors[index], variable.dtype)
        if self._decays[index]:
            self.assign_sub(variable, variable * ops.cast(self._decay, variable.dtype) * rate)
        super().update_step(gradient, variable, rate)

    def averages(self) -> list[keras.Variable]:
        """Returns the averages of the trained variables, in their order; none where they are not kept."""
        return list(self._model_variables_moving_average) if self.use_ema else []


@contextlib.contextmanager
def averaged(optimizer: PartwiseAdam, variables: list[keras.Variable]) -> Iterator[None]:
    """Gives the trained variables their averages, where the optimizer keeps them, and takes them back after the block.

    Statistics of normalisations stay as they are: they are averages already.
    """
    averages = optimizer.averages()
    values = [variable.numpy() for variable in variables] if averages else []
    take_averages(optimizer, variables)
    try:
        yield
    finally:
        for variable, value in zip(variables, values, strict=False):
            variable.assign(value)


def take_averages(optimizer: PartwiseAdam, variables: list[keras.Variable]) -> None:
    """Gives the trained variables their averages for good, where the optimizer keeps them."""
    for variable, average in zip(variables, optimizer.averages(), strict=False):
        variable.assign(average)


def _decays(variable: keras.Variable) -> bool:
    return len(variable.shape) > 1 and "bias" not in variable.name


def make_optimizer(
    kind: str,
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule,
    weight_decay: float,
    rate_factors: Mapping[str, float] | None = None,
    ema_momentum: float = 0.0,
) -> PartwiseAdam:
    """Returns Adam, or AdamW.

    Args:
        kind: `adam`, which takes no weight decay, or `adamw`.
        learning_rate: of the whole network, see `make_schedule`.
        weight_decay: see `PartwiseAdam`.
        rate_factors: what the learning rate is multiplied by for variables whose path begins so; of several, the
            longest counts. `{"encoder/": 0.1}`.
        ema_momentum: share of itself that an average of a weight keeps at each step; 0 keeps no averages.
    """
    # A name of our own: Keras numbers its own by what the process made before, and a checkpoint's names must not vary.
    decay = weight_decay if kind == "adamw" else 0.0
    return PartwiseAdam(learning_rate, decay=decay, rate_factors=rate_factors, ema_momentum=ema_momentum, name=kind)


def make_schedule(
    kind: str, learning_rate: float, total_steps: int, warmup_steps: int
) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """Returns a constant, or a cosine to zero at the last step, after a linear warm-up from zero."""
    if kind == "constant":
        return learning_rate
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup_steps else learning_rate,
        decay_steps=max(1, total_steps - warmup_steps),
        warmup_target=learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )
