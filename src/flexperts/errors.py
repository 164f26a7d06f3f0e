"""The exception tree.

    FlexpertsError (ValueError)
    ├── ConfigError      a recipe, an override, a command-line value
    ├── DataError        a data file, its columns, its rows
    ├── ModelError       a base model that cannot be loaded or grafted
    ├── GraftError       selection, attachment or a personal state that does not fit
    ├── SplitError       a parameter that is not exactly one of shared / personal / frozen
    ├── PrivacyError     an attempt to encode something that must stay on the client
    ├── PolicyError      a request that a silo's own policy does not allow
    ├── ArtifactError    a run directory or file that is missing, damaged or of another format
    ├── FederationError  a round that cannot continue
    └── ServingError     a request that the serving engine cannot answer

Every message is one line: value, rule, remedy.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

_LONGEST_SHOWN = 200


def printable(text: str) -> str:
    """Return a text with every character that cannot be printed as an escape: control, format, bidi, line ends."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(text: str, longest: int = 400) -> str:
    """Return any text as one printable line of bounded length."""
    line = printable(" ".join(text[: 4 * longest].split()))
    return line if len(line) <= longest else f"{line[:longest]}..."


def shown(value: Any) -> str:
    """Return a value as text for a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that is most similar to a name, if its similarity (0 to 1) reaches the cutoff."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """Return the question whether the closest known name was meant, or another text if no name is similar."""
    near = closest(name, known, cutoff)
    return f"did you mean {near!r}?" if near else otherwise


class FlexpertsError(ValueError):
    """Base of all errors that a user can cause and fix; its text is one printable line.

    Args:
        value: What was found, with its name.
        rule: The rule it breaks.
        remedy: What the user can do about it.
    """

    def __init__(self, value: str, rule: str, remedy: str) -> None:
        value, rule, remedy = map(printable, (value, rule, remedy))  # they may quote a file or another machine
        super().__init__(f"{value}: {rule}; {remedy}")
        self.value, self.rule, self.remedy = value, rule, remedy

    def __reduce__(self) -> tuple[type[FlexpertsError], tuple[str, str, str]]:
        return type(self), (self.value, self.rule, self.remedy)


class ConfigError(FlexpertsError):
    """A recipe, an override or a command-line value breaks a rule."""


@contextmanager
def optional(extra: str, purpose: str) -> Iterator[None]:
    """Turn the import of a module that is not installed into an error that names the extra which brings it.

    Raises:
        ConfigError: An import inside found no module.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise _missing(f"{error.name}", extra, purpose) from error


def require(module: str, extra: str, purpose: str) -> None:
    """Refuse what needs a module that is not installed, without importing it.

    Raises:
        ConfigError: There is no such module; the error names the extra which brings it.
    """
    if find_spec(module) is None:
        raise _missing(module, extra, purpose)


def _missing(module: str, extra: str, purpose: str) -> ConfigError:
    return ConfigError(
        f"the module {module} is missing", f"{purpose} needs it", f"run pip install 'flexperts[{extra}]'"
    )


class DataError(FlexpertsError):
    """A data file, its columns or its rows break a rule."""


class ModelError(FlexpertsError):
    """A base model cannot be loaded, or has nothing to graft."""


class GraftError(FlexpertsError):
    """Selection, attachment or a personal state does not fit the model."""


class SplitError(FlexpertsError):
    """A parameter is not exactly one of shared, personal, frozen."""


class PrivacyError(FlexpertsError):
    """Something that must stay on the client was about to be encoded."""


class PolicyError(FlexpertsError):
    """A silo's own policy does not allow a request; a server is told the rule alone."""


class ArtifactError(FlexpertsError):
    """A run directory or file is missing, damaged or of another format."""


class FederationError(FlexpertsError):
    """A round cannot continue."""


def incompatible(value: str, rule: str) -> FederationError:
    """Return the error for a message that no client or server of this version and recipe sends."""
    return FederationError(value, rule, "use one flexperts version and one recipe on the server and every silo")


def logged(error: Exception) -> str:
    """Return an error as text for a log, escaped: a user's error as one line, any other with its trace."""
    if isinstance(error, FlexpertsError):
        return f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join([type(error).__name__, *map(printable, trace)])


class ServingError(FlexpertsError):
    """The serving engine cannot answer."""
