"""What is wrong with a .gin file, in one sentence with its place and the nearest name.

Knows the lines of the files and how gin words its errors. Does not import gin.
"""

import difflib
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_IMPORT = re.compile(
    r"(?:from\s+(?P<package>\S+)\s+)?import\s+(?P<name>\S+)(\s+as\s+\w+)?"
)
_INCLUDE = re.compile(r"include\s+['\"](?P<file>.+)['\"]")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a file, or one binding of the command line."""

    text: str
    file: str | None = None
    number: int | None = None

    @property
    def code(self) -> str:
        """The text without its comment."""
        return self.text.split("#")[0].strip()

    @property
    def place(self) -> str:
        if self.file is None:
            return binding_place(self.text)
        return f"{self.file}, line {self.number}"


@dataclass(frozen=True, kw_only=True)
class _Mistake:
    """What is wrong, the wrong name, and the names that it could have been."""

    text: str
    wrong: str = ""
    names: Iterable[str] = ()
    line: Line | None = None


def read_lines(files: Sequence[str], bindings: Sequence[str]) -> list[Line]:
    """All lines in the order in which they are read, those of included files too.

    Raises:
        ValueError: there is no such file.
    """
    lines: list[Line] = []
    for file in files:
        if not os.path.isfile(file):
            raise ValueError(
                f"there is no file {file!r}{_hint(file, _neighbours(file))}"
            )
        _add_file(file, lines)
    return lines + [Line(text=binding) for binding in bindings]


def imports(lines: Sequence[Line]) -> list[str]:
    """The import statements, that of dynamic registration first."""
    found = dict.fromkeys(line.code for line in lines if _IMPORT.fullmatch(line.code))
    return sorted(found, key=lambda statement: "__gin__" not in statement)


def binding_place(binding: str) -> str:
    """How a binding of the command line is named."""
    return f"--gin_bindings {binding!r}"


def check_macros(lines: Sequence[Line]) -> None:
    """Finds a misspelt macro, which gin would set and never use.

    Raises:
        ValueError: no line uses a macro that is set.
    """
    code = "\n".join(line.code for line in lines)
    used = re.findall(r"%(\w+)", code)
    for name, line in _macros(lines):
        if name not in used:
            hint = _hint(name, used)
            raise ValueError(f"nothing uses the macro {name!r}{hint} ({line.place})")


def sentence(error: Exception, lines: Sequence[Line], place: str | None = None) -> str:
    """What the user did wrong; `place` is the file or binding that was being read."""
    message = str(error)
    statement, stated_place = _stated(error)
    mistake = (
        _wrong_name(message, lines)
        or _wrong_import(message)
        or _wrong_macro(message, lines)
        or _wrong_syntax(error, statement)
        or _wrong_value(error, lines)
        or _Mistake(text=message.splitlines()[0] if message else type(error).__name__)
    )
    text = mistake.text + _hint(mistake.wrong, mistake.names)
    if mistake.line:
        place = mistake.line.place
    place = stated_place or place
    return f"{text} ({place})" if place and place not in text else text


def _add_file(file: str, lines: list[Line]) -> None:
    for number, text in enumerate(Path(file).read_text().splitlines(), 1):
        lines.append(Line(text=text, file=file, number=number))
        included = _INCLUDE.match(text.strip())
        read = {line.file for line in lines}
        if (
            included
            and included["file"] not in read
            and Path(included["file"]).is_file()
        ):
            _add_file(included["file"], lines)


def _hint(wrong: str, names: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(wrong, list(names), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _neighbours(file: str) -> list[str]:
    return [str(path) for path in Path(file).parent.glob("*.gin")]


def _stated(error: Exception) -> tuple[str, str | None]:
    """The statement that gin shows, and its place in a file."""
    if isinstance(error, SyntaxError):
        place = f"{error.filename}, line {error.lineno}" if error.filename else None
        return (error.text or "").strip(), place
    shown = re.search(
        r'\n  In (?:file "(.+)",|bindings string) line (\d+)\n(.*)', str(error)
    )
    if shown is None:
        return "", None
    return shown[3].strip(), f"{shown[1]}, line {shown[2]}" if shown[1] else None


def _wrong_name(message: str, lines: Sequence[Line]) -> _Mistake | None:
    if match := re.match(
        r"Configurable '(.+)' doesn't have a parameter named '(\w+)'", message
    ):
        names = _parameters(match[1], lines)
        return _Mistake(
            text=f"{match[1]} has no parameter {match[2]!r}",
            wrong=match[2],
            names=names,
        )
    if match := re.match(
        r".*<(?:module|class) '([\w.]+)'.* has no attribute (\w+)", message
    ):
        names = [name for name in dir(sys.modules.get(match[1])) if name[0] != "_"]
        return _Mistake(
            text=f"{match[1]} has no {match[2]!r}", wrong=match[2], names=names
        )
    if match := re.match(r"'(\w+)' was not provided by an import", message):
        return _Mistake(
            text=f"{match[1]!r} is not imported",
            wrong=match[1],
            names=_symbols(lines),
        )
    return None


def _wrong_import(message: str) -> _Mistake | None:
    match = re.match(r"No module named '([\w.]+)'", message)
    if match is None:
        return None
    package, _, name = match[1].rpartition(".")
    paths = getattr(sys.modules.get(package), "__path__", [os.getcwd()])
    names = [module.name for module in pkgutil.iter_modules(paths)]
    return _Mistake(text=f"there is no module {match[1]!r}", wrong=name, names=names)


def _wrong_macro(message: str, lines: Sequence[Line]) -> _Mistake | None:
    if match := re.match(r"No bindings specified for '(.+)/gin.macro'", message):
        return _Mistake(
            text=f"the macro %{match[1]} is not set",
            wrong=match[1],
            names=[name for name, _ in _macros(lines)],
            line=_last(rf"=.*%{match[1]}\b", lines),
        )
    if match := re.match(r"(\w+)(/macro\.value|\S+) set to `%gin.REQUIRED`", message):
        name = match[1] if match[2] == "/macro.value" else match[1] + match[2]
        line = _last(rf"\b{re.escape(name)}\s*=\s*%gin.REQUIRED", lines)
        name = line.code.split("=")[0].strip() if line else name
        return _Mistake(
            text=f"{name} must be set, for example by --gin_bindings '{name} = ...'",
            line=line,
        )
    return None


def _wrong_syntax(error: Exception, statement: str) -> _Mistake | None:
    message = str(error)
    if included := _INCLUDE.match(statement):
        name = included["file"]
        return _Mistake(
            text=f"there is no file {name!r} to include",
            wrong=name,
            names=_neighbours(name),
        )
    if match := re.search(r"Failed to parse token '(.+)'", message):
        return _Mistake(
            text=f"{match[1]} is no value; text needs quotes, a macro %, a reference @"
        )
    if "EOF in multi-line" in message:
        return _Mistake(text="a bracket or a quote stays open")
    if isinstance(error, SyntaxError):
        return _Mistake(text=f"{error.msg.rstrip('.')}: {statement}".rstrip(": "))
    if "not enough values to unpack" in message:
        return _Mistake(text=f"{statement!r} should be module.name.parameter = value")
    return None


def _wrong_value(error: Exception, lines: Sequence[Line]) -> _Mistake | None:
    """A configuration that refused its values; gin tells whose."""
    message, _, rest = str(error).partition("\n")
    match = re.search(r"In call to configurable '(\w+)'", rest)
    if match is None:
        return None
    name = match[1]
    if lacking := re.search(r"missing \d+ required .*arguments?: (.+)", message):
        return _Mistake(text=f"{name} needs a value for {lacking[1]}")
    bound = rf"\b{name}\.(\w+)\s*="
    words = set(re.findall(r"\w+", message))
    of_name = [(re.search(bound, line.code), line) for line in lines]
    of_name = [(found[1], line) for found, line in of_name if found]
    named = [line for parameter, line in of_name if parameter in words]
    if not isinstance(error, ValueError) and not named:
        values = "; ".join(line.code for _, line in of_name)
        return _Mistake(text=f"{name} does not take its values ({values}): {message}")
    return _Mistake(text=f"{name}: {message}", line=named[-1] if named else None)


def _last(pattern: str, lines: Sequence[Line]) -> Line | None:
    found = [line for line in lines if re.search(pattern, line.code)]
    return found[-1] if found else None


def _macros(lines: Sequence[Line]) -> list[tuple[str, Line]]:
    found = [(re.match(r"(\w+)\s*=", line.text), line) for line in lines]
    return [(match[1], line) for match, line in found if match]


def _symbols(lines: Sequence[Line]) -> dict[str, str]:
    """The names that the files import, and the modules that they stand for."""
    symbols = {}
    for statement in imports(lines):
        match = _IMPORT.fullmatch(statement)
        assert match
        module = ".".join(part for part in (match["package"], match["name"]) if part)
        if match[3] or match["package"]:
            symbols[statement.split()[-1]] = module
        else:
            symbols[module.split(".")[0]] = module.split(".")[0]
    return symbols


def _parameters(selector: str, lines: Sequence[Line]) -> list[str]:
    symbol, *path = selector.split(".")
    found: object = sys.modules.get(_symbols(lines).get(symbol, symbol))
    for name in path:
        found = getattr(found, name, None)
    return list(inspect.signature(found).parameters) if callable(found) else []
