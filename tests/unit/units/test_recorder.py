"""The recorder, run by real shells; what records say, and what is made of that."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.units import recorder
from ckptd.units.papers import Papers
from ckptd.units.recorder import RECORDER, Began, Records, Stopped

BOOT = "8a0f2fb3-c19d-77e4-8a0f-2fb3c19d77e4"
OTHER_BOOT = "0123abcd-c19d-77e4-8a0f-2fb3c19d77e4"
KEY = (7, 2)
BEGAN = Began(at_ns=5, pid=65, resumed_from=3, invocation="ab12")
SHELLS = [
    pytest.param(argv, id=argv[0])
    for argv in (["dash"], ["bash", "--posix"], ["busybox", "sh"])
    if shutil.which(argv[0])
] or [pytest.param(["sh"], id="sh")]


def records_in(directory: Path, boot: str = BOOT) -> Records:
    return Records(f"{directory}/state", f"{directory}/run", boot)


def test_the_recorder_lies_ready_for_every_unit_and_is_replaced_by_the_next_daemon(
    tmp_path: Path,
) -> None:
    records = records_in(tmp_path)
    path = tmp_path / "run/recorder"
    path.write_text("old")
    Papers(f"{tmp_path}/state", f"{tmp_path}/run", records, is_system=True)
    assert path.read_text() == RECORDER
    assert path.stat().st_mode & 0o777 == 0o600


def run_recorder(shell: list[str], *words: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    given_env = {"PATH": "/usr/bin:/bin", "INVOCATION_ID": "ab12", **env}
    argv = [*shell, "-c", RECORDER, "ckptd-recorder", *words]
    return subprocess.run(argv, env=given_env, capture_output=True, check=False)


@pytest.mark.parametrize("shell", SHELLS)
class TestEveryShell:
    @pytest.mark.parametrize(
        ("told", "ended"),
        [
            ("success exited 0", (0, 0)),
            ("exit-code exited 255", (255, 0)),
            ("signal killed KILL", (0, 9)),
            ("core-dump dumped ABRT", (0, 6)),
            ("signal killed RTMIN+3", (0, 37)),
        ],
    )
    def test_writes_what_systemd_tells(
        self, shell: list[str], tmp_path: Path, told: str, ended: tuple[int, int]
    ) -> None:
        result, code, status = told.split()
        records = records_in(tmp_path)
        path = records.make(KEY)
        how = {"SERVICE_RESULT": result, "EXIT_CODE": code, "EXIT_STATUS": status}
        ran = run_recorder(shell, path, f"{tmp_path}/stopping", **how)
        assert (ran.returncode, ran.stderr) == (0, b"")
        stopped = records.read(KEY).stopped
        assert stopped is not None
        assert (stopped.result, stopped.code, stopped.is_stopping) == (result, code, False)
        assert (stopped.exit_code, stopped.signal) == ended

    @pytest.mark.xdist_group("sync")  # it calls sync(2): see `FailingDisk`
    def test_notes_that_the_machine_is_being_stopped(
        self, shell: list[str], tmp_path: Path
    ) -> None:
        records = records_in(tmp_path)
        flag = tmp_path / "stop ping"
        flag.touch()
        run_recorder(shell, records.make(KEY), str(flag), EXIT_CODE="exited", EXIT_STATUS="0")
        stopped = records.read(KEY).stopped
        assert stopped is not None
        assert stopped.is_stopping

    def test_adds_one_line_and_makes_a_record_that_was_removed_anew(
        self, shell: list[str], tmp_path: Path
    ) -> None:
        records = records_in(tmp_path)
        path = Path(records.make(KEY))
        path.unlink()
        run_recorder(shell, str(path), "/no/such", "sync", EXIT_CODE="exited", EXIT_STATUS="3")
        assert path.read_text().count("\n") == 1
        assert path.stat().st_mode & 0o777 == 0o600
        assert records.read(KEY).stopped is not None

    def test_without_a_main_process_it_tells_no_end(self, shell: list[str], tmp_path: Path) -> None:
        records = records_in(tmp_path)
        run_recorder(shell, records.make(KEY), "/no/such", SERVICE_RESULT="resources")
        assert records.read(KEY).stopped is None


NAMES_OF_SYSTEMD = (
    "HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP "
    "TSTP TTIN TTOU URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS"
)  # Source: signal-util.c


@pytest.mark.parametrize(("number", "name"), list(enumerate(NAMES_OF_SYSTEMD.split(), 1)))
def test_every_signal_is_known_by_systemds_name(number: int, name: str) -> None:
    assert Stopped("killed", name, 0).signal == number


@pytest.mark.parametrize(
    ("name", "number"), [("RTMIN", 34), ("RTMIN+0", 34), ("RTMIN+30", 64), ("32", 32), ("?", 9)]
)
def test_so_are_those_without_a_name_of_their_own(name: str, number: int) -> None:
    assert Stopped("killed", name, 0).signal == number


# --- reading ----------------------------------------------------------------------------------

ENDED = (
    "ended result=success code=exited status=0 inv=ab12 stopping=0 cpu=2500000 peak=4096 oom=1\n"
)


def test_a_whole_record_says_all_of_it() -> None:
    text = f"started at=5 pid=65 from=3 inv=ab12\n{ENDED}"
    record = recorder.parsed(text, 9)
    assert record.began == BEGAN
    assert record.stopped == Stopped(
        "exited", "0", 9, "success", limit_hits=1, cpu_s=2.5, peak_bytes=4_096
    )
    assert not record.is_refused


@pytest.mark.parametrize("length", range(len(ENDED)))
def test_a_torn_line_says_nothing(length: int) -> None:
    assert recorder.parsed(ENDED[:length], 9).stopped is None


def test_refused_is_a_line_of_its_own() -> None:
    assert recorder.parsed("refused\n", 9).is_refused
    assert not recorder.parsed("refused", 9).is_refused
    assert not recorder.parsed("ended refused=1\n", 9).is_refused


@pytest.mark.parametrize("odd", ["²", "٣", "-1", "1e3", "9" * 4_000, "", "x"])
def test_a_number_that_is_none_breaks_nothing(odd: str) -> None:
    text = f"started at={odd} pid={odd}\nended code=exited status={odd} cpu={odd} oom_kill={odd}\n"
    record = recorder.parsed(text, 9)
    assert record.stopped is not None
    recorder.seen(KEY, record.stopped, record.began, 0)


@given(st.text(), st.sampled_from(["exited", "killed", "dumped", "²"]), st.text())
def test_no_text_breaks_the_reader(before: str, code: str, status: str) -> None:
    record = recorder.parsed(f"{before}\nended code={code} status={status}\n{before}", 9)
    if record.stopped is not None:
        recorder.seen(KEY, record.stopped, record.began, 0)


# --- what it means ----------------------------------------------------------------------------


def the_end(code: str, status: str, **fields: object) -> tuple[str, int, int, str]:
    end = recorder.seen(KEY, Stopped(code, status, 9, **fields), BEGAN, 1 << 20)  # type: ignore[arg-type]
    return end.cause, end.code, end.signal, end.blame


def test_exit_codes_and_signals_are_told_as_they_are() -> None:
    assert the_end("exited", "0") == ("exit", 0, 0, "")
    assert the_end("exited", "77") == ("exit", 77, 0, "")
    assert the_end("killed", "TERM") == ("signal", 0, 15, "")
    assert recorder.seen(KEY, Stopped("dumped", "SEGV", 9), None, 0).core


def test_the_killer_in_the_kernel_is_blamed_on_the_limit_or_on_the_host() -> None:
    assert the_end("killed", "KILL", kills=1, limit_hits=1) == ("oom", 0, 9, "limit")
    assert the_end("killed", "KILL", kills=1) == ("oom", 0, 9, "host")
    assert the_end("exited", "137", kills=1, limit_hits=1) == ("oom", 137, 9, "limit")
    assert the_end("exited", "2", kills=1, limit_hits=1) == ("exit", 2, 0, "limit")


def test_a_task_that_outlived_its_child_has_succeeded() -> None:
    assert the_end("exited", "0", kills=1, limit_hits=1) == ("exit", 0, 0, "")


def test_what_ends_while_the_machine_stops_is_interrupted() -> None:
    assert the_end("killed", "TERM", is_stopping=True)[0] == "shutdown"
    assert the_end("exited", "0", is_stopping=True)[0] == "shutdown"


def test_a_child_lost_to_memory_long_before_does_not_make_a_shutdown_a_failure() -> None:
    assert the_end("killed", "TERM", kills=1, limit_hits=1, is_stopping=True)[0] == "shutdown"


def test_only_ends_of_its_own_become_a_stop_by_hand() -> None:
    ends = {
        cause: recorder.as_stopped(recorder.without(KEY, cause, "")).cause
        for cause in ("exit", "signal", "oom", "shutdown")
    }
    assert ends == {"exit": "stopped", "signal": "stopped", "oom": "oom", "shutdown": "shutdown"}


# --- records on disk --------------------------------------------------------------------------


def test_a_record_fences_its_attempt_for_every_later_daemon(tmp_path: Path) -> None:
    path = records_in(tmp_path).make(KEY)
    later = records_in(tmp_path)
    assert KEY in later
    assert later.path(KEY) == path
    with pytest.raises(FileExistsError):
        later.make(KEY)


def test_a_refusal_is_on_disk_even_where_there_was_no_record(tmp_path: Path) -> None:
    records_in(tmp_path).refuse(KEY)
    assert records_in(tmp_path).read(KEY).is_refused


def test_a_refusal_makes_a_record_anew_that_somebody_removed(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    os.unlink(records.make(KEY))
    records.refuse(KEY)
    assert records.read(KEY).is_refused


def test_a_record_that_somebody_removed_says_nothing(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    os.unlink(records.make(KEY))
    assert records.read(KEY) == recorder.Record()


def test_a_record_that_cannot_be_read_is_no_empty_one(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    path = records.make(KEY)
    os.unlink(path)
    os.symlink("/etc/passwd", path)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        records.read(KEY)


def test_a_start_is_known_until_the_machine_restarts(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    records.make(KEY)
    records.note_start(KEY, BEGAN)
    assert records_in(tmp_path).read(KEY).began == BEGAN
    rebooted = records_in(tmp_path, OTHER_BOOT)
    assert not rebooted.is_of_this_boot(KEY)
    assert rebooted.read(KEY).began is None


def test_a_removed_record_of_a_running_attempt_is_no_attempt_that_never_began(
    tmp_path: Path,
) -> None:
    records = records_in(tmp_path)
    path = records.make(KEY)
    records.note_start(KEY, BEGAN)
    os.unlink(path)
    later = records_in(tmp_path)
    assert later.path(KEY) == path
    assert later.read(KEY) == recorder.Record(began=BEGAN)


def test_starts_of_a_store_that_was_thrown_away_are_not_ours(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    records.make(KEY)
    records.note_start(KEY, BEGAN)
    shutil.rmtree(tmp_path / "state")
    new = records_in(tmp_path)
    assert KEY not in new
    new.make(KEY)
    assert new.read(KEY).began is None
    assert records_in(tmp_path).read(KEY).began is None


def test_what_is_forgotten_leaves_nothing_and_frees_its_name(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    records.make(KEY)
    records.note_start(KEY, BEGAN)
    records.forget(KEY)
    records.forget(KEY)
    assert KEY not in records
    assert os.listdir(f"{tmp_path}/state/units") == os.listdir(f"{tmp_path}/run/began") == []
    records.make(KEY)
    assert records.read(KEY) == recorder.Record()


def test_names_that_are_not_ours_are_passed_by(tmp_path: Path) -> None:
    (tmp_path / "state/units").mkdir(parents=True)
    for name in ("x", "7.2", ".", "a.b.c", "lost+found", "7.2.3.x"):
        if name != ".":
            (tmp_path / "state/units" / name).touch()
    assert list(records_in(tmp_path)) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
def test_on_a_full_disk_no_record_is_made_and_a_made_one_takes_its_end(tmp_path: Path) -> None:
    script = """
    mount -t tmpfs -o size=64k tmpfs "$1" && shift && exec "$@"
    """
    code = f"""
