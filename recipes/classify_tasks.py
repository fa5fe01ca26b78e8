"""The tasks of GLUE and SuperGLUE: what a model reads of a row, what its classes are called, and how it is scored."""

from classify_kinds import ChoiceOfEntity, Row, Task


def wic_texts(row: Row) -> tuple[str, ...]:
    """The word in question, before the first sentence."""
    return f"{row['word']}: {row['sentence1']}", row["sentence2"]


def copa_texts(row: Row) -> tuple[str, ...]:
    """Both choices in one text, as classes 0 and 1."""
    return row["premise"], f"{row['question']}? 1. {row['choice1']} 2. {row['choice2']}"


def multirc_texts(row: Row) -> tuple[str, ...]:
    return row["paragraph"], f"{row['question']} {row['answer']}"


def wsc_texts(row: Row) -> tuple[str, ...]:
    """The text with the pronoun between stars; then what it may stand for."""
    words = row["text"].split()
    words[row["span2_index"]] = f"*{words[row['span2_index']]}*"
    return " ".join(words), f"{row['span2_text']}: {row['span1_text']}"


TRUTH = ("False", "True")
ENTAILMENT = ("entailment", "not_entailment")
SENTENCES = ("sentence1", "sentence2")
INFERENCE = ("premise", "hypothesis")

TASKS = {
    "cola": Task("glue", "cola", ("sentence",), ("unacceptable", "acceptable")),
    "sst2": Task("glue", "sst2", ("sentence",), ("negative", "positive")),
    "mrpc": Task("glue", "mrpc", SENTENCES, ("not_equivalent", "equivalent")),
    "qqp": Task("glue", "qqp", ("question1", "question2"), ("not_duplicate", "duplicate")),
    "stsb": Task("glue", "stsb", SENTENCES, ()),
    "mnli": Task("glue", "mnli", INFERENCE, ("entailment", "neutral", "contradiction"), "only_first"),
    "qnli": Task("glue", "qnli", ("sentence", "question"), ENTAILMENT, "only_first"),
    # The examples of SuperGLUE's RTE, under other names.
    "glue_rte": Task("glue", "rte", SENTENCES, ENTAILMENT, "only_first"),
    "wnli": Task("glue", "wnli", SENTENCES, ("not_entailment", "entailment"), "only_first"),
    "boolq": Task("super_glue", "boolq", ("passage", "question"), TRUTH, "only_first"),
    "cb": Task("super_glue", "cb", INFERENCE, ("entailment", "contradiction", "neutral"), "only_first"),
    "copa": Task(
        "super_glue",
        "copa",
        ("premise", "question", "choice1", "choice2"),
        ("choice1", "choice2"),
        "only_first",
        copa_texts,
    ),
    "multirc": Task(
        "super_glue", "multirc", ("paragraph", "question", "answer", "idx"), TRUTH, "only_first", multirc_texts
    ),
    "record": ChoiceOfEntity("super_glue", "record", ("passage", "query", "entities", "answers"), TRUTH, "only_first"),
    "rte": Task("super_glue", "rte", INFERENCE, ENTAILMENT, "only_first"),
    "wic": Task("super_glue", "wic", ("word", *SENTENCES), TRUTH, texts=wic_texts),
    "wsc": Task(
        "super_glue", "wsc", ("text", "span1_text", "span2_text", "span2_index"), TRUTH, "only_first", wsc_texts
    ),
}
