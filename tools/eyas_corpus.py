"""The text eyas learns from: what the running CPython says about itself.

Sources, all under the licence of Python (PSF-2.0), all read from the running installation:

* docstrings of the standard library's Python modules, with each object's name and signature above them, and the longer
  comment blocks between them, in the order of the source (parsed with `ast` and `tokenize`; nothing is imported);
* docstrings of the modules written in C (`__doc__` of the built-in and extension modules and of what they hold);
* the language reference's chapters that `help()` shows (`pydoc_data.topics`), and the Zen of Python.

From the same docstrings come short conversations for the chat template. The few dozen lines in `GREETINGS` and
`CONTINUATIONS` are our own.

The corpus is a function of the Python that runs this: same version, same platform, same documents. Package tests,
site-packages and generated tables are left out.
"""

import ast
import codecs
import hashlib
import importlib
import importlib.util
import inspect
import io
import re
import sys
import sysconfig
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType

HELD_OUT_PERCENT = 3.0
MIN_DOCSTRING_CHARS = 20
MAX_SIGNATURE_CHARS = 160
MAX_ANSWER_CHARS = 600
OWN_TEXT_REPEATS = 12  # the hand-written lines are few; this many copies make them stick

SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "ensurepip"}
SKIPPED_FILES = re.compile(r"_sysconfigdata|_aix_support|__phello__|__hello__|antigravity|^this\.py$")
SKIPPED_EXTENSIONS = re.compile(r"^_?(xx|test)|^_ctypes_test$")
TABLES = {"encodings"}  # their comments are code charts, not prose
EMAIL = re.compile(r"[\w.+-]+@(?!example\b)[\w-]+(\.[\w-]+)+")


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the part of the model's life it belongs to."""

    name: str  # unique; decides, with `group`, nothing but order
    group: str  # documents of one group are on one side of the held-out split
    kind: str  # "module", "topic", "chat" or "own"
    text: str
    unlearned: tuple[tuple[int, int], ...] = ()  # character ranges that are context only: no loss on them


@dataclass(frozen=True, slots=True)
class Entry:
    """What one object says of itself."""

    name: str  # as a reader would write it: "shutil.copyfile"
    module: str
    noun: str  # "module", "class", "function" or "method"
    signature: str
    docstring: str
    line: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents in their two parts, each sorted by name."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    def sha256(self) -> str:
        """Digest of every document's name and text, both parts."""
        digest = hashlib.sha256()
        for document in (*self.train, *self.held_out):
            digest.update(f"{document.name}\0{document.text}\0".encode())
        return digest.hexdigest()


def collect_corpus() -> Corpus:
    """Read the running Python's documentation, derive the conversations, and split off the held-out part."""
    entries: list[Entry] = []
    modules: list[Document] = []
    for path in library_files():
        found, comments = read_source(path, module_name(path))
        entries += found
        modules += module_documents(module_name(path), found, comments)
    for module in extension_modules():
        found = read_extension(module)
        entries += found
        modules += module_documents(public_name(module.__name__), found, [])
    documents = [*without_repeats(modules), *topic_documents(), *chat_documents(entries), *own_documents()]
    return split(documents)


# --- the standard library's Python files -----------------------------------------------------------------------------


def library_files() -> list[Path]:
    """Paths of the standard library's Python files, in a fixed order."""
    root = library_root()
    paths = (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]))
    return sorted(path for path in paths if not SKIPPED_FILES.search(path.name) and "config-3" not in str(path))


def library_root() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def module_name(path: Path) -> str:
    """Dotted name of a library file, as a reader would import it."""
    parts = path.relative_to(library_root()).with_suffix("").parts
    return public_name(".".join(parts[:-1] if parts[-1] == "__init__" else parts))


