"""The stream that pretraining reads: its sources, its windows, and how it goes on where it was."""

import gzip
import json
import math
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from corpus import byte_tokenizer
from helpers import ENVIRONMENT, ROOT, random_texts, write_rows, write_texts
from hub.loopback import LoopbackHub
from sources import open_documents
from stream import PackedStream, held_out_windows, tokenize
from torch.nn.functional import cross_entropy

from modeling_fire import FireConfig, FireForCausalLM


SHAPE = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": True}


def stream_of(source, length=16, buffer_size=7, windows_per_step=4, tokenizer=None, **changes) -> PackedStream:
    tokenizer = tokenizer or byte_tokenizer()
    return PackedStream(str(source), "text", tokenizer, length, buffer_size, 0, windows_per_step, **changes)


def pieces_of(window: dict[str, torch.Tensor]) -> list[bytes]:
    """The parts of documents in a window, told apart by the positions."""
    starts = (window["position_ids"] == 0).nonzero()[:, 0].tolist()
    ids = bytes(window["input_ids"].tolist())
    return [ids[start:stop] for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]


def test_every_token_once_in_each_pass(tmp_path):
    texts = random_texts(40, 20)
    total = sum(map(len, texts))
    stream = stream_of(write_texts(tmp_path / "rows.jsonl", texts))
    passes = math.lcm(total, 16) // total
    assert 1 < passes <= 16, "what is left of a pass begins the next one"
    counts = dict.fromkeys(set("".join(texts)), 0)
    windows = list(islice(stream, passes * total // 16))
    for window in windows:
        assert all(values.shape == (16,) and values.dtype == torch.long for values in window.values())
        for piece in pieces_of(window):
            assert any(piece.decode() in text for text in texts)
            for letter in piece.decode():
                counts[letter] += 1
    assert counts == {letter: passes * "".join(texts).count(letter) for letter in counts}
    first, second = ([pieces_of(window) for window in part] for part in (windows[:20], windows[total // 16 :][:20]))
    assert first != second, "each pass has an order of its own"
    assert first == [pieces_of(window) for window in islice(stream, 20)], "and another reading the same one"
    unshuffled = [pieces_of(window) for window in islice(stream_of(tmp_path / "rows.jsonl", buffer_size=1), 20)]
    assert first != unshuffled


def test_positions_and_labels_keep_documents_apart(tmp_path):
    """The loss of packed windows is that of their documents alone: none across a border, none seen across one."""
    torch.manual_seed(0)
    model = FireForCausalLM(FireConfig(**SHAPE)).eval()
    source = write_texts(tmp_path / "rows.jsonl", random_texts(60, 60))
    windows = list(islice(stream_of(source, length=256), 6))
    assert sum(len(pieces_of(window)) for window in windows) > 10
    batch = {name: torch.stack([window[name] for window in windows]) for name in windows[0]}
    losses = []
    for piece in (torch.tensor(list(piece)) for window in windows for piece in pieces_of(window)):
        logits = model(piece[None]).logits[0]
        losses.append(cross_entropy(logits[:-1], piece[1:], reduction="sum"))
    count = (batch["labels"] != -100).sum()
    torch.testing.assert_close(model(**batch).loss, sum(losses) / count)
    assert count == sum(len(piece) - 1 for window in windows for piece in pieces_of(window))


def write_as(kind: str, folder: Path, texts: list[str]) -> str:
    """A file of that kind with the texts."""
    path = write_texts(folder / "rows.jsonl", texts)
    if kind == "jsonl":
        return path
    other = folder / f"rows.{kind}"
    if kind == "json.gz":
        other.write_bytes(gzip.compress(Path(path).read_bytes()))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts}), other, row_group_size=7)
    return str(other)


@pytest.mark.parametrize(
    "kind, buffer_size", [("jsonl", 1), ("jsonl", 7), ("jsonl", 1000), ("json.gz", 7), ("parquet", 5)]
)
def test_a_stream_goes_on_where_it_was(tmp_path, kind, buffer_size):
    texts = random_texts(30, 12)
    source = write_as(kind, tmp_path, texts)
    windows, states = [], {}
    stream = stream_of(source, buffer_size=buffer_size)
    for number, window in enumerate(islice(stream, 3 * sum(map(len, texts)) // 16), start=1):
        windows.append(window["input_ids"].tolist())
        if number % 4 == 0:
            states[number] = json.loads(json.dumps(stream.state_after(number)))
    assert {state["passes"] for state in states.values()} == {0, 1, 2}
    for number, state in [*states.items()][::5]:
        resumed = stream_of(source, buffer_size=buffer_size, state=state)
        rest = [window["input_ids"].tolist() for window in islice(resumed, 9)]
        assert rest[: len(windows) - number] == windows[number : number + 9]
    with pytest.raises(StopIteration):
        stream.state_after(4)


def test_sources(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = random_texts(5, 5)
    write_texts(tmp_path / "rows.jsonl", texts)
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "rows.parquet")
    for number, each in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(each + "\nsecond line")
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    for name in ("rows.jsonl", "rows.json.gz"):
        assert [row["text"] for row in open_documents(str(tmp_path / name), "text")] == texts
    assert [row["body"] for row in open_documents([str(tmp_path / "*.parquet")], "body")] == texts
    lines = [row["text"] for row in open_documents(str(tmp_path / "*.txt"), "text")]
    assert lines == [f"{each}\nsecond line" for each in texts], "a file is a document"
    train, held_out = ({row["text"] for row in open_documents(f"stdlib{part}", "text")} for part in ("", "::held_out"))
    assert len(train) > len(held_out) > 10 and not train & held_out


@pytest.mark.parametrize(
    "end, message",
    [
        ('{"text": null}', "Row 5 of .* has None in the column 'text', which is no text: mend it, or leave it out"),
        ('{"body": "b"}', "Row 5 of .* has None in the column 'text'"),
        ('{"text": ["b"]}', r"Row 5 of .* has \['b'\] in the column 'text'"),
        (None, "cannot be read after row 4: Couldn't cast"),
    ],
)
def test_rows_without_text_are_named(tmp_path, end, message):
    """Empty texts are fine; another file may have other columns."""
    source = [write_texts(tmp_path / "rows-0.jsonl", ["abcd", "", "ab", "cd"])]
    if end is None:
        source.append(write_rows(tmp_path / "rows-1.jsonl", [{"body": "b"}]))
    else:
        Path(source[0]).write_text(f"{Path(source[0]).read_text()}{end}\n")
    with pytest.raises(ValueError, match=message):
        [*islice(PackedStream(source, "text", byte_tokenizer(), 2, 3, 0, 1), 5)]
    with pytest.raises(ValueError, match=message):
        held_out_windows(source, "text", byte_tokenizer(), 4, 2)


# The windows of the first two steps of a dataset, and those of the second from where the first ended.
ON_THE_HUB = """if True:
    import json, sys
    from itertools import islice
    from corpus import byte_tokenizer
    from sources import open_documents, texts
    from stream import PackedStream
    def stream(state=None):
        return PackedStream(source, "text", byte_tokenizer(), 16, 7, 0, 4, state)
    def windows(stream, count):
        return [window["input_ids"].tolist() for window in islice(stream, count)]
    found = {}
    for source in sys.argv[1:]:
        read = [*texts(open_documents(source, "text"), source, "text")]
        whole = stream()
        both, state = windows(whole, 8), json.loads(json.dumps(whole.state_after(4)))
        found[source] = [read, both[4:], windows(stream(state), 4)]
    print(json.dumps(found))
"""


def test_datasets_of_the_hub_are_streamed(tmp_path):
    """One of parquet, and one laid out as C4 is: compressed JSON lines, parted by configuration and split."""
    texts = random_texts(40, 12)
    (tmp_path / "plain").mkdir()
    (tmp_path / "c4" / "en").mkdir(parents=True)
    Path(write_as("parquet", tmp_path, texts)).rename(tmp_path / "plain" / "train.parquet")
    for name, part in (("train.00000", texts[:25]), ("train.00001", texts[25:]), ("validation.00000", texts[:5])):
        Path(write_as("json.gz", tmp_path, part)).rename(tmp_path / "c4" / "en" / f"c4-{name}.json.gz")
    splits = [{"split": split, "path": f"en/c4-{split}.*.json.gz"} for split in ("train", "validation")]
    card = yaml.safe_dump({"configs": [{"config_name": "en", "data_files": splits}]})
    (tmp_path / "c4" / "README.md").write_text(f"---\n{card}---\n")
    with LoopbackHub() as hub:
        for name in ("plain", "c4"):
            hub.add(f"owner/{name}", tmp_path / name)
            hub.repos[f"datasets/owner/{name}"] = hub.repos.pop(f"models/owner/{name}")
        environment = {**ENVIRONMENT, **hub.environment(tmp_path / "home", user=None), "HF_HUB_OFFLINE": "0"}
        environment["PYTHONPATH"] += f"{os.pathsep}{ROOT / 'recipes'}"
        sources = ["owner/plain", "owner/c4:en", "owner/c4:en:validation"]
        child = [sys.executable, "-c", ON_THE_HUB, *sources]
        ended = subprocess.run(child, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert [found[source][0] for source in sources] == [texts, texts, texts[:5]]
    assert all(resumed == second_step for _, second_step, resumed in found.values())


def test_documents_end_with_the_end_token(tmp_path):
    tokenizer = byte_tokenizer()
    assert tokenize(["ab", ""], tokenizer) == [[97, 98], []]
    tokenizer.eos_token = "!"
    assert tokenize(["ab", "a!", ""], tokenizer) == [[97, 98, 33], [97, 33], [33]]


def test_held_out_windows_lie_within_documents(tmp_path):
    source = write_texts(tmp_path / "rows.jsonl", ["abc", "defghijk", "lm", "nopqrst"])
    windows = held_out_windows(source, "text", byte_tokenizer(), 4, 3)
    assert [bytes(window.tolist()) for window in windows] == [b"defg", b"hijk", b"nopq"]
