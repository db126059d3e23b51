"""The configuration: defaults, refusals that help, and what a reload may change."""

import itertools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from ckptd.host import config, paths
from ckptd.host.config_check import known_keys
from ckptd.protocol.errors import BadConfig

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "etc" / "ckptd.toml"


Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> str:
        path = tmp_path / "ckptd.toml"
        path.write_text(text)
        return str(path)

    return write


def test_the_shipped_file_holds_every_key_at_its_default() -> None:
    assert config.load(str(SHIPPED)) == config.Config()
    shipped = tomllib.loads(SHIPPED.read_text())
    written = {
        f"{table}.{key}"
        for table, keys in shipped.items()
        for key in (keys if table != "groups" else ())
    }
    expected = {key for key in known_keys(config.Config) if not key.startswith("groups.")}
    assert written == expected


def test_every_key_of_the_shipped_file_is_explained_right_above_it() -> None:
    lines = SHIPPED.read_text().splitlines()
    bare = [
        line
        for above, line in itertools.pairwise(lines)
        if re.match(r"\w+ = ", line) and not above.startswith("# ")
    ]
    assert not bare


def test_the_shipped_file_tells_for_every_key_whether_a_reload_applies_it() -> None:
    text = SHIPPED.read_text()
    for table in msgspec.structs.fields(config.Config):
        if table.name == "groups":
            continue
        for field in msgspec.structs.fields(table.type):
            match = re.search(rf"((?:^#.*\n)+)^{field.name} = ", text, re.MULTILINE)
            assert match, field.name
            assert ("[restart]" in match[1]) != config._is_live(field.type), field.name


def test_a_missing_default_file_means_defaults_and_a_missing_named_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONFIGURATION_DIRECTORY", str(tmp_path))
    assert config.load(None) == config.Config()
    (tmp_path / "ckptd.toml").write_text("[task]\nretries = 3\n")
    assert config.load(None).task.retries == 3
    with pytest.raises(BadConfig, match=r"other.toml: No such file or directory$"):
        config.load(str(tmp_path / "other.toml"))


def test_a_check_says_what_is_wrong_and_only_where_there_is_one_a_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[task]\nretires = 3\n")
    assert config.main(["check", str(wrong)]) == BadConfig.exit_code
    assert config.main(["check", f"{tmp_path}/none.toml"]) == BadConfig.exit_code
    first, hint, second = capsys.readouterr().err.splitlines()
    assert "did you mean task.retries?" in first
    assert hint == "  hint: every key is explained in etc/ckptd.toml"
    assert second.endswith("none.toml: No such file or directory")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[wal]\nsegment_byte = 1\n",
            ":2: unknown key wal.segment_byte, did you mean wal.segment_bytes?",
        ),
        (
            "[task]\nbackoff_s = 1\n",
            ":2: unknown key task.backoff_s, did you mean retry.backoff_s?",
        ),
        ("deamon = 1\n", ":1: unknown key deamon, did you mean [daemon]?"),
        ("[task]\nzzzz = 1\n", ":2: unknown key task.zzzz, known here: task.retries"),
        (
            "\n[wal]\nidle_mark_ms = 'x'\n",
            ":3: wal.idle_mark_ms is 'x', allowed is a whole number from 1 to 60000",
        ),
        ("[task]\ngrace_s = -1\n", ":2: task.grace_s is -1, allowed is a number from 0 to"),
        ("[task]\ngrace_s = nan\n", ":2: task.grace_s is nan, allowed is a number from 0 to"),
        ("[task]\nretries = true\n", ":2: task.retries is True, allowed is a whole number"),
        (
            "[daemon]\nlog_level = 'loud'\n",
            ":2: daemon.log_level is 'loud', allowed is one of 'debug'",
        ),
        (
            "[daemon]\nstate_dir = 'here'\n",
            ":2: daemon.state_dir is 'here', allowed is text of the form",
        ),
        ("[ipc]\nmode = '777'\n", ":2: ipc.mode is '777'"),
        ("[access]\nread = 'ops'\n", ":2: access.read is 'ops', allowed is a list of names"),
        ("[access]\nadmin = [0]\n", ":2: access.admin is [0], allowed is a list of names"),
        ("wal = 3\n", ":1: wal is 3, but it is a table: write [wal]"),
        ("[[wal]]\n", "wal is [{}], but it is a table"),
        ("[groups]\nbig = 3\n", ":2: groups.big must be a table: [groups.big]"),
        (
            "[groups.big]\nparalel = 3\n",
            ":2: unknown key groups.big.paralel, did you mean groups.NAME.parallel?",
        ),
        ("[groups.'a b']\nparallel = 3\n", "'a b' is no name for groups"),
        (f"[groups.{'a' * 129}]\n", "is no name for groups, allowed is text of the form"),
        ('[groups."ops\\n"]\n', "'ops\\n' is no name for groups"),
        (f"[task]\non_oom = '{'a' * 65}'\n", "allowed is text, at most 64 characters"),
        (
            "[retry]\nbackoff_s = 1000\n",
            "retry.backoff_s is 1000 s, more than retry.backoff_max_s of 900 s",
        ),
        ("[task]\non_oom = 'retry'\n", "task.on_oom: 'retry' needs a factor and a largest limit"),
        ("[wal\n", "not TOML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_line_key_value_and_remedy(
    write: Write, text: str, said: str
) -> None:
    with pytest.raises(BadConfig) as refused:
        config.load(write(text))
    assert said in refused.value.message
    assert refused.value.hint