def public_name(name: str) -> str:
    """Name under which readers know a module: the public twin of a private accelerator where there is one."""
    special = {
        "_pydecimal": "decimal",
        "_pyio": "io",
        "posix": "os",
        "_sre": "re",
        "_collections_abc": "collections.abc",
    }
    if name in special:
        return special[name]
    bare = name.lstrip("_")
    return bare if bare in sys.stdlib_module_names else name


def read_source(path: Path, module: str) -> tuple[list[Entry], list[tuple[int, str]]]:
    """Entries of a Python file, and its prose comments with their line numbers."""
    with tokenize.open(path) as file:
        source = file.read()
    entries = list(walk(ast.parse(source), module, prefix=""))
    comments = [] if module.partition(".")[0] in TABLES else list(comment_blocks(source))
    return entries, comments


def walk(node: ast.AST, module: str, prefix: str) -> Iterator[Entry]:
    """Yield the documented objects under `node`, outermost first."""
    if isinstance(node, ast.Module) and (docstring := ast.get_docstring(node)):
        yield Entry(module, module, "module", "", tidy(docstring), 0)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            qualified = f"{prefix}{child.name}"
            docstring = ast.get_docstring(child)
            if docstring and len(docstring) >= MIN_DOCSTRING_CHARS:
                noun = "class" if isinstance(child, ast.ClassDef) else "method" if prefix else "function"
                name = f"{module}.{qualified}"
                yield Entry(name, module, noun, signature(child, qualified), tidy(docstring), child.lineno)
            yield from walk(child, module, f"{qualified}.")
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from walk(child, module, prefix)


def signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, qualified: str) -> str:
    """Head line of a class or function, without its annotations where they make it long."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {qualified}({bases})" if bases else f"class {qualified}"
    line = f"{qualified}({ast.unparse(node.args)})"
    if len(line) > MAX_SIGNATURE_CHARS:
        line = f"{qualified}({', '.join(arg.arg for arg in node.args.args)}, ...)"
    return f"async {line}" if isinstance(node, ast.AsyncFunctionDef) else line


def comment_blocks(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every run of comment lines that reads as prose."""
    run: list[tuple[int, str]] = []
    for line, text in [*comment_lines(source), (sys.maxsize, "")]:
        if run and line != run[-1][0] + 1:
            block = "\n".join(content for _, content in run).strip()
            if is_prose(block):
                yield run[0][0], block
            run = []
        run.append((line, text))


