"""The fine-tuning recipe in miniature: the formats it reads, what it trains on, what it leaves, what it refuses."""

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import evaluate
import pytest
import torch
import yaml
from helpers import ENVIRONMENT, ROOT, execute, recipe_command, tiny_model, write_rows
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from modeling_fire.evaluation.metrics import metric_path


pytest.importorskip("rouge_score", reason="rouge-score is of the extra `tasks`")


from corpus import byte_tokenizer
from finetune import finetune, main
from finetune_settings import Finetune
from prompts import CUE, Prompts, answer, collate
from questions import Example, evenly, hold_out, read_examples
from settings import changed, read_fields


DATA = ROOT.parent / "shared" / "data"
ANIMALS = ["fox", "owl", "hare", "toad", "crow", "wolf"]


def tokenizer_with_end():
    """Of bytes, with marks of beginning and end and none for padding."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A random FIRE model with a tokenizer of bytes, and two questions on each of six documents."""
    folder = tmp_path_factory.mktemp("source")
    tiny_model(vocab_size=258, initializer_range=0.05).save_pretrained(folder)
    tokenizer_with_end().save_pretrained(folder)
    rows = []
    for animal in ANIMALS:
        document = f"There was a {animal}. It lived in the woods with many others. " * 3
        rows.append({"id": f"{animal}-1", "question": "Who?", "document": document, "answers": [animal, "it"]})
        rows.append({"id": f"{animal}-2", "question": "Where?", "document": document, "answers": ["in the woods"]})
    write_rows(folder / "questions.jsonl", rows)
    return folder


@pytest.fixture
def settings(source, tmp_path) -> dict:
    return {
        "output_dir": str(tmp_path / "out"),
        "task": "narrative_qa",
        "model": {"source": str(source)},
        "data": {"train": str(source / "questions.jsonl"), "length": 64, "held_out": 0.5},
        "training": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "steps",
            "save_steps": 2,
            "disable_tqdm": True,
            "use_cpu": True,
        },
        "evaluation": {"lengths": [64, 128], "max_new_tokens": 4},
    }


