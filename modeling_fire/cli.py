"""The `fire` command."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from . import conversion


app = typer.Typer(
    help="FIRE position encoding for Hugging Face transformers.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def main() -> None:
    """Keeps `convert` a command of its own while it is the only one."""


class Rotation(str, Enum):
    drop = "drop"
    keep = "keep"


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of the checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write. It appears when all is done.")],
    rotation: Annotated[
        Rotation, typer.Option(help="drop: pure FIRE, to be trained. keep: computes what SOURCE does, RoPE included.")
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
    Turn a LLaMA, Mistral, Qwen2, Qwen3, GPT-NeoX, BLOOM or MPT checkpoint into FIRE.

    Weights are streamed from shard to shard; the proof loads the original and then the converted model in float32, and
    the calibration the converted one, on a GPU if there is one.

    \b
    Example, with a model from the Hub:
        fire convert HuggingFaceTB/SmolLM2-135M smollm2-fire --calibrate sample
    \b
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("smollm2-fire", trust_remote_code=True)
    """
    options = None
    if calibrate is not None:
        options = conversion.CalibrationOptions(calibrate, tokens=calibration_tokens, seed=seed)
    try:
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
    except conversion.ConversionError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    if result.proof is not None:
        typer.echo(f"Proof: {result.proof}")
    if result.calibration is not None:
        typer.echo(f"Calibration: {result.calibration}")
    typer.echo(f"Wrote {out}")


if __name__ == "__main__":
    app()
