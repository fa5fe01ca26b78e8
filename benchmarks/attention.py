"""
The speed and memory of FIRE attention beside its peers: `make bench`, or e.g.

    python benchmarks/attention.py --lengths 2048 4096 --bias default listing --out benchmarks/results/cpu

In one process and on the same tensors: first every peer is compared with its formula in float64, values and gradients,
then all are timed in turns. Prints a table, and writes the figures as JSON and a plot.
"""

import argparse
import statistics
from pathlib import Path

import measure
import torch
from peers import CONSTANT, FORWARD_ONLY_ON_CPU, PEERS, QUADRATIC, WITHOUT_BIAS, listing

from modeling_fire import FirePositionBias


BASE, OURS = "SDPA, no bias", "FIRE, fused"
# Tokens on which peers are compared, as the formula in float64 takes long. Of so many no pair stands on a knot of
# *listing*, where rounding decides to which side it counts: one pair is 1e-3 of the gradients of the hidden layer.
CHECKED_LENGTH = 900


def build_bias(kind: str, heads: int, length: int, device: str) -> FirePositionBias:
    """
    `default`: as `FireConfig` starts it for a model trained at `length`: 31 knots over its distances, no query past L.
    `listing`: as public code starts it: about 8 knots, L = 512, and so most queries past it.
    """
    torch.manual_seed(0)
    if kind == "default":
        bias = FirePositionBias(heads, init_c=1.0, init_L=64.0 * length, train_length=length)
    else:
        bias = FirePositionBias(heads, init_c=0.1, init_L=512.0, init_f="uniform")
    return bias.to(device)


def results(function, tensors: list[torch.Tensor], bias: FirePositionBias, learns: bool, backward: bool) -> dict:
    """The output and, with `backward`, the gradients of queries, keys and values, and of what the bias learns."""
    *qkv, grad_output = (tensor.detach().requires_grad_(backward) for tensor in tensors)
    with torch.set_grad_enabled(backward):
        output = function(*qkv, bias)
    found = {"output": output.detach()}
    if backward:
        # That of the last bias is 0, but for rounding.
        named = {name: p for name, p in bias.named_parameters() if learns and name != "mlp.2.bias"}
        names = ["query", "key", "value", *named]
        found |= zip(names, torch.autograd.grad(output, [*qkv, *named.values()], grad_output), strict=True)
    return found


def check(names: list[str], kind: str, args, heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, float]:
    """
    The largest error of each peer against its formula in float64, relative to the largest number: of the output, and
    of every gradient if the backward pass is timed.
    """
    shape = (1, heads, min(CHECKED_LENGTH, max(args.lengths)), head_dim)
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=args.device).to(dtype) for _ in range(4)]
    wide = [tensor.double() for tensor in tensors]
    bias = build_bias(kind, heads, shape[2], args.device)
    # In 16 bits attention has large errors in the gradients of a bias, ours apart.
    limit, bias_limit = (1e-4, 1e-4) if dtype == torch.float32 else (2e-2, 2e-3)
    errors, wrong = {}, []
    for name in names:
        backward = "backward" in args.passes and not (args.device == "cpu" and name in FORWARD_ONLY_ON_CPU)
        learns = name not in CONSTANT
        found = results(PEERS[name], tensors, bias, learns, backward)
        formula = WITHOUT_BIAS.get(name, listing)
        expected = results(formula, wide, build_bias(kind, heads, shape[2], args.device).double(), learns, backward)
        each = {field: float((found[field] - x).abs().max() / x.abs().max()) for field, x in expected.items()}
        errors[name] = max(each.values())
        of_tensors = [*each][:4]
        of_bias = [*each][4:] if dtype == torch.float32 or name == OURS else []
        wrong += [f"{name}: {field} by {each[field]:.1e}" for field in of_tensors if not each[field] < limit]
        wrong += [f"{name}: {field} by {each[field]:.1e}" for field in of_bias if not each[field] < bias_limit]
    if wrong:
        raise SystemExit(f"Not the formula: {', '.join(wrong)}")
    return errors


def runs(name: str, length: int, backward: bool, args, heads: int) -> bool:
    """Whether a peer can run this case."""
    if backward and args.device == "cpu" and name in FORWARD_ONLY_ON_CPU:
        return False
    return name not in QUADRATIC or 4 * heads * length**2 * (6 if backward else 3) < args.memory * 2**30


