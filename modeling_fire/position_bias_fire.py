"""What a position contributes to an attention score: FIRE, and the choice among the encodings that a config may name.

FIRE is defined in Li et al., *Functional Interpolation for Relative Positions Improves Long Context Transformers*
(arXiv 2310.04418, ICLR 2024).
"""

import math
from functools import partial

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast
from transformers.utils.import_utils import is_cuda_stream_capturing

from .base_bias_fire import PositionBias, in_function_transform, is_observed
from .linear_fire import Float32Linear, decay_start, hinge_start, parameter_dtype, pass_on_start, uniform_start
from .other_biases_fire import (
    AlibiPositionBias,
    KerplePositionBias,
    SandwichPositionBias,
    T5PositionBias,
    alibi_slopes,
    t5_bucket,
)
from .piecewise_fire import PiecewiseBias, psi, relu_pieces
from .positions_fire import FirePositions


class FirePositionBias(PositionBias):
    """
    FIRE: `b_h(i, j) = f_h(psi(i - j) / (psi(max(i, L)) + eps))` with `psi(x) = log(1 + c x)`.

    The names `mlp.0`, `mlp.2`, `c`, `L_multiplier` and `init_L` are those of the widely copied public listing, whose
    state dict loads here, 0-dim scalars included.

    In `eval()` without gradients, what the parameters alone decide is remembered from one step of generation to the
    next until they change. On a GPU a change made through `.data`, as where averaged weights are swapped in, does not
    show: call `eval()` after it, which forgets, as do `generate` and any call without a cache.

    Args:
        num_heads (`int`): number of attention heads; they share the hidden layers of `f`.
        mlp_width (`int`, *optional*, defaults to 32): width of each hidden layer of `f`.
        init_c (`float`, *optional*, defaults to 0.1): initial `c`, used through its absolute value.
        init_L (`float`, *optional*, defaults to 512.0): initial threshold `L = |L_multiplier * init_L|`, in tokens.
        eps (`float`, *optional*, defaults to 1e-6): added to the denominator.
        mlp_depth (`int`, *optional*, defaults to 1):
            Number of hidden layers of `f`: 1 as in public code, 2 as in the paper's text.
        activation (`str`, *optional*, defaults to `"relu"`): `"relu"` or `"gelu"`.
        transform (`str`, *optional*, defaults to `"log"`):
            `psi`: `"log"` is `log(1 + c x)`, `"identity"` is `x` (and has no `c`), `"power"` is `x ** c`.
        progressive (`bool`, *optional*, defaults to `True`):
            Whether the normaliser follows the query (progressive interpolation). If not, it is `psi(L)` for every
            query, or absent without a threshold.
        threshold (`bool`, *optional*, defaults to `True`):
            Whether there is an `L` below which distances keep their scale. If not, the normaliser is `psi(i)`.
        init_f (`str`, *optional*, defaults to `"decay"`):
            How `f` starts: `"decay"` about as `-d ** r`, with `r` from 1.5 in the first head to 0.3 in the last, and
            no steeper than `-64 log(d)`; or `"uniform"` like any `nn.Linear`, as in public code.
        train_length (`int`, *optional*, defaults to 2048): length of the training texts in tokens, for `"decay"`.
    """

    init_L: torch.Tensor

    def __init__(
        self,
        num_heads: int,
        mlp_width: int = 32,
        init_c: float = 0.1,
        init_L: float = 512.0,
        eps: float = 1e-6,
        *,
        mlp_depth: int = 1,
        activation: str = "relu",
        transform: str = "log",
        progressive: bool = True,
        threshold: bool = True,
        init_f: str = "decay",
        train_length: int = 2048,
    ):
        super().__init__()
        if activation not in ("relu", "gelu"):
            raise ValueError(f"`activation` must be 'relu' or 'gelu', got {activation!r}.")
        if transform not in ("log", "identity", "power"):
            raise ValueError(f"`transform` must be 'log', 'identity' or 'power', got {transform!r}.")
        if init_f not in ("decay", "uniform"):
            raise ValueError(f"`init_f` must be 'decay' or 'uniform', got {init_f!r}.")
        if mlp_depth not in (1, 2):
            raise ValueError(f"`mlp_depth` must be 1 or 2, got {mlp_depth}.")
        for name, size in (("mlp_width", mlp_width), ("train_length", train_length)):
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        for name, number in (("init_c", init_c), ("init_L", init_L), ("eps", eps)):
            if not 0 < number < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {number}.")
        self.eps, self.transform = eps, transform
        self.progressive, self.threshold = progressive, threshold
        self.hidden_width = mlp_width
        self.memory: dict = {}  # of inference, see `remembered`
        self.prepared: tuple[torch.Tensor | None, ...] | None = None
        self._initial_c, self._initial_L = float(init_c), float(init_L)

        start_hidden, start_middle, start_output = uniform_start, uniform_start, uniform_start
        if init_f == "decay":
            # Transforms other than the log are rescaled to its range, where slopes and step sizes are known to suit.
            reach = self._initial_psi(train_length)
            span = reach if transform == "log" else math.log1p(0.1 * train_length)
            normalizer = self._initial_psi(init_L) if threshold else reach if progressive else 1.0
            start_hidden = partial(hinge_start, span, normalizer * span / reach)
            steps = max(1, mlp_width - 1)
            distances = [self._initial_distance(reach * unit / steps) for unit in range(mlp_width + 1)]
            start_middle, start_output = pass_on_start, partial(decay_start, span / steps, distances)
        act = nn.ReLU if activation == "relu" else nn.GELU
        layers: list[nn.Module] = [Float32Linear(1, mlp_width, start_hidden), act()]
        if mlp_depth == 2:
            layers += [Float32Linear(mlp_width, mlp_width, start_middle), act()]
        self.mlp = nn.Sequential(*layers, Float32Linear(mlp_width, num_heads, start_output))

        # Shape (1,), not (): FSDP2 refuses parameters without dimensions. What an option does not use is not created,
        # so that every parameter has a gradient (DDP insists).
        one = torch.ones(1, dtype=parameter_dtype())
        self.c = nn.Parameter(one * init_c) if transform != "identity" else None
        self.L_multiplier = nn.Parameter(one.clone()) if threshold else None
        self._names = (*self._parameters, "weight", "bias", "weight", "bias")
        # A buffer, so that nothing trains it (PEFT's modules_to_save would train a frozen parameter).
        self.register_buffer("init_L", one * init_L)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.c is not None:
            init.constant_(self.c, self._initial_c)
        if self.L_multiplier is not None:
            init.ones_(self.L_multiplier)
        init.constant_(self.init_L, self._initial_L)

    def _initial_psi(self, x: float) -> float:
        """`psi` with the initial `c`, without touching parameters, which may have no values yet."""
        if self.transform == "log":
            return math.log1p(self._initial_c * x)
        return x**self._initial_c if self.transform == "power" else x

    def _initial_distance(self, psi: float) -> float:
        """The distance of an initial `psi`."""
        if self.transform == "log":
            return math.expm1(psi) / self._initial_c
        return psi ** (1 / self._initial_c) if self.transform == "power" else psi

    def psi(self, x: torch.Tensor) -> torch.Tensor:
        """The monotone transform of a distance `x >= 0`."""
        return psi(x, self.c.to(x.dtype).abs() if self.c is not None else None, self.transform)

    def normalizer(self, absolute: torch.Tensor) -> torch.Tensor | None:
        """The denominator of each query at `absolute` (a float tensor), or `None` where the options leave none."""
        if self.threshold:
            length = (self.L_multiplier * self.init_L).abs().to(absolute.dtype)
            absolute = torch.maximum(absolute, length) if self.progressive else length.expand_as(absolute)
        elif not self.progressive:
            return None
        return self.psi(absolute) + self.eps

    def compute(self, positions: FirePositions, dtype: torch.dtype) -> torch.Tensor:
        x = self.psi(positions.distance().to(dtype))
        normalizer = self.normalizer(positions.absolute.to(dtype))
        if normalizer is not None:
            x = x / normalizer[:, :, None]
        return self.mlp(x[..., None])

    @property
    def is_piecewise(self) -> bool:
        # An adapter may have put something else in the place of `mlp`, which then is only called.
        return isinstance(self.mlp, nn.Sequential) and len(self.mlp) == 3 and isinstance(self.mlp[1], nn.ReLU)

    def pieces(self, positions: FirePositions, dtype: torch.dtype, backend: str) -> PiecewiseBias:
        # One step after the other: what is the same for all of them is worked out once.
        if positions.key.shape[1] == positions.absolute.shape[1]:
            self.memory = {}  # a text begins, maybe with other parameters
        memory, constants = self.remembered(), None
        if memory is not None:
            constants = memory["constants"] = memory.get("constants") or self.constants(dtype)
            if positions.absolute.shape[1] == 1:
                of_token = self.tabulated(positions, memory) if backend == "cpu" else self.limited(memory)
                if of_token is not None:
                    return of_token
        elif torch.compiler.is_compiling() and not torch.is_grad_enabled() and not self.training:
            constants = self.prepared
        knots, slope, offset, c, length, scale = constants or self.constants(dtype)
        absolute = positions.absolute.to(dtype)
        if not self.progressive:
            row_scale, shared = scale.expand_as(absolute), torch.ones_like(absolute, dtype=torch.bool)
        elif length is None:
            row_scale = (psi(absolute, c, self.transform) + self.eps).reciprocal()
            shared = torch.zeros_like(absolute, dtype=torch.bool)
        else:
            # The queries before L share its normaliser. One *at* L does not: there `maximum` splits the gradient.
            shared = absolute < length
            row_scale = (psi(torch.maximum(absolute, length), c, self.transform) + self.eps).reciprocal()
            if torch.is_grad_enabled():  # for the gradient; the values are the same
                row_scale = torch.where(shared, scale, row_scale)
        return PiecewiseBias(knots, slope, offset, c, row_scale, shared, self.transform)

    def tabulated(self, positions: FirePositions, memory: dict) -> PiecewiseBias | None:
        """
        The pieces and their table for a step of one query for each item on CPU, the same object at each step. `None`
        unless all are before `L`.
        """
        num_keys = positions.key.shape[1]
        if positions.absolute.device.type != "cpu":
            return None
        knots, slope, offset, c, length, scale = memory["constants"]
        if "limit" not in memory:
            memory["limit"] = length.item() if length is not None and self.progressive else math.inf
        if scale is None or max(positions.absolute.flatten().tolist()) >= memory["limit"]:
            return None
        pieces = memory.get("table")
        if pieces is None or pieces.table.shape[1] < num_keys:
            # Room for twice as many keys before it has to be computed again: of the distances `size - 1, ..., 0`.
            size = 2 ** num_keys.bit_length()
            x = psi(torch.arange(size - 1, -1, -1, dtype=c.dtype), c, self.transform) * scale
            segments = torch.bucketize(x, knots)
            table = slope[:, segments] * x + offset[:, segments]
            row_scale, shared = scale[None], torch.ones_like(scale[None], dtype=torch.bool)
            pieces = PiecewiseBias(knots, slope, offset, c, row_scale, shared, self.transform, table)
            memory["table"] = pieces
        return pieces

    def limited(self, memory: dict) -> PiecewiseBias | None:
        """
        The pieces with an upper limit of `row_scale`, for a step of one query for each item on a GPU, the same object
        at each step. `None` where the normaliser does not follow the query.
        """
        if self.progressive and "limited" not in memory:
            knots, slope, offset, c, _, scale = memory["constants"]
            row_scale = slope.new_full((1, 1), math.inf) if scale is None else scale[None]
            shared = torch.zeros_like(row_scale, dtype=torch.bool)
            pieces = PiecewiseBias(knots, slope, offset, c, row_scale, shared, self.transform, eps=self.eps)
            memory["limited"] = pieces
        return memory.get("limited")

    @torch.no_grad()
    def prepare(self) -> None:
        """
        Works out `constants` for the compiled steps of a `generate` that begins, which cannot see whether parameters
        changed. Not where parameters have values during a call of their module only.
        """
        at_hand = all(parameter.numel() and not parameter.is_meta for parameter in self.parameters())
        if self.is_piecewise and at_hand and self.remembered() is not None:
            with maybe_autocast(device_type=self.init_L.device.type, enabled=False):
                self.prepared = self.constants(torch.promote_types(self.init_L.dtype, torch.float32))

    def constants(self, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
        """Knots, slopes, offsets, `c`, `L`, and the scale of the queries before `L`: what parameters alone decide."""
        # Called as modules, with an input of no rows, for the sake of hooks: those that gather, and those that watch.
        hidden = self.mlp[0](self.init_L.new_empty(0, 1), parameters=True)
        output = self.mlp[2](self.init_L.new_empty(0, self.hidden_width), parameters=True)
        knots, slope, offset = relu_pieces(hidden[:, :-1], hidden[:, -1], output[:, :-1], output[:, -1])
        c = slope.new_ones(1) if self.c is None else self.c.to(dtype).abs()
        length, scale = None, None
        if self.threshold:
            length = (self.L_multiplier * self.init_L).abs().to(dtype)
            scale = 1 / (psi(length, c, self.transform) + self.eps)
        elif not self.progressive:
            scale = slope.new_ones(1)
        return knots, slope, offset, c, length, scale

    def remembered(self) -> dict | None:
        """
        What inference has kept of the present parameters; `None` where it is not inference, or where parameters cannot
        be watched. Replaced whole when they change: other threads may be using what was kept.
        """
        if self.training or torch.is_grad_enabled() or in_function_transform() or is_observed():
            return None
        if forward_ad._current_level >= 0:
            return None  # parameters may have tangents
        hidden, output = self.mlp[0], self.mlp[2]
        if type(hidden) is not Float32Linear or type(output) is not Float32Linear:
            return None  # an adapter
        # Rather than `parameters()`, which walks through modules.
        own, first, last = self._parameters, hidden._parameters, output._parameters
        if (*own, *first, *last) != self._names:
            return None  # a parametrization, or something pruned
        watched = [*own.values(), *first.values(), *last.values(), self.init_L]
        device = self.init_L.device
        on_cpu = device.type == "cpu"
        if not on_cpu and is_cuda_stream_capturing():
            return {}  # a CUDA graph would replay the address of a tensor that is gone: it works all out itself
        state = [self.eps, self.transform, self.progressive, self.threshold, device]
        if device.type == "cuda":  # another stream does not wait until it is worked out
            state.append(torch.cuda.current_stream(device).cuda_stream)
        for tensor in watched:
            # Offloaded weights are elsewhere until their layer is called.
            if isinstance(tensor, DTensor) or tensor.is_inference() or tensor.device != device:
                return None
            state.append(tensor.dtype)
            if not on_cpu:  # a comparison of values would wait for the device
                state += tensor.data_ptr(), tensor._version
        memory = self.memory
        current = memory.get("state") == state
        if current and on_cpu:
            current = all(torch.equal(x, y) for x, y in zip(watched, memory["values"], strict=True))
        if not current:
            memory = {"state": state, "values": [x.clone() for x in watched] if on_cpu else []}
            self.memory = memory
        return memory

    def train(self, mode: bool = True) -> "FirePositionBias":
        self.memory = {}  # sharded training changes values in place, without a new version
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "memory": {}, "prepared": None}

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name in ("c", "L_multiplier", "init_L"):
            value = state_dict.get(prefix + name)
            if value is not None and value.ndim == 0:
                state_dict[prefix + name] = value[None]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def from_alibi(cls, num_heads: int, max_length: int, slopes: torch.Tensor | None = None) -> "FirePositionBias":
        """
        ALiBi, `-m_h d`, as FIRE: `psi(x) = x` and one hidden unit, `f_h(u) = -m_h L u` with `L = max_length`.

        Exact while no query stands past `max_length`; from there on distances are interpolated, as FIRE does.

        Args:
            num_heads (`int`): number of attention heads.
            max_length (`int`): `L`, in tokens.
            slopes (`torch.Tensor` of shape `(num_heads,)`, *optional*): `m`; the usual geometric ones by default.
        """
        slopes = alibi_slopes(num_heads) if slopes is None else slopes
        bias = cls(num_heads, mlp_width=1, init_L=max_length, transform="identity")
        return bias._set_mlp(1.0, 0.0, -slopes[:, None] * (max_length + bias.eps), 0.0)

    @classmethod
    def from_kerple(cls, r1: torch.Tensor, r2: float, max_length: int, variant: str = "log") -> "FirePositionBias":
        """
        KERPLE with one `r2` for all heads, by one hidden unit. Exact while no query stands past `max_length`.

        - `"log"`: `-r1_h log(1 + r2 d)`, from `c = r2` and `f_h(u) = -r1_h psi(L) u`.
        - `"power"`: `-r1_h d ** r2`, from `psi(x) = x ** r2` and the same `f`.

        Args:
            r1 (`torch.Tensor` of shape `(num_heads,)`): scale of each head, positive.
            r2 (`float`): positive, and at most 2 for `"power"`.
            max_length (`int`): `L`, in tokens.
            variant (`str`, *optional*, defaults to `"log"`): `"log"` or `"power"`.
        """
        if variant not in ("log", "power"):
            raise ValueError(f"`variant` must be 'log' or 'power', got {variant!r}.")
        bias = cls(len(r1), mlp_width=1, init_c=r2, init_L=max_length, transform=variant)
        psi_of_L = math.log1p(r2 * max_length) if variant == "log" else max_length**r2
        return bias._set_mlp(1.0, 0.0, -r1[:, None] * (psi_of_L + bias.eps), 0.0)

    @classmethod
    def from_t5(cls, table: torch.Tensor, max_length: int, max_distance: int = 128) -> "FirePositionBias":
        """
        T5's bucketed bias as FIRE: the piecewise-linear `f` through the table at every integer distance, so one hinge
        wherever the slope changes. Exact (to rounding) at integers while no query stands past `max_length`.

        Args:
            table (`torch.Tensor` of shape `(num_buckets, num_heads)`): `relative_attention_bias.weight` of T5.
            max_length (`int`): `L`, in tokens; at least `max_distance`.
            max_distance (`int`, *optional*, defaults to 128): from here on all distances share the last bucket.
        """
        if max_length < max_distance:
            raise ValueError(f"`max_length` ({max_length}) must be at least `max_distance` ({max_distance}).")
        table = table.double()
        buckets = t5_bucket(torch.arange(max_distance + 2), table.shape[0], max_distance)
        values = table[buckets]
        slopes = values.diff(dim=0)
        changes = slopes.diff(dim=0, prepend=torch.zeros_like(slopes[:1]))
        # The slope can change where a bucket ends or begins, whatever the table holds.
        steps = buckets.diff() != 0
        hinges = (steps | steps.roll(1)).nonzero()[1:, 0]
        bias = cls(table.shape[1], mlp_width=len(hinges), init_L=max_length, transform="identity")
        # In tokens rather than in units of L: integers, which floats hold exactly. The hinges open towards distance 0,
        # so that their sums stay as small as the distances that the table tells apart.
        return bias._set_mlp(-float(max_length), hinges, changes[hinges].T, values[-1])

    def _set_mlp(self, *values: torch.Tensor | float) -> "FirePositionBias":
        """Sets weight and bias of the hidden, then of the output layer."""
        with torch.no_grad():
            for parameter, value in zip(self.mlp.parameters(), values, strict=True):
                parameter.copy_(torch.as_tensor(value))
        return self


