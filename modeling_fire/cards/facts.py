"""What the files of a run tell about its model. What they do not tell stays empty."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers.modelcard import TrainingSummary
from transformers.utils import CONFIG_NAME

from ..configuration_fire import FireConfig
from ..conversion import RECORD_NAME, library_versions
from ..errors import FireError
from .measures import STDLIB, Perplexities, Text, is_hub_id, texts


ADAPTER_CONFIG_NAME = "adapter_config.json"
CARD_NAME = "README.md"
LICENCE = ("license", "license_name", "license_link")


class CardError(FireError):
    """What no card can be written of. The message says what would do."""


@dataclass(frozen=True)
class Base:
    """
    The model that another was made of.

    Args:
        name (`str`): Hub id, or the name of the folder without its path.
        on_hub (`bool`): whether `name` is an id.
        folder (`Path`, *optional*): where its files are, as far as they are on this machine.
    """

    name: str
    on_hub: bool
    folder: Path | None

    @classmethod
    def of(cls, source: str, revision: str | None = None, known: bool = False) -> "Base":
        """
        Of a folder or a Hub id. That an id is one shows in the cache of the Hub, which has what was loaded from there,
        unless it is `known`: the path of a folder that is gone may look like an id.
        """
        path = Path(source)
        if path.is_dir():
            return cls(title_of(path), False, path)
        try:
            cached = try_to_load_from_cache(source, CONFIG_NAME, revision=revision)
        except HFValidationError:
            cached = None
        if isinstance(cached, str):
            return cls(source, True, Path(cached).parent)
        if known and is_hub_id(source):
            return cls(source, True, None)
        return cls(title_of(path), False, None)

    def card_data(self) -> dict[str, Any]:
        return card_data(self.folder / CARD_NAME) if self.folder is not None else {}


@dataclass
class Training:
    """
    What a Trainer knows of a training, beside the folder that it saves to.

    Args:
        config (`dict`): of the model, or of the one that the adapter is for.
        adapter (`dict`, *optional*): of PEFT's adapter.
        base ([`Base`], *optional*): the model that it started from.
        state (`dict`): `log_history` and `global_step`, as in trainer_state.json.
        arguments (`dict`): TrainingArguments.
        summary (`TrainingSummary`): transformers', for its own card.
    """

    config: dict[str, Any]
    adapter: dict[str, Any] | None
    base: Base | None
    state: dict[str, Any]
    arguments: dict[str, Any]
    summary: TrainingSummary

    def metadata(self) -> dict[str, Any]:
        """What the card's metadata say beside what is found: all that Trainer's card would say, and is not ours."""
        given = self.summary.create_metadata()
        _, given["eval_results"] = model_index_to_eval_results(given.pop("model-index"))
        return {name: value for name, value in given.items() if name not in ("library_name", "base_model")}

    def data(self) -> list[str]:
        """The names of what was trained on, as far as Trainer was told."""
        names = self.summary.dataset or []
        return [names] if isinstance(names, str) else names


@dataclass
class Facts:
    """
    All that was found.

    Args:
        folder (`Path`): of the model or adapter.
        config (`dict`): of the model, or of the one that the adapter is for.
        adapter (`dict`, *optional*): of PEFT's adapter.
        record (`dict`, *optional*): of the conversion.
        results (`dict`): of the recipe.
        state (`dict`): of the Trainer.
        evaluation (`dict`): of `fire evaluate`; empty if it is not of this model.
        base ([`Base`], *optional*): what the model was made of.
        training ([`Training`], *optional*): from the Trainer itself.
    """

    folder: Path
    config: dict[str, Any]
    adapter: dict[str, Any] | None = None
    record: dict[str, Any] | None = None
    results: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    base: Base | None = None
    training: Training | None = None

    @classmethod
    def of(
        cls,
        folder: Path,
        results: Path | dict[str, Any] | None = None,
        evaluation: Path | None = None,
        base: Base | None = None,
        training: Training | None = None,
    ) -> "Facts":
        """
        Reads what there is.

        Raises:
            [`CardError`]: if the folder holds no model, a file is no JSON, or `evaluation` is of other models.
        """
        near = [folder, folder.parent] if folder.name == "model" else [folder]  # recipes leave it so
        config = training.config if training else read_first([folder / CONFIG_NAME])
        adapter = training.adapter if training else read_first([folder / ADAPTER_CONFIG_NAME]) or None
        adapter = json.loads(json.dumps(adapter, default=list))  # PEFT has sets and enumerations
        if not config and adapter is None:
            raise CardError(
                f"{folder} has no {CONFIG_NAME} and no {ADAPTER_CONFIG_NAME}: give a saved model's folder."
            )
        if isinstance(results, dict):
            found = json.loads(json.dumps(results))  # with keys as in a file
        elif results is not None:
            found = read_first([existing(results)])
        else:
            found = read_first([folder / "loss_by_context.json", *(each / "results.json" for each in near)])
        facts = cls(folder, config, adapter, results=found, training=training)
        facts.state = training.state if training else read_first([each / "trainer_state.json" for each in near])
        # Beside the model lies the conversion that a retrofit began with.
        records = [folder, folder.parent / "converted"] if "heal" in facts.settings else [folder]
        facts.record = read_first([each / RECORD_NAME for each in records]) or None
        facts.base = base or facts.find_base()
        if adapter is not None and not config and facts.base is not None and facts.base.folder is not None:
            facts.config = read_first([facts.base.folder / CONFIG_NAME])
        if facts.is_fire:
            try:
                facts.config = FireConfig.from_dict(facts.config).to_dict()  # with its defaults
            except (StrictDataclassError, TypeError) as error:
                raise CardError(f"The config of {folder} is not valid: {error}") from error
        found = read_first([existing(evaluation)] if evaluation else [e / "evaluation.json" for e in near])
        if facts.own_name(found) is not None:
            facts.evaluation = found
        elif evaluation is not None:
            others = ", ".join(found.get("models", {})) or "no model"
            raise CardError(f"{evaluation} has no figures of {folder}, but of {others}.")
        return facts

    @property
    def settings(self) -> dict[str, Any]:
        return self.results.get("settings") or self.results.get("study") or {}

    @property
    def is_fire(self) -> bool:
        return self.config.get("model_type") == "fire"

    @property
    def kind(self) -> str:
        """The name of the template."""
        if self.adapter is not None:
            return "adapter"
        if self.record is not None:
            return "retrofit"
        return "finetuned" if self.base is not None else "pretrained"

    @property
    def begins_at_random(self) -> bool:
        """Whether the files tell so, or the Trainer: that a folder names no base may mean that nobody knows it."""
        return self.base is None and (bool(self.settings) or self.training is not None)

    def find_base(self) -> Base | None:
        model = self.settings.get("model")
        if self.training is not None and self.training.base is not None:
            return self.training.base
        if self.adapter is not None:
            name = self.adapter.get("base_model_name_or_path")  # none, if that was made in memory
            return Base.of(name, self.adapter.get("revision")) if name else Base("a model without a name", False, None)
        if self.record is not None:
            source, revision = self.record["source"], self.record["revision"]  # only the Hub has revisions
            return Base.of(source, revision, known=True) if revision is not None else Base(source, False, None)
        if isinstance(model, str) and not self.settings.get("random_start"):
            return Base.of(model)
        return (
            Base.of(model["source"], model.get("revision")) if isinstance(model, dict) and "source" in model else None
        )

    def inherited(self) -> dict[str, Any]:
        """Licence and language of the card that is there, of the conversion's, or of the base's."""
        folders = [self.folder, self.folder.parent / "converted"] if "heal" in self.settings else [self.folder]
        cards = [card_data(folder / CARD_NAME) for folder in folders]
        cards += [self.base.card_data()] if self.base is not None else []
        licence = dict(next((card for card in cards if "license" in card), {}))
        link = licence.get("license_link", "")
        if "://" not in link and not (self.folder / link).exists():
            # A file beside the base, which is not here.
            on_hub = self.base is not None and self.base.on_hub
            licence["license_link"] = f"{ENDPOINT}/{self.base.name}/blob/main/{link}" if on_hub else None
        language = next((card for card in cards if "language" in card), {})
        return {name: licence[name] for name in LICENCE if licence.get(name) is not None} | {
            name: language[name] for name in ("language",) if name in language
        }

    def own_name(self, evaluation: dict[str, Any]) -> str | None:
        """What an evaluation calls this model, see [`~modeling_fire.evaluation.loading.distinct_names`]."""
        parts = self.folder.resolve().parts
        names = {"/".join(parts[-depth:]) for depth in range(1, len(parts))}
        return next((name for name in evaluation.get("models", {}) if name in names), None)

    def history(self) -> list[dict[str, Any]]:
        """What was logged, in the form of Trainer."""
        if self.state:
            return self.state["log_history"]
        entries = [{"step": int(step), "loss": loss} for step, loss in self.results.get("train_loss", {}).items()]
        for step, losses in self.results.get("eval_loss", {}).items():
            by_name = (
                {f"eval_loss_{context}": loss for context, loss in losses.items()} if isinstance(losses, dict) else {}
            )
            entries.append({"step": int(step), **(by_name or {"eval_loss": losses})})
        return entries

    def train_texts(self) -> list[Text]:
        data = self.settings.get("data", {})
        sources = data.get("train", data.get("text"))
        if "contexts" in self.settings:  # of extrapolate.py, which reads Python's standard library if told nothing
            sources = self.settings.get("text") or STDLIB
        return texts(sources)

    def held_out_texts(self) -> list[Text]:
        data = self.settings.get("data", {})
        sources = data.get("held_out", data.get("validation"))
        if isinstance(sources, (str, list, dict)):
            return texts(sources)
        return [replace(text, split=None) for text in self.train_texts()]  # a share of them

    def perplexities(self, title: str) -> list[Perplexities]:
        """Of the recipe's own test, and of `fire evaluate`; `title` is what this model is to be called."""
        measured, losses = [], self.results.get("loss")
        if "mean_loss" in self.results and len(self.settings["seeds"]) == 1:  # a study: folders have names of variants
            losses = self.results["mean_loss"].get(title.rpartition("-seed")[0])
        if isinstance(losses, dict):
            counts = self.settings.get("evaluation", self.settings)
            measured.append(Perplexities(self.held_out_texts(), counts, {title: losses}, title, held_out=True))
        if self.evaluation:
            own, settings = self.own_name(self.evaluation), self.evaluation["settings"]
            by_model = {
                title if name == own else name: figures["loss_by_context"]
                for name, figures in self.evaluation["models"].items()
            }
            measured.append(Perplexities(texts(settings["text"]), settings, by_model, title))
        return measured

    @property
    def own_evaluation(self) -> dict[str, Any]:
        """What `fire evaluate` measured of this model; empty if it did not."""
        return self.evaluation["models"][self.own_name(self.evaluation)] if self.evaluation else {}

    @property
    def steps(self) -> int | None:
        return self.state.get("global_step", self.settings.get("training", {}).get("max_steps"))

    @property
    def settings_length(self) -> int | None:
        """Tokens in a text of the training, at the most."""
        return self.settings.get("length", self.settings.get("data", {}).get("length"))

    @property
    def train_length(self) -> int | None:
        """The same, or the length that the config of a FIRE model tells."""
        return self.settings_length or (self.config.get("max_position_embeddings") if self.is_fire else None)

    @property
    def versions(self) -> dict[str, str]:
        sources = (self.record or {}, self.evaluation, self.results)
        found = {name: version for source in sources for name, version in source.get("versions", {}).items()}
        return found or (library_versions() if self.training is not None else {})


def title_of(folder: Path) -> str:
    """The name of a folder; of `NAME/model` and `NAME/seed0`, as recipes leave them, with the name."""
    folder = folder.resolve()
    if folder.name == "model":
        return title_of(folder.parent)
    return f"{folder.parent.name}-{folder.name}" if re.fullmatch(r"seed\d+", folder.name) else folder.name


def card_data(path: Path) -> dict[str, Any]:
    """The metadata of a card; empty if there is none."""
    return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}


def existing(path: Path) -> Path:
    if not path.is_file():
        raise CardError(f"There is no file {path}.")
    return path


def read_first(paths: Iterable[Path]) -> dict[str, Any]:
    """The JSON in the first of the files that is there; empty if none is."""
    for path in paths:
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CardError(f"{path} is broken: {error}") from error
            if not isinstance(found, dict):
                raise CardError(f"{path} is not what its name says: it holds a {type(found).__name__}, not an object.")
            return found
    return {}