import errno, subprocess, sys
from ckptd.units.recorder import RECORDER, Records
records = Records({str(tmp_path)!r}, {str(tmp_path)!r}, {BOOT!r})
path = records.make((7, 2))
try:
    with open({str(tmp_path)!r} + "/ballast", "wb", buffering=0) as file:
        while True: file.write(bytes(4096))
except OSError as error: assert error.errno == errno.ENOSPC
try: records.make((8, 1)); sys.exit("made")
except OSError as error: assert error.errno == errno.ENOSPC
assert (8, 1) not in records
env = {{"EXIT_CODE": "exited", "EXIT_STATUS": "3"}}
subprocess.run(["sh", "-c", RECORDER, "-", path, "/no"], env=env, check=True)
assert records.read((7, 2)).stopped.exit_code == 3
"""
    argv = ["unshare", "--mount", "--propagation", "private"]
    argv += ["sh", "-ec", script, "-", str(tmp_path)]

    done = subprocess.run([*argv, sys.executable, "-c", code], capture_output=True, check=False)
    if b"mount" in done.stderr or b"unshare" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr.decode()}")
    assert done.returncode == 0, done.stderr.decode()


def test_a_pipe_in_the_place_of_a_record_hangs_nobody(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    path = records.make(KEY)
    os.unlink(path)
    os.mkfifo(path)
    records.refuse(KEY)
    assert records.read(KEY) == recorder.Record()


def test_a_start_noted_by_one_daemon_is_read_whole_by_the_next(tmp_path: Path) -> None:
    began = Began(time.time_ns(), 65, 3, "d5e6e7e7863140799e53b74afcbb0bf0")
    records = records_in(tmp_path)
    records.make((7, 2))
    records.note_start((7, 2), began)
    assert records_in(tmp_path).read((7, 2)).began == began


def test_a_record_is_synchronous_or_is_known_not_to_be(tmp_path: Path) -> None:
    """What is told of it decides whether its recorder calls sync(1), a process more."""
    records = records_in(tmp_path)
    fd = os.open(records.make(KEY), os.O_RDONLY)
    try:
        assert records.is_synchronous == is_flagged(fd)
    finally:
        os.close(fd)


def is_flagged(fd: int) -> bool:
    """Return whether writes are synchronous. Source: ioctl_iflags(2)."""
    flags = bytearray(8)
    try:
        fcntl.ioctl(fd, 0x8008_6601, flags)  # FS_IOC_GETFLAGS
    except OSError:
        return False
    return bool(int.from_bytes(flags, sys.byteorder) & 0x8)  # FS_SYNC_FL
