"""
Model cards: what a run left, in the templates of `hub_cards`. A fact that was not found is left out.

`facts` reads the files of a run, `weights` those of the model, `measures` puts figures into the form of the Hub.
"""

import importlib.util
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from ..evaluation import plot_learned_bias, plot_perplexity_by_context
from ..evaluation.attention import position_biases
from ..modeling_fire import FireModel
from .description import describe
from .facts import CARD_NAME, Base, CardError, Facts, Training, title_of
from .measures import Perplexities, eval_results, is_hub_id, task_scores
from .weights import saved_biases


# In cards that are written here, and so may be written anew without asking.
MARK = "<!-- Written by modeling_fire.cards"
# Of the plot of the biases: a few seconds of matplotlib. `fire plot` draws any number of them.
MOST_POINTS = 5_000_000


def write_card(
    folder: str | Path,
    *,
    name: str | None = None,
    results: Path | dict[str, Any] | None = None,
    evaluation: Path | None = None,
    out: Path | None = None,
    base: Base | None = None,
    training: Training | None = None,
    overwrite: bool = True,
) -> Path:
    """
    Writes the card of a model or an adapter, and its plots beside it if matplotlib is there.

    Args:
        folder (`str` or `Path`): what `save_pretrained` left.
        name (`str`, *optional*):
            What the model is loaded by: its id on the Hub. By default the name of the folder; of `NAME/model`, which
            recipes leave, that of the run.
        results (`Path` or `dict`, *optional*):
            What a recipe found. By default `results.json` or `loss_by_context.json` in the folder; of a folder called
            `model` also beside it, where `trainer_state.json` and `evaluation.json` are looked for as well.
        evaluation (`Path`, *optional*): `evaluation.json` of `fire evaluate`, likewise.
        out (`Path`, *optional*): the file to write; by default `README.md` in the folder.
        base ([`Base`], *optional*): what the model was made of, where the files do not tell.
        training ([`Training`], *optional*): from a Trainer at work, instead of what it saved.
        overwrite (`bool`, *optional*, defaults to `True`): whether a card that was not written here may be replaced.

    Returns:
        `Path`: the card.

    Raises:
        [`CardError`]: before anything is written, if there is no model, or if a file is broken or of another model.
    """
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise CardError(f"{out} cannot be written: give the file, {CARD_NAME} for instance, in a folder that exists.")
    out = out or Path(folder) / CARD_NAME
    folder = Path(folder).resolve()
    if not overwrite and out.exists() and MARK not in out.read_text(encoding="utf-8"):
        raise CardError(f"{out} was not written by this command. `--overwrite` replaces it.")
    facts = Facts.of(folder, results, evaluation, base, training)
    title = name.rpartition("/")[2] if name else title_of(folder)
    measured = facts.perplexities(title)
    untrained = facts.record is not None and facts.record["calibration"] is None and not facts.steps
    biases = saved_biases(folder, facts.config) if facts.is_fire and not untrained else None
    values = describe(facts, measured, biases) | {"title": title, "name": name or title}
    values |= draw(facts, measured, biases, out.parent)
    card = render(facts.kind, metadata(facts, values, measured), values)
    temporary = out.with_name(out.name + ".tmp")
    card.save(temporary)
    os.replace(temporary, out)
    return out


def render(kind: str, data: ModelCardData, values: dict[str, Any]) -> ModelCard:
    """The card, without the blank lines that facts leave that are not there."""
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    base = jinja2.Template(template("base"), **options)
    card = ModelCard.from_template(data, template_str=template(kind), base=base, **values)
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"
    return card


def template(kind: str) -> str:
    """In an installed package the templates are inside, in a checkout beside it."""
    folder = resources.files("modeling_fire") / "hub_cards"
    if not folder.is_dir():
        folder = Path(__file__).parents[2] / "hub_cards"
    return (folder / f"{kind}.md.jinja").read_text(encoding="utf-8")


def metadata(facts: Facts, values: dict[str, Any], measured: list[Perplexities]) -> ModelCardData:
    """What the Hub reads. Its words for `base_model_relation` are adapter, finetune, merge and quantized."""
    base, given = facts.base, facts.training.metadata() if facts.training else {}
    tags = ["fire"] if facts.is_fire else []
    tags += ["custom_code"] if facts.is_fire and facts.adapter is None else []  # of an adapter the base has it
    tags += ["lora"] if (facts.adapter or {}).get("peft_type") == "LORA" else []
    base_model = base.name if base is not None and base.on_hub else None
    if base_model is None and base is not None and facts.kind == "finetuned":
        made_of = base.card_data().get("base_model")  # what a local model was itself made of
        base_model = made_of if isinstance(made_of, str) and is_hub_id(made_of) else None
    data: dict[str, Any] = {
        **facts.inherited(),
        "library_name": "peft" if facts.adapter is not None else "transformers",
        "pipeline_tag": values["head"],
        "base_model": base_model,
        "datasets": list(dict.fromkeys(text.name for text in facts.train_texts() if text.on_hub)) or None,
    }
    data |= {**given, "tags": [*tags, *given.get("tags", [])] or None}
    if data["base_model"] is not None:
        data["base_model_relation"] = "adapter" if facts.kind == "adapter" else "finetune"
    scores = task_scores(facts.results)
    found = [*eval_results(measured, scores, facts.held_out_texts(), values["head"]), *data.pop("eval_results", [])]
    return ModelCardData(**data | ({"eval_results": found, "model_name": values["title"]} if found else {}))


def draw(facts: Facts, measured: list[Perplexities], biases: FireModel | None, out: Path) -> dict[str, str | None]:
    """The plots that there is something to draw for, by the names that the templates have for them."""
    drawn: dict[str, str | None] = {"perplexity_plot": None, "bias_plot": None}
    if importlib.util.find_spec("matplotlib") is None:
        return drawn
    length = facts.train_length
    if measured:  # the last is of `fire evaluate`, if there is one
        losses = measured[-1].means()
        contexts = [context for by_context in losses.values() for context in by_context]
        in_view = length is not None and min(contexts) <= length <= max(contexts)
        drawn["perplexity_plot"] = "perplexity.png"
        plot_perplexity_by_context(losses, out / "perplexity.png", length if in_view else None)
    points = 5 * (length or 0) * len(position_biases(biases)) * facts.config["num_attention_heads"] if biases else 0
    if 0 < points <= MOST_POINTS:
        drawn["bias_plot"] = "bias.png"
        plot_learned_bias(biases, out / "bias.png", [length - 1, 4 * length - 1])
    return drawn


__all__ = ["Base", "CardError", "Training", "write_card"]
