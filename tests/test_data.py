"""The data modules: what they read, how they split and tokenise it, and what they say to bad input."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lightning_peft.data import DocstringTopics, InstructionData, TextBlocks, TextClassificationData
from lightning_peft.data import corpus as corpus_file
from lightning_peft.data.corpus import TOPICS, corpus, prose
from lightning_peft.data.instructions import PadTokens
from tests.texts import tiny_bert, tiny_llama

POEM = "".join(f"Line {n} of the poem says that {n} and {n + 1} make {2 * n + 1}.\n" for n in range(80))
ROWS = [("a good film", "pos"), ("a bad film", "neg"), ("NA", "pos"), ('one "dull plot', "neg"), ("null, not", "pos")]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("llama"), POEM)


def written(path: Path, rows: list[tuple[Any, Any]], names: tuple[str, str] = ("text", "label")) -> str:
    table = Dataset.from_dict({names[0]: [row[0] for row in rows], names[1]: [row[1] for row in rows]})
    if path.suffix == ".csv":
        table.to_csv(path)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".tsv":
        path.write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(table.to_list()))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_list()))
    return str(path)


def examples(data: Any, split: str) -> list[dict[str, Any]]:
    data.prepare_data()
    data.setup({"train": "fit", "val": "validate", "test": "test", "predict": "predict"}[split])
    return data._encoded[split].to_list()


def texts(data: Any, split: str) -> list[str]:
    return [data.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in examples(data, split)]


# The corpus of docstrings


def test_corpus_splits_share_no_module_and_no_sentence() -> None:
    splits = corpus()
    for one, other in combinations(splits.values(), 2):
        assert {s.module for s in one}.isdisjoint(s.module for s in other)
    letters = Counter("".join(filter(str.isalnum, s.text.lower())) for s in chain(*splits.values()))
    assert max(letters.values()) == 1


def test_corpus_has_every_topic_in_every_split_and_none_too_large() -> None:
    splits = corpus()
    assert 3000 < sum(map(len, splits.values())) < 9000
    assert {s.topic for s in splits["train"]} <= set(TOPICS) and len({s.topic for s in splits["train"]}) >= 8
    for part in splits.values():
        count = Counter(s.topic for s in part)
        assert count.keys() == {s.topic for s in splits["train"]}
        assert max(count.values()) < 0.3 * len(part) and min(count.values()) >= 5


def test_corpus_is_the_same_in_a_process_with_another_hash_seed() -> None:
    show = "import runpy, sys; print(*(s for p in runpy.run_path(sys.argv[1])['corpus']().values() for s in p))"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    command = [sys.executable, "-c", show, str(corpus_file.__file__)]
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    here = " ".join(str(s) for part in corpus().values() for s in part)
    assert shown.stdout.strip() == here.strip()


def test_prose_keeps_sentences_and_drops_code_lists_and_fragments() -> None:
    docstring = """Return the sum of the items.  If there are none, e.g. in an empty list, it is zero.
Too short.  There is no end to this line

    >>> total([1, 2])
    It would be a sentence if it were not in the code.

- A list is not what we are after here.

Call total(items, start) to begin at another number.  See https://x.org for the rest of it.

   An indented paragraph is fine
   if all its lines are alike."""
    assert list(prose(docstring)) == [
        "Return the sum of the items.",
        "If there are none, e.g. in an empty list, it is zero.",
        "An indented paragraph is fine if all its lines are alike.",
    ]


def test_corpus_reads_nested_definitions_of_a_folder_and_names_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_file, "TOPICS", {"birds": "birds", "few": "one two"})
    (tmp_path / "birds" / "tests").mkdir(parents=True)
    for n in range(40):  # each pair of files shares a pair of words, which a twentieth of all files use
        text = f'"""The heron{n // 2} and the stork{n // 2} wade in the water as number {"x" * (n + 1)}."""\n'
        (tmp_path / "birds" / f"b{n:02}.py").write_text(f"if True:\n  class Bird:\n    def fly(self):\n      {text}")
    (tmp_path / "birds" / "tests" / "b.py").write_text('"""The heron1 and the stork1 are in a test."""\n')
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(f'"""The egret and the ibis of file {name} stand alone."""\n')
    with pytest.warns(UserWarning, match="topic 'few' is left out: .* has 2 of its modules"):
        splits = corpus.__wrapped__(tmp_path)
    assert {name: len(part) for name, part in splits.items()} == {"train": 28, "val": 4, "test": 8}
    assert {s.topic for part in splits.values() for s in part} == {"birds"}
    with pytest.raises(ValueError, match="comes without its library's source"):
        corpus.__wrapped__(tmp_path / "nowhere")


def test_docstring_topics_encodes_its_sentences_under_their_topics(bert: str) -> None:
    data = DocstringTopics(bert, max_length=16)
    assert data.num_labels == len(data.label_names) == len({s.topic for s in corpus()["train"]})
    rows = examples(data, "val")
    assert [data.label_names[row["labels"]] for row in rows] == [s.topic for s in corpus()["val"]]
    assert max(len(row["input_ids"]) for row in rows) == 16
    assert "labels" not in examples(data, "predict")[0]


# Classification from files


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path, bert: str) -> None:
    path = written(tmp_path / f"train.{kind}", ROWS)
    columns = ["text", "label"] if kind == "tsv" else None
    data = TextClassificationData(bert, train=path, columns=columns, val_fraction=0)
    assert data.label_names == ["neg", "pos"]
    rows = data.rows("train")
    assert rows is not None and list(zip(rows["text"], rows["label"], strict=True)) == ROWS
    assert [row["labels"] for row in examples(data, "train")] == [1, 0, 1, 0, 1]
    assert texts(data, "train")[0] == "a good film"