def calls(names: list[str], kind: str, length: int, backward: bool, args, heads: int, head_dim: int, dtype) -> dict:
    """What to time: peer -> function without arguments."""
    torch.manual_seed(1)
    make = [torch.randn(args.batch, length, heads, head_dim, device=args.device, dtype=dtype) for _ in range(4)]
    query, key, value, grad_output = (tensor.transpose(1, 2) for tensor in make)  # as projections leave them
    bias = build_bias(kind, heads, length, args.device)

    def forward(name: str):
        with torch.no_grad():
            return PEERS[name](query, key, value, bias)

    def step(name: str):
        tensors = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        PEERS[name](*tensors, bias).backward(grad_output)
        bias.zero_grad()

    function = step if backward else forward
    return {name: (lambda name=name: function(name)) for name in names if runs(name, length, backward, args, heads)}


def measure_case(names, kind, length, backward, args, heads, head_dim, dtype) -> list[dict]:
    """One row for each peer that runs."""
    torch._dynamo.reset()  # it compiles FlexAttention for a few shapes only, and then no more
    functions = calls(names, kind, length, backward, args, heads, head_dim, dtype)
    if args.profile and OURS in functions:
        print(
            f"\n{OURS}, {'forward + backward' if backward else 'forward'}, bias {kind}, {length} tokens, by operator:"
        )
        print(*measure.profile(functions[OURS], args.device), sep="\n")
    memory = {name: measure.peak_memory(function, args.device) for name, function in functions.items()}
    times = measure.interleaved(functions, args.device, args.seconds)
    return [
        {
            "bias": kind,
            "head_dim": head_dim,
            "length": length,
            "pass": "forward + backward" if backward else "forward",
            "peer": name,
            "ms": 1e3 * statistics.median(times[name]),
            "ratio": measure.ratio(times, name, BASE),
            "MiB": memory[name],
        }
        for name in functions
    ]


def print_table(rows: list[dict]) -> None:
    """Peers down, lengths across: the time as a multiple of SDPA without a bias, and the peak memory."""
    lengths = sorted({row["length"] for row in rows})
    print(f"\n{rows[0]['pass']}, bias {rows[0]['bias']}, head_dim {rows[0]['head_dim']}: x of {BASE} (peak MiB)")
    print(f"{'':26}" + "".join(f"{length:>16}" for length in lengths))
    for name in dict.fromkeys(row["peer"] for row in rows):
        cells = {row["length"]: f"{row['ratio']:.2f} ({row['MiB']:.0f})" for row in rows if row["peer"] == name}
        print(f"{name:26}" + "".join(f"{cells.get(length, '-'):>16}" for length in lengths))


def plot(rows: list[dict], path: Path) -> None:
    """Time and memory over the length, both axes logarithmic; a column for each pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    passes = list(dict.fromkeys(row["pass"] for row in rows))
    figure, axes = pyplot.subplots(2, len(passes), figsize=(6 * len(passes), 8), squeeze=False)
    for column, name in enumerate(passes):
        for axis, field in zip(axes[:, column], ("ms", "MiB"), strict=True):
            for number, peer in enumerate(PEERS):
                points = [(row["length"], row[field]) for row in rows if (row["pass"], row["peer"]) == (name, peer)]
                if points:
                    bold = {"linewidth": 2.5, "zorder": 3} if peer == OURS else {}
                    axis.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=peer, **bold)
            axis.set(xscale="log", yscale="log", xlabel="length", ylabel={"ms": "time (ms)"}.get(field, "peak MiB"))
            axis.set_xticks(sorted({row["length"] for row in rows}))
            axis.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0, column].set_title(name)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="float32 on CPU, bfloat16 on a GPU, unless given")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--bias", nargs="+", default=["default", "listing"], choices=["default", "listing"])
    parser.add_argument("--passes", nargs="+", default=["forward", "backward"], choices=["forward", "backward"])
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--seconds", type=float, default=12.0, help="for each table column")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that a quadratic peer may take")
    parser.add_argument("--profile", action="store_true", help="also print where FIRE's time goes, by operator")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON and the plots")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    names = [name for name in PEERS if name in args.peers or name == BASE]
    args.out.mkdir(parents=True, exist_ok=True)

    every: list[dict] = []
    for head_dim in args.head_dims:
        for kind in args.bias:
            errors = check(names, kind, args, args.heads, head_dim, dtype)
            print(f"largest error, bias {kind}, head_dim {head_dim}: { ({k: f'{v:.0e}' for k, v in errors.items()}) }")
            for backward in ("forward" in args.passes) * [False] + ("backward" in args.passes) * [True]:
                rows: list[dict] = []
                for length in args.lengths:
                    rows += measure_case(names, kind, length, backward, args, args.heads, head_dim, dtype)
                print_table(rows)
                every += rows
            chosen = [row for row in every if (row["bias"], row["head_dim"]) == (kind, head_dim)]
            plot(chosen, args.out / f"attention_{kind}_d{head_dim}.png")
    measure.write_json(args.out / "attention.json", {"dtype": str(dtype), "rows": every}, args.device)


if __name__ == "__main__":
    main()