def test_every_problem_of_a_file_is_told_at_once(write: Write) -> None:
    with pytest.raises(BadConfig) as refused:
        config.load(write("[wal]\na = 1\nb = 2\n[task]\ngrace_s = 'x'\n"))
    assert len(refused.value.message.splitlines()) == 3


def test_the_default_group_is_there_whatever_the_file_says(write: Write) -> None:
    groups = config.load(write("[groups.big]\nparallel = 3\n")).groups
    assert groups == {"default": config.Group(), "big": config.Group(3)}


def test_a_configuration_written_out_reads_back_the_same(write: Write) -> None:
    text = "[groups.big]\nparallel = 3\n[ipc]\nmode = '0600'\n[task]\nask_s = 0.5\n"
    text += "[access]\nread = ['ops', 'watch']\nsubmit = []\n"
    loaded = config.load(write(text))
    assert config.load(write(config.as_toml(loaded))) == loaded


def test_a_reload_tells_what_it_applied_and_what_waits_for_a_restart(write: Write) -> None:
    old = config.Config()
    new = config.load(
        write("[wal]\nsegment_bytes = 33554432\n[task]\nretries = 2\n[groups.big]\nparallel = 3\n")
    )
    assert config.live_changes(old, new) == (("task.retries", "groups.big"), ("wal.segment_bytes",))
    kept = config.keep_fixed(old, new)
    assert kept.wal == old.wal
    assert (kept.task, kept.groups) == (new.task, new.groups)
    assert config.live_changes(old, old) == ((), ())


def test_check_exits_78_with_the_reason_and_0_for_a_good_file(write: Write) -> None:
    def check(path: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "ckptd.host.config", "check", path]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    good, bad = check(str(SHIPPED)), check(write("[wal]\nx = 1\n"))
    assert (good.returncode, bad.returncode) == (0, 78)
    assert "unknown key wal.x" in bad.stderr


@pytest.mark.parametrize(
    "words", [("ckptd.host.config", "check", ""), ("ckptd.host.config", "show", ""),
              ("ckptd", "--config", ""), ("ckptd", "--config=")],
)  # fmt: skip
def test_an_empty_name_of_a_file_is_wrong_usage_and_not_the_usual_file(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    kinds = ("CONFIGURATION", "STATE", "RUNTIME")
    env = os.environ | {f"{kind}_DIRECTORY": str(tmp_path) for kind in kinds}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True, text=True, check=False, cwd=ROOT, env=env, timeout=15,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (64, "")
    assert "the name of the configuration file is empty" in done.stderr


def test_paths_follow_root_xdg_systemd_and_the_configuration_in_rising_order() -> None:
    assert paths.resolve(0, {}).socket == "/run/ckptd/ctl.sock"
    assert paths.default_config(0, {}) == "/etc/ckptd/ckptd.toml"
    user = {"HOME": "/home/u"}
    assert paths.resolve(1000, user).state == "/home/u/.local/state/ckptd"
    assert paths.resolve(1000, user).run == "/home/u/.local/state/ckptd/run"
    assert paths.default_config(1000, user) == "/home/u/.config/ckptd/ckptd.toml"
    xdg = user | {"XDG_RUNTIME_DIR": "/run/user/1000", "XDG_STATE_HOME": "/s"}
    assert paths.resolve(1000, xdg) == paths.Paths(
        "/s/ckptd", "/run/user/1000/ckptd", "/run/user/1000/ckptd/ctl.sock"
    )
    unit = xdg | {"STATE_DIRECTORY": "/var/lib/a:/var/lib/b", "RUNTIME_DIRECTORY": "/run/a"}
    assert paths.resolve(0, unit).state == "/var/lib/a"
    assert paths.resolve(0, unit, state_dir="/own", run_dir="/r").socket == "/r/ctl.sock"


def test_every_key_is_read_by_somebody() -> None:
    code = "\n".join(
        path.read_text()
        for path in (ROOT / "ckptd").rglob("*.py")
        if path.stem not in {"config", "doctor"}
    )
    unread = {
        key
        for key in known_keys(config.Config)
        if not key.startswith("groups.") and not re.search(rf"\b{key}\b", code)
    }
    assert unread == set()


def test_the_longest_runtime_directory_leaves_room_for_the_sockets_of_ten_million_tasks(
    write: Write, tmp_path: Path
) -> None:
    longest = "/" + "r" * (paths.RUN_BYTES_MAX - 1)
    assert len(f"{longest}/notify/{10**7 - 1}.sock") == paths.SOCKET_PATH_BYTES_MAX
    config.load(write(f'[daemon]\nrun_dir = "{longest}"\n'))
    with pytest.raises(BadConfig, match="88 bytes, over 87"):
        config.load(write(f'[daemon]\nrun_dir = "{longest}r"\n'))


@pytest.mark.parametrize(
    ("run", "told"),
    [
        ("file/run", "cannot be used as runtime directory: Not a directory"),
        ("file", "cannot be used as runtime directory: File exists"),
        ("r" * 88, "the sockets of tasks have no room"),
    ],
)
def test_a_daemon_without_a_usable_runtime_directory_is_a_matter_of_its_configuration(
    tmp_path: Path, run: str, told: str
) -> None:
    (tmp_path / "file").touch()
    env = os.environ | {
        "STATE_DIRECTORY": f"{tmp_path}/s",
        "RUNTIME_DIRECTORY": f"{tmp_path}/{run}",
    }
    env["CONFIGURATION_DIRECTORY"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "ckptd"],
        capture_output=True, text=True, check=False, cwd=ROOT, env=env, timeout=15,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (78, "")
    assert told in done.stderr
    assert "Traceback" not in done.stderr
