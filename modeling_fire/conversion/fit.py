"""
A layer's `f`, fitted to the attention that the layer had with its rotation: a convex problem, by Newton's method.

Write each pair of dimensions that the rotation turns as a complex number. With the rotation the score of query `i` and
key `j` is `sum_m Re(exp(i theta_m (i - j)) q_m conj(k_m))`. With what is kept of it, where `t_m` is `theta_m` or 0,
let it be

    s(i, j) = sum_m Re(z_m exp(i t_m (i - j)) q_m conj(k_m)) + w . h(i, j)

where `h` is the hidden layer of `f`, `w` a head's row of its output layer, and `z_m` turns and scales what the head's
query has in pair `m`: what is left, on the average, of the rotation that goes. For each head the fit minimises the
mean of

    KL(softmax of the rotated scores || softmax of s)

over queries of some text. Because `s` is linear in `w` and `z`, this is multinomial logistic regression.
"""

from itertools import product
from typing import Any

import torch

from ..modeling_fire import FireAttention
from ..position_bias_fire import FirePositionBias
from ..positions_fire import FirePositions


# Queries of each window that take part, fewer where there are more keys than so many pairs allow: neighbours say much
# the same.
QUERIES, PAIRS = 32, 2**17
# Of them, those that are worked through at a time, beside the keys that the last of them sees.
ROWS = 8
# Holds what the text does not decide where it starts: `w` at 0, `z` at 1.
RIDGE = 1e-3
MAX_ITERATIONS = 20
TOLERANCE = 1e-4


