"""The one table of verbs: what each is called, what it is for, where its code is.

`where` names module and function; the module's `<function>_options` adds its options, and is
imported only for the verb that runs. Read next: `cli.py` (how the table is used).
"""

from typing import Final

import msgspec


class Verb(msgspec.Struct, frozen=True):
    """One verb. `takes` follows the options in the usage line; examples are shell lines."""

    name: str
    where: str
    summary: str
    takes: str = "[TASK...]"
    aliases: tuple[str, ...] = ()
    examples: str = ""
    has_command: bool = False  # the first word that is no option begins a command
    passes_on: bool = False  # a program of its own reads all options but -h


SECTIONS: Final[dict[str, tuple[Verb, ...]]] = {
    "start work": (
        Verb(
            "submit", "run:submit", "accept a task; print its id", "[--] COMMAND...",
            aliases=("add",), has_command=True,
            examples="""\
ckptctl submit -- rsync -a src/ dst/
ckptctl submit -n nightly -k nightly-2026-11-20 --at 02:00 ./backup.sh
ckptctl submit --retries 2 --backoff 5s..10m --on-exit 3=retry ./flaky
ckptctl submit --after 3,4 --memory 2G -- python3 report.py
id=$(ckptctl submit -q make all) && ckptctl wait "$id"
ckptctl submit --python work:ingest --input '{"path": "data.csv"}'
ckptctl submit --file tasks.toml""",
        ),
        Verb(
            "run", "run:run", "submit, follow the output, return the task's exit code",
            "[--] COMMAND...", has_command=True,
            examples="""\
ckptctl run make test
ckptctl run --timeout 2h -- ./train --resume
(Ctrl-C once leaves the task running in the background, twice cancels it)""",
        ),
    ),
    "look": (
        Verb(
            "status", "status:status", "list tasks (what `ckptctl` alone does)",
            aliases=("ls", "list"),
            examples="""\
ckptctl status --watch
ckptctl status --all -o wide
ckptctl status --state failed,stuck -g batch
ckptctl status -o csv --columns id,name,phase,ended_at
ckptctl status -o '{id} {state} {command}'""",
        ),
        Verb("show", "look:show", "all about a task: settings, attempts, checkpoints",
             examples="ckptctl show 7\nckptctl show @last --env\nckptctl show 7 -o json"),
        Verb("explain", "look:explain", "why a task is where it is, and what to do",
             examples="ckptctl explain 7\nckptctl explain --state stuck"),
        Verb(
            "logs", "run:logs", "print a task's output; -f follows it", "[TASK]",
            aliases=("log", "tail"),
            examples="ckptctl logs 7\nckptctl logs -f @last\nckptctl logs -n 20 name:nightly",
        ),
        Verb(
            "events", "events:events", "what happened, from the daemon's log", "",
            aliases=("listen",),
            examples="ckptctl events -f\nckptctl events --task 7\n"
            "ckptctl events --since 2h --type ended\nckptctl events -f --since 4711 -o jsonl",
        ),
        Verb("stats", "look:stats", "totals and counters", ""),
    ),
    "wait and steer": (
        Verb(
            "wait", "run:wait", "return once tasks are done (survives daemon restarts)",
            examples="""\
ckptctl wait 7 8
ckptctl wait --for running --timeout 30s @last
ckptctl wait --any -g batch
ckptctl wait --exit-code task 7; echo $?""",
        ),
        Verb("cancel", "change:cancel", "stop tasks in order: save, stop signal, grace, SIGKILL",
             aliases=("rm",), examples="ckptctl cancel 7\nckptctl cancel --grace 60s -g batch"),
        Verb("kill", "change:kill", "SIGKILL tasks now; with -s send another signal",
             examples="ckptctl kill 7\nckptctl kill -s HUP 7"),
        Verb("signal", "change:signal", "send a signal to running tasks", "SIGNAL TASK...",
             examples="ckptctl signal USR1 7\nckptctl signal --tree TERM 7"),
        Verb("drill", "drill:drill", "kill it for real, and see that it comes back", "TASK",
             examples="ckptctl drill 7 --kill9\nckptctl drill 7 --oom --yes\n"
             "ckptctl drill 7 --daemon --restart 'ckptd --config ~/ckptd.toml'"),
        Verb("pause", "change:pause", "freeze running tasks where they are"),
        Verb("resume", "change:resume", "let paused tasks go on"),
        Verb("hold", "change:hold", "keep tasks from starting"),
        Verb("release", "change:release", "let held, quarantined or blocked tasks go on"),
        Verb("retry", "change:retry", "start ended tasks again, from their last checkpoint",
             aliases=("restart",),
             examples="ckptctl retry 7\nckptctl retry --fresh 7\nckptctl retry --state failed\n"
             "ckptctl retry --from-step load 7"),
        Verb(
            "edit", "edit:edit", "change tasks that are not running",
            examples="ckptctl edit 7 --set timeout=2h --set priority=5\n"
            "ckptctl edit 7 --memory 8G\n"
            "ckptctl edit 7            # opens $EDITOR",
        ),
        Verb("priority", "change:priority", "higher starts first", "N TASK...",
             examples="ckptctl priority 10 7 8\nckptctl priority -5 -g batch"),
        Verb("clean", "change:clean", "forget ended tasks and delete their files",
             examples="ckptctl clean --all --older 30d\nckptctl clean --all --dry-run"),
    ),
    "groups, checkpoints, quarantine": (
        Verb("group ls", "nouns:group_ls", "list groups", ""),
        Verb("group add", "nouns:group_add", "make a group", "NAME",
             examples="ckptctl group add gpu --parallel 2"),
        Verb("group set", "nouns:group_set", "change a group, at once", "NAME",
             examples="ckptctl group set gpu --parallel 4"),
        Verb("group rm", "nouns:group_rm", "remove an empty group", "NAME"),
        Verb("group pause", "nouns:group_pause", "start nothing more in a group", "NAME"),
        Verb("group resume", "nouns:group_resume", "start tasks of a group again", "NAME"),
        Verb("checkpoint ls", "checkpoint:ls", "list a task's checkpoints", "TASK"),
        Verb("checkpoint now", "checkpoint:now", "ask running tasks to save and go on"),
        Verb("checkpoint show", "checkpoint:show", "one checkpoint in full", "TASK [SEQ]"),
        Verb("checkpoint diff", "checkpoint:diff", "what differs between two (exit 1 if any)",
             "TASK [A] [B]", examples="ckptctl checkpoint diff 7\nckptctl checkpoint diff 7 4 5"),
        Verb("checkpoint verify", "checkpoint:verify", "read every byte again", "TASK"),
        Verb("checkpoint export", "checkpoint:export", "copy a checkpoint out",
             "TASK [SEQ] DIR|FILE.tar|-",
             examples="ckptctl checkpoint export 7 /tmp/save\n"
             "ckptctl checkpoint export 7 - | ssh other 'cat >7.tar'"),
        Verb("checkpoint import", "checkpoint:bring_in", "make a new checkpoint of an exported one",
             "TASK DIR|FILE.tar|-", examples="ckptctl checkpoint import 7 /tmp/save"),
        Verb("checkpoint edit", "checkpoint:edit", "make a new checkpoint with members changed",
             "TASK [SEQ]",
             examples="ckptctl checkpoint edit 7 --set state.part=7 --unset state.tmp\n"
             "ckptctl checkpoint edit 7            # opens $EDITOR"),
        Verb("quarantine ls", "nouns:quarantine_ls", "tasks that were taken out, and why", ""),
        Verb("quarantine show", "look:show", "the evidence", "TASK..."),
        Verb("quarantine release", "change:release", "let them try again", "TASK..."),
        Verb("quarantine drop", "change:drop", "give them up", "TASK..."),
    ),
    "measure": (
        Verb("bench overhead", "bench:overhead", "what saving costs a Python function, in pairs",
             "--python M:F",
             examples="ckptctl bench overhead --python work:ingest --input '{\"limit\": 1000}'\n"
             "ckptctl bench overhead --python work:ingest --pairs 30 -o json"),
    ),
    "batches: one command over many items": (
        Verb(
            "batch submit", "batch:batch_submit", "work off many items in one task; print its id",
            "[--] COMMAND... [::: ITEM...]", has_command=True,
            examples="""\
ckptctl batch submit -i hosts.txt -j 8 -- ping -c 1 {}
find . -name '*.png' -print0 | ckptctl batch submit --format null -- optipng
ckptctl batch submit -i users.jsonl --item-key id --rate 10/s -- ./sync --user {id}
ckptctl batch submit -i urls.txt --python work:fetch -j 20
(the same line again goes on where it stood: only items without a result run)""",
        ),
        Verb(
            "batch run", "batch:batch_run", "work them off right here, without a daemon",
            "[--] COMMAND... [::: ITEM...]", has_command=True,
            examples="""\
ckptctl batch run gzip -k ::: *.log
ckptctl batch run -i hosts.txt --dry-run -- ssh {} uptime
ckptctl batch run -i hosts.txt --errors -- ssh {} uptime""",
        ),
        Verb("batch status", "batch_look:batch_status", "list batches, or show one", "[NAME]",
             aliases=("batch ls", "batch list", "batch show"),
             examples="ckptctl batch status\nckptctl batch status ping-3f9a1c\n"
             "ckptctl batch status nightly --check; echo $?"),
        Verb("batch items", "batch_look:batch_items", "items and what they came to", "NAME",
             examples="ckptctl batch items nightly --status error,fail\n"
             "ckptctl batch items nightly --todo -q\nckptctl batch items nightly -o csv"),
        Verb("batch retry", "batch:batch_retry", "go on, or run some items again", "NAME",
             aliases=("batch resume",),
             examples="ckptctl batch retry nightly\nckptctl batch retry nightly --errors\n"
             "ckptctl batch retry nightly --only host7 --here"),
        Verb("batch wait", "batch:batch_wait", "return once a batch is at rest, with its exit code",
             "NAME", examples="ckptctl batch wait nightly --timeout 2h; echo $?"),
        Verb("batch logs", "batch_look:batch_logs", "what items printed; -f follows", "NAME",
             aliases=("batch log",),
             examples="ckptctl batch logs nightly -n 20\nckptctl batch logs nightly --key host7"),
        Verb("batch export", "batch_look:batch_export", "all results as JSON lines, CSV or JSON",
             "NAME", examples="ckptctl batch export nightly > results.jsonl\n"
             "ckptctl batch export nightly -o csv --status fail,error"),
        Verb("batch gc", "batch_look:batch_gc", "remove finished batches", "[NAME...]",
             examples="ckptctl batch gc --older 30d\nckptctl batch gc --dry-run\n"
             "ckptctl batch gc nightly --force"),
    ),
    "the daemon": (
        Verb("daemon status", "admin:daemon_status", "how the daemon is", ""),
        Verb("daemon ping", "admin:daemon_ping", "does it answer", ""),
        Verb("daemon reload", "admin:daemon_reload", "read the configuration again", ""),
        Verb("daemon shutdown", "admin:daemon_shutdown", "stop it; tasks live on", "",
             examples="ckptctl daemon shutdown\nckptctl daemon shutdown --tasks checkpoint --wait"),
        Verb("config show", "admin:config_show", "the configuration in force", ""),
        Verb("config check", "admin:config_check", "is a file right (78 if not)", "[FILE]"),
        Verb("config diff", "admin:config_diff", "the file against what is in force", "[FILE]"),
        *(
            Verb(f"wal {word}", "admin:wal", text, passes_on=True, takes="",
                 examples=f"ckptctl wal {word} {more}".strip())
            for word, text, more in (
                ("status", "segments, snapshots, positions (offline)", "--json"),
                ("verify", "check every byte of the log (offline)", "--state /var/lib/ckptd"),
                ("dump", "print the records (offline)", "--since 4711 --limit 20"),
                ("replay", "rebuild the state from it, to see that it works (offline)", ""),
                ("repair", "drop a damaged end, keep a copy (offline)", "--truncate-after 4711"),
                ("salvage", "go on around damage, keep a copy (offline)", ""),
            )
        ),
        Verb("doctor", "admin:doctor", "is this machine fit for ckptd, and what to do", "",
             passes_on=True, examples="ckptctl doctor\nckptctl doctor --user\nsudo ckptctl doctor"),
        Verb("completion", "completion:completion", "shell completion", "bash|zsh|fish",
             examples="source <(ckptctl completion bash)\nckptctl completion fish | source"),
        Verb("help", "cli:help_verb", "this list, or the help of a verb", "[VERB]"),
    ),
}  # fmt: skip

