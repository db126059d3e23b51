"""What `ckptctl submit --python module:function` runs, in the author's own interpreter.

    python .../ckptd/sdk/run.py ingest:main --input '{"path": "data.csv"}'
    python .../ckptd/sdk/run.py --describe ingest:main      one line of JSON: name, version, retries

Run by its path, so that an interpreter without ckptd can run it: ckptd, and nothing else of where
it is installed, is made importable from here, also where the interpreter has another version: what
reads a task's files and what started it are one. The working directory comes first on the path,
as it does for `python -m`. Exit codes: `outcomes.exit_code_of`.
Read next: `drive.py`.
"""

from __future__ import annotations  # so that an interpreter that is too old can say so

import json
import os
import sys
import traceback
from typing import Any, Final

_PYTHON_MIN: Final = (3, 11)
_USAGE: Final = 64
_BAD_DATA: Final = 65


def make_importable() -> None:
    """Let `import ckptd` be this very package, whatever the interpreter has installed."""
    import importlib.util  # noqa: PLC0415  (only this way of starting needs it)

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    init = os.path.join(root, "__init__.py")
    spec = importlib.util.spec_from_file_location("ckptd", init, submodule_search_locations=[root])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ckptd"] = module
    spec.loader.exec_module(module)


def in_its_tree(path: str) -> str:
    """Return a path that leads through the link of an installation as one below the tree itself.

        .../lib/ckptd/venv/bin/ckptd-python -> .../lib/ckptd/venv-0.1.0-5f3a9c01/bin/ckptd-python

    A waiting task names the link, which an upgrade switches. One that runs must keep to the tree
    that it began with, and name it, so that `make install` leaves that tree alone.
    """
    above, _, below = path.rpartition("/venv/")
    try:
        tree = os.readlink(f"{above}/venv")
    except OSError:
        return path
    return f"{above}/{tree}/{below}" if tree.startswith("venv-") else path


def _keep_to_this_tree() -> None:
    here = os.path.abspath(__file__)
    wanted = in_its_tree(here)
    if wanted != here:
        words = [wanted if word == sys.argv[0] else word for word in sys.orig_argv[1:]]
        os.execv(sys.executable, [sys.executable, *words])  # noqa: S606 (no shell)


class NoSuchFunction(Exception):
    """`module:function` names nothing that can be run."""


class BadInput(Exception):
    """The input is no JSON object; trying again would not make it one."""


def resolve(target: str) -> Any:
    """Import `module:function` (or `path/to/file.py:function`) and return it as a task.

    Raises:
        NoSuchFunction: with what is wrong, and what there is instead.
    """
    from ckptd.sdk.declare import as_task  # noqa: PLC0415  (after make_importable)

    name, colon, attribute = target.partition(":")
    if not (name and colon and attribute):
        raise NoSuchFunction(f"{target!r} is not of the form module:function")
    module = _imported(name)
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        known = [key for key, one in vars(module).items() if callable(one) and key[0] != "_"]
        own = module.__name__
        known = [key for key in known if _home_of(vars(module)[key]) in {own, ""}]
        raise NoSuchFunction(f"{name} has no {attribute!r}; it has: {', '.join(known) or 'none'}")
    try:
        return as_task(found)
    except TypeError as error:
        raise NoSuchFunction(f"{target}: {error}") from error


def _home_of(found: Any) -> str:
    """Return the module that a function or task is from."""
    function = getattr(found, "__wrapped__", found)
    return getattr(function, "__module__", "") or ""


def _imported(name: str) -> Any:
    import importlib  # noqa: PLC0415

    if name.endswith(".py"):
        if not os.path.isfile(name):
            where = "" if os.path.isabs(name) else f" in {os.getcwd()}"
            raise NoSuchFunction(f"there is no file {name}{where}")
        folder, file = os.path.split(os.path.abspath(name))
        sys.path.insert(0, folder)
        name = file.removesuffix(".py")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise NoSuchFunction(
                f"no module {error.name!r} for {sys.executable} in {os.getcwd()}"
            ) from error
        raise NoSuchFunction(f"{name} imports {error.name!r}, which is not installed") from error
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}:{last.lineno}"
        raise NoSuchFunction(
            f"importing {name} failed at {where}: {type(error).__name__}: {error}"
        ) from error