@torch.no_grad()
def fit(
    attention: FireAttention,
    inputs: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    kept: tuple[torch.Tensor, torch.Tensor] | None,
    positions: FirePositions,
) -> torch.Tensor:
    """
    Sets the output layer of `f`, and turns and scales the queries. Beyond the windows, `f` is [`decline_beyond`].

    Args:
        attention ([`FireAttention`]): as the original has it, with an `f` of 0. Changed in place.
        inputs (`torch.Tensor` of shape `(windows, length, hidden_size)`): what the attention of the original is given.
        rotation (`tuple[torch.Tensor, torch.Tensor]`): cosine and sine, each of shape `(1, length, rotated dims)`.
        kept (`tuple[torch.Tensor, torch.Tensor]`, *optional*): the same of what is kept of it.
        positions ([`FirePositions`]): of one window.

    Returns:
        `torch.Tensor` of shape `(num_heads,)`: the mean divergence of each head, in nats.
    """
    bias: Any = attention.position_bias
    query, key = attention.project(inputs, kept)[:2]
    rotated_query, rotated_key = attention.project(inputs, rotation)[:2]
    length = inputs.shape[1]
    count = min(QUERIES, length, max(1, PAIRS // length))
    rows = torch.linspace(0, length - 1, count, device=inputs.device).round().long()
    query, rotated_query = query[:, :, rows] * attention.scaling, rotated_query[:, :, rows] * attention.scaling

    distance = rows[:, None] - positions.key
    ahead = distance < 0
    x = bias.psi(distance.clamp(min=0).float()) / bias.normalizer(rows.float())[:, None]
    hinges = bias.mlp[1](bias.mlp[0](x[..., None]))
    hinges[ahead] = 0.0
    scale = hinges.flatten(0, 1).square().mean(0).sqrt().clamp(min=1e-6)
    hinges = hinges / scale

    # RMS norms of queries stand between a projection and what a factor would change.
    rotated = 0 if attention.config.qk_norm else rotation[0].shape[-1]
    divergences = []
    bias.mlp[2].bias.zero_()
    for head in range(query.shape[1]):
        shared = head // attention.num_key_value_groups

        blocks = []
        for window, some in product(range(len(inputs)), torch.arange(len(rows)).split(ROWS)):
            q, k = query[window, head, some], key[window, shared]
            k = k - k.mean(0)  # shifts all scores of a query alike, which changes nothing but digits lost
            seen = int(rows[some[-1]]) + 1
            k, hidden = k[:seen], ahead[some, :seen]
            fixed = q[:, rotated:] @ k[:, rotated:].T
            target = rotated_query[window, head, some] @ rotated_key[window, shared, :seen].T
            features = torch.cat((hinges[some, :seen], *turned_products(q[:, :rotated], k[:, :rotated])), dim=-1)
            blocks.append((features, fixed.masked_fill(hidden, -torch.inf), target.masked_fill(hidden, -torch.inf)))

        start = torch.zeros(hinges.shape[-1] + rotated, dtype=torch.float64, device=inputs.device)
        start[hinges.shape[-1] : hinges.shape[-1] + rotated // 2] = 1.0
        parameters, divergence = minimise(blocks, start)
        divergences.append(divergence)
        weight, z = parameters.split((hinges.shape[-1], rotated))
        bias.mlp[2].weight[head] = weight / scale
        if rotated:
            turn_queries(attention, head, *z.chunk(2))
    decline_beyond(bias, length)
    return torch.stack(divergences)


@torch.no_grad()
def decline_beyond(bias: FirePositionBias, length: int) -> None:
    """
    Adds `-log(distance)` to `f`, from the first knot at `length` tokens or more on; what is nearer stays as it was. No
    text decides there. With an `f` that stayed constant, far keys would weigh the more the more of them there are; so,
    each doubling of the distance weighs about as much as the one before. Does nothing where the last knot is nearer:
    there the last line of `f` is one of those that were fitted.

    Args:
        bias ([`FirePositionBias`]):
            With a logarithmic `psi` and a threshold. Its first unit rises from distance 0; the others fall, each down
            to its knot, in ascending order.
        length (`int`): that `f` was fitted at.
    """
    layers: Any = bias.mlp
    hidden, output = layers[0], layers[2]
    slope, knots = hidden.weight[:, 0], -hidden.bias / hidden.weight[:, 0]
    normalizer = bias.normalizer(slope.new_zeros(1))
    at_length = bias.psi(slope.new_tensor(length)) / normalizer * (1 - 1e-4)
    unit = int((knots < at_length).sum())
    if unit == len(knots):
        return
    # Together the two units are `max(x, knot)` and a constant.
    output.weight[:, 0] -= normalizer / slope[0]
    output.weight[:, unit] += normalizer / slope[unit]
    output.bias += normalizer * knots[unit]


def turned_products(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `Re(q conj(k))` and `Re(-i q conj(k))` of every pair of dimensions, as the rotation pairs them: the first half with
    the second.

    Args:
        query (`torch.Tensor` of shape `(rows, dims)`): and `key` of shape `(keys, dims)`.

    Returns:
        Two tensors of shape `(rows, keys, dims / 2)`.
    """
    q1, q2 = query[:, None].chunk(2, dim=-1)
    k1, k2 = key.chunk(2, dim=-1)
    return q1 * k1 + q2 * k2, q2 * k1 - q1 * k2


def turn_queries(attention: FireAttention, head: int, real: torch.Tensor, imaginary: torch.Tensor) -> None:
    """Multiplies each pair of a head's queries by `real - i imaginary`, each of shape `(pairs,)`, in its weights."""
    pairs = len(real)
    for parameter in attention.q_proj.parameters():
        rows = parameter.view(-1, attention.head_dim, parameter[0].numel())[head, : 2 * pairs]
        q1, q2 = rows.clone().chunk(2)
        real, imaginary = real.to(rows.dtype), imaginary.to(rows.dtype)
        rows[:pairs] = real[:, None] * q1 + imaginary[:, None] * q2
        rows[pairs:] = real[:, None] * q2 - imaginary[:, None] * q1


def minimise(
    blocks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Newton's method, damped where a full step goes too far.

    Args:
        blocks (`list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]`):
            For some queries each the features, of shape `(rows, keys, parameters)`; the scores that do not depend on
            the parameters, and those of the target, of shape `(rows, keys)`. A key that is not seen has `-inf`.
        start (`torch.Tensor` of shape `(parameters,)`): float64.

    Returns:
        The parameters, and the mean divergence there.
    """
    terms = sum(len(features) for features, _, _ in blocks)

    def evaluate(parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        divergence, gradient = start.new_zeros(()), torch.zeros_like(start)
        hessian = start.new_zeros(len(start), len(start))
        for features, fixed, target in blocks:
            log_p = (features @ parameters.to(features.dtype) + fixed).log_softmax(-1)
            p, wanted = log_p.exp(), target.softmax(-1)
            per_key = torch.where(wanted > 0, wanted * (target.log_softmax(-1) - log_p), 0.0)
            weighted = p[..., None] * features
            mean = weighted.sum(1)
            divergence += per_key.sum() / terms
            gradient += torch.einsum("rkp,rk->p", features, p - wanted) / terms
            hessian += (weighted.flatten(0, 1).T @ features.flatten(0, 1) - mean.T @ mean) / terms
        away = parameters - start
        hessian.diagonal().add_(RIDGE)
        return divergence + RIDGE / 2 * away.square().sum(), gradient + RIDGE * away, hessian, divergence

    parameters, damping = start, 1e-3
    value, gradient, hessian, divergence = evaluate(start)
    for _ in range(MAX_ITERATIONS):
        step = torch.linalg.solve(hessian + damping * hessian.diagonal().diag(), gradient)
        trial = evaluate(parameters - step)
        if not trial[0] < value:
            damping *= 10
            continue
        progress, parameters, damping = value - trial[0], parameters - step, damping / 10
        value, gradient, hessian, divergence = trial
        if progress < TOLERANCE:
            break
    return parameters, divergence
