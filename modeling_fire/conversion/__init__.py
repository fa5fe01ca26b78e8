"""
Other architectures become FIRE: `convert` (and `fire convert`) rewrites a checkpoint and proves that it did it right.

A family of architectures is one file here, [`Family`], and one line in `FAMILIES`. Nothing of this travels with saved
models.
"""

import importlib.metadata
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, logging

from ..configuration_fire import FireConfig
from ..modeling_fire import FireForCausalLM
from .bloom import BLOOM
from .calibrate import Calibration, CalibrationOptions, calibrate_folder, calibration_windows
from .family import ConversionError, Family, writing
from .gpt_neox import GPT_NEOX
from .llama import LLAMA
from .mpt import MPT
from .proof import Proof, prompt_ids, prove
from .source import LICENCE_FILES, Source
from .weights import Shard, WeightMap, bias_weights, write_shards


FAMILIES = {model_type: family for family in (LLAMA, GPT_NEOX, BLOOM, MPT) for model_type in family.model_types}
RECORD_NAME = "conversion.json"
logger = logging.get_logger("transformers.fire")
# A pair of dimensions whose rotation turns so often within the training length has been seen at every angle: more
# distance brings nothing new. `rotation="fast"` keeps these.
TURNS = 1


@dataclass(frozen=True)
class Conversion:
    """
    What was converted and how well; `conversion.json` holds the same.

    Args:
        source (`str`): Hub id, or name of the folder.
        revision (`str`, *optional*): commit of the source on the Hub.
        gguf_file (`str`, *optional*): the file that was read.
        model_type (`str`): the source's.
        rotation (`str`, *optional*): `"drop"`, `"fast"` or `"keep"`; `None` for ALiBi.
        max_length (`float`): `L`, in tokens.
        proof ([`Proof`], *optional*): `None` if it was not asked for.
        calibration ([`Calibration`], *optional*): likewise.
        versions (`dict[str, str]`): of the libraries.
    """

    source: str
    revision: str | None
    gguf_file: str | None
    model_type: str
    rotation: str | None
    max_length: float
    proof: Proof | None
    calibration: Calibration | None
    versions: dict[str, str]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    rotation: Literal["drop", "fast", "keep"] = "drop",
    calibrate: CalibrationOptions | None = None,
    max_length: int | None = None,
    prompt: str | None = None,
    verify: bool = True,
    revision: str | None = None,
    gguf_file: str | None = None,
    overwrite: bool = False,
    max_shard_size: int = 2 * 10**9,
) -> Conversion:
    """
    Rewrites a checkpoint as a FIRE model and, unless told not to, proves that it computes the same.

    Weights are streamed: memory holds about one shard, until the proof, which loads first the original and then the
    converted model in float32, and the calibration, which loads the converted one. `out` appears when all is done, and
    not at all if anything fails; a run that is killed leaves a folder `out.partial-...` beside it, which may go. If
    only the last step fails, as others put something at `out` meanwhile, what is there stays, and the conversion is
    left in a folder `out.finished-...`.

    Args:
        source (`str` or `Path`): folder or Hub id of the original.
        out (`str` or `Path`): folder to write.
        rotation (`str`, *optional*, defaults to `"drop"`):
            `"drop"` writes pure FIRE; `"keep"` the model that computes what the original does, with the rotation at
            scale 1; `"fast"` keeps only what of the rotation comes round within the training length. In
            all FIRE's bias is 0. ALiBi has no rotation: there FIRE's bias is ALiBi.
        calibrate ([`CalibrationOptions`], *optional*):
            Has the bias take over what the dropped rotation did, as far as that goes without training the model.
        max_length (`int`, *optional*, defaults to 64 times the training length):
            Initial `L`, in tokens. ALiBi is exact up to here.
        prompt (`str`, *optional*): text for the proof.
        verify (`bool`, *optional*, defaults to `True`): whether to make the proof.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        gguf_file (`str`, *optional*): file of the source to read instead, through transformers: all of it at once.
        overwrite (`bool`, *optional*, defaults to `False`): whether a model that is in `out` may be replaced.
        max_shard_size (`int`, *optional*, defaults to 2 GB): bytes in a file of weights.

    Returns:
        [`Conversion`].

    Raises:
        [`ConversionError`]: for an architecture, an option or files that cannot be converted (before anything is
            written), and if the proof fails, the disk is full, or the result cannot be put at `out` in the end.
        [`~modeling_fire.errors.TextError`]: for a text that cannot be read, or has tokens that the model lacks.
    """
    from ..cards import Base, write_card  # which import this package

    out = Path(out).resolve()
    check_out(out, source, overwrite)
    original = Source.open(source, revision, gguf_file)
    config = read_config(original)
    family = FAMILIES[config.model_type]
    kept, final = fire_configs(family, config, rotation, max_length)
    if calibrate is not None and (rotation == "keep" or family.alibi_slopes is not None):
        raise ConversionError("`calibrate` is for a rotation that is dropped, or of which the slow part is.")

    with torch.device("meta"):
        model = FireForCausalLM(final)
    weight_map = WeightMap(family, model)
    tokenizer = original.tokenizer()
    windows = calibration_windows(calibrate, tokenizer, final) if calibrate is not None else None
    ids = prompt_ids(tokenizer, prompt, kept) if verify else None
    shards = original.shards()
    weight_map.check(shards)
    if model.config.dtype is None:
        # Loading would go by the first tensor it meets, and that is one of the float32 bias.
        model.config.dtype = next(tensor.dtype for _, tensor in weight_map.convert_all(shards))

    out.parent.mkdir(parents=True, exist_ok=True)
    with writing(), tempfile.TemporaryDirectory(prefix=f"{out.name}.partial-", dir=out.parent) as partial:
        staging = Path(partial) / out.name
        staging.mkdir()  # unlike its temporary parent, with the permissions that any new folder has
        slopes = family.alibi_slopes(config) if family.alibi_slopes is not None else None
        write_shards(converted(shards, weight_map, bias_weights(final, slopes)), staging, max_shard_size)
        del shards  # of a GGUF file a whole model
        write_around_weights(staging, model, original, tokenizer)
        proof = prove(original, staging, kept, ids) if ids is not None else None
        if proof is not None and not proof.holds:
            raise ConversionError(f"The converted model is not the original: {proof}. Nothing was written.")
        calibration = None
        if calibrate is not None:
            calibration = calibrate_folder(staging, kept, calibrate, windows, final.rope_max_period)

        record = Conversion(
            source=original.name,
            revision=original.revision,
            gguf_file=gguf_file,
            model_type=config.model_type,
            rotation=None if slopes is not None else rotation,
            max_length=final.fire_init_L,
            proof=proof,
            calibration=calibration,
            versions=library_versions(),
        )
        (staging / RECORD_NAME).write_text(json.dumps(asdict(record), indent=2) + "\n")
        write_card(staging, base=Base(original.name, original.on_hub, original.folder))
        # What is finished is no longer temporary: with this name it stays, whatever happens.
        finished = Path(partial).rename(f"{out}.finished-{partial.rpartition('-')[2]}")
    publish(finished / out.name, out, source, overwrite)
    return record