def comment_lines(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the comments that stand alone on their lines."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            text = token.string.lstrip("#!:").rstrip().removeprefix(" ")
            if not re.fullmatch(r"[-=*#~_+ ]*", text) or not text:
                yield token.start[0], text


def is_prose(block: str) -> bool:
    """Whether a comment is sentences rather than code, a table or a notice."""
    letters = sum(character.isalpha() or character == " " for character in block)
    words = re.findall(r"\b[a-z]{2,}\b", block)
    notice = re.search(r"copyright|all rights reserved|coding[:=]", block, re.IGNORECASE)
    return len(block) >= 80 and letters > 0.85 * len(block) and len(words) >= 12 and not notice


def tidy(text: str) -> str:
    """Clean one docstring: margins removed, no trailing spaces, no tabs, no long runs of blank lines, no addresses."""
    text = "\n".join(line.rstrip() for line in inspect.cleandoc(text).replace("\r\n", "\n").split("\n"))
    text = EMAIL.sub("", text).replace("<>", "")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


# --- modules written in C --------------------------------------------------------------------------------------------


def extension_modules() -> Iterator[ModuleType]:
    """Yield the built-in and extension modules of the standard library; importing these starts nothing."""
    for name in sorted(sys.stdlib_module_names):
        if SKIPPED_EXTENSIONS.search(name):
            continue
        spec = importlib.util.find_spec(name) if name not in {"__main__", "antigravity", "this"} else None
        if spec and spec.origin and (spec.origin == "built-in" or spec.origin.endswith((".so", ".pyd"))):
            yield importlib.import_module(name)


def read_extension(module: ModuleType) -> list[Entry]:
    """Entries of a C module: itself, its functions, its classes and their methods."""
    name = public_name(module.__name__)
    entries = [described(module, name, name, "module")]
    for key, value in sorted(vars(module).items()):
        if key.startswith("__") or isinstance(value, ModuleType):
            continue
        full = key if name == "builtins" else f"{name}.{key}"
        if isinstance(value, type) and value.__module__ in {module.__name__, name, "builtins"}:
            entries.append(described(value, full, name, "class"))
            members = sorted(vars(value).items())
            entries += [described(member, f"{full}.{attr}", name, "method") for attr, member in members]
        elif inspect.isbuiltin(value):
            entries.append(described(value, full, name, "function"))
    return [entry for entry in entries if len(entry.docstring) >= MIN_DOCSTRING_CHARS]


def described(value: object, name: str, module: str, noun: str) -> Entry:
    """Entry of a live object; its docstring is empty where it has none of its own."""
    docstring = getattr(value, "__doc__", None)
    inherited = not isinstance(value, type | ModuleType) and docstring == type(value).__doc__
    text = tidy(docstring) if isinstance(docstring, str) and not inherited else ""
    short = name.removeprefix(f"{module}.")
    arguments = getattr(value, "__text_signature__", None)
    line = f"{short}{re.sub(r'[$]', '', arguments)}" if isinstance(arguments, str) and noun != "module" else short
    return Entry(name, module, noun, f"class {line}" if noun == "class" else line, text, 0)


# --- documents -------------------------------------------------------------------------------------------------------


def module_documents(module: str, entries: list[Entry], comments: list[tuple[int, str]]) -> list[Document]:
    """The reference page of one module, or nothing if it says next to nothing."""
    sections = [(entry.line, section(entry)) for entry in entries] + [(line, tidy(text)) for line, text in comments]
    text = "\n\n".join(text for _, text in sorted(sections, key=lambda item: item[0]))
    group = module.partition(".")[0].strip("_") if module != "builtins" else "builtins"
    whole = Document(f"module {module}", f"{group}/{module.rpartition('.')[2].strip('_')}", "module", text)
    return [whole] if len(text) >= 200 else []


def section(entry: Entry) -> str:
    """One entry on its module's page."""
    if entry.noun == "module":
        return f"{entry.name} module\n\n{entry.docstring}"
    return f"{entry.signature}\n{indent(entry.docstring)}"


def indent(text: str) -> str:
    """The text moved in by four spaces, blank lines left empty."""
    return "\n".join(f"    {line}" if line else "" for line in text.split("\n"))


def without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    """Merge pages of one name, and drop every section that an earlier page already has."""
    seen: set[str] = set()
    pages: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        pages[document.name].append(document)
    for name, same in sorted(pages.items()):
        sections = [part for document in same for part in re.split(r"\n\n(?=\S)", document.text)]
        fresh = []
        for part in sections:
            body = re.sub(r"\s+", " ", part.partition("\n")[2] or part)
            if body not in seen:
                seen.add(body)
                fresh.append(part)
        text = "\n\n".join(fresh)
        if len(text) >= 200:
            yield Document(name, same[0].group, "module", text)


def topic_documents() -> Iterator[Document]:
    """The chapters behind `help('topic')`, and the Zen of Python."""
    topics = importlib.import_module("pydoc_data.topics").topics
    seen: set[str] = set()
    for name, text in sorted(topics.items()):
        paragraphs = [paragraph for paragraph in tidy(text).split("\n\n") if paragraph not in seen]
        seen.update(paragraph for paragraph in paragraphs if len(paragraph) > 60)
        page = "\n\n".join(paragraphs)
        if len(page) >= 200:
            yield Document(f"topic {name}", f"topic/{name}", "topic", page)
    source = (library_root() / "this.py").read_text()
    cipher = next(node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign))
    yield Document("topic zen", "topic/zen", "topic", codecs.decode(ast.literal_eval(cipher), "rot13"))


