"""The facts as the templates name them."""

import math
from pathlib import Path
from typing import Any

from ..conversion import Calibration, Proof
from ..conversion.calibrate import GIVEN, SAMPLE
from ..conversion.source import TOKENIZER_FILES
from ..evaluation import learned_scales
from ..modeling_fire import FireModel
from .facts import Facts
from .measures import Perplexities, Text, passkeys, task_scores
from .weights import count_parameters


# By the end of a class's name: the Hub's task, transformers' Auto class, and what such a model is called.
HEADS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM", "A language model"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM", "A language model"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification", "A text classifier"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification", "A token classifier"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering", "An extractive answerer"),
    "": ("feature-extraction", "AutoModel", "A decoder without a head"),
}
# PEFT's names of the same.
TASK_TYPES = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
ENCODINGS = {
    "fire": "[FIRE](https://arxiv.org/abs/2310.04418)",
    "alibi": "ALiBi",
    "kerple_log": "KERPLE (logarithmic)",
    "kerple_power": "KERPLE (power)",
    "t5": "T5's relative position bias",
    "sandwich": "Sandwich",
}
# Settings of the recipes, and fields of TrainingArguments, that make a model what it is, in the order of the card.
SETTINGS = ("batch_size", "bias_lr_multiplier", "bias_weight_decay")
HYPERPARAMETERS = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm"),
    *("label_smoothing_factor", "bf16", "fp16"),
)
# Of these fields, what says that there is nothing to say.
UNSET: tuple[Any, ...] = (None, 0, -1, False, "", {})
# Of the table of a training, at the most.
ROWS = 12


def describe(facts: Facts, measured: list[Perplexities], biases: FireModel | None) -> dict[str, Any]:
    """Every variable of the templates, but for the name of the model and those of the plots."""
    config, base = facts.config, facts.base
    head, auto_class, what = head_of(facts)
    encoding = encoding_of(config)
    count, dtypes = count_parameters(facts.folder)
    parts = [encoding, f"{count:,} parameters" if count and facts.adapter is None else None]
    in_folder = has_tokenizer(facts.folder)
    in_base = facts.adapter is not None and base.folder is not None and has_tokenizer(base.folder)
    reach = reach_of(config, biases)
    longest = max((context for each in measured for context in each.means()[each.own]), default=None)
    return {
        "fire": facts.is_fire,
        "biased": config.get("position_bias", "none") != "none",
        "cite": config.get("position_bias") == "fire",
        "head": head,
        "auto_class": auto_class,
        "trust": ", trust_remote_code=True" if facts.is_fire else "",
        "tokenizer": in_folder or in_base,
        "tokenizer_in_base": in_base and not in_folder,
        "model": " with ".join(part for part in (what, " and ".join(part for part in parts if part)) if part),
        "encoding": encoding,
        "rotates": config.get("rope_parameters") is not None,
        "base_name": None if base is None else base.name,
        "base_model": None if base is None else link(base.name) if base.on_hub else f"`{base.name}`",
        "adapter": adapter_rows(facts.adapter, count) if facts.adapter is not None else [],
        "shape": shape_rows(config, count if facts.adapter is None else 0, dtypes),
        "encoding_settings": encoding_rows(config, biases),
        "conversion": conversion_of(facts.record) if facts.record is not None else None,
        "task": facts.settings.get("task"),
        "data": [str(text) for text in facts.train_texts()] + (facts.training.data() if facts.training else []),
        "steps": facts.steps,
        "from_scratch": facts.steps is not None and facts.begins_at_random,
        "length": facts.settings_length,
        "hyperparameters": hyperparameters_of(facts),
        "history": history_table(facts.history()),
        "perplexities": [perplexity_table(each) for each in measured],
        "scores": score_table(facts),
        "passkeys": passkeys(facts.own_evaluation),
        "trained_at": facts.train_length,
        "longest": longest,
        "reach": None if reach is None else short(reach),
        "reached": None not in (longest, reach) and longest > reach,
        "versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
    }


