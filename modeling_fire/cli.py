"""The `fire` command: options and help. What the commands do is in `conversion` and `evaluation.report`."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from . import cards, conversion
from .errors import FireError
from .evaluation import report
from .evaluation.passkey import NAMES


app = typer.Typer(
    help="FIRE position encoding for Hugging Face transformers.", no_args_is_help=True, rich_markup_mode=None
)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the command with one line and exit status 1, where its input is at fault."""
    try:
        yield
    except FireError as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error


def refuse_idle(context: typer.Context, names: tuple[str, ...], missing: str) -> None:
    """Refuses options that were given although they do nothing without another."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            option = "/".join((*parameter.opts, *parameter.secondary_opts))
            raise typer.BadParameter(f"`{option}` does nothing without `{missing}`.")


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Rotation(str, Enum):
    drop = "drop"
    fast = "fast"
    keep = "keep"


@app.command()
def convert(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Folder or Hub id of the checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write. It appears when all is done.")],
    rotation: Annotated[
        Rotation,
        typer.Option(
            help="drop: pure FIRE, to be trained. fast: FIRE, and of RoPE what turns so fast that distance brings "
            "nothing new; to be trained, but nearer to SOURCE. keep: computes what SOURCE does, RoPE included."
        ),
    ] = Rotation.drop,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Let the bias take over what the rotation did, layer by layer, on a text: a file (plain text, or "
            "jsonl, json, csv or parquet with a column text), a dataset (name or name:configuration), or sample: what "
            "SOURCE itself writes.",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(min=1, help="How much of the text.")
    ] = conversion.CalibrationOptions.tokens,
    calibration_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens in a window of it. [default: the training length, up to 8192]"),
    ] = None,
    align: Annotated[
        bool | None,
        typer.Option(
            help="Of the calibration: fit the bias, then align the layers. Or only fit it, as by default where "
            "windows are longer than 2048 tokens."
        ),
    ] = None,
    repeat: Annotated[
        bool | None,
        typer.Option(
            help="Of the calibration: let half of the windows repeat themselves, so that heads which look for what "
            "was said long ago have something to do. By default where windows are longer than 2048 tokens."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the calibration.")] = 0,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="L, in tokens; ALiBi is exact up to here. [default: 64 times the training length]"),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text for the proof. [default: one that comes along]")] = None,
    verify: Annotated[bool, typer.Option(help="Prove that the logits are those of SOURCE.")] = True,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="File of SOURCE to read instead.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that is in OUT.")] = False,
) -> None:
    """
    Turn a LLaMA, Mistral, Ministral, Qwen2, Qwen3, GPT-NeoX, BLOOM or MPT checkpoint into FIRE.

    Weights are streamed from shard to shard; the proof loads the original and then the converted model in float32, and
    the calibration the converted one, on a GPU if there is one.

    \b
    Example, with a model from the Hub:
        fire convert HuggingFaceTB/SmolLM2-135M smollm2-fire --calibrate sample
    \b
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("smollm2-fire", trust_remote_code=True)
    """
    if calibrate is None:
        refuse_idle(context, ("calibration_tokens", "calibration_length", "align", "repeat", "seed"), "--calibrate")
    if not verify:
        refuse_idle(context, ("prompt",), "--verify")
    with one_line_errors():
        options = None
        if calibrate is not None:
            options = conversion.CalibrationOptions(
                calibrate, calibration_tokens, calibration_length, align, repeat, seed
            )
        result = conversion.convert(
            source,
            out,
            rotation=rotation.value,
            calibrate=options,
            max_length=max_length,
            prompt=prompt,
            verify=verify,
            revision=revision,
            gguf_file=gguf_file,
            overwrite=overwrite,
        )
    if result.proof is not None:
        typer.echo(f"Proof: {result.proof}")
    if result.calibration is not None:
        typer.echo(f"Calibration: {result.calibration}")
    typer.echo(f"Wrote {out}")


@app.command()
def evaluate(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids of causal language models, FIRE or not.")],
    text: Annotated[
        str,
        typer.Option(
            help="What they are to predict, from its beginning: a file (plain text, or jsonl, json, csv or parquet "
            "with a column text), or a dataset (name or name:configuration)."
        ),
    ],
    contexts: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="How much they see; may be repeated. [default: 1, 2, 4 and 8 times max_position_embeddings (or 512), "
            "as far as the text goes]",
        ),
    ] = None,
    targets: Annotated[
        int, typer.Option(min=1, help="Tokens at the end of each window that count.")
    ] = report.EvaluationOptions.num_targets,
    windows: Annotated[
        int, typer.Option(min=1, help="Windows of the text, each as long as the longest context.")
    ] = report.EvaluationOptions.num_windows,
    sliding: Annotated[
        bool, typer.Option("--sliding", help="Windows overlap, so that their targets are the text without gaps.")
    ] = False,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Also all tokens of the windows, by position.")
    ] = False,
    passkey: Annotated[
        bool, typer.Option("--passkey", help="Also how often they find a number that is hidden in a text.")
    ] = False,
    keys: Annotated[
        int, typer.Option(min=1, max=len(NAMES), help="Numbers in that text; one is asked for.")
    ] = report.EvaluationOptions.num_keys,
    trials: Annotated[
        int, typer.Option(min=1, help="Such texts for each length and each of five places of the number.")
    ] = report.EvaluationOptions.num_trials,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights. auto: as they are stored.")] = Dtype.auto,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a model. FIRE needs none.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for evaluation.json and plots. [default: none]")] = None,
) -> None:
    """
    Measure how models get on with long contexts: perplexity of the same tokens, and retrieval.

    All models have to cut the text into the same tokens; others are refused. Contexts beyond 2048 tokens are read
    in chunks with a cache: memory is linear in the length. A GPU is used if there is one.

    \b
    Example, a model and what became of it, at up to four times the length that it was trained on:
        fire convert HuggingFaceTB/SmolLM2-135M smollm2-fire --calibrate sample
        fire evaluate HuggingFaceTB/SmolLM2-135M smollm2-fire --text book.txt --windows 4 \\
            --contexts 2048 --contexts 8192 --contexts 32768 --by-position --passkey --out evaluation
    """
    if not passkey:
        refuse_idle(context, ("keys", "trials"), "--passkey")
    options = report.EvaluationOptions(
        text,
        contexts=contexts,
        num_targets=targets,
        num_windows=windows,
        sliding=sliding,
        by_position=by_position,
        passkey=passkey,
        num_keys=keys,
        num_trials=trials,
        dtype=dtype.value,
    )
    with one_line_errors():
        result = report.evaluate(models, options, out, trust_remote_code)
    typer.echo(report.tables(result))
    if out is not None:
        typer.echo(f"\nWrote {out}")


@app.command()
def plot(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a FIRE model.")],
    out: Annotated[Path, typer.Option(help="Folder for the plots.")],
    positions: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            max=2**22,  # distances, of each of which the bias of every head is held
            metavar="TOKENS",
            help="Where queries stand; may be repeated. [default: at the ends of 1x and 4x max_position_embeddings]",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Draw how far back the queries look in a text: a file, or a dataset, as for evaluate. [default: none]"
        ),
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(help="Draw c and L over the training: trainer_state.json, as FireTrainer wrote it."),
    ] = None,
) -> None:
    """
    Draw what a FIRE model learned about distance: its bias by head and layer, c and L, and where its attention goes.

    \b
    Example, with a model of your own:
        fire plot outputs/mine/model --out outputs/mine/plots --positions 127 --positions 2047 --text book.txt \\
            --history outputs/mine/trainer_state.json
    """
    with one_line_errors():
        learned = report.plot_model(model, out, positions, text, history)
    typer.echo(report.learned_tables(learned))
    typer.echo(f"Wrote {out}")


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model or adapter.")],
    name: Annotated[
        str | None,
        typer.Option(help="Its id on the Hub. [default: the name of FOLDER, or of the run if that is `model`]"),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="What the recipe found. [default: results.json or loss_by_context.json, see below]"),
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="What `fire evaluate` found. [default: evaluation.json, see below]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write. [default: README.md in FOLDER]")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a card that was not written by this command.")
    ] = False,
) -> None:
    """
    Write the model card of a folder, from what the run left there. What is not found is left out.

    Read are, in FOLDER: config.json, adapter_config.json, the weights, conversion.json (`fire convert`),
    loss_by_context.json, results.json (recipes), evaluation.json and trainer_state.json (Trainer's `save_state`). If
    FOLDER is called `model`, as recipes leave it, the last three are also looked for beside it, and with them the
    folder `converted`. Licence and language come from the card that is there, or from that of the model that this one
    was made of, if it is on this machine. Plots need matplotlib.

    \b
    Example, a model that was pretrained and measured, on its way to the Hub:
        fire evaluate outputs/mine/model --text book.txt --out outputs/mine
        fire card outputs/mine/model --name someone/mine
    """
    with one_line_errors():
        written = cards.write_card(
            folder, name=name, results=results, evaluation=evaluation, out=out, overwrite=overwrite
        )
    typer.echo(f"Wrote {written}")


if __name__ == "__main__":
    app()