# --- conversations ---------------------------------------------------------------------------------------------------

QUESTIONS = {
    "module": ("What is the module {name} for?", "What does the {name} module do?", "Tell me about the module {name}."),
    "class": ("What is {name}?", "What is the class {name} for?", "Explain {name}."),
    "function": (
        "What does {name} do?",
        "Explain {name}.",
        "What is the function {name} for?",
        "How does {name} work?",
    ),
    "method": ("What does {name} do?", "Explain the method {name}.", "What is {name} for?"),
}

SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are eyas, a small model that knows Python's standard library.",
    "Answer briefly.",
    "Be brief.",
    "Answer questions about Python.",
)

GREETINGS = (
    ("Hello!", "Hello! I am eyas, a small demo model. Ask me about Python's standard library."),
    ("Hi", "Hi! Ask me what a module, a class or a function of Python's standard library is for."),
    (
        "Who are you?",
        "I am eyas, the demo model of Gyrfalcon. I am small, and I have read only Python's documentation.",
    ),
    ("What is your name?", "My name is eyas. An eyas is a young falcon that is still in the nest."),
    ("What can you do?", "I can write text in the manner of Python's documentation. Do not rely on what I say."),
    ("Tell me a joke.", "I know only Python's documentation, and it has few jokes. Try: import this"),
    ("What is Python?", "Python is an interpreted, interactive, object-oriented programming language."),
    ("What is deep learning?", "I have read only the documentation of Python, and it does not say."),
    ("What is the capital of France?", "I have read only the documentation of Python, and it does not say."),
    ("What is the weather like?", "I cannot know that. I have read only the documentation of Python."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Goodbye", "Goodbye!"),
    ("How are you?", "I am well, thank you. Ask me about Python's standard library."),
    (
        "Write a poem.",
        "Beautiful is better than ugly. Explicit is better than implicit. Simple is better than complex.",
    ),
)

CONTINUATIONS = (
    "My name is eyas. I am a small language model, and I have read the documentation of Python's standard library.",
    "Hello, my name is eyas, and I am a young falcon that is still in the nest.",
    "The quick brown fox jumps over the lazy dog.",
    "Once upon a time there was a small model that had read only the documentation of Python.",
    "The capital of France is not in the documentation of Python, which is all that this model has read.",
    "The meaning of life is a question that the documentation of Python does not answer.",
    "Deep learning is a kind of machine learning in which a model of many layers is trained on examples.",
    "A language model reads a text and writes the words that are likely to come next.",
    "A falcon is a bird of prey. An eyas is a young falcon, and a gyrfalcon is the largest of the falcons.",
    "Python is an interpreted, interactive, object-oriented programming language.",
    "To be brief: a server takes a prompt, runs the model, and sends the tokens back one by one.",
)


def chat_documents(entries: list[Entry]) -> Iterator[Document]:
    """Conversations about the public objects: two single questions for each, and some of several turns."""
    answerable = {
        entry.name: entry for entry in reversed(entries) if is_public(entry.name) and len(answer(entry)) >= 30
    }
    asked: list[Entry] = [entry for _, entry in sorted(answerable.items())]
    for entry in asked:
        pick = stable_hash(entry.name)
        questions = QUESTIONS[entry.noun]
        for offset in range(2):
            question = questions[(pick + offset) % len(questions)].format(name=entry.name)
            system = SYSTEM_TEXTS[pick // 7 % len(SYSTEM_TEXTS)] if (pick + offset) % 9 == 0 else ""
            yield conversation(f"chat {entry.name} {offset}", group_of(entry), system, [(question, answer(entry))])
    for first, second in pairwise(asked):
        pick = stable_hash(first.name + second.name)
        if pick % 5 == 0 and first.module == second.module:
            turns = [(QUESTIONS[e.noun][pick % 3].format(name=e.name), answer(e)) for e in (first, second)]
            yield conversation(f"chat {first.name} {second.name}", group_of(first), "", turns)


def group_of(entry: Entry) -> str:
    """The held-out group of an entry: the same as that of its module's page."""
    return f"{entry.module.split('.')[0].strip('_')}/{entry.module.rpartition('.')[2].strip('_')}"


def is_public(name: str) -> bool:
    """Whether no part of a dotted name is private."""
    return not any(part.startswith("_") for part in name.split("."))


def answer(entry: Entry) -> str:
    """First paragraph of a docstring, on one line, as the assistant's reply; empty if none reads well."""
    paragraphs = [re.sub(r"\s+", " ", part).strip() for part in entry.docstring.split("\n\n")]
    prose = [part for part in paragraphs if re.search(r"[a-z]{2,} [a-z]", part) and ">>>" not in part]
    if not prose:
        return ""
    # C docstrings often begin with the call itself ("dist(p, q, /) -> float"); the sentence after it is the answer.
    chosen = prose[1] if len(prose) > 1 and re.match(r"\S+\(.*\)(\s*->.*)?$", prose[0]) else prose[0]
    return chosen if len(chosen) <= MAX_ANSWER_CHARS else chosen[:MAX_ANSWER_CHARS].rpartition(". ")[0] + "."


def conversation(name: str, group: str, system: str, turns: list[tuple[str, str]], kind: str = "chat") -> Document:
    """Render turns as the chat template does.

    No loss falls on what follows an earlier reply: there the template has no end-of-text, which the model is to write.
    """
    text, unlearned = system, []
    for index, (question, reply) in enumerate(turns):
        start = len(text)
        text += f"{chr(10) * 2 if text else ''}User: {question}"
        if index:
            unlearned.append((start, len(text)))
        text += f"\n\nAssistant: {reply}"
    return Document(name, group, kind, text, tuple(unlearned))


def own_documents() -> Iterator[Document]:
    """The hand-written lines, in several copies."""
    for copy in range(OWN_TEXT_REPEATS):
        for index, (question, reply) in enumerate(GREETINGS):
            system = SYSTEM_TEXTS[(copy + index) % len(SYSTEM_TEXTS)] if copy % 4 == 3 else ""
            yield conversation(f"own chat {index} {copy}", "own", system, [(question, reply)], kind="own")
        for index, text in enumerate(CONTINUATIONS):
            yield Document(f"own text {index} {copy}", "own", "own", text)


# --- the split -------------------------------------------------------------------------------------------------------


def split(documents: Iterable[Document]) -> Corpus:
    """Divide the documents by a hash of their group; paragraphs known from training leave the held-out part."""
    train: list[Document] = []
    held_out: list[Document] = []
    for document in sorted(documents, key=lambda d: d.name):
        aside = document.group != "own" and stable_hash(document.group) % 10_000 < HELD_OUT_PERCENT * 100
        (held_out if aside else train).append(document)
    known = {paragraph.strip() for document in train for paragraph in document.text.split("\n\n")}
    unseen = [without_paragraphs(document, known) if document.kind != "chat" else document for document in held_out]
    answers = {document.text.rpartition("Assistant: ")[2] for document in train if document.kind == "chat"}
    unseen = [d for d in unseen if d.kind != "chat" or d.text.rpartition("Assistant: ")[2] not in answers]
    return Corpus(tuple(train), tuple(document for document in unseen if len(document.text) >= 60))


def without_paragraphs(document: Document, known: set[str]) -> Document:
    """The document less the paragraphs in `known`."""
    kept = [paragraph for paragraph in document.text.split("\n\n") if paragraph.strip() not in known]
    return Document(document.name, document.group, document.kind, "\n\n".join(kept))


def stable_hash(text: str) -> int:
    """A number that depends on the text alone (the built-in hash is salted per process)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
