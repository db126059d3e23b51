"""The start script, run by real shells; what it says where it fails; the unit's properties."""

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ckptd.core.port import Start
from ckptd.units import launch
from ckptd.units.launch import Paths
from ckptd.units.papers import Scripts

SHELLS = [
    pytest.param(argv, id=argv[0])
    for argv in (["dash"], ["bash", "--posix"], ["busybox", "sh"])
    if shutil.which(argv[0])
] or [pytest.param(["sh"], id="sh")]
GIVEN = {  # what systemd puts into the unit's own environment
    "HOME": "/root", "INVOCATION_ID": "ab12", "LANG": "C", "LOGNAME": "root", "SHELL": "/bin/sh",
    "SYSTEMD_EXEC_PID": "1", "USER": "root", "PATH": "/usr/bin:/bin",
}  # fmt: skip
PATH = {"PATH": "/usr/bin:/bin"}


def a_start(**fields: Any) -> Start:
    given: dict[str, Any] = {
        "task": 7, "attempt": 2, "argv": ("true",), "env": {}, "cwd": "/", "uid": 1000,
        "gid": 1000, "stdin": "", "umask": 0o022, "memory_bytes": 0, "epoch": 1, "deadline_ns": 0,
        "fresh": False, **fields,
    }  # fmt: skip
    return Start(**given)


class Ran:
    """A script that was run: what came of it, and what it says of itself."""

    def __init__(
        self, shell: list[str], directory: Path, argv: list[str], env: dict[str, str], **fields: Any
    ) -> None:
        start = a_start(argv=tuple(argv), **fields)
        path = directory / "7.2"
        path.write_bytes(launch.script(start, argv, env))
        done = subprocess.run(
            [*shell, path], env=GIVEN, cwd="/", stdin=subprocess.DEVNULL, capture_output=True,
            check=False,
        )  # fmt: skip
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr
        self.complaint = launch.complaint(path.read_bytes()[-64:], start)

    @property
    def words(self) -> list[bytes]:
        return self.out.split(b"\0")[:-1]

    @property
    def env(self) -> dict[bytes, bytes]:
        pairs = (word.partition(b"=") for word in self.words)
        return {name: value for name, _, value in pairs}


