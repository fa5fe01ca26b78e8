"""Questions on long documents, from files or datasets, whatever format they come in, as examples of one kind."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from settings import SettingsError
from sources import open_rows

from modeling_fire.text import READING_ERRORS


# Tasks of SCROLLS whose inputs have no question before the document.
WITHOUT_QUESTION = ("gov_report", "summ_screen_fd")


@dataclass
class Example:
    """
    Args:
        id (`str`): of the question.
        question (`str`): may be empty, as for the summary of a whole document.
        document (`str`): the text that it is about. Examples on the same document share one string.
        answers (`list[str]`): each of them is right; at least one.
    """

    id: str
    question: str
    document: str
    answers: list[str]


def read_examples(source: str | list[str], task: str) -> list[Example]:
    """
    Args:
        source (`str` or `list[str]`):
            Files or a dataset, see [`~sources.open_rows`], in a format that their columns tell: our own (`id`,
            `question`, `document`, `answers`), NarrativeQA's on the Hub, NarrativeQA as whole books (`document`, `qas`
            with `q` and `a`), QMSum's own, or SCROLLS's (`id`, `input`, `output`).
        task (`str`): which task of SCROLLS it is; says how SCROLLS's inputs are parted.

    Returns:
        `list[Example]`: in the order of the source; rows of SCROLLS with the same id are one example.

    Raises:
        SettingsError: if the source cannot be read, is in another format, or has no examples.
    """
    examples: dict[str, Example] = {}
    documents: dict[str, str] = {}
    number = 0
    try:
        rows, first = open_rows(source)
        read = reader(source, first)
        for number, row in enumerate(rows):
            for example in read(number, row, task):
                if not example.answers or not all(isinstance(each, str) for each in example.answers):
                    raise SettingsError(f"{source}: the example {example.id} has no list of texts as `answers`.")
                example.document = documents.setdefault(example.document, example.document)
                known = examples.setdefault(example.id, example)
                if known is not example:
                    if (known.question, known.document) != (example.question, example.document):
                        raise SettingsError(f"{source} has two examples with the id {example.id}.")
                    known.answers += example.answers
    except SettingsError:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{source} is not in the format that its columns tell: row {number}, {error}") from error
    except READING_ERRORS as error:
        raise SettingsError(f"{source} cannot be read: {error}") from error
    if not examples:
        raise SettingsError(f"{source} has no examples.")
    return list(examples.values())


def hold_out(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """
    Parts the examples by *document*, the same way every time, so that no question is asked on a text that was trained
    on.

    Args:
        examples (`list[Example]`): on at least two documents.
        share (`float`): of the documents, in (0, 1); at least one is held out, and one is not.

    Returns:
        `tuple[list[Example], list[Example]]`: for training, and held out, both in the order that they had.

    Raises:
        SettingsError: if there is only one document.
    """
    documents = list(dict.fromkeys(example.document for example in examples))
    if len(documents) < 2:
        raise SettingsError("All examples are on one document: give `data.held_out` a source of its own.")
    count = min(max(1, round(share * len(documents))), len(documents) - 1)
    held_out = set(random.Random(0).sample(documents, count))
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        parts[example.document in held_out].append(example)
    return parts


def evenly(examples: list[Example], count: int | None) -> list[Example]:
    """At most `count` of the examples, evenly spread over them, so that all documents have their turn."""
    if count is None or count >= len(examples):
        return examples
    return [examples[i * len(examples) // count] for i in range(count)]


Rows = Iterator[Example]


def own(number: int, row: dict[str, Any], task: str) -> Rows:
    """Our own format, or that of `deepmind/narrativeqa`, where document, question and answers have fields."""
    document, answers = row["document"], row["answers"]
    if isinstance(document, dict):
        texts = [answer["text"] for answer in answers]
        yield Example(f"{document['id']}-{number}", row["question"]["text"], document["text"], texts)
    else:
        texts = answers if isinstance(answers, list) else []
        yield Example(str(row["id"]), row.get("question") or "", document, texts)


def books(number: int, row: dict[str, Any], task: str) -> Rows:
    """NarrativeQA, one book a row."""
    for index, qa in enumerate(row["qas"]):
        yield Example(f"{row.get('document_id', number)}-{index}", qa["q"], row["document"], list(qa["a"]))


def meetings(number: int, row: dict[str, Any], task: str) -> Rows:
    """QMSum as Yale-LILY/QMSum publishes it, one meeting a row; who speaks stands before what is said."""
    document = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"])
    for kind in ("general", "specific"):
        for index, query in enumerate(row[f"{kind}_query_list"]):
            yield Example(f"{number}-{kind}-{index}", query["query"], document, [query["answer"]])


def scrolls(number: int, row: dict[str, Any], task: str) -> Rows:
    """
    SCROLLS (arXiv 2201.03533, section 3): the question stands before the document, parted by a blank line, and in
    QuALITY with the four options, parted by another. Several rows share an id where several answers are right.
    """
    text, start = row["input"], 0
    if task in WITHOUT_QUESTION:
        yield Example(row["id"], "", text, [row["output"]])
        return
    if task == "quality":
        start = text.index("(D)") if "(D)" in text else len(text)
    end = text.find("\n\n", start)
    if end < 0:
        raise SettingsError(f"The input of {row['id']} has no blank line after its question: is it {task}'s?")
    yield Example(row["id"], text[:end], text[end + 2 :], [row["output"]])


# By a column that others do not have.
READERS: dict[str, Callable[[int, dict[str, Any], str], Rows]] = {
    "answers": own,
    "output": scrolls,
    "qas": books,
    "meeting_transcripts": meetings,
}


def reader(source: str | list[str], columns: Iterable[str]) -> Callable[[int, dict[str, Any], str], Rows]:
    """What reads rows with these columns."""
    for column, read in READERS.items():
        if column in columns:
            return read
    raise SettingsError(
        f"{source} has the columns {', '.join(columns)}. Questions on documents have one of {', '.join(READERS)}: see "
        "recipes/finetune/README.md."
    )