def test_whole_number_labels_are_in_numerical_order_and_known_before_setup(tmp_path: Path, bert: str) -> None:
    rows = [("a", 10), ("the", 2), ("it", 10), ("was", -1)]
    for path in (written(tmp_path / "a.jsonl", rows), written(tmp_path / "a.csv", rows)):
        data = TextClassificationData(bert, train=path)
        assert (data.label_names, data.num_labels) == (["-1", "2", "10"], 3)


def test_validation_rows_are_held_out_of_training_by_seed(tmp_path: Path, bert: str) -> None:
    rows = [(" ".join(pair), "ab"[n % 2]) for n, pair in enumerate(combinations("a the not bad good film".split(), 2))]
    path = written(tmp_path / "train.csv", rows)

    def halves(seed: int) -> tuple[list[str], list[str]]:
        data = TextClassificationData(bert, train=path, val_fraction=0.2, seed=seed)
        return texts(data, "train"), texts(data, "val")

    train, val = halves(0)
    assert len(val) == 3 and sorted(train + val) == sorted(text for text, _ in rows)
    assert halves(0) == (train, val) and halves(1) != (train, val)


def test_pairs_are_encoded_together_and_batches_padded_to_their_longest(tmp_path: Path, bert: str) -> None:
    path = tmp_path / "train.jsonl"
    pairs = [("a good film", "it was dull", 0), ("a", "the", 1)]
    path.write_text("".join(json.dumps({"one": a, "two": b, "y": y}) + "\n" for a, b, y in pairs))
    data = TextClassificationData(
        bert, test=[str(path)], text_column="one", text_pair_column="two", label_column="y", label_names=["0", "1"]
    )
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert batch["input_ids"].shape == (2, 9)  # [CLS] 3 [SEP] 3 [SEP]
    assert data.tokenizer.decode(batch["input_ids"][0]) == "[CLS] a good film [SEP] it was dull [SEP]"
    assert batch["attention_mask"].sum(1).tolist() == [9, 5]
    assert batch["labels"].tolist() == [0, 1]


def test_a_named_data_set_keeps_the_order_of_its_labels(tmp_path: Path, bert: str) -> None:
    (folder := tmp_path / "set").mkdir()
    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    for split, labels in (("train", [0, 1]), ("test", [1, -1])):
        table = Dataset.from_dict({"text": ["good", "bad"], "label": labels}, features=features)
        table.to_parquet(folder / f"{split}.parquet")
    data = TextClassificationData(bert, dataset=str(folder), val_split=None)
    assert data.label_names == ["pos", "neg"]
    assert [row["labels"] for row in examples(data, "train")] in ([0], [1])  # the other one validates
    with pytest.raises(ValueError, match="test: row 2 has the label '-1'"):
        data.setup("test")
    with pytest.raises(ValueError, match=r"has \['train', 'test'\], no 'validation': set val_split, or null"):
        TextClassificationData(bert, dataset=str(folder)).setup("fit")


