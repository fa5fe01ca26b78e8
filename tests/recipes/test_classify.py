"""The classification recipe in miniature: what is read of each task, what is learned, kept and refused."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import classify as recipe
import numpy as np
import pytest
import torch
import yaml
from checkpoints import llama, save_tokenizer
from classify_plan import Examples, Plan, read_rows
from classify_settings import Classify
from classify_tasks import TASKS
from corpus import byte_tokenizer
from helpers import FEW_STEPS, ROOT, execute, recipe_command, tiny_model, write_rows
from safetensors.torch import load_file
from settings import changed, read_fields
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from modeling_fire import FireForSequenceClassification


KEPT = ROOT / "benchmarks" / "results" / "cpu" / "classify"
SUPERGLUE = ROOT.parent / "shared" / "data" / "superglue"
# A row of each task with the columns that the Hub has, what the model reads of it, and the name of its class.
SENTENCES = {"sentence1": "A fox ran.", "sentence2": "It sat.", "idx": 0}
PREMISE = {"premise": "A fox ran.", "hypothesis": "It sat.", "idx": 0}
HUB = {
    "cola": ({"sentence": "A fox ran.", "label": 1, "idx": 0}, "A fox ran.", "acceptable"),
    "sst2": ({"sentence": "dull", "label": 0, "idx": 0}, "dull", "negative"),
    "mrpc": ({**SENTENCES, "label": 1}, "A fox ran.\nIt sat.", "equivalent"),
    "qqp": ({"question1": "Why?", "question2": "How?", "label": 0, "idx": 0}, "Why?\nHow?", "not_duplicate"),
    "stsb": ({**SENTENCES, "label": 3.8}, "A fox ran.\nIt sat.", 3.8),
    "mnli": ({**PREMISE, "label": 2}, "A fox ran.\nIt sat.", "contradiction"),
    "qnli": ({"question": "Who?", "sentence": "A fox.", "label": 1, "idx": 0}, "A fox.\nWho?", "not_entailment"),
    "glue_rte": ({**SENTENCES, "label": 0}, "A fox ran.\nIt sat.", "entailment"),
    "wnli": ({**SENTENCES, "label": 1}, "A fox ran.\nIt sat.", "entailment"),
    "boolq": (
        {"question": "do foxes run", "passage": "They do.", "idx": 0, "label": 1},
        "They do.\ndo foxes run",
        "True",
    ),
    "cb": ({**PREMISE, "label": 1}, "A fox ran.\nIt sat.", "contradiction"),
    "copa": (
        {"premise": "It ran.", "choice1": "Fear.", "choice2": "Rain.", "question": "cause", "idx": 0, "label": 1},
        "It ran.\ncause? 1. Fear. 2. Rain.",
        "choice2",
    ),
    "multirc": (
        {
            "paragraph": "A fox ran.",
            "question": "Who ran?",
            "answer": "A fox",
            "idx": {"paragraph": 0, "question": 0, "answer": 0},
            "label": 1,
        },
        "A fox ran.\nWho ran? A fox",
        "True",
    ),
    "record": (
        {
            "passage": "A fox ran.",
            "query": "The @placeholder ran.",
            "entities": ["fox"],
            "answers": ["fox"],
            "idx": {"passage": 0, "query": 0},
        },
        "A fox ran.\nThe fox ran.",
        "True",
    ),
    "rte": ({**PREMISE, "label": 1}, "A fox ran.\nIt sat.", "not_entailment"),
    "wic": (
        {"word": "run", **SENTENCES, "start1": 6, "start2": 0, "end1": 9, "end2": 2, "label": 0},
        "run: A fox ran.\nIt sat.",
        "False",
    ),
    "wsc": (
        {
            "text": "The fox ran because it was afraid.",
            "span1_index": 0,
            "span2_index": 4,
            "span1_text": "The fox",
            "span2_text": "it",
            "idx": 0,
            "label": 1,
        },
        "The fox ran because *it* was afraid.\nit: The fox",
        "True",
    ),
}
# Labels as SuperGLUE's own files have them.
FILES = {
    "boolq": {True: "True", False: "False"},
    "cb": {"neutral": "neutral"},
    "rte": {"not_entailment": "not_entailment", "entailment": "entailment"},
    "wic": {True: "True", False: "False"},
}


def rows_of(count: int, seed: int) -> list[dict]:
    """Questions whose answer is the first letter of the passage."""
    numbers = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        {"passage": "yn"[number == 0] * (3 + index % 5), "question": "?", "label": number == 1, "idx": index}
        for index, number in enumerate(numbers)
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A random FIRE model with a tokenizer of bytes, which has no token to pad with, and a task."""
    folder = tmp_path_factory.mktemp("source")
    model = tiny_model(vocab_size=256, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", rows_of(32, seed=0))
    write_rows(folder / "validation.jsonl", rows_of(11, seed=1))
    return folder


@pytest.fixture
def settings(source, tmp_path) -> dict:
    return {
        "output_dir": str(tmp_path / "out"),
        "task": "boolq",
        "model": str(source / "model"),
        "data": {"train": str(source / "train.jsonl"), "validation": str(source / "validation.jsonl")},
        "length": 16,
        "training": {**FEW_STEPS, "per_device_train_batch_size": 8},
    }


def run(settings: dict, **changes) -> dict:
    """The results by seed of a run in this process; the name of a field is written with `__` for each dot."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return recipe.classify(read_fields(Classify, changed(settings, changes)))


def launch(layout: str, settings: dict) -> subprocess.CompletedProcess:
    machine = ["-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/configuration/accelerate/{layout}.yaml"]
    return execute(*machine, *recipe_command("classify", settings))


@pytest.mark.parametrize("name", TASKS)
def test_what_is_read_of_a_row(name, tmp_path):
    row, text, label = HUB[name]
    task, tokenizer = TASKS[name], byte_tokenizer()
    examples = Examples.of(read_rows(write_rows(tmp_path / "rows.jsonl", [row] * 2)), "rows", task, tokenizer, 99)
    assert tokenizer.decode(examples.dataset[1]["input_ids"]) == text
    assert examples.labels == [task.labels.index(label) if task.labels else label] * 2
    if task.labels:
        assert set(task.score(task.right(examples.rows), examples.rows).values()) <= {0.0, 1.0}
        assert examples.counts(task)[label] == 2 and sum(examples.counts(task).values()) == 2
    for value, class_name in FILES.get(name, {}).items():
        [found] = Examples.of([{**row, "label": value}], "rows", task, tokenizer, 99).labels
        assert task.labels[found] == class_name


def test_the_files_of_wsc_have_a_block_of_their_own(tmp_path):
    row, text, _ = HUB["wsc"]
    spans = {name: value for name, value in row.items() if name.startswith("span")}
    path = write_rows(tmp_path / "wsc.jsonl", [{"text": row["text"], "target": spans, "label": False}])
    examples = Examples.of(read_rows(path), path, TASKS["wsc"], byte_tokenizer(), 99)
    assert byte_tokenizer().decode(examples.dataset[0]["input_ids"]) == text and examples.labels == [0]


# Of ReCoRD: the text, its mentions of entities, the queries and the mentions that answer each.
MENTIONED = ("Ann met Bob. Annie saw Bob Ray.", ["Ann", "Bob", "Annie", "Bob"])
ASKED = [("@placeholder met Bob.", ["Ann", "Annie"]), ("Ann met @placeholder; @placeholder left.", ["Bob", "Bob"])]


def as_in_the_files(text: str, mentions: list[str], asked: list[tuple[str, list[str]]]) -> dict:
    """A passage as SuperGLUE's own files of ReCoRD have it."""
    spans, end = [], 0
    for mention in mentions:
        start = text.index(mention, end)
        end = start + len(mention)
        spans.append({"start": start, "end": end - 1})
    queries = [
        {"query": query, "idx": number, "answers": [{"start": 0, "end": 0, "text": answer} for answer in answers]}
        for number, (query, answers) in enumerate(asked)
    ]
    return {"source": "Daily mail", "passage": {"text": text, "entities": spans}, "qas": queries, "idx": 0}


def as_on_the_hub(text: str, mentions: list[str], asked: list[tuple[str, list[str]]]) -> list[dict]:
    rows = [{"passage": text, "query": query, "answers": sorted(set(answers))} for query, answers in asked]
    numbers = [{"idx": {"passage": 0, "query": number}} for number in range(len(asked))]
    entities = {"entities": list(dict.fromkeys(mentions))}
    return [{**row, **entities, **number} for row, number in zip(rows, numbers, strict=True)]


@pytest.mark.parametrize("layout", ["files", "hub"])
def test_a_query_of_record_is_a_pair_for_each_entity(layout, tmp_path):
    """Two sources, of which the passages and queries have the same numbers."""
    rows = [as_in_the_files(*MENTIONED, ASKED)] if layout == "files" else as_on_the_hub(*MENTIONED, ASKED)
    sources = [write_rows(tmp_path / f"{number}.jsonl", rows) for number in range(2)]
    task, tokenizer = TASKS["record"], byte_tokenizer()
    examples = Examples.of(read_rows(sources), sources, task, tokenizer, 60)
    read = [tokenizer.decode(ids).split("\n") for ids in examples.dataset["input_ids"]]
    queries = ["Ann met Bob.", "Bob met Bob.", "Annie met Bob."]
    queries += ["Ann met Ann; Ann left.", "Ann met Bob; Bob left.", "Ann met Annie; Annie left."]
    assert read == [[MENTIONED[0], query] for query in queries * 2]
    assert examples.labels == examples.dataset["labels"] == [1, 0, 1, 0, 1, 0] * 2
    assert len(examples.rows) == 4 and examples.counts(task) == {"False": 6, "True": 6}
    # Half of the pairs have 44 to 46 tokens, the others 54 to 58.
    assert Examples.of(examples.rows, sources, task, tokenizer, 50).cut == 0.5

    # The highest True in itself is that of Ann, and the highest above False that of Annie.
    outputs = np.array([[5.0, 6.0], [0.0, -1.0], [1.0, 3.0]] * 4)
    answers = task.answers(outputs, examples.rows)
    assert answers == ["Annie"] * 4 and task.score(answers, examples.rows) == {"exact_match": 0.5, "f1": 0.5}
    # Ann is a part of Annie, and no mention.
    assert task.majority(examples.rows) == ["Bob"] * 4


def test_record_is_learned_and_its_table_says_pairs(settings, tmp_path, monkeypatch, capsys):
    """The answer is the one of two letters that the passage has once."""
    letters = [("y y y n", ["y", "n"], [("@placeholder", ["n"])]), ("n y y", ["n", "y"], [("@placeholder", ["n"])])]
    path = write_rows(tmp_path / "record.jsonl", [as_in_the_files(*each) for each in letters * 6])
    given = changed(settings, {"task": "record", "data": {"train": path, "validation": path}})
    given = changed(given, {"training.max_steps": 20})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    monkeypatch.setattr(sys, "argv", ["classify.py", str(tmp_path / "run.yaml")])
    recipe.main()
    said = capsys.readouterr().out
    assert "validation: 12 rows as 24 pairs (False 12, True 12), 0% of them cut" in said
    assert "most frequent entity                 0.000                 0.000" in said and "majority" not in said
    written = json.loads((tmp_path / "out" / "results.json").read_text())["seeds"]["0"]["measured"]["validation"]
    assert written["rows"] == 12 and written["predicted"] == written["classes"] == {"False": 12, "True": 12}
    assert written["metrics"] == {"exact_match": 1.0, "f1": 1.0}


def test_rows_of_record_that_cannot_be_read_are_refused(tmp_path):
    [row, _], nested = as_on_the_hub(*MENTIONED, ASKED), as_in_the_files(*MENTIONED, ASKED)

    def refused(message: str, row: dict) -> None:
        path = write_rows(tmp_path / "rows.jsonl", [row])
        with pytest.raises(ValueError, match=message):
            Examples.of(read_rows(path), "rows", TASKS["record"], byte_tokenizer(), 99)

    no_answers = "rows: row 1 has no answers, but passage, query, entities.*; the task needs .*, entities and answers"
    refused(no_answers, {**row, "answers": []})
    refused(no_answers, {**nested, "qas": [{"query": "@placeholder", "idx": 0}]})
    refused("row 1 has entities that are no list of texts, but 'Ann'", {**row, "entities": "Ann"})
    refused("row 1 has answers that are no list of texts, but .*text", {**row, "answers": [{"text": "Ann"}]})
    refused("row 1 has a query without @placeholder: 5", {**row, "query": 5})
    refused("row 1 has a query without @placeholder: 'Who\\?'", {**row, "query": "Who?"})
    refused(
        "cannot be read: a row with `qas` is not as in SuperGLUE's files .*'entities'",
        {**nested, "passage": {"text": ""}},
    )


def test_what_is_too_long_loses_its_end():
    tokenizer = byte_tokenizer()

    def read(name: str, row: dict, length: int) -> tuple[str, float]:
        examples = Examples.of([row], "rows", TASKS[name], tokenizer, length)
        return tokenizer.decode(examples.dataset[0]["input_ids"]), examples.cut

    row = {"passage": "0123456789", "question": "what is it", "label": True}
    assert read("boolq", row, 21) == ("0123456789\nwhat is it", 0.0)
    assert read("boolq", row, 15) == ("0123\nwhat is it", 1.0)
    assert read("boolq", {**row, "passage": "01"}, 13) == ("01\nwhat is it", 0.0)
    with pytest.raises(ValueError, match=r"`length` \(11\) has no room beside this text.*\nwhat is it"):
        read("boolq", row, 11)
    # Neither sentence of a paraphrase is worth more than the other.
    assert read("mrpc", {"sentence1": "0123456789", "sentence2": "abc", "label": 1}, 8) == ("0123\nabc", 1.0)
    assert read("cola", {"sentence": "0123456789", "label": 1}, 8) == ("01234567", 1.0)


def test_from_the_command_line_to_a_model_for_the_hub(settings, tmp_path, monkeypatch, capsys):
    """Learns what can be learned; what is saved says the same in a process without the package, padded or not."""
    settings = changed(settings, {"training.max_steps": 30, "seeds": [0, 3]})
    first = launch("cpu", settings)
    assert first.returncode == 0, first.stderr
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"results.json", "seed0", "seed3", "settings.json"}
    result = json.loads((out / "results.json").read_text())["seeds"]
    measured = [result[seed]["measured"]["validation"] for seed in ("0", "3")]
    labels = [row["label"] for row in rows_of(11, seed=1)]
    majority = max(sum(labels), 11 - sum(labels)) / 11
    for each in measured:
        assert each["metrics"] == {"accuracy": 1.0} and each["majority"] == {"accuracy": pytest.approx(majority)}
        assert each["classes"] == each["predicted"] == {"False": 11 - sum(labels), "True": sum(labels)}
    table = first.stdout[first.stdout.index("\nboolq:") :]
    assert "mean of 2 seeds" in table and f"11 rows (False {11 - sum(labels)}, True {sum(labels)})" in table
    assert f"majority class{majority:>22.3f}" in table and "1.000 ±0.000" in table

    model = AutoModelForSequenceClassification.from_pretrained(out / "seed3" / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "seed3" / "model")
    assert model.config.id2label == {0: "False", 1: "True"} and model.config.pad_token_id == tokenizer.pad_token_id
    texts = ["yyy\n?", "nnnnnnn\n?"]
    with torch.no_grad():
        padded = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        for text, logits in zip(texts, padded, strict=True):
            torch.testing.assert_close(model(**tokenizer(text, return_tensors="pt")).logits[0], logits)
    assert padded.argmax(-1).tolist() == [1, 0]
    stranger = "import sys; sys.modules['modeling_fire'] = None; from transformers import pipeline; "
    stranger += "print([e['label'] for e in pipeline('text-classification', sys.argv[1], trust_remote_code=True)(%r)])"
    said = execute("-c", stranger % texts, str(out / "seed3" / "model"))
    assert said.stdout.strip() == "['True', 'False']", said.stderr

    written = (out / "seed0" / "results.json").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["classify.py", str(out.with_suffix(".yaml"))])
    recipe.main()
    assert capsys.readouterr().out == table, "what is finished is not run again"
    assert (out / "seed0" / "results.json").stat().st_mtime_ns == written

    (out / "results.json").unlink()
    monkeypatch.setenv("RANK", "1")
    recipe.main()
    assert not capsys.readouterr().out and not (out / "results.json").exists(), "that is for the main process"