def head_of(facts: Facts) -> tuple[str, str, str]:
    """Task, Auto class and noun."""
    name = TASK_TYPES.get((facts.adapter or {}).get("task_type") or "")
    name = name or next(iter(facts.config.get("architectures") or []), "")
    return next(value for end, value in HEADS.items() if name.endswith(end))


def encoding_of(config: dict[str, Any]) -> str | None:
    """The position encoding, if the config tells."""
    names = [ENCODINGS[config["position_bias"]]] if config.get("position_bias", "none") != "none" else []
    names += ["rotary position embeddings (RoPE)"] if config.get("rope_parameters") else []
    return " beside ".join(names) or ("no position encoding" if config.get("position_bias") == "none" else None)


def shape_rows(config: dict[str, Any], count: int, dtypes: set[str]) -> list[tuple[str, Any]]:
    heads, key_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    length = "training length (tokens)" if config.get("model_type") == "fire" else "positions"
    rows = [
        ("architecture", next(iter(config.get("architectures") or []), None)),
        ("parameters", f"{count:,}" if count else None),
        ("type of the weights", ", ".join(sorted(dtypes))),
        ("layers", config.get("num_hidden_layers")),
        ("hidden size", config.get("hidden_size")),
        ("heads", heads if key_heads in (None, heads) else f"{heads}, {key_heads} of keys and values"),
        ("vocabulary", config.get("vocab_size")),
        (length, config.get("max_position_embeddings")),
    ]
    return [(name, value) for name, value in rows if value]


def adapter_rows(adapter: dict[str, Any], count: int) -> list[tuple[str, Any]]:
    def names(value: Any) -> str:
        return ", ".join(f"`{name}`" for name in ([value] if isinstance(value, str) else sorted(value or [])))

    rows = [
        ("kind", adapter.get("peft_type")),
        ("parameters", f"{count:,}" if count else None),
        ("rank", adapter.get("r")),
        ("alpha", adapter.get("lora_alpha")),
        ("adapted", names(adapter.get("target_modules"))),
        ("trained whole", names(adapter.get("modules_to_save"))),
    ]
    return [(name, value) for name, value in rows if value]


def encoding_rows(config: dict[str, Any], biases: FireModel | None) -> list[tuple[str, Any]]:
    """Of FIRE, what was set and what was learned."""
    if config.get("position_bias") != "fire":
        return []
    rows = [
        ("biases", "one, shared by all layers (FIRE-S)" if config["fire_share_layers"] else "one for each layer"),
        (
            "hidden layers of f",
            f"{config['fire_mlp_depth']} of {config['fire_mlp_width']}, {config['fire_activation']}",
        ),
        ("psi", config["fire_transform"]),
        ("initial c", short(config["fire_init_c"]) if config["fire_transform"] != "identity" else None),
        ("initial L (tokens)", short(config["fire_init_L"])),
    ]
    for name, unit in (("c", ""), ("L", " (tokens)")):
        learned = [scale[name] for scale in learned_scales(biases) if scale[name] is not None] if biases else []
        if learned:
            rows.append((f"{name}{unit}, by layer", ", ".join(map(short, learned))))
    rows += [(f"`{name}`", config[name]) for name in ("fire_progressive", "fire_threshold") if not config[name]]
    return [(name, value) for name, value in rows if value is not None]


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 1e4 else f"{value:.5g}"


def reach_of(config: dict[str, Any], biases: FireModel | None) -> float | None:
    """The tokens up to which FIRE's bias is one of the distance alone, in every layer."""
    if config.get("position_bias") != "fire" or not config["fire_progressive"] or not config["fire_threshold"]:
        return None
    learned = [scale["L"] for scale in learned_scales(biases) if scale["L"] is not None] if biases else []
    return min(learned, default=config["fire_init_L"])


