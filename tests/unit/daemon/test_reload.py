"""What a reload says of itself is what happened."""

from tests.daemon_fixture import LiveDaemon


def test_a_group_that_left_the_file_stays_and_is_told_so(daemon: LiveDaemon) -> None:
    before = daemon.config.read_text()
    daemon.config.write_text(f"{before}[groups.big]\nparallel = 3\n[groups.own]\nparallel = 4\n")
    told = daemon.ctl("daemon", "reload")
    assert told.stdout == "groups.big: in force now\ngroups.own: in force now\n"
    assert "nothing has changed" not in told.stderr
    assert "left as they are" not in daemon.log.read_text()
    daemon.ctl("group", "set", "own", "-j", "5")
    daemon.config.write_text(f"{before}[groups.own]\nparallel = 6\n")

    kept = daemon.json("daemon", "reload")
    daemon.config.write_text(before)
    lines = daemon.ctl("daemon", "reload").stdout.splitlines()

    assert (kept["applied"], kept["kept"]) == ([], ["groups.big", "groups.own"])
    assert "; left as they are: groups.big, groups.own\n" in daemon.log.read_text()
    (line,) = lines
    assert line.startswith("groups.own: stays as it is")
    assert "`ckptctl group rm own`" in line
    parallel = {group["name"]: group["parallel"] for group in daemon.json("group", "ls")["groups"]}
    assert (parallel["big"], parallel["own"]) == (3, 5)
    assert "nothing has changed" in daemon.ctl("daemon", "reload").stderr
