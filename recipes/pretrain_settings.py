"""The YAML of a pretraining run."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from corpus import byte_tokenizer
from huggingface_hub.errors import StrictDataclassError
from settings import SettingsError, check_names
from training_arguments import training_arguments
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments

from modeling_fire import FireConfig


# Fields of `training` that say how a machine does the work, not what is done.
OF_THE_MACHINE = {
    "per_device_train_batch_size",
    "use_cpu",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "gradient_checkpointing",
    "disable_tqdm",
    "report_to",
    "save_steps",
    "save_total_limit",
}


@dataclass
class Model:
    """The shape: a JSON of configuration/models, and fields of FireConfig that differ."""

    config: str
    changes: dict = field(default_factory=dict)


@dataclass
class Data:
    """What is read; sources are files or datasets, see `open_rows` in sources.py."""

    train: str | list[str]
    held_out: str | list[str]
    column: str = "text"
    shuffle_buffer: int = 1000  # documents


@dataclass
class Evaluation:
    """The last `num_targets` tokens of each held-out window, predicted from each of the `contexts`."""

    contexts: list[int]  # in tokens
    num_targets: int = 64
    num_windows: int = 64


@dataclass
class Pretrain:
    """The YAML. `training` holds transformers' TrainingArguments."""

    output_dir: str
    model: Model
    tokenizer: str  # a folder, a name on the Hub, or `bytes`
    data: Data
    length: int  # tokens in a training window
    batch_size: int  # windows in a step, over all processes
    training: dict
    evaluation: Evaluation
    bias_lr_multiplier: float = 1.0  # learning rate of the position bias, as a multiple of the others'

    def __post_init__(self):
        check_names(FireConfig, self.model.changes, "model.changes")
        check_names(TrainingArguments, self.training, "training")
        for name in ("output_dir", "gradient_accumulation_steps"):
            if name in self.training:
                raise ValueError(f"Leave out `training.{name}`: it follows from `output_dir` and `batch_size`.")
        if self.training.get("dataloader_num_workers"):
            raise ValueError("Leave out `training.dataloader_num_workers`: the main process reads the stream.")
        steps = self.training.get("max_steps")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(
                f"Set `training.max_steps` to a whole number, 1 or more, got {steps}: the stream has no end."
            )
        contexts, num_targets = self.evaluation.contexts, self.evaluation.num_targets
        if min(contexts) < num_targets:
            raise ValueError(f"`evaluation.num_targets` ({num_targets}) do not fit into contexts of {contexts}.")

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        training = {name: value for name, value in self.training.items() if name not in OF_THE_MACHINE}
        return {name: value for name, value in asdict(self).items() if name != "output_dir"} | {"training": training}

    def arguments(self) -> TrainingArguments:
        """With as many steps of accumulation as the processes need for `batch_size`."""
        # The stream itself begins where it was.
        given = {"save_strategy": "steps", "ignore_data_skip": True, **self.training}
        arguments = training_arguments(Path(self.output_dir), given)
        if arguments.n_gpu > 1:  # Trainer would take torch's DataParallel
            raise SettingsError(
                f"One process has {arguments.n_gpu} GPUs: start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES."
            )
        windows = arguments.train_batch_size * arguments.world_size
        if self.batch_size % windows != 0:
            raise SettingsError(
                f"`batch_size` ({self.batch_size}) must be a multiple of `training.per_device_train_batch_size` x "
                f"processes ({arguments.train_batch_size} x {arguments.world_size})."
            )
        arguments.gradient_accumulation_steps = self.batch_size // windows
        if self.evaluation.num_windows % arguments.world_size != 0:
            raise SettingsError(
                f"`evaluation.num_windows` ({self.evaluation.num_windows}) must be a multiple of the number of "
                f"processes ({arguments.world_size})."
            )
        return arguments

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer == "bytes":
            return byte_tokenizer()
        try:
            return AutoTokenizer.from_pretrained(self.tokenizer)
        except (ImportError, OSError, ValueError) as error:  # which may say what went wrong, and not with what
            raise SettingsError(f"There is no tokenizer in {self.tokenizer} (`tokenizer`): {error}") from error

    def config(self, tokenizer: PreTrainedTokenizerBase) -> FireConfig:
        """The model's, with the length of the training and the special tokens of the tokenizer."""
        path = Path(self.model.config)
        if not path.is_file():
            raise SettingsError(f"There is no file {path}: `model.config` names a JSON, as in configuration/models.")
        own = {
            "max_position_embeddings": self.length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        try:
            fields = dict(json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise SettingsError(f"{path} (`model.config`) is not the JSON of a model: {error}") from error
        check_names(FireConfig, fields, str(path), also=FireConfig().to_dict())  # which save_pretrained writes
        try:
            config = FireConfig.from_dict({**fields, **own, **self.model.changes})
        except (AttributeError, StrictDataclassError, ValueError) as error:  # the first of a dtype that torch lacks
            raise SettingsError(f"`model`: {error.__cause__ or error}") from error
        if len(tokenizer) > config.vocab_size:
            raise SettingsError(
                f"The tokenizer {self.tokenizer} has {len(tokenizer)} tokens and the model only {config.vocab_size}: "
                f"set `model.changes.vocab_size` to {len(tokenizer)} or more, or take another tokenizer."
            )
        return config


def check_shape(config: FireConfig, checkpoint: str) -> None:
    """Refuses a checkpoint of another model."""
    other = FireConfig.from_pretrained(checkpoint)
    fields = set(FireConfig.__annotations__) - {"use_cache"}  # which Trainer turns off
    names = sorted(name for name in fields if getattr(other, name) != getattr(config, name))
    if names:
        raise SettingsError(
            f"{checkpoint} is of another model ({', '.join(names)} differ): delete it, or choose another `output_dir`."
        )