VERBS: Final = {verb.name: verb for verbs in SECTIONS.values() for verb in verbs}
ALIASES: Final = {
    **{alias: verb.name for verb in VERBS.values() for alias in verb.aliases},
    "ckpt": "checkpoint",
    "prune": "clean",
    "freeze": "pause",
    "thaw": "resume",
    "group list": "group ls",
    "quarantine list": "quarantine ls",
    "checkpoint list": "checkpoint ls",
}
NOUNS: Final = {
    "batch": "batch status",
    "bench": "bench overhead",
    "group": "group ls",
    "checkpoint": "checkpoint ls",
    "quarantine": "quarantine ls",
    "daemon": "daemon status",
    "config": "config show",
    "wal": "wal status",
}
"""What a noun alone means."""
GUESSED: Final = {
    "ps": "status",
    "top": "status --watch",
    "watch": "status --watch",
    "stop": "cancel",
    "delete": "cancel, or of an ended task: clean",
    "version": "--version",
    "daemon stop": "daemon shutdown",
    "batch rm": "batch gc",
    "batch delete": "batch gc",
    "batch cancel": "cancel, of the task that `batch status NAME` names",
    "batch stop": "cancel, of the task that `batch status NAME` names",
    "--cwd": "--chdir",
    "--tail": "--lines",
    "--running": "--state running",
    "--failed": "--state failed",
}
"""Words of other programs -> what to say here; options count for verbs that have the other one."""
DEFAULT: Final = "status"
