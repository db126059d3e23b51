"""What a reload says of itself is what happened."""

from tests.daemon_fixture import LiveDaemon


def test_a_group_that_left_the_file_stays_and_is_told_so(daemon: LiveDaemon) -> None:
    before = daemon.config.read_text()
    daemon.config.write_text(f"{before}[groups.big]\nparallel = 3\n[groups.own]\nparallel = 4\n")
    assert daemon.ctl("daemon", "reload").stdout == (
        "groups.big: in force now\ngroups.own: in force now\n"
    )
    daemon.ctl("group", "set", "own", "-j", "5")
    daemon.config.write_text(f"{before}[groups.own]\nparallel = 6\n")

    told = daemon.json("daemon", "reload")
    daemon.config.write_text(before)
    lines = daemon.ctl("daemon", "reload").stdout.splitlines()

    assert (told["applied"], told["kept"]) == ([], ["groups.big", "groups.own"])
    (line,) = lines
    assert line.startswith("groups.own: stays as it is")
    assert "`ckptctl group rm own`" in line
    parallel = {group["name"]: group["parallel"] for group in daemon.json("group", "ls")["groups"]}
    assert (parallel["big"], parallel["own"]) == (3, 5)