def publish(finished: Path, out: Path, source: str | Path, overwrite: bool) -> None:
    """
    Puts what is finished, alone in a folder, at `out`, and removes that folder. If that fails or is interrupted, what
    is at `out` stays there, and what is finished where it is, as the [`ConversionError`] or a warning says.
    """
    replaced = finished.with_name(f"{out.name}.replaced")
    try:
        check_out(out, source, overwrite)  # once more: the work may have taken hours
        if out.exists():
            out.rename(replaced)
        finished.rename(out)
    except BaseException as error:  # an interrupt, too
        if not finished.exists():  # it is at `out`
            raise
        if replaced.exists():
            replaced.rename(out)
        where = f"The finished conversion is {finished}."
        if isinstance(error, Exception):
            raise ConversionError(f"{str(error).rstrip('.')}. {where}") from error
        logger.warning(where)
        raise
    shutil.rmtree(finished.parent, ignore_errors=True)


def check_out(out: Path, source: str | Path, overwrite: bool) -> None:
    """Raises [`ConversionError`] unless `out` may be written to, which takes more than a word where files are lost."""
    if os.path.ismount(out):
        raise ConversionError(f"{out} is a mount point, which nothing can be renamed to: name a folder inside it.")
    parent = next(folder for folder in out.parents if os.path.exists(folder))  # not Path's: it may raise an error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConversionError(f"{out} cannot be made: {parent} is no folder that may be written to.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ConversionError(f"{out} exists and is not an empty folder. `overwrite` replaces a model that is there.")
    if not (out / CONFIG_NAME).is_file():
        raise ConversionError(f"{out} is not a model (it has no {CONFIG_NAME}), and is not overwritten.")
    if Path(source).resolve().is_relative_to(out):
        raise ConversionError(f"{out} holds the source, and is not overwritten.")