def test_a_killed_run_goes_on(settings, tmp_path, monkeypatch):
    """Killed after the last step of the second seed: the first is kept, the second is only measured and saved."""
    changes = {"seeds": [0, 1], "training__save_strategy": "steps", "training__save_steps": 2}
    undisturbed = run(settings, output_dir=str(tmp_path / "whole"), **changes)
    measure, calls = recipe.measure, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise InterruptedError
        return measure(*args)

    monkeypatch.setattr(recipe, "measure", killed)
    with pytest.raises(InterruptedError):
        run(settings, **changes)
    kept = tmp_path / "out" / "seed0" / "results.json"
    written = kept.stat().st_mtime_ns
    assert not (tmp_path / "out" / "seed1" / "model").exists()
    steps = []
    monkeypatch.setattr(recipe.FireTrainer, "training_step", spy(recipe.FireTrainer.training_step, steps))
    assert json.loads(json.dumps(run(settings, **changes))) == json.loads(json.dumps(undisturbed))
    assert not steps, "the checkpoint is that of the last step"
    assert kept.stat().st_mtime_ns == written
    with pytest.raises(SystemExit, match="was made with other settings"):
        run(settings, **changes, length=15)


def spy(function, calls: list):
    def spied(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return spied


def test_two_processes_or_smaller_batches_do_what_one_does(settings, tmp_path):
    one = run(settings, output_dir=str(tmp_path / "one"))[0]
    halves = changed(settings, {"training.per_device_train_batch_size": 4})
    accumulated = run(halves, output_dir=str(tmp_path / "accumulated"), training__gradient_accumulation_steps=2)[0]
    launched = launch("two_cpu_processes", halves)
    assert launched.returncode == 0, launched.stderr
    two = json.loads((tmp_path / "out" / "results.json").read_text())["seeds"]["0"]
    weights = {}
    for name, result in {"one": one, "accumulated": accumulated, "out": two}.items():
        assert result["measured"] == one["measured"], name
        assert list(result["train_loss"].values()) == pytest.approx(list(one["train_loss"].values()), rel=1e-4), name
        weights[name] = load_file(tmp_path / name / "seed0" / "model" / "model.safetensors")
        torch.testing.assert_close(weights[name], weights["one"], rtol=1e-3, atol=1e-4)
    assert launched.stdout.count("majority class") == 1


def test_a_share_is_held_out(settings):
    """The end of the rows, always the same; the rest is trained on."""
    given = changed(
        settings, {"data": {"train": [settings["data"]["train"]] * 2, "validation": None, "held_out": 0.25}}
    )
    plan = Plan.of(read_fields(Classify, given))
    rows = rows_of(32, seed=0) * 2
    assert plan.train.rows == rows[:48] and plan.validation["validation"].rows == rows[48:]


def test_several_sets_are_measured(settings):
    sets = {"matched": settings["data"]["validation"], "mismatched": settings["data"]["train"]}
    result = run(settings, data__validation=sets)[0]
    assert [each["rows"] for each in result["measured"].values()] == [11, 32]


def test_numbers_and_a_model_that_is_not_fire(settings, tmp_path):
    llama().save_pretrained(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    rows = [{"sentence1": "a" * number, "sentence2": "a", "label": float(number)} for number in range(1, 7)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = {"train": path, "validation": path}
    result = run(settings, task="stsb", model=str(tmp_path / "llama"), data=data)[0]
    assert result["measured"]["validation"]["metrics"].keys() == {"pearson", "spearmanr"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "seed0" / "model")
    assert model.config.model_type == "llama" and model.num_labels == 1


def test_a_random_start_has_the_shape_alone(settings):
    given = changed(settings, {"training.max_steps": 1, "random_start": True})
    fields = read_fields(Classify, given)
    torch.manual_seed(7)
    model = recipe.start(fields, Plan.of(fields))
    pretrained = recipe.start(read_fields(Classify, settings), Plan.of(fields))
    start = tiny_model(vocab_size=256, pad_token_id=None, bos_token_id=None, eos_token_id=None).model
    name = "layers.0.mlp.up_proj.weight"
    assert torch.equal(pretrained.model.get_parameter(name), start.get_parameter(name))
    assert not torch.equal(model.model.get_parameter(name), start.get_parameter(name))
    assert model.get_input_embeddings().weight.shape == pretrained.get_input_embeddings().weight.shape == (257, 32)


def test_wrong_input_is_refused(settings, tmp_path):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            run(settings, **changes)
        assert not Path(settings["output_dir"]).exists()

    def rows(**fields) -> str:
        row = {**rows_of(1, seed=0)[0], **fields}
        return write_rows(tmp_path / "rows.jsonl", [{name: row[name] for name in row if row[name] is not None}])

    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.tsv").write_text("passage\tlabel")
    refused("no task 'bolq'. Known are cola, sst2", task="bolq")
    refused("no field `lenght`. Known are output_dir, task", lenght=1)
    refused("no field `data.test`", data__test="x.jsonl")
    refused("TrainingArguments has no field `max_step` .* `max_steps`", training__max_step=3)
    refused("`training`: `warmup_steps` must be a number, got 'few'", training__warmup_steps="few")
    refused("Leave out `training.seed`: it follows from", training__seed=3)
    refused("`seeds` is a list of different numbers, got \\[1, 1\\]", seeds=[1, 1])
    refused("Set one of `data.validation` and `data.held_out`", data__validation=None)
    refused("Set one of `data.validation` and `data.held_out`", data__held_out=0.1)
    refused("between 0 and 1, got 2", data__held_out=2, data__validation=None)
    refused("There is no file .*nowhere.jsonl", data__train=str(tmp_path / "nowhere.jsonl"))
    refused("rows.tsv: row 1 has no passage, question, label, but text;", data__train=str(tmp_path / "rows.tsv"))
    refused("empty.jsonl has no rows", data__train=str(tmp_path / "empty.jsonl"))
    refused("row 1 has no passage, but .*; the task needs passage, question and l", data__train=rows(passage=None))
    refused("row 1 has no label", data__validation=rows(label=None))
    refused("row 1 has the label 'maybe'; known are False, True", data__validation=rows(label="maybe"))
    refused("row 1 has the label -1; .*test sets of the benchmarks have none", data__validation=rows(label=-1))
    refused("row 1 has no premise, hypothesis", task="rte")
    refused("`model`: .*nowhere cannot be loaded", model=str(tmp_path / "nowhere"))
    refused("has no room beside this text", length=2)

    classifier = tmp_path / "classifier"
    tiny_model(FireForSequenceClassification, vocab_size=256, num_labels=3).save_pretrained(classifier)
    byte_tokenizer().save_pretrained(classifier)
    refused("has a head for 3 labels, and boolq has 2", model=str(classifier))
    tiny_model(vocab_size=200).save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    refused("tokens up to number 255, the model only 200 of them", model=str(tmp_path / "small"))


def test_what_is_wrong_ends_with_one_line(settings, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(sys, "argv", ["classify.py", str(tmp_path / "run.yaml"), "task=rte"])
    with pytest.raises(SystemExit, match=r"^Error: .*train.jsonl: row 1 has no premise, hypothesis, but [^\n]*$"):
        recipe.main()


def test_what_is_not_installed_is_named(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"need scikit-learn and scipy: `pip install modeling-fire\[tasks\]`"):
        run(settings)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "classify").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_runs_load(path):
    given = {"task": "boolq", "model": "model", "data": {"train": "train.jsonl", "held_out": 0.5}}
    run = read_fields(Classify, {**given, **yaml.safe_load(path.read_text())})
    TrainingArguments("unused", **{**run.training, "bf16": False})  # which needs a GPU


@pytest.mark.parametrize("path", sorted(KEPT.glob("*.json")), ids=lambda path: path.stem)
def test_the_readme_has_what_was_measured(path):
    kept = json.loads(path.read_text())
    readme = (ROOT / "recipes" / "classify" / "README.md").read_text()
    measured = [seed["measured"]["validation"] for seed in kept["seeds"].values()]
    task = kept["settings"]["task"]
    for figure, majority in measured[0]["majority"].items():
        values = [each["metrics"][figure] for each in measured]
        [row] = [line for line in readme.splitlines() if line.startswith(f"| `{task}`, {figure} |")]
        cells = [cell.strip() for cell in row.split("|")]
        found = f"{mean(values):.3f} ±{recipe.half_interval(values):.3f}"
        assert cells[5] == f"{majority:.3f}" and cells[7 if kept["settings"]["random_start"] else 6] == found


@pytest.mark.skipif(not SUPERGLUE.is_dir(), reason="needs the files of SuperGLUE beside the project")
@pytest.mark.parametrize("folder,rows", [("BoolQ", 3270), ("CB", 56), ("RTE", 277), ("WiC", 638)])
def test_the_files_of_superglue(folder, rows):
    source = str(SUPERGLUE / folder / "val.jsonl")
    task = TASKS[folder.lower()]
    examples = Examples.of(read_rows(source), source, task, byte_tokenizer(), 512)
    assert len(examples.rows) == rows and all(examples.counts(task).values())