def build_position_bias(config) -> PositionBias | None:
    """
    The position bias that a [`FireConfig`] asks for, or `None` for `position_bias="none"`.

    Args:
        config ([`FireConfig`]): its `position_bias`, `num_attention_heads` and `fire_*` fields are read.
    """
    num_heads = config.num_attention_heads
    match config.position_bias:
        case "fire":
            return FirePositionBias(
                num_heads,
                mlp_width=config.fire_mlp_width,
                init_c=config.fire_init_c,
                init_L=config.fire_init_L,
                eps=config.fire_eps,
                mlp_depth=config.fire_mlp_depth,
                activation=config.fire_activation,
                transform=config.fire_transform,
                progressive=config.fire_progressive,
                threshold=config.fire_threshold,
                init_f=config.fire_init_f,
                train_length=config.max_position_embeddings,
            )
        case "alibi":
            return AlibiPositionBias(num_heads)
        case "kerple_log":
            return KerplePositionBias(num_heads, "log")
        case "kerple_power":
            return KerplePositionBias(num_heads, "power")
        case "t5":
            return T5PositionBias(num_heads)
        case "sandwich":
            return SandwichPositionBias(num_heads)
        case "none":
            return None
        case name:
            raise ValueError(f"`position_bias` {name!r} is unknown.")