def read_config(source: Source) -> PreTrainedConfig:
    """The config of the original. Raises [`ConversionError`] for an architecture that is not supported."""
    stored = source.config_dict()
    if "model_type" not in stored:
        raise ConversionError(f"{source.name} has no {CONFIG_NAME} that names a `model_type`.")
    refuse_unknown(stored["model_type"])
    if stored.get("quantization_config") is not None:
        raise ConversionError("`quantization_config` is not supported: convert the weights it was made from.")
    config = source.config()
    refuse_unknown(config.model_type)  # transformers may read another: a Mistral with `layer_types` is a Ministral
    return config


def refuse_unknown(model_type: str) -> None:
    if model_type not in FAMILIES:
        raise ConversionError(
            f"The architecture {model_type!r} is not supported. Supported are {', '.join(FAMILIES)}."
        )


def fire_configs(
    family: Family, config: PreTrainedConfig, rotation: str, max_length: int | None
) -> tuple[FireConfig, FireConfig]:
    """
    The config that computes what the original does, and the one to save. Raises [`ConversionError`] for options that
    FIRE does not have.
    """
    if rotation not in ("drop", "fast", "keep"):
        raise ConversionError(f"`rotation` must be 'drop', 'fast' or 'keep', got {rotation!r}.")
    alibi = family.alibi_slopes is not None
    if alibi and rotation != "drop":
        raise ConversionError(f"`rotation={rotation!r}` does not apply: {config.model_type} has ALiBi, not RoPE.")
    try:
        fields = family.fire_fields(config) | {"fire_init_L": max_length, "architectures": ["FireForCausalLM"]}
        if alibi:  # the form of `FirePositionBias.from_alibi`
            fields |= {"fire_transform": "identity", "fire_mlp_width": 1}
        kept = FireConfig(**fields)
        changes = {
            "drop": {"rope_parameters": None},
            "fast": {"rope_max_period": fields["max_position_embeddings"] / TURNS},
            "keep": {},
        }
        final = FireConfig(**fields | changes[rotation])
    except (ConversionError, StrictDataclassError) as error:
        problem = error.__cause__ or error  # without what `@strict` says around it
        raise ConversionError(f"{config.model_type}: {problem} Supported are {', '.join(FAMILIES)}.") from error
    return kept, final


def converted(
    shards: list[Shard], weight_map: WeightMap, biases: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """FIRE's tensors one by one: those of the source, then the position biases."""
    tensors = itertools.chain(weight_map.convert_all(shards), biases)
    total = len(weight_map.shapes) - weight_map.tied
    yield from logging.tqdm(tensors, total=total, desc="Converting", unit=" tensors")


def write_around_weights(
    folder: Path, model: FireForCausalLM, source: Source, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Config and code, as `save_pretrained` writes them; tokenizer, chat template, generation config and licence."""
    custom_object_save(model, folder, config=model.config)  # type: ignore[arg-type]
    model.config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for pattern in (GENERATION_CONFIG_NAME, *LICENCE_FILES):
        for file in source.folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def library_versions() -> dict[str, str]:
    """Of the libraries that a conversion depends on, as far as they were installed rather than found on the path."""
    names = ("modeling-fire", "torch", "transformers", "safetensors")
    installed = {str(distribution.name).lower() for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in names if name in installed}


__all__ = [
    "FAMILIES",
    "Calibration",
    "CalibrationOptions",
    "Conversion",
    "ConversionError",
    "Family",
    "Proof",
    "convert",
]
