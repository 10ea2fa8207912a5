"""Reward functions: a Python function in a file of the user's, named as FILE.py:FUNCTION.

    def function(prompt: str, responses: list[str]) -> list[float]      # higher is better

The function may also take `finish_reasons: list[str]` ("stop", "length" or "stop_string" per
response). It may carry an attribute `terms`, a function (prompt, response, finish_reason) ->
dict[str, float], whose values are recorded beside the scores.

The file may import the modules and packages in its own folder, as a script may. They belong to this
ranker alone: another ranker's folder may have others of the same names. So do those that the file
loads from elsewhere, unless they are installed as libraries.
"""

import ast
import contextlib
import hashlib
import importlib.machinery
import importlib.util
import inspect
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Set, Sized
from itertools import islice
from pathlib import Path

from model.rankers.ranking import Done, Ranking, Request
from sharding.errors import LARGEST, UserError

ROOT = Path(__file__).parents[2]
LIBRARIES = [Path(os.__file__).parent, *(ROOT / n for n in "model sharding stages scripts".split())]


class FunctionRanker:
    """A reward function from the user's file. `identity` is the sha256 of the function's name, the
    file, the modules in its folder that it imports anywhere, and all modules of the user's that it
    loads, however and from wherever, while it is imported itself."""

    on_mesh = False

    def __init__(self, path: str, name: str):
        self.name, self._file = f"{path}:{name}", Path(path).resolve()
        if not self._file.is_file():
            raise UserError(f"ranker {self.name}: {path} does not exist")
        self._beside = _Beside(self._file.parent)
        text, imported = self._file.read_bytes(), imported_files(self._file)
        module_name = f"ranker_{hashlib.sha256(os.fsencode(self._file) + text).hexdigest()[:16]}"
        spec = importlib.util.spec_from_file_location(module_name, self._file)
        module = importlib.util.module_from_spec(spec)
        # A dataclass with postponed annotations looks its module up in sys.modules.
        sys.modules[module_name] = module
        with self._user_code(f"ranker {self.name}: {path} does not import (", ")"):
            spec.loader.exec_module(module)
        self._known = {self._file, *imported, *self._beside.ran}
        parts = []
        for file in self._known - {self._file}:
            within = file.is_relative_to(self._file.parent)
            short = file.relative_to(self._file.parent).as_posix() if within else file.name
            parts.append((short.encode(), hashlib.sha256(file.read_bytes()).digest()))
        parts = [text, name.encode(), *(part for pair in sorted(parts) for part in pair)]
        self.identity, self._opened = hashlib.sha256(b"\n".join(parts)).hexdigest(), time.time()
        self.function: Callable | None = getattr(module, name, None)
        if not callable(self.function) or inspect.isclass(self.function):
            raise UserError(f"ranker {self.name}: {path} defines no function {name!r}")
        self._wants_reasons = self._check_signature()
        self._terms = getattr(self.function, "terms", None)

    def _check_signature(self) -> bool:
        """Whether the function takes finish_reasons. Raises UserError where it cannot be called."""
        if inspect.iscoroutinefunction(self.function):
            raise UserError(f"ranker {self.name} is async: give a plain function")
        try:
            signature = inspect.signature(self.function)
        except ValueError:  # a function in C that does not say
            return False
        reasons = {"finish_reasons": []} if "finish_reasons" in signature.parameters else {}
        try:
            signature.bind("", [], **reasons)
        except TypeError as error:
            raise UserError(
                f"ranker {self.name}{signature} cannot be called with (prompt, responses): {error}"
            ) from None
        return bool(reasons)

    def rank_all(
        self, requests: Iterable[Request], done: Done
    ) -> Iterator[tuple[Request, Ranking]]:
        for request in requests:
            try:
                ranking = self.rank(request.prompt, request.responses, request.finish_reasons)
            except UserError as error:
                raise UserError(
                    f"{request.where}, prompt_id {request.prompt_id!r}: {error}; "
                    "mend the function, then run again (the prompts before it are kept)"
                ) from error
            yield request, ranking
            done(1)

    def rank(self, prompt: str, responses: list[str], finish_reasons: list[str]) -> Ranking:
        """Raises UserError if the function raises, or does not return one finite number per
        response."""
        n, terms = len(responses), None
        with self._user_code(f"{self.name} raised "):
            extra = {"finish_reasons": list(finish_reasons)} if self._wants_reasons else {}
            returned = self.function(prompt, list(responses), **extra)
            scores = _listed(returned, n)
            if self._terms:
                terms = [self._terms(prompt, *pair) for pair in zip(responses, finish_reasons)]
        self._refuse_late()
        try:
            scores = [_number(score) for score in scores]
        except (TypeError, ValueError, OverflowError):
            problem = f"{self.name} returned {_short(returned)}, not a list of numbers"
            raise UserError(problem) from None
        if len(scores) != n:
            raise UserError(f"{self.name} returned {len(scores)} scores for {n} responses")
        if not all(abs(score) <= LARGEST for score in scores):
            raise UserError(
                f"{self.name} returned a score that is not finite, or beyond {LARGEST:g}: {scores}"
            )
        try:
            named = terms and [{str(k): _number(x) for k, x in term.items()} for term in terms]
            if named and not all(math.isfinite(x) for term in named for x in term.values()):
                raise ValueError
        except (TypeError, ValueError, OverflowError, AttributeError):
            problem = f"{self.name}: its terms are {_short(terms)}, not finite numbers by name"
            raise UserError(problem) from None
        return Ranking(scores, terms=named)

    def _refuse_late(self) -> None:
        """Raise UserError for a module that existed when the file was opened, but is loaded only by
        a call of the function, so that a change in it would not be noticed. Files outside the
        folders of modules are passed over: libraries keep compiled code there."""
        for file in sorted(self._beside.ran - self._known):
            folders = [self._file.parent, *(Path(folder).resolve() for folder in self._beside.path)]
            found = any(file.is_relative_to(folder) for folder in folders)
            if found and file.stat().st_mtime < self._opened:
                raise UserError(
                    f"{self.name} loads {file} when it is called, too late for it to be a part of "
                    f"the ranker's identity: load it at the top of {self._file.name}"
                )
            self._known.add(file)

    @contextlib.contextmanager
    def _user_code(self, problem: str, end: str = "") -> Iterator[None]:
        """Run code of the user's, which may import the modules beside its file. Whatever it raises
        becomes a UserError, SystemExit too, which would end the stage without a word."""
        try:
            with self._beside, contextlib.chdir(os.getcwd()):  # the folder is restored
                yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == str(self._file)]
            at = f" in line {lines[-1]} of {self._file.name}" if lines else ""
            raise UserError(f"{problem}{_short(error)}{end}{at}") from error


