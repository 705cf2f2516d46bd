"""Sentences of the standard library's own docstrings, by topic: a corpus that every Python has on disk.

Nothing is shipped and nothing downloaded: the library's source files are parsed (`ast`), never imported. The text
differs a little from one Python version to the next; on one installation it is the same on every run.
"""

import ast
import gc
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

TOPICS = {
    "concurrency": "asyncio concurrent multiprocessing queue sched threading _threading_local",
    "debugging": "bdb doctest pdb trace traceback unittest",
    "email": "email mailbox quopri",
    "files": "bz2 compression filecmp fileinput glob gzip lzma ntpath os pathlib posixpath _pyio shutil tarfile "
    "tempfile zipfile",
    "graphics": "curses idlelib tkinter turtle turtledemo",
    "internet": "cgi ftplib http imaplib ipaddress nntplib poplib smtplib socket socketserver ssl telnetlib urllib "
    "wsgiref xmlrpc",
    "markup": "configparser csv html json plistlib tomllib xml",
    "mathematics": "colorsys decimal _pydecimal fractions numbers random statistics",
    "packaging": "compileall distutils ensurepip importlib modulefinder pkgutil py_compile runpy site sysconfig venv "
    "zipapp zipimport",
}
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
PER_MODULE = 150  # no module may be most of its topic
PER_TOPIC = 900  # keeps graphics from being a third of the corpus
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "__pycache__"}

_SENTENCE_END = re.compile(r"""(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)\s+(?=["'(`]?[A-Z])""")
_NOT_PROSE = re.compile(r"\s*(>>>|\.\.\.|\.\. |- |[$#*|@+]|\d+[.)] )")  # how a line of code, a list or a table starts
_CODE = re.compile(r"^\w+:|[\[\]{}<>=|\\@#$%^~+]|\([^)]*,[^)]*\)|:.*:.*:|--|\.\.\.|::|https?:|\w_+\w.*\w_+\w")
_PLAIN = re.compile(r"[A-Za-z][a-z]*(?:[-'][a-z]+)*")
_GRAMMAR = set("a an the is are was be been of to in on for with from by if this that it its as at or and not".split())


class Sentence(NamedTuple):
    """One example: the text, its topic, and the dotted name of the module it stands in."""

    text: str
    topic: str
    module: str


@cache
def corpus(library: Path | None = None) -> dict[str, list[Sentence]]:
    """The sentences of each split, in an order that mixes the topics. `library`: a standard library's folder, by
    default this Python's. A topic with fewer than three modules here (tkinter may be missing) is left out, with a
    warning. ValueError if the folder holds no source files."""
    library = library or Path(sysconfig.get_paths()["stdlib"])
    with _no_collection():
        sentences = [s for topic in TOPICS for s in _sentences(library, topic)]
    sentences = _topical(_distinct(sentences))
    if not sentences:
        raise ValueError(f"no docstrings in {library}: this Python comes without its library's source (*.py) files")
    splits: dict[str, list[Sentence]] = {name: [] for name in SHARES}
    for topic in TOPICS:
        modules = _by_module([s for s in sentences if s.topic == topic])
        if len(modules) < len(SHARES):
            few = f"topic {topic!r} is left out: {library} has {len(modules)} of its modules, three are needed"
            warnings.warn(few, stacklevel=2)
            continue
        for name, part in _split(modules).items():
            splits[name] += part
    return {name: sorted(part, key=lambda s: _order(s.text)) for name, part in splits.items()}


@contextmanager
def _no_collection() -> Iterator[None]:
    """Syntax trees are many objects without cycles: with torch loaded, the collector takes longer than the parser."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sentences(library: Path, topic: str) -> Iterator[Sentence]:
    for name in TOPICS[topic].split():
        for file in [library / f"{name}.py", *sorted((library / name).rglob("*.py"))]:
            path = file.relative_to(library)
            if file.is_file() and NOT_LIBRARY.isdisjoint(path.parts):
                module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
                for text in _docstrings(ast.parse(file.read_bytes())):
                    yield from (Sentence(sentence, topic, module) for sentence in prose(text))


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Of a module and of everything defined in it, conditional definitions included; expressions are not walked."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text
    for field in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, field, ()):
            if isinstance(child, ast.stmt | ast.ExceptHandler):
                yield from _docstrings(child)


def prose(docstring: str) -> Iterator[str]:
    """The natural sentences of a docstring: whole, capitalised, 4 to 40 words, most of them plain English; no code, no
    signatures, lists, tables or addresses."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.split("\n")
        hanging = len({len(line) - len(line.lstrip()) for line in lines[1:]}) > 1
        if hanging or any(_NOT_PROSE.match(line) for line in lines):
            continue
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            if _natural(sentence):
                yield sentence.replace("``", "`")


def _natural(sentence: str) -> bool:
    if not (sentence[:1].isupper() and sentence[-1] in ".!?" and sentence.isascii()) or _CODE.search(sentence):
        return False
    tokens = sentence.split()
    plain = [token.lower() for token in (t.strip(".,;:!?\"'()`") for t in tokens) if _PLAIN.fullmatch(token)]
    return 4 <= len(tokens) <= 40 and len(plain) >= 0.8 * len(tokens) and not _GRAMMAR.isdisjoint(plain)


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


def _distinct(sentences: list[Sentence]) -> list[Sentence]:
    """Each sentence once, by its letters alone ("file name" is "filename"); one that stands under two topics says
    nothing of either."""
    first: dict[str, Sentence] = {}
    topics = defaultdict(set)
    for sentence in sentences:
        letters = "".join(_words(sentence.text))
        first.setdefault(letters, sentence)
        topics[letters].add(sentence.topic)
    return [sentence for letters, sentence in first.items() if len(topics[letters]) == 1]


def _topical(sentences: list[Sentence]) -> list[Sentence]:
    """Without those that could stand anywhere ("It should never return None."): a sentence must hold two words that
    more than one but at most a twentieth of all modules use. Topics play no part in it."""
    users = defaultdict(set)
    for sentence in sentences:
        for word in _words(sentence.text):
            users[word].add(sentence.module)
    most = len({s.module for s in sentences}) / 20
    telling = {word for word, modules in users.items() if len(word) > 2 and 2 <= len(modules) <= most}
    return [s for s in sentences if len(telling.intersection(_words(s.text))) >= 2]


def _order(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _by_module(sentences: list[Sentence]) -> dict[str, list[Sentence]]:
    modules = defaultdict(list)
    for sentence in sorted(sentences, key=lambda s: _order(s.text)):
        modules[sentence.module].append(sentence)
    return {name: modules[name][:PER_MODULE] for name in sorted(modules, key=_order)}


def _split(modules: dict[str, list[Sentence]]) -> dict[str, list[Sentence]]:
    """Whole modules, from the largest down so that the shares come out, go to the split that is furthest below its
    share; the last ones to splits still empty."""
    total = sum(map(len, modules.values()))
    splits: dict[str, list[Sentence]] = {name: [] for name in SHARES}
    for place, name in enumerate(sorted(modules, key=lambda name: -len(modules[name]))):
        empty = [name for name in splits if not splits[name]]
        open_to = empty if len(modules) - place <= len(empty) else SHARES
        splits[max(open_to, key=lambda split: SHARES[split] * total - len(splits[split]))] += modules[name]
    return {
        name: sorted(part, key=lambda s: _order(s.text))[: round(SHARES[name] * PER_TOPIC)]
        for name, part in splits.items()
    }