def run(settings: dict, **changes) -> dict:
    """The result of a run in this process; the name of a field is written with `__` for each dot."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return finetune(read_fields(Finetune, changed(settings, changes)))


command = partial(recipe_command, "finetune")


# The formats.


def test_our_own_format(tmp_path):
    rows = [
        {"id": "a", "question": "Who?", "document": "A fox.", "answers": ["fox", "a fox"]},
        {"id": 7, "question": None, "document": "An owl.", "answers": ["owl"]},
    ]
    # Of each its own file: numbers and texts in one column are more than JSON lines are read with.
    sources = [write_rows(tmp_path / f"{number}.jsonl", [row]) for number, row in enumerate(rows)]
    assert read_examples(sources[0], "qasper") == [Example("a", "Who?", "A fox.", ["fox", "a fox"])]
    assert read_examples(sources[1], "qasper") == [Example("7", "", "An owl.", ["owl"])]
    without = write_rows(tmp_path / "without.jsonl", [{"id": "a", "document": "A fox.", "answers": ["fox"]}])
    assert read_examples(without, "gov_report") == [Example("a", "", "A fox.", ["fox"])]


def test_qmsum(tmp_path):
    meeting = {
        "topic_list": [{"topic": "Foxes", "relevant_text_span": [["0", "1"]]}],
        "general_query_list": [{"query": "What was said?", "answer": "Little."}],
        "specific_query_list": [
            {"query": "What of foxes?", "answer": "They run.", "relevant_text_span": [["0", "1"]]},
            {"query": "And owls?", "answer": "Nothing.", "relevant_text_span": [["1", "1"]]},
        ],
        "meeting_transcripts": [
            {"speaker": "Grad A", "content": "Foxes run ."},
            {"speaker": "Grad B", "content": "So ."},
        ],
    }
    examples = read_examples(write_rows(tmp_path / "val.jsonl", [meeting, meeting]), "qmsum")
    document = "Grad A: Foxes run .\nGrad B: So ."
    assert examples[:3] == [
        Example("0-general-0", "What was said?", document, ["Little."]),
        Example("0-specific-0", "What of foxes?", document, ["They run."]),
        Example("0-specific-1", "And owls?", document, ["Nothing."]),
    ]
    assert [example.id for example in examples[3:]] == ["1-general-0", "1-specific-0", "1-specific-1"]
    assert len({id(example.document) for example in examples}) == 1, "a document is kept once"


def test_narrativeqa_as_books(tmp_path):
    book = {"document_id": "b", "title": "Foxes", "document": "A book.", "qas": [{"q": "Who?", "a": ["Fox", "A fox"]}]}
    assert read_examples(write_rows(tmp_path / "books.jsonl", [book]), "narrative_qa") == [
        Example("b-0", "Who?", "A book.", ["Fox", "A fox"])
    ]


def test_narrativeqa_as_on_the_hub(tmp_path):
    row = {
        "document": {"id": "d", "kind": "gutenberg", "summary": {"text": "Short."}, "text": "Long.", "word_count": 1},
        "question": {"text": "Who?", "tokens": ["Who", "?"]},
        "answers": [{"text": "Fox", "tokens": ["Fox"]}, {"text": "A fox", "tokens": ["A", "fox"]}],
    }
    examples = read_examples(write_rows(tmp_path / "hub.jsonl", [row, row]), "narrative_qa")
    assert examples[0] == Example("d-0", "Who?", "Long.", ["Fox", "A fox"])
    assert [example.id for example in examples] == ["d-0", "d-1"]


def test_scrolls(tmp_path):
    def read(task, *rows):
        rows = [{"id": id, "pid": f"{id}_{n}", "input": text, "output": out} for n, (id, text, out) in enumerate(rows)]
        return read_examples(write_rows(tmp_path / "train.jsonl", rows), task)

    text = "Who?\n\nOnce.\n\nA fox."
    assert read("qasper", ("a", text, "Fox"), ("b", text, "Owl"), ("a", text, "A fox")) == [
        Example("a", "Who?", "Once.\n\nA fox.", ["Fox", "A fox"]),
        Example("b", "Who?", "Once.\n\nA fox.", ["Owl"]),
    ]
    assert read("gov_report", ("a", text, "Fox")) == [Example("a", "", text, ["Fox"])]
    options = "Who?\n\n (A) Fox\n (B) Owl\n (C) Hare\n (D) Toad"
    assert read("quality", ("a", f"{options}\n\nOnce.\n\nA fox.", "Fox")) == [
        Example("a", options, "Once.\n\nA fox.", ["Fox"])
    ]
    with pytest.raises(ValueError, match="The input of a has no blank line after its question: is it quality's"):
        read("quality", ("a", text, "Fox"))
    with pytest.raises(ValueError, match="the example a has no list of texts as `answers`"):
        read("qasper", ("a", text, None))  # a test split
    with pytest.raises(ValueError, match="has two examples with the id a"):
        read("qasper", ("a", text, "Fox"), ("a", "Where?\n\nOnce.", "There"))


def test_what_cannot_be_read_is_named(tmp_path):
    def refused(message, *rows, task="qasper"):
        source = write_rows(tmp_path / "some.jsonl", list(rows))
        with pytest.raises(ValueError, match=message):
            read_examples(source, task)

    refused("some.jsonl has the columns question, story. Questions on documents", {"question": "", "story": ""})
    refused("the example a has no list of texts as", {"id": "a", "document": "", "answers": []})
    refused("the example a has no list of texts as", {"id": "a", "document": "", "answers": "fox"})
    refused("not in the format that its columns tell: row 0, 'document'", {"id": "a", "answers": ["fox"]})
    refused("not in the format that its columns tell: row 0, 'q'", {"document": "", "qas": [{"question": "Who?"}]})
    with pytest.raises(ValueError, match=r"There is no file .*nowhere.jsonl"):
        read_examples(str(tmp_path / "nowhere.jsonl"), "qasper")
    for content, message in (("", "empty.jsonl has no rows"), ('{"id": "a', "cannot be read")):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_examples(str(tmp_path / "empty.jsonl"), "qasper")


def test_documents_are_held_out_whole(source):
    examples = read_examples(str(source / "questions.jsonl"), "narrative_qa")
    parts = hold_out(examples, 0.34)
    assert [len(part) for part in parts] == [8, 4]
    assert not {example.document for example in parts[0]} & {example.document for example in parts[1]}
    assert sorted(each.id for part in parts for each in part) == sorted(each.id for each in examples)
    assert hold_out(examples, 0.34) == parts
    assert [len(part) for part in hold_out(examples, 0.01)] == [10, 2], "one document is the least"
    assert [len(part) for part in hold_out(examples, 0.99)] == [2, 10]
    with pytest.raises(ValueError, match=r"All examples are on one document: give `data.held_out` a source"):
        hold_out(examples[:2], 0.5)
    assert evenly(examples, 3) == examples[::4] and evenly(examples, None) == evenly(examples, 99) == examples


# What is trained on, and what is asked.


def test_the_document_is_cut_and_the_answer_alone_is_learned():
    tokenizer = tokenizer_with_end()
    prompts = Prompts(tokenizer, 200)
    document = "".join(f"It is {number}. " for number in range(100))
    example = Example("a", "Who was it?", document, ["A fox", "It"])
    for length in (60, 200):
        feature = prompts.training(example, length)
        text = tokenizer.decode(feature["input_ids"])
        room = length - len(f"Who was it?\n\n{CUE} A fox") - 1
        assert text == f"Who was it?\n\n{document[:room]}{CUE} A fox</s>" and len(feature["input_ids"]) == length
        learned = feature["labels"] != -100
        assert tokenizer.decode(feature["labels"][learned]) == " A fox</s>" and not learned[: -len(" A fox") - 1].any()
        assert torch.equal(feature["input_ids"][learned], feature["labels"][learned])
        assert prompts.prompt(example, length - 7) == feature["input_ids"][:-7].tolist(), "asked as it was trained"
    short = prompts.training(Example("a", "", "Once.", ["A fox"]), 200)
    assert tokenizer.decode(short["input_ids"]) == f"Once.{CUE} A fox</s>"
    with pytest.raises(ValueError, match=r"The question a and its answer leave no room .*, by 1 tokens: raise"):
        prompts.training(example, len(f"Who was it?\n\n{CUE} A fox") + 1)


def test_special_tokens_are_those_of_the_tokenizer():
    example = Example("a", "Who?", "A fox.", ["Fox"])
    tokenizer = tokenizer_with_end()
    tokenizer.add_bos_token = True
    assert tokenizer.decode(Prompts(tokenizer, 50).training(example, 50)["input_ids"]).startswith("<s>Who?\n\nA fox.")
    ids = Prompts(byte_tokenizer(), 50).training(example, 50)["input_ids"]
    assert bytes(ids.tolist()) == f"Who?\n\nA fox.{CUE} Fox".encode(), "it knows no end token"


def test_batches_are_padded_on_either_side():
    features = [{"input_ids": torch.tensor([5]), "labels": torch.tensor([5])}]
    features.append({"input_ids": torch.tensor([6, 7]), "labels": torch.tensor([-100, 7])})
    right, left = collate(features), collate(features, "left")
    assert right["attention_mask"].tolist() == [[1, 0], [1, 1]] and left["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert right["labels"].tolist() == [[5, -100], [-100, 7]] and right["input_ids"].tolist() == [[5, 0], [6, 7]]
    assert left["labels"].tolist() == [[-100, 5], [-100, 7]] and left["input_ids"].tolist() == [[0, 5], [6, 7]]


@pytest.mark.parametrize("tokenizer", [tokenizer_with_end(), byte_tokenizer()], ids=["end", "no_end"])
def test_answers_do_not_depend_on_the_batch(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=None)
    model.generation_config.do_sample = True  # which a checkpoint may bring along
    prompts = Prompts(tokenizer, 40)
    examples = [Example("", "Who?" * n, "A fox. " * n, ["Fox"]) for n in range(1, 6)]
    together = answer(model, prompts, examples, 60, 8, batch_size=3)
    assert together == [answer(model, prompts, [example], 60, 8, batch_size=1)[0] for example in examples]
    assert len(set(together)) > 1


def test_an_answer_ends_with_the_end_token():
    """A model that writes " ab" after a colon, and then `</s>` and anything."""
    tokenizer = tokenizer_with_end()
    model = tiny_model(vocab_size=258, hidden_size=264, tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(258, 264))
        model.lm_head.weight.zero_()
        for token, following in pairwise([*b": ab", tokenizer.eos_token_id, *b"z"]):
            model.lm_head.weight[following, token] = 1.0
    assert answer(model, Prompts(tokenizer, 40), [Example("", "Who?", "A fox.", ["ab"])], 60, 8, 1) == ["ab"]


# Whole runs.


def test_from_the_command_line_to_a_model_for_the_hub(settings, tmp_path):
    out = tmp_path / "out"
    first = execute(*command(settings))
    assert first.returncode == 0, first.stderr
    left = {"losses", "predictions", "results", "settings", "trainer_state", "model", "checkpoints"}
    assert {path.stem for path in out.iterdir()} == left
    result = json.loads((out / "results.json").read_text())
    assert result["examples"] == {"train": 6, "held_out": 6}
    assert result["train_loss"]["6"] < result["train_loss"]["1"] and list(result["eval_loss"]) == ["3", "6"]

    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    metric = evaluate.load(metric_path("scrolls"), "narrative_qa")
    for length in (64, 128):
        part = [row for row in rows if row["length"] == length]
        references, predictions = [row["references"] for row in part], [row["prediction"] for row in part]
        assert len(part) == 6 and ["in the woods"] in references
        assert metric.compute(predictions=predictions, references=references) == result["scores"][str(length)]
        assert f"{length} tokens  f1 {result['scores'][str(length)]['f1']:.2f}" in first.stdout

    held_out = hold_out(read_examples(settings["data"]["train"], "narrative_qa"), 0.5)[1]
    assert [row["id"] for row in rows[:6]] == [example.id for example in held_out]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(out / "model"),
        AutoTokenizer.from_pretrained(out / "model"),
    )
    answers = answer(model, Prompts(tokenizer, 128), held_out, 128, 4, 4)
    assert answers == [row["prediction"] for row in rows[6:]], "what was saved is what was scored"

    second = execute(*command(settings))
    assert second.returncode == 0 and second.stdout == first.stdout[first.stdout.index("\nnarrative_qa") :]


def test_lora_is_merged(settings, source, tmp_path):
    lora = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    result = run(settings, lora=lora, training__max_steps=3, training__per_device_eval_batch_size=8)
    moved = set()
    start = AutoModelForCausalLM.from_pretrained(source).state_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    for name, value in model.state_dict().items():
        if not torch.equal(value, start[name]):
            moved.add(next(part for part in ("q_proj", "down_proj", "position_bias", name) if part in name))
    assert moved == {"q_proj", "down_proj", "position_bias"}
    # The merged model has the loss that the adapters had at the end.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    held_out = hold_out(read_examples(settings["data"]["train"], "narrative_qa"), 0.5)[1]
    prompts = Prompts(tokenizer, 64)
    with torch.no_grad():
        loss = model(**collate([prompts.training(example, 64) for example in held_out])).loss
    assert loss.item() == pytest.approx(result["eval_loss"]["3"], rel=1e-4)


def test_what_was_learned_is_answered(settings, source):
    """Asked what it was trained on: all of training, saving, prompts, generation and metric fit together."""
    settings["training"] |= {"max_steps": 100, "per_device_train_batch_size": 12, "save_strategy": "no"}
    settings["evaluation"] = {"lengths": [80], "max_new_tokens": 16}
    result = run(settings, data__held_out=str(source / "questions.jsonl"), training__eval_strategy="no")
    assert result["scores"][80]["f1"] > 75  # 50 for "in the woods" alone


def test_a_killed_run_goes_on_as_if_it_had_not_been(settings, tmp_path, monkeypatch):
    longer = changed(settings, {"training.max_steps": 60})
    undisturbed = run(longer, output_dir=str(tmp_path / "whole"))

    process = subprocess.Popen([sys.executable, *command(longer)], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "out" / "checkpoints"
    deadline = time.monotonic() + 120
    while not (checkpoints / "checkpoint-4" / "trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "model").exists(), "killed too late to test anything"
    (checkpoints / "checkpoint-59").mkdir()
    (tmp_path / "out" / "model.unfinished").mkdir()
    assert run(longer) == undisturbed

    # Killed after the last step, before the model was saved.
    shutil.rmtree(tmp_path / "out" / "model")
    monkeypatch.setattr("finetune.FireTrainer.training_step", None)
    assert run(longer) == undisturbed

    # Killed while it answered: the model is there, and is not trained again.
    monkeypatch.setattr("finetune.train", None)
    assert run(longer) == undisturbed
    with pytest.raises(SystemExit, match="was made with other settings"):
        run(longer, data__length=65)


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj"]}], ids=["full", "lora"])
def test_two_processes_do_what_one_does(settings, tmp_path, lora):
    """Eight questions to train on, in equal shares; three to answer, in unequal ones."""
    settings = changed(settings, {"lora": lora, "data.held_out": 0.34, "evaluation.num_examples": 3})
    one = run(settings, output_dir=str(tmp_path / "one"))
    both = changed(settings, {"training.per_device_train_batch_size": 2, "training.ddp_backend": "gloo"})
    layout = str(ROOT / "configuration" / "accelerate" / "two_cpu_processes.yaml")
    launched = execute("-m", "accelerate.commands.launch", "--config_file", layout, *command(both))
    assert launched.returncode == 0, launched.stderr
    two = json.loads((tmp_path / "out" / "results.json").read_text())
    assert two["processes"] == 2
    assert list(two["train_loss"].values()) == pytest.approx(list(one["train_loss"].values()), rel=1e-4)
    predictions = [(tmp_path / folder / "predictions.jsonl").read_text() for folder in ("one", "out")]
    assert predictions[0] == predictions[1]


# What is refused.


def test_wrong_settings_are_refused_before_any_work(settings, source, tmp_path):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            run(settings, **changes)
        assert not Path(settings["output_dir"]).exists()

    one = write_rows(tmp_path / "one.jsonl", [{"id": "a", "document": "A fox.", "answers": ["fox"]}])
    refused("no field `data.lenght`. Known are train, length, held_out", data__lenght=1)
    refused("TrainingArguments has no field `max_step` .* `max_steps`", training__max_step=1)
    refused("`training`: .*is not a valid", training__eval_strategy="never")
    refused("`training`: `save_total_limit` must be a number, got 'two'", training__save_total_limit="two")
    refused("`training`: `report_to`: wandbee is not installed", training__report_to="wandbee")
    refused("SCROLLS has no configuration 'narrativeqa'. Known are", task="narrativeqa")
    refused("`data.held_out` must be a source or lie between 0 and 1, got 1", data__held_out=1)
    refused("All examples are on one document", data__train=one)
    refused("There is no file .*nowhere.jsonl", data__held_out=str(tmp_path / "nowhere.jsonl"))
    refused("num_examples` must be 1 or more, or null", evaluation__num_examples=0)
    refused(r"max_new_tokens` \(64\) do not fit into `evaluation.lengths`: \[64, 128\]", evaluation__max_new_tokens=64)
    refused("do not fit into `evaluation.lengths`: ", evaluation__lengths=[])
    refused("The question .* leave no room for the document", data__length=16)
    refused("The question .* leave no room for the document", evaluation__lengths=[16])
    refused("`model.source`: .*nowhere cannot be loaded", model__source=str(tmp_path / "nowhere"))
    tiny_model(vocab_size=257).save_pretrained(tmp_path / "small")
    tokenizer_with_end().save_pretrained(tmp_path / "small")
    refused("tokens up to number 257, the model only 257 of them", model__source=str(tmp_path / "small"))
    refused("unexpected keyword argument 'rank'", lora={"rank": 2})


def test_modules_that_the_model_does_not_have(settings):
    with pytest.raises(ValueError, match="`lora`: No modules were targeted for adaptation"):
        run(settings, lora={"target_modules": ["query"]})


def test_errors_are_one_line(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", command(settings, f"data.train={tmp_path / 'nowhere.jsonl'}"))
    with pytest.raises(SystemExit, match=r"^Error: There is no file .*nowhere.jsonl.*[^\n]$"):
        main()


@pytest.mark.parametrize("name", ["narrativeqa", "qmsum", "scrolls"])
def test_shipped_runs_load(name):
    run = read_fields(Finetune, yaml.safe_load((ROOT / "recipes" / "finetune" / f"{name}.yaml").read_text()))
    TrainingArguments("unused", **{**run.training, "bf16": False})  # which needs a GPU
    LoraConfig(**run.lora or {})


@pytest.mark.skipif(not DATA.exists(), reason="needs NarrativeQA and QMSum, which are not part of this project")
def test_the_real_files():
    books = read_examples(str(DATA / "narrativeqa" / "narrativeqa_books.jsonl"), "narrative_qa")
    assert len(books) == 115 and len({example.document for example in books}) == 4
    assert all(len(example.answers) == 2 for example in books)
    # As many as SCROLLS has questions in its validation split of QMSum.
    meetings = read_examples(str(DATA / "qmsum" / "val.jsonl"), "qmsum")
    assert len(meetings) == 272 and len({example.document for example in meetings}) == 35
    assert [len(part) for part in hold_out(books, 0.25)] in ([86, 29], [85, 30], [88, 27])