def _listed(scores, n: int) -> list | None:
    """The scores as a list; None where they are no ordered numbers: "12" would be read as 1 and 2,
    a dict as its keys, a table as its columns' names. n: how many are wanted, since a generator may
    not end."""
    if isinstance(scores, str | bytes | Mapping | Set) or getattr(scores, "ndim", 1) != 1:
        return None
    if not isinstance(scores, Iterable):
        return None
    return list(scores if isinstance(scores, Sized) else islice(scores, n + 1))


def _number(value) -> float:
    """The value as a float. TypeError for a text, which float() would read, and for a list."""
    if isinstance(value, str | bytes) or getattr(value, "ndim", 0):
        raise TypeError
    return float(value)


def _short(value) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}…"


# ------------------------------------------------------------------- the modules beside a file


_watching: list[set[str]] = []  # the last set collects the paths of modules that are run


def _watch(event: str, args: tuple) -> None:
    """Note each module's text that Python opens or runs: `import` is only one of many ways to load
    a module."""
    if _watching and event in ("exec", "open"):
        path = args[0].co_filename if event == "exec" else args[0]
        if isinstance(path, str) and path.endswith(".py"):
            _watching[-1].add(os.path.abspath(path))


sys.addaudithook(_watch)


class _Beside:
    """The modules and packages of a reward file. Those in its folder can be imported by their own
    names while `with` lasts, before all others but Python's own. (On sys.path, a random.py in the
    folder would be imported by Python's own modules too, and a helper.py only once for all
    rankers.) Modules that it finds elsewhere, and what it puts on sys.path, are its own as well."""

    def __init__(self, folder: Path):
        self._folder, self._loaded, self._hidden = str(folder), {}, {}
        # Its sys.path, and the files of its modules that were run.
        self.path, self.ran = None, set()
        names = {file.stem for file in folder.glob("*.py")}
        names |= {file.parent.name for file in folder.glob("*/__init__.py")}
        for file in folder.glob("*/*.py"):  # unless an installed library has the folder's name
            name = file.parent.name
            if name.isidentifier() and name not in names and not importlib.util.find_spec(name):
                names.add(name)
        self._names = names - sys.stdlib_module_names

    def find_spec(self, name: str, path=None, target=None):
        """What Python calls on the objects in sys.meta_path to find a module."""
        if path is not None or name not in self._names:
            return None
        return importlib.machinery.PathFinder.find_spec(name, [self._folder])

    def __enter__(self):
        self._hidden, self._others_path = self._take_out(), list(sys.path)
        sys.modules.update(self._loaded)
        sys.path[:] = self.path or sys.path
        sys.meta_path.insert(0, self)
        self._before = set(sys.modules)
        _watching.append(set())

    def __exit__(self, *_):
        self.ran |= {path for path in map(Path, _watching.pop()) if _is_own(path)}
        sys.meta_path.remove(self)
        for name in sys.modules.keys() - self._before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(os.path.abspath(file)) in self.ran:
                self._names.add(name.partition(".")[0])
        self._loaded = self._take_out()
        self.path, sys.path[:] = list(sys.path), self._others_path
        sys.modules.update(self._hidden)

    def _take_out(self) -> dict:
        """Remove the modules of these names from sys.modules, and return them."""
        names = [name for name in sys.modules if name.partition(".")[0] in self._names]
        return {name: sys.modules.pop(name) for name in names}


def _is_own(path: Path) -> bool:
    """Whether a file is the user's: not Python's, not an installed library's or this project's."""
    installed = not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    return not installed and path.is_file() and not any(map(path.is_relative_to, LIBRARIES))


def imported_files(file: Path) -> set[Path]:
    """The modules in the file's folder that it imports anywhere in its text, those that they
    import, and so on."""
    folder, imported, todo = file.parent, set(), {file}
    while todo:
        path = todo.pop()
        try:
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError, RecursionError):  # reported when it is imported
            continue
        named = set()
        for node in nodes:
            if isinstance(node, ast.Import):
                named |= {folder.joinpath(*alias.name.split(".")) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                start = path.parents[node.level - 1] if node.level else folder
                start = start.joinpath(*(node.module or "").split("."))
                named |= {start} | {start / alias.name for alias in node.names}
        named |= {package for module in named for package in module.parents}
        within = [module for module in named if folder in module.parents]
        files = {module.with_name(f"{module.name}.py") for module in within}
        files |= {module / "__init__.py" for module in within}
        new = {module for module in files - imported if module.is_file()}
        imported, todo = imported | new, todo | new
    return imported - {file}