@pytest.mark.parametrize("shell", SHELLS)
class TestEveryShell:
    def test_hands_every_word_of_the_command_on_as_it_is(
        self, shell: list[str], tmp_path: Path
    ) -> None:
        words = [
            "", " ", "it's", '"', "a\nb\n", "$HOME ${x} $(id) `id`", "\\", "\\n", "%h %% %s", "*",
            "~", "-n", "#", "!", "a;b&c|d", "\t", "\x01\x7f", "é", os.fsdecode(b"\xff\xfe"), "''",
        ]  # fmt: skip
        ran = Ran(shell, tmp_path, ["printf", "%s\\0", *words], PATH)
        assert ran.words == [os.fsencode(word) for word in words]
        assert (ran.code, ran.complaint) == (0, None)

    def test_gives_the_task_exactly_its_environment(self, shell: list[str], tmp_path: Path) -> None:
        env = {
            **PATH, "A": "it's\n$x `y` \\ %h", "EMPTY": "", "BYTES": os.fsdecode(b"\xff"),
            "BASH_FUNC_x%%": "() { echo hi\n}", "IFS": "x", "PWD": "/elsewhere", "OLDPWD": "o",
            "with space": "1", "1": "digit", "UID": "7", "EUID": "8", "PPID": "9", "RANDOM": "r",
            "SECONDS": "s", "LINENO": "l", "OPTIND": "3", "SHELLOPTS": "o", "BASHOPTS": "o",
            "BASH_ENV": "/nope", "ENV": "/nope", "PS4": "$(id)", "LC_ALL": "no_SUCH", "é": "é",
            "GLOBIGNORE": "*", "EXECIGNORE": "*", "BASH_XTRACEFD": "99", "HISTCMD": "h",
            "POSIXLY_CORRECT": "", "CDPATH": "/tmp", "BASHPID": "3", "HOME": "/h", "USER": "u",
        }  # fmt: skip
        ran = Ran(shell, tmp_path, ["env", "-0"], env)
        got = ran.env
        for shells_own in (b"_", b"SHLVL"):  # bash sets them at every start
            got.pop(shells_own, None)
        wanted = {os.fsencode(name): os.fsencode(value) for name, value in env.items()}
        assert got == {**wanted, b"INVOCATION_ID": b"ab12"}
        assert ran.err == b""

    def test_leaves_nothing_of_systemds_or_its_own_environment(
        self, shell: list[str], tmp_path: Path
    ) -> None:
        got = set(Ran(shell, tmp_path, ["env", "-0"], PATH).env) - {b"_", b"SHLVL"}
        assert got == {b"INVOCATION_ID", b"PATH"}

    def test_goes_where_it_should_with_input_and_umask(
        self, shell: list[str], tmp_path: Path
    ) -> None:
        where, given = tmp_path / "-it's here", tmp_path / "in put"
        where.mkdir()
        given.write_text("input")
        argv = ["sh", "-c", "pwd; umask; cat"]
        ran = Ran(shell, tmp_path, argv, PATH, cwd=str(where), stdin=str(given), umask=0o027)
        assert ran.out.decode() == f"{where}\n0027\ninput"

    def test_takes_a_megabyte_of_words_and_variables(
        self, shell: list[str], tmp_path: Path
    ) -> None:
        words = ["x'" * 30_000] * 9
        env = {**PATH, **{f"V{number}": "y" * 100_000 for number in range(5)}}
        ran = Ran(shell, tmp_path, ["sh", "-c", 'printf %s "$@$V1$V4" | wc -c', "-", *words], env)
        assert int(ran.out) == 9 * 60_000 + 200_000

    @pytest.mark.parametrize(
        ("argv", "fields", "number", "text"),
        [
            (["/no/such"], {}, 2, "cannot execute /no/such"),
            (["no-such"], {}, 2, "cannot execute no-such"),
            (["/etc/passwd"], {}, 13, "cannot execute /etc/passwd"),
            (["/etc"], {}, 13, "cannot execute /etc"),
            (["if"], {}, 2, "cannot execute if"),
            (["true"], {"cwd": "/no/such"}, 2, "cannot enter the working directory /no/such"),
            (["true"], {"cwd": "/etc/passwd"}, 2, "cannot enter the working directory"),
            (["true"], {"stdin": "/no/such"}, 2, "cannot open the input /no/such"),
        ],
    )
    def test_says_which_step_failed(
        self,
        shell: list[str],
        tmp_path: Path,
        argv: list[str],
        fields: dict[str, Any],
        number: int,
        text: str,
    ) -> None:
        ran = Ran(shell, tmp_path, argv, PATH, **fields)
        assert ran.complaint is not None
        assert ran.complaint[0] == number
        assert ran.complaint[1].startswith(text)
        assert ran.code != 0

    def test_says_so_of_a_missing_program_among_odd_variables(
        self, shell: list[str], tmp_path: Path
    ) -> None:
        ran = Ran(shell, tmp_path, ["no-such"], {**PATH, "UID": "7"})
        assert ran.complaint is not None
        assert ran.code

    def test_sets_odd_variables_whatever_the_tasks_path_is(
        self, shell: list[str], tmp_path: Path
    ) -> None:
        ran = Ran(shell, tmp_path, ["/usr/bin/env", "-0"], {"PATH": "/nowhere", "IFS": "x"})
        assert ran.env[b"IFS"] == b"x"

    @pytest.mark.parametrize("code", [1, 2, 126, 127])
    def test_takes_the_commands_own_codes_for_its_own(
        self, shell: list[str], tmp_path: Path, code: int
    ) -> None:
        ran = Ran(shell, tmp_path, ["sh", "-c", f"exit {code}"], PATH)
        assert (ran.code, ran.complaint) == (code, None)

    def test_runs_a_program_that_is_a_script_without_its_first_line(
        self, shell: list[str], tmp_path: Path
    ) -> None:
        program = tmp_path / "program"
        program.write_text("echo $1")
        program.chmod(0o755)
        assert Ran(shell, tmp_path, [str(program), "hi"], PATH).out == b"hi\n"


@pytest.mark.parametrize("words", [["a\0b"], []])
def test_a_command_that_no_system_can_run_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"NUL|nothing is left"):
        launch.script(a_start(), words, {})


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b"# failed 127 exec",
        b"x # failed 127 exec\n",
        b"\n# failed 127 exec\nmore",
        b"\n# failed  exec\n",
        b"\n# failed 1 \n",
        b"\n# failed 99999999999999999999 exec\n",
        b"\n# failed 1 " + b"\xff" * 50,
    ],
)
def test_only_a_whole_last_line_is_believed(tail: bytes) -> None:
    assert launch.complaint(tail, a_start()) is None


def test_a_quoted_line_of_the_command_is_no_complaint(tmp_path: Path) -> None:
    words = ["sh", "-c", "exit 1", "\n# failed 127 exec\n"]
    ran = Ran(["sh"], tmp_path, words, PATH)
    assert (ran.code, ran.complaint) == (1, None)


