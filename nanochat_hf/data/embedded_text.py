"""English and code that every Python installation carries: the corpus of the tiny recipe, with nothing to download.

Read at run time, never copied: the language reference (`pydoc_data.topics`), the docstrings of the standard library as
reference pages (`json.dumps(obj, ...)`, a blank line, the docstring) and its source with those docstrings taken out, so
that no text stands twice. Documents are short (a topic's section, a function, a few methods), because a row of the
tiny recipe is short. Test packages are left out, and so are top-level statements as long as a generated table.

The order depends on nothing but the Python version: files are sorted, modules shuffled by a fixed seed, and the last 5%
of the documents are validation, so that a module's page and its source fall on the same side of the split. Training
documents are then shuffled once more among themselves. Another Python version has another text.

    python -c "from nanochat_hf.data.embedded_text import embedded_documents as d; print(*d('train')[:9], sep='\\n\\n')"
"""

import ast
import functools
import gc
import importlib
import inspect
import random
import re
import sysconfig
import tokenize
import types
from collections.abc import Iterator
from pathlib import Path

# Tests, other people's packages (site-packages, bundled wheels), generated tables, and the topics, read as text.
_SKIPPED_FOLDERS = frozenset(
    "test tests idle_test site-packages dist-packages lib-dynload _bundled encodings pydoc_data __pycache__".split()
)
# Modules written in C have no source here, only docstrings. Not `sys`: programs replace its hooks.
_C_MODULES = (
    "_codecs _collections _csv _datetime _functools _io _operator _pickle _random _re _sre _struct _thread array "
    "atexit binascii builtins cmath errno gc itertools marshal math time unicodedata zlib"
).split()
_MAX_CHARS = 2_000  # a longer text is cut at blank lines
_MIN_CHARS = 300  # neighbours are joined up to here
_TABLE_CHARS = 3_000  # a longer top-level statement that defines nothing is a generated table
_SHUFFLE_SEED = 1729


def embedded_documents(split: str) -> tuple[str, ...]:
    """The documents of `split`, "train" or "validation", always in the same order on one Python version.

    Raises:
        ValueError: this Python comes without the source of its standard library.
    """
    train, validation = _read_all()
    return {"train": train, "validation": validation}[split]