def conversion_of(record: dict[str, Any]) -> dict[str, Any]:
    proof, calibration = record["proof"], record["calibration"]
    return {
        "rotation": record["rotation"],
        "max_length": f"{record['max_length']:.0f}",
        "proof": None if proof is None else Proof(**proof),
        "calibration": None if calibration is None else Calibration(**calibration),
        "calibrated_on": None if calibration is None else calibrated_on(calibration["text"]),
    }


def calibrated_on(text: str) -> str:
    if text == SAMPLE:
        return "what the source itself wrote"
    return text if text == GIVEN else str(Text.of(text))


def hyperparameters_of(facts: Facts) -> list[tuple[str, Any]]:
    settings = facts.settings
    rows = [(name, settings.get(name)) for name in SETTINGS]
    rows += [(name, facts.results.get(name)) for name in ("tokens_per_step", "processes")]
    arguments = facts.training.arguments if facts.training is not None else settings.get("training", {})
    rows += [(name, arguments[name]) for name in HYPERPARAMETERS if arguments.get(name) not in UNSET]
    rows += [("seed", arguments.get("seed"))]
    rows += [(name, value) for name, value in settings.get("heal", {}).items() if name != "teacher_device"]
    rows += [("lora", settings.get("lora"))]
    return [(name.replace("_", " "), value) for name, value in rows if value is not None]


def history_table(history: list[dict[str, Any]]) -> list[list[Any]]:
    """Header and rows: the steps that were evaluated, or else logged, evenly picked; empty if there are none."""
    by_step: dict[int, dict[str, float]] = {}
    for entry in history:
        figures = {name: value for name, value in entry.items() if name == "loss" or name.startswith("eval_")}
        by_step.setdefault(entry["step"], {}).update(figures)
    timing = ("_runtime", "_per_second", "_time")
    names = list(dict.fromkeys(n for figures in by_step.values() for n in figures if not n.endswith(timing)))
    evaluated = [name for name in names if name != "loss"]
    steps = [step for step, figures in sorted(by_step.items()) if any(n in figures for n in evaluated or names)]
    if not steps:
        return []
    count = min(ROWS, len(steps))
    picked = [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]
    columns = [*(["loss"] if "loss" in names else []), *evaluated]
    titles = ["training loss" if name == "loss" else name.removeprefix("eval_").replace("_", " ") for name in columns]
    titles = [title if title == "training loss" else f"held-out {title}" for title in titles]
    return [["step", *titles], *([s, *(number(by_step[s].get(name)) for name in columns)] for s in picked)]


def number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def perplexity_table(measured: Perplexities) -> dict[str, Any]:
    """Caption, contexts and rows."""
    counts = [measured.settings.get(name) for name in ("num_windows", "num_targets")]
    tokens = f"{counts[0]} x {counts[1]} tokens" if None not in counts else "tokens"
    of = f" of {', '.join(map(str, measured.texts))}" if measured.texts else ""
    means = measured.means()
    rows = [
        [f"**{name}**" if name == measured.own else name, *(f"{math.exp(loss):.3f}" for loss in losses.values())]
        for name, losses in means.items()
    ]
    tokens = f"held-out {tokens}" if measured.held_out else tokens
    caption = f"Perplexity of the same {tokens}{of}, predicted from contexts of each length:"
    return {"caption": caption, "contexts": list(means[measured.own]), "rows": rows}


def score_table(facts: Facts) -> list[list[Any]]:
    """Header and rows; empty if there are no scores."""
    scores = task_scores(facts.results)
    columns = {"tokens": "context", "majority class": "majority"}
    columns = {title: name for title, name in columns.items() if any(vars(s)[name] is not None for s in scores)}
    rows = [[s.on, s.metric, number(s.value), *(number(vars(s)[name]) for name in columns.values())] for s in scores]
    return [["task", "metric", "score", *columns], *rows] if rows else []


def has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})"