def test_predict_needs_no_labels_and_missing_splits_are_named(tmp_path: Path, bert: str) -> None:
    path = tmp_path / "new.jsonl"
    path.write_text('{"text": "a film"}\n')
    data = TextClassificationData(bert, predict=str(path))
    data.setup("predict")
    assert set(next(iter(data.predict_dataloader()))) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="no rows for 'test': give test="):
        data.test_dataloader()
    with pytest.raises(ValueError, match="not known without training rows"):
        data.num_labels  # noqa: B018


def test_bad_files_are_named(tmp_path: Path, bert: str) -> None:
    good = written(tmp_path / "train.csv", ROWS)

    def error(kind: type[Exception], *words: str, **arguments: Any) -> None:
        with pytest.raises(kind) as caught:
            data = TextClassificationData(bert, **{"train": good, "val_fraction": 0.0, **arguments})
            data.setup()
        assert all(word in str(caught.value) for word in words), str(caught.value)

    error(FileNotFoundError, "tain.csv", "nearest: 'train.csv'", train=str(tmp_path / "tain.csv"))
    (tmp_path / "empty.csv").touch()
    error(ValueError, "empty.csv", "is empty", train=str(tmp_path / "empty.csv"))
    (tmp_path / "header.csv").write_text("text,label\n")
    error(ValueError, "header.csv", "no rows", train=str(tmp_path / "header.csv"))
    error(ValueError, "no column 'txt'", "['text', 'label']", "nearest: 'text'", text_column="txt")
    error(ValueError, "train.csv", "no column 'class'", label_column="class")
    (tmp_path / "ragged.csv").write_text("text,label\na,0\na,b,c\n")
    error(ValueError, "ragged.csv", "line 3", train=str(tmp_path / "ragged.csv"))
    error(ValueError, "line 1 has 2 cells", columns=["text", "label", "more"])
    bare = written(tmp_path / "bare.tsv", ROWS)
    error(ValueError, "bare.tsv", "columns=[...]", train=bare)
    strange = written(tmp_path / "val.csv", [("good", "pos"), ("bad", "ngv")])
    error(ValueError, "val.csv", "row 2 has the label", "'ngv'", "['neg', 'pos']", "nearest: 'neg'", val=strange)
    gaps = written(tmp_path / "gaps.jsonl", [("good", "pos"), (None, "neg")])
    error(ValueError, "gaps.jsonl", "row 2 has nothing in column 'text'", train=gaps)
    error(ValueError, "train.csv", "bare.tsv", "files of one split are all one of", train=[good, bare])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b" "label": 0}\n', "line 3, column 14: not JSON"),
        ("x.jsonl", '{"text": "a", "label": 1}\n["b", 0]\n', "line 2: every row must be an object"),
        ("x.json", '[{"text": "a", "label": 1},\n {"text": "b", label: 0}]', "line 2, column 16: not JSON"),
        (
            "x.jsonl",
            '{"text": "a", "label": 1}\n{"text": {"b": 1}, "label": 0}\n',
            "x.jsonl.*row 2 has {'b': 1}, not a text",
        ),
    ],
)
def test_broken_json_is_named_by_file_and_line(
    name: str, content: str, message: str, tmp_path: Path, bert: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        TextClassificationData(bert, train=str(tmp_path / name)).prepare_data()
    assert name in str(caught.value)


def test_max_length_past_the_tokenizers_own_limit_is_refused(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 32}))
    data = DocstringTopics(folder, max_length=64)
    with pytest.raises(ValueError, match="max_length=64, .* at most 32 tokens"):
        data.setup("test")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        DocstringTopics(folder, batch_size=0)


# Blocks of text


def test_blocks_lose_no_token_but_the_tail(tmp_path: Path, llama: str) -> None:
    (tmp_path / "a.txt").write_text(POEM)
    (tmp_path / "b.txt").write_text("Another poem.\n")
    data = TextBlocks(llama, test=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], block_size=50, batch_size=3)
    blocks = [row["input_ids"] for row in examples(data, "test")]
    assert {len(block) for block in blocks} == {50}
    tokens = list(chain(*blocks))
    documents = [data.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (POEM, "Another poem.\n")]
    whole = [*documents[0], 1, *documents[1], 1]
    assert tokens == whole[: len(tokens)] and len(whole) - len(tokens) < 50
    batch = next(iter(data.test_dataloader()))
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == blocks[:3]


