"""Reward by any Python function with TRL's signature, or by an object that is made once."""

import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from pydantic import Field

from rewards.base import Reward

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")


class Source(NamedTuple):
    """The file of a module, and the SHA-256 of what stood in it when it was imported."""

    file: str
    fingerprint: str


class PythonReward(Reward):
    """Any function with TRL's reward signature, sync or async, or a class of such objects.

    ARGS are keyword arguments: of the class or of a function that makes rewards, which are called
    once, at the start, or of the reward function itself, at each call. A function makes rewards if
    it takes neither `**columns` nor anything that rewards are called with.
    """

    type: Literal["python"] = "python"
    function: str = Field(pattern=r"^\w+(\.\w+)*:\w+$", description="my_module:my_reward")
    args: dict[str, Any] = Field({}, description="Keyword arguments of the class or function")
    _function: Callable[..., Any]
    _with_each_call: Mapping[str, Any] = {}
    _source: Source | None = None

    def _default_name(self) -> str:
        return self.function.split(":")[1]

    def _load(self, device: Any) -> None:
        module, _, name = self.function.partition(":")
        here = str(Path.cwd())  # whose modules hide those of the program's own folder
        sys.path.insert(0, here)
        try:
            source = importlib.import_module(module)
        except SyntaxError as error:
            raise ValueError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
        except ImportError:
            raise
        except (Exception, SystemExit) as error:
            raise ValueError(f"{_place(error)}: {type(error).__name__}: {error}") from error
        finally:
            sys.path.remove(here)  # the first one
        if not callable(found := getattr(source, name, None)):
            file = getattr(source, "__file__", None) or "built in"
            raise ValueError(f"module {module} ({file}) has no function {name}")
        self._source = _source_of(_defining(found) or source)
        makes_rewards = isinstance(found, type) or not _is_reward(found)
        self._check_args(found, complete=makes_rewards)
        if makes_rewards:
            found = found(**self.args)
            if not callable(found):
                raise ValueError(f"{self.function} makes {found!r:.60}, which cannot be called")
        elif self.args:
            self._refuse_hidden(GIVEN, "rewards are called with that name, and its value is lost")
            found, self._with_each_call = partial(found, **self.args), self.args
        if isinstance(found, Reward):
            found.start(device)
        self._function = found

    def _check_args(self, function: Callable[..., Any], complete: bool) -> None:
        """Raises ValueError where the call with ARGS would fail; `complete`: with them alone."""
        declared = isinstance(function, type) and issubclass(function, Reward)  # checks by itself
        if declared:
            return
        signature = _signature(function)
        kinds = {name: each.kind for name, each in signature.parameters.items()}
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names = [name for name, kind in kinds.items() if kind in by_name]
        any_name = inspect.Parameter.VAR_KEYWORD in kinds.values()
        if not any_name and (unknown := self.args.keys() - {*names}):
            taken = ", ".join(name for name in names if name not in GIVEN) or "none"
            wrong = ", ".join(sorted(unknown))
            raise ValueError(f"{self.function} does not take the ARGS {wrong}: it takes {taken}")
        try:
            (signature.bind if complete else signature.bind_partial)(**self.args)
        except TypeError as error:
            raise ValueError(f"{self.function} does not take these ARGS: {error}") from error

    def _refuse_hidden(self, names: Iterable[str], why: str) -> None:
        """Raises ValueError for the first of `names`, whose values hide those of ARGS."""
        if hidden := [name for name in names if name in self.args]:
            raise ValueError(f"ARGS.{hidden[0]}: {why}. Give the argument another name")

    def check_columns(self, columns: Mapping[str, Iterable], source: str) -> None:
        """Raises ValueError if the function cannot be called with these columns by name."""
        self.start()
        if self._with_each_call:
            self._refuse_hidden(
                columns, f"the function gets {source}'s column of that name instead"
            )
        signature, known = _signature(self._function), {*GIVEN, *columns}
        wanted = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and parameter.default is parameter.empty
            and name not in known
        ]
        if wanted:
            raise ValueError(f"it needs the column {', '.join(wanted)}, which {source} has not")
        try:
            signature.bind(**dict.fromkeys(known))
        except TypeError as error:
            raise ValueError(
                f"it cannot be called as rewards are, by name: {error}. Let it take what it needs "
                "(prompts, completions, columns of the prompts) and **columns"
            ) from error

    @property
    def source(self) -> Source | None:
        """Of the module that defines the function or class; None where it has no file."""
        self.start()
        return self._source

    @property
    def after_others(self) -> bool:
        self.start()
        return isinstance(self._function, Reward) and self._function.after_others

    @property
    def is_async(self) -> bool:
        self.start()
        if isinstance(self._function, Reward):
            return self._function.is_async
        call = type(self._function).__call__
        return any(map(inspect.iscoroutinefunction, (self._function, call)))

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Any) -> Any:
        self.start()
        return self._function(prompts=prompts, completions=completions, **columns)

    def interrupt(self) -> None:
        if self._started and isinstance(self._function, Reward):
            self._function.interrupt()

    def close(self) -> None:
        if self._started and isinstance(self._function, Reward):
            self._function.close()


def _place(error: BaseException) -> str:
    """Where the user's module, the first that is neither ours nor Python's, raised `error`."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, importlib.__file__) and "<frozen" not in frame.filename
    ]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f"{own[-1].filename}, line {own[-1].lineno}"


def _defining(found: Any) -> ModuleType | None:
    """The module of a function or class, which another may import it from; None of an object."""
    named = inspect.isroutine(found) or isinstance(found, type)
    name = getattr(found, "__module__", None) if named else None
    return sys.modules.get(name or "")


@cache
def _source_of(module: ModuleType) -> Source | None:
    """Read once: a process goes on with what it has imported, also where the file changes."""
    file = Path(getattr(module, "__file__", None) or "")
    if not file.is_file():  # built in, or in a zip file
        return None
    return Source(str(file), hashlib.sha256(file.read_bytes()).hexdigest())


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """What it takes: anything, where that cannot be known."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return inspect.signature(lambda *args, **kwargs: None)


def _is_reward(function: Callable[..., Any]) -> bool:
    """Whether it takes arguments of any name, or some that rewards are called with."""
    taken = _signature(function).parameters
    return any(name in GIVEN or taken[name].kind == taken[name].VAR_KEYWORD for name in taken)