def test_of_an_earlier_daemons_start_the_step_is_still_told() -> None:
    assert launch.complaint(b"\n# failed 1 cd\n", None) == (
        2, "cannot enter the working directory: No such file or directory",
    )  # fmt: skip


class TestScripts:
    def test_are_their_users_alone(self, tmp_path: Path) -> None:
        scripts = Scripts(f"{tmp_path}/start")
        scripts.write((7, 2), b"text", (-1, -1))
        found = os.stat(scripts.path((7, 2)))
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert stat.S_IMODE(os.stat(f"{tmp_path}/start").st_mode) == 0o711

    def test_replace_what_an_earlier_daemon_left(self, tmp_path: Path) -> None:
        scripts = Scripts(f"{tmp_path}/start")
        for text in (b"longer text", b"text"):
            scripts.write((7, 2), text, (-1, -1))
        assert Path(scripts.path((7, 2))).read_bytes() == b"text"
        scripts.forget((7, 2))
        scripts.forget((7, 2))
        assert os.listdir(f"{tmp_path}/start") == []

    def test_that_are_missing_or_replaced_complain_of_nothing(self, tmp_path: Path) -> None:
        scripts = Scripts(f"{tmp_path}/start")
        assert scripts.complaint((7, 2), None) is None
        (tmp_path / "secret").write_text("\n# failed 1 cd\n")
        os.symlink(tmp_path / "secret", scripts.path((7, 2)))
        assert scripts.complaint((7, 2), None) is None
        os.unlink(scripts.path((7, 2)))
        os.mkfifo(scripts.path((7, 2)))
        assert scripts.complaint((7, 2), None) is None

    def test_that_their_user_made_huge_are_read_at_the_end_only(self, tmp_path: Path) -> None:
        scripts = Scripts(f"{tmp_path}/start")
        scripts.write((7, 2), b"", (-1, -1))
        os.truncate(scripts.path((7, 2)), 1 << 40)
        with open(scripts.path((7, 2)), "ab") as file:
            file.write(b"\n# failed 126 exec\n")
        assert scripts.complaint((7, 2), None) == (13, "cannot execute: Permission denied")


# --- the properties -------------------------------------------------------------------------


def the_properties(start: Start, *, is_system: bool = True) -> dict[str, Any]:
    paths = Paths(
        "/var/lib/ckptd/start/7.2",
        "/run/ckptd/recorder",
        "/r/7.2.ab",
        "/run/ckptd/stopping",
        is_synchronous=True,
    )
    found = launch.properties(start, paths, 5, is_system=is_system)
    return {name: value for name, (_, value) in found}


def test_no_word_or_variable_of_a_client_is_in_the_properties() -> None:
    start = a_start(
        argv=("s3cret",), env={"LD_PRELOAD": "s3cret"}, cwd="/s3cret", stdin="/s3cret",
        name="a\nb$%h'é" + "x" * 300,
    )  # fmt: skip
    found = the_properties(start)
    assert "s3cret" not in repr(found)
    assert found["Description"] == "ckptd task 7, attempt 2: a?b??h??" + "x" * 92
    assert not {"Environment", "EnvironmentFiles", "WorkingDirectory"} & set(found)


def test_only_the_systems_manager_is_told_a_user_and_a_privileged_recorder() -> None:
    ours, theirs = the_properties(a_start()), the_properties(a_start(), is_system=False)
    assert (ours["User"], ours["Group"]) == ("1000", "1000")
    assert ours["PermissionsStartOnly"]
    assert not {"User", "Group", "PermissionsStartOnly"} & set(theirs)


def test_the_commands_survive_a_daemon_reload_of_systemd_252() -> None:
    """It writes ExecStartEx=, `\\;` and `\\$` into the unit's file, and cannot read them again."""
    found = the_properties(a_start())
    assert not [name for name in found if name.endswith("Ex")]
    assert found["ExecStart"] == [("/bin/sh", ["sh", "/var/lib/ckptd/start/7.2"], False)]
    recorder = ["sh", "/run/ckptd/recorder", "/r/7.2.ab", "/run/ckptd/stopping"]
    assert found["ExecStopPost"] == [("/bin/sh", recorder, False)]


@pytest.mark.parametrize(
    ("unit", "key"),
    [
        ("ckptd-task-7-2.service", (7, 2)),
        ("ckptd-task-7.service", None),
        ("ckptd-task-7-2.scope", None),
        ("ckptd-task-x-y.service", None),
        ("ckptd-task--7-2.service", None),
        ("ckptd.service", None),
        ("ckptd-task-7-2-3.service", None),
    ],
)
def test_only_names_that_we_give_are_ours(unit: str, key: tuple[int, int] | None) -> None:
    assert launch.key_of(unit) == key