def test_validation_text_is_the_end_of_each_training_file(tmp_path: Path, llama: str) -> None:
    (tmp_path / "a.txt").write_text(POEM)
    data = TextBlocks(llama, train=str(tmp_path / "a.txt"), block_size=8, val_fraction=0.25)
    train, val = data.rows("train"), data.rows("val")
    assert train is not None and val is not None
    (start,), (end,) = train["documents"][0], val["documents"][0]
    assert start + end == POEM and start.endswith("\n") and 0.2 < len(end) / len(POEM) <= 0.25
    with pytest.raises(ValueError, match=r"'train' has \d+ tokens, not one block of block_size=9000"):
        TextBlocks(llama, train=str(tmp_path / "a.txt"), block_size=9000).setup("fit")
    with pytest.raises(FileNotFoundError, match="nearest: 'a.txt'"):
        TextBlocks(llama, train=str(tmp_path / "b.txt"))


# Instructions

TALKS = [
    ("Name 3 lines.", "Line 1, line 2."),
    ("What do 3 and 4 make?", "They make 7."),
    ("Hm?", "The poem says that."),
]


def test_only_the_response_and_its_end_are_learnt(tmp_path: Path, llama: str) -> None:
    path = written(tmp_path / "talks.jsonl", TALKS, ("question", "answer"))
    data = InstructionData(llama, train=path, prompt_column="question", response_column="answer", val_fraction=0)
    rows = examples(data, "train")
    for row, (prompt, response) in zip(rows, TALKS, strict=True):
        learnt = [token for token in row["labels"] if token != -100]
        assert data.tokenizer.decode(learnt) == response + "</s>"
        assert data.tokenizer.decode(row["input_ids"]) == f"<s>{prompt}\n{response}</s>"
        assert row["labels"][-len(learnt) :] == learnt  # all at the end: the response, not equal tokens of the prompt
    batch = next(iter(data.train_dataloader()))
    longest = max(len(row["input_ids"]) for row in rows)
    assert batch["labels"].shape == (3, -(-longest // 8) * 8)
    assert batch["attention_mask"].sum().item() == sum(len(row["input_ids"]) for row in rows)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_a_template_names_its_columns(tmp_path: Path, llama: str) -> None:
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([{"instruction": "Say {it}.", "input": "", "output": "It."}]))
    data = InstructionData(llama, test=str(path), template="Do: {instruction} {input}\nSo: ", response_column="output")
    assert data.tokenizer.decode(examples(data, "test")[0]["input_ids"]) == "<s>Do: Say {it}. \nSo: It.</s>"
    with pytest.raises(ValueError, match="has no column 'instructions'.*nearest: 'instruction'"):
        InstructionData(llama, test=str(path), template="{instructions}", response_column="output").setup("test")
    with pytest.raises(ValueError, match="names no column"):
        InstructionData(llama, test=str(path), template="Do it.")


def test_truncation_cuts_the_start_of_the_prompt_then_the_end_of_the_response(tmp_path: Path, llama: str) -> None:
    path = written(tmp_path / "a.jsonl", [("Line 1 of the poem says that 1 and 2", "make 3.")], ("prompt", "response"))
    full = examples(InstructionData(llama, test=path), "test")[0]
    count = sum(label != -100 for label in full["labels"])
    shorter = examples(InstructionData(llama, test=path, max_length=count + 4), "test")[0]
    assert shorter["input_ids"] == [0, *full["input_ids"][-count - 3 :]]
    assert shorter["labels"] == [-100] * 4 + full["labels"][-count:]
    with pytest.warns(UserWarning, match="1 responses of 'test' lose their end"):
        shortest = examples(InstructionData(llama, test=path, max_length=count - 1), "test")[0]
    assert shortest["input_ids"] == [0, *full["input_ids"][-count:-2]]


def test_prompts_to_predict_are_padded_on_the_left(tmp_path: Path, llama: str) -> None:
    path = written(tmp_path / "a.jsonl", TALKS, ("prompt", "response"))
    data = InstructionData(llama, predict=path, batch_size=3)
    rows = examples(data, "predict")
    batch = next(iter(data.predict_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask"}
    for row, ids, mask in zip(rows, batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        assert ids[-len(row["input_ids"]) :] == row["input_ids"] and sum(mask) == len(row["input_ids"]) == sum(
            mask[-len(row["input_ids"]) :]
        )


def test_padding_stops_at_max_length() -> None:
    batch = PadTokens(pad_id=9, most=11)(
        [{"input_ids": [1] * 10, "labels": [1] * 10}, {"input_ids": [2], "labels": [2]}]
    )
    assert batch["input_ids"].shape == (2, 11)
    assert batch["labels"][1].tolist() == [2] + [-100] * 10