def check_input(task: Any, given: Any) -> str:
    """Return what is wrong with the input for this function, or an empty text."""
    if not isinstance(given, dict):
        return f"the input is a {type(given).__name__}, expected a JSON object"
    import inspect  # noqa: PLC0415  (slow to import; only who describes needs it)

    try:
        inspect.signature(task.function).bind(None, **given)
    except TypeError as error:
        return f"the input does not fit {task.name}{inspect.signature(task.function)}: {error}"
    except ValueError:
        return ""  # a function without a signature takes what it takes
    return ""


def describe(target: str, text: str | None) -> dict[str, Any]:
    """Return what a submit needs to know of a function; `error` says why it cannot run."""
    try:
        task = resolve(target)
    except NoSuchFunction as error:
        return {"error": str(error)}
    told = {
        "name": task.name,
        "version": task.version,
        "retries": task.retry.retries,
        "backoff_s": task.retry.backoff,
        "backoff_max_s": task.retry.backoff_max,
        "is_async": task.is_async,
        "error": None,
    }
    if text is not None:
        try:
            told["error"] = check_input(task, json.loads(text)) or None
        except ValueError as error:
            told["error"] = f"the input is not JSON: {error}"
    return told


def _given(text: str) -> dict[str, Any]:
    try:
        given = json.loads(text)
    except ValueError as error:
        raise BadInput(f"the input is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise BadInput(f"the input is a {type(given).__name__}, expected a JSON object")
    return given


def run(target: str, text: str) -> int:
    """Run one attempt; return the exit code."""
    from ckptd.sdk.drive import drive, opened  # noqa: PLC0415
    from ckptd.sdk.outcomes import StopRequested, exit_code_of  # noqa: PLC0415
    from ckptd.sdk.surroundings import NotATask, Surroundings  # noqa: PLC0415
    from ckptd.sdk.waits import PARK_AFTER_S  # noqa: PLC0415
    from ckptd.sdk.work import since_process_start_s  # noqa: PLC0415

    try:
        around = Surroundings()
        task = resolve(target)
        work = opened(around, task, _given(text), None)
    except NotATask as error:
        return _say(f"{error}; submit it, or use run_local in Python", _USAGE)
    except (NoSuchFunction, BadInput) as error:
        return _say(str(error), _BAD_DATA)
    except Exception as error:  # noqa: BLE001 - told with its exit code, once, here
        return _say(str(error), exit_code_of(error))
    try:
        work.attention.listen()
        work.pace.resume_s = since_process_start_s()
        if work.known.result:
            _say("it has its result already; `ckptctl retry --fresh` starts over", 0)
        drive(work, park_after_s=PARK_AFTER_S)
    except StopRequested as stop:
        return _say(str(stop), exit_code_of(stop))
    except Exception as error:  # noqa: BLE001 - told with its exit code, once, here
        traceback.print_exc()
        return exit_code_of(error)
    finally:
        work.close()
    return 0


def _say(text: str, code: int) -> int:
    sys.stderr.write(f"ckptd: {text}\n")
    return code


def main(argv: list[str]) -> int:
    """Run `TARGET [--input JSON]` or `--describe TARGET [--input JSON]`."""
    if sys.path and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # its names would hide others
    sys.path.insert(0, os.getcwd())
    if sys.version_info < _PYTHON_MIN:
        found = ".".join(map(str, sys.version_info[:3]))
        error = f"{sys.executable} is Python {found}; a task needs 3.11 or newer"
        if argv[:1] == ["--describe"]:
            sys.stdout.write(json.dumps({"error": error}) + "\n")
            return 0
        return _say(error, _BAD_DATA)
    _keep_to_this_tree()
    make_importable()
    text = None
    if argv[-2:-1] == ["--input"]:
        text, argv = argv[-1], argv[:-2]
    if len(argv) == 2 and argv[0] == "--describe":
        sys.stdout.write(json.dumps(describe(argv[1], text)) + "\n")
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        return _say("usage: run.py [--describe] MODULE:FUNCTION [--input JSON]", _USAGE)
    return run(argv[0], "{}" if text is None else text)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    raise SystemExit(code)