@functools.cache
def _read_all() -> tuple[tuple[str, ...], tuple[str, ...]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = {**dict(_topics()), **dict(_c_modules()), **dict(_source_modules(root))}
    names = sorted(modules)
    random.Random(_SHUFFLE_SEED).shuffle(names)
    # A dict keeps the first of equal documents: boilerplate is repeated from module to module.
    documents = list(dict.fromkeys(document for name in names for document in modules[name]))
    if sum(map(len, documents)) < 2**20:
        raise ValueError(
            f"the embedded corpus needs the source of the standard library, and {root} holds next to none. "
            f"Install it (Debian: libpython3-stdlib), or set `dataset` to a parquet folder, a .jsonl file or a Hub id."
        )
    num_validation = len(documents) // 20
    train, validation = documents[:-num_validation], documents[-num_validation:]
    random.Random(_SHUFFLE_SEED).shuffle(train)
    return tuple(train), tuple(validation)


def _topics() -> Iterator[tuple[str, list[str]]]:
    """The sections of the language reference that `help("topic")` prints."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return
    for name, text in topics.items():
        yield f"topic {name}", _cut([text])


def _c_modules() -> Iterator[tuple[str, list[str]]]:
    """Reference pages of the modules written in C, one entry a type and one for all functions of a module."""
    for module_name in _C_MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        public = [(n, v) for n, v in sorted(vars(module).items()) if not n.startswith("_")]
        functions = [(n, v) for n, v in public if isinstance(v, types.BuiltinFunctionType)]
        prefix = "" if module_name == "builtins" else module_name.lstrip("_") + "."
        yield f"C {module_name}", _cut([_entry(prefix + n, v) for n, v in functions])
        for name, value in public:
            if isinstance(value, type) and value.__module__ in (module_name, module_name.lstrip("_")):
                methods = [(n, v) for n, v in sorted(vars(value).items()) if not n.startswith("_")]
                entries = [_entry(f"class {prefix}{name}", value)]
                entries += [_entry(f"{prefix}{name}.{n}", v) for n, v in methods]
                yield f"C {module_name}.{name}", _cut(entries)


def _entry(name: str, value: object) -> str:
    documentation = value.__doc__
    if not isinstance(documentation, str) or not documentation.strip():
        return ""
    # "($self, iterable, /)" -> "(iterable, /)". inspect.signature would show addresses of default objects.
    signature = re.sub(r"\(\$\w+(?:, )?(?:/(?:, )?)?", "(", getattr(value, "__text_signature__", None) or "")
    return f"{name}{signature}\n\n{inspect.cleandoc(documentation)}"


def _source_modules(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Pages and source of every module under the standard library's folder."""
    was_collecting = gc.isenabled()
    gc.disable()  # syntax trees are many small objects and no garbage: collecting doubles the time
    try:
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            if _SKIPPED_FOLDERS.isdisjoint(relative.parts) and not relative.name.startswith("_sysconfigdata"):
                name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
                try:
                    with tokenize.open(path) as file:  # honours the file's encoding line
                        source = file.read()
                    yield name, _module_documents(name, source)
                except (SyntaxError, ValueError):  # templates and files kept broken on purpose
                    continue
    finally:
        if was_collecting:
            gc.enable()


def _module_documents(name: str, source: str) -> list[str]:
    tree = ast.parse(source)
    lines: list[str | None] = source.split("\n")
    page = [f"{name}\n\n{docstring}" if (docstring := _take_docstring(tree, lines)) else ""]
    blocks, plain_start = [], 0
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            page.append("\n\n".join(_take_page(node, name, lines)))
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            blocks += [_source(lines, plain_start, start), _source(lines, start, node.end_lineno)]
            plain_start = node.end_lineno
        elif node.end_lineno - node.lineno > 20 and len(ast.get_source_segment(source, node) or "") > _TABLE_CHARS:
            blocks.append(_source(lines, plain_start, node.lineno - 1))
            plain_start = node.end_lineno
    blocks.append(_source(lines, plain_start, len(lines)))
    return _cut(page) + [f"# {name}\n{piece}" for piece in _cut(blocks)]


def _take_page(node: ast.AST, prefix: str, lines: list) -> list[str]:
    """The entries of a definition and of what it defines; their docstrings are taken out of `lines`."""
    is_class = isinstance(node, ast.ClassDef)
    name = f"{prefix}.{node.name}"
    entries = []
    if docstring := _take_docstring(node, lines):
        head = f"class {name}" if is_class else f"{name}({ast.unparse(node.args)})"
        entries.append(f"{head}\n\n{docstring}")
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            entries += _take_page(child, name if is_class else node.name, lines)
    return entries


def _take_docstring(node: ast.AST, lines: list) -> str:
    docstring = ast.get_docstring(node)
    if not docstring or not docstring.strip():
        return ""
    literal = node.body[0]
    if not lines[literal.lineno - 1][: literal.col_offset].strip():  # not `def f(): "docstring"`
        lines[literal.lineno - 1 : literal.end_lineno] = [None] * (literal.end_lineno - literal.lineno + 1)
        if len(node.body) == 1 and literal.col_offset:
            lines[literal.lineno - 1] = " " * literal.col_offset + "pass"
    return docstring


def _source(lines: list, start: int, stop: int) -> str:
    return "\n".join(line for line in lines[start:stop] if line is not None)


def _cut(blocks: list[str]) -> list[str]:
    """Join short neighbours up to `_MIN_CHARS` and cut long blocks at blank lines into at most `_MAX_CHARS` or so."""
    pieces, piece = [], ""
    for block in blocks:
        block = block.strip("\n").rstrip()
        paragraphs = [block] if len(block) <= _MAX_CHARS else re.split(r"\n(?:[ \t]*\n)+", block)
        for position, paragraph in enumerate(p for p in paragraphs if p.strip()):
            enough = _MIN_CHARS if position == 0 else _MAX_CHARS - len(paragraph)
            if piece and len(piece) > enough:
                pieces.append(piece)
                piece = ""
            piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    return [p for p in [*pieces, piece] if p]
