"""The supervisors: small processes that outlive the daemon and know the true end of a task.

    daemon --(a socket per supervisor)--> warm parent --fork--> supervisor --fork--> task

The *warm parent* is this file, started as `python -I -S shim.py FD STATE_DIR BOOT_ID GROUPS...`.
It does nothing but fork supervisors. A *supervisor* runs one attempt at a time: it takes the claim,
forks the child behind a gate, tells the daemon, opens the gate, waits, kills what the task left
behind, writes the exit record and only then reports. Between attempts it waits for the next order,
because a fork of even a small interpreter costs as much as running /bin/true. The daemon's death
closes the socket: the parent exits at once, a supervisor after the attempt it is in.

Messages, one packet each: an order comes in (or a descriptor of it, where it is long); out go
`S PID TICKS ...` (started), `E record` (ended), `F` (fenced: somebody else has the claim).

`_socket` is the C half of `socket`, whose Python half (it imports enum) would make every fork a
tenth dearer; `signal`, `json` and `typing` are avoided for the same reason.
Stdlib only. Read next: `attempt.py`, `child.py`, and `spawn.py` for the daemon's end.
"""

import gc
import os
import resource
import sys
import time

if __name__ == "__main__":  # started by path: nothing of the environment is trusted or needed
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import _socket

from ckptd.runner import attempt, identity, linux, output
from ckptd.runner.attempt import End, Holder, Order, Record
from ckptd.runner.cgroup import Group, Roots
from ckptd.runner.child import OPEN, Child

ORDER_BYTES_MAX = 65_536  # longer ones travel as a memory file
DESCRIPTOR_BYTES = 4
NOFILE_SOFT = 1_024
_EINVAL, _EPERM = 22, 1
_SIGKILL = 9
_REFUSED_WAITS, _REFUSED_WAIT_S = 60, 0.05  # for set-uid programs, which only root may kill


class Supervisor:
    """One supervisor: who it is, its socket and its control group."""

    __slots__ = (
        "attempts", "attempts_dir", "calm", "group", "is_forked", "is_sound", "is_spent",
        "link", "me",
    )  # fmt: skip

    def __init__(self, link: _socket.socket, attempts_dir: str, boot_id: str, roots: Roots) -> None:
        self.link = link
        self.attempts_dir = attempts_dir
        self.attempts = os.open(attempts_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.calm = _oom_score() == b"0"
        pid = os.getpid()
        home = attempt.home_of(self.attempts)
        self.me = Holder(boot_id, pid, identity.ticks_of(pid), home)
        self.group = Group(roots, f"{pid}.{self.me.ticks}")
        self.is_forked = False  # the attempt has a child: from here on it may run
        self.is_sound = True  # fit for another attempt
        self.is_spent = False  # the group was killed, or may have been

    def serve(self) -> None:
        """Run attempts until the daemon closes the socket, or this one is not fit for another."""
        self.group.make()
        while self.is_sound:  # Bound: the daemon hangs up
            packed = self._next_order()
            if not packed:
                break
            self._run(Order.unpack(packed))
        self.group.leave()

    def _next_order(self) -> bytes:
        try:
            data, rights, _, _ = self.link.recvmsg(
                ORDER_BYTES_MAX, _socket.CMSG_SPACE(DESCRIPTOR_BYTES), _socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            return b""
        if not rights:
            return data
        fd = int.from_bytes(rights[0][2][:DESCRIPTOR_BYTES], sys.byteorder)
        packed = b"".join(iter(lambda: os.read(fd, 1 << 20), b""))
        os.close(fd)
        return packed

    def _tell(self, message: bytes) -> None:
        try:
            self.link.send(message)
        except OSError:  # the daemon is gone: the next one reads the files
            return

    # --- one attempt ------------------------------------------------------------------------

    def _run(self, order: Order) -> None:
        """Run one attempt.

        Raises:
            OSError: it may have run, and how it ended is not known. This supervisor must end, so
                that its claim is dead.
        """
        place = attempt.place_of(self.attempts_dir, order.task, order.attempt)
        record: Record | None = None
        self.is_forked = False
        try:
            spare = f"{order.reign}.{order.spare}"
            record = Record(self.attempts_dir, place, spare, self.me.claim)
            if not record.take():
                self._tell(b"F")
                return
            # Crash: claimed, nothing runs. The claim is dead with us: the daemon says lost.
            if attempt.is_reigning(self.attempts_dir, order.reign):
                end = self._start(order, record)
            else:
                end = _not_run("not_started", "the order was revoked")
            self._keep(order, record, end)
        except OSError as error:
            if self.is_forked:
                raise
            self._keep(order, record, _failed(error, "claim the attempt"))
        finally:
            if record is not None:
                record.close()

    def _start(self, order: Order, record: Record) -> End:
        """Run the task from its first to its last process; return how it ended."""
        try:
            out = output.opened(order.output, order.uid, order.gid)
        except OSError as error:
            return _failed(error, f"open {order.output}")
        try:
            untaken = self._untaken(order)
            if untaken:
                return _not_run("spawn_error", untaken, _EPERM)
            return self._live(order, record, out)
        finally:
            os.close(out)

    def _untaken(self, order: Order) -> str:
        """Set the limits of the attempt; return why it must not run, "" where it may."""
        is_limited = self.group.limit(order.memory_bytes) or not order.memory_bytes
        if not is_limited and self.group.has_memory:
            return f"the control group does not take the limit of {order.memory_bytes} bytes"
        untaken = self.group.quota.set(order.cpus, order.tasks_max, order.io_weight)
        return f"the control group does not take what is wanted of {untaken}" if untaken else ""

    def _live(self, order: Order, record: Record, out: int) -> End:
        ooms = self.group.ooms()
        started_ns = time.time_ns()
        output.write_start(out, order.attempt, started_ns, order.resumed_from)
        try:
            pid, gate = self._fork(order, out)
        except OSError as error:  # nothing ran
            end = _failed(error, "make its process")
        else:
            start = self.me.start(pid, identity.ticks_of(pid), started_ns, order.resumed_from)
            end = self._wait(pid, self._release(record, gate, pid, start))
            gate.close()
            end.pid, end.started_ns = pid, started_ns
            self._judge_memory(end, ooms, order.memory_bytes)
            _judge_disk(end, order)
            if self.is_spent and not self.group.renew():
                self.is_sound = False
        output.write_end(out, order.attempt, end.ended_ns, _said(end))
        return end

    def _fork(self, order: Order, out: int) -> tuple[int, _socket.socket]:
        """Make the child that becomes the task; return its pid and the gate that it waits at."""
        gate, inner = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        is_calm = self.calm and not self.group.is_guarded
        task = Child(order, out, self.me.pid, is_calm=is_calm)
        try:
            pid = self.group.fork()
        except OSError:
            gate.close()
            inner.close()
            raise
        if pid == 0:
            gate.close()
            task.become_task(inner.fileno())
        self.is_forked = True
        inner.close()
        return pid, gate

    def _release(self, record: Record, gate: _socket.socket, pid: int, start: bytes) -> bytes:
        """Let the child go; return what it says if it could not become the task."""
        try:
            record.write_start(start)
            # Crash: the gate is shut. With us the child dies without having run the task.
            self._tell(b"S" + start)
            gate.send(OPEN)
            # Crash: the task runs. PDEATHSIG ends it with us, the daemon kills what it forked.
            return gate.recv(4_096)
        except ConnectionError:  # the child gave up before the gate and said why
            return gate.recv(4_096)
        except OSError as error:  # a record that cannot be kept: the task must not run
            os.kill(pid, _SIGKILL)
            return f"{error.errno or 0} cannot keep the start: {error}".encode()

    def _wait(self, pid: int, complaint: bytes) -> End:
        """Wait for the end of the main process and of all that came from it."""
        status, cpu_s, rss_bytes = _wait_for(pid)
        ended_ns = time.time_ns()
        end = _end_of(status, complaint)
        self.is_spent = end.signal == _SIGKILL  # whoever killed it may have killed its group
        left = self._end_tree()
        if left:
            self.is_sound = False
            end.text = end.text or f"not permitted to end what it left, a set-uid program: {left}"
        end.ended_ns, end.cpu_s, end.rss_bytes = ended_ns, cpu_s, rss_bytes
        return end

    def _end_tree(self) -> list[int]:
        """Kill all that the task left; nothing escapes, orphans become our children (subreaper).

        Returns once none is left. Bound: what SIGKILL does not end keeps the attempt running; what
        we are not permitted to send it to is given a while to end by itself, then returned.
        """
        refused: list[int] = []
        try:
            for _ in range(_REFUSED_WAITS):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
                refused = self._kill_all()
                time.sleep(_REFUSED_WAIT_S)
        except ChildProcessError:
            return []
        return refused

    def _kill_all(self) -> list[int]:
        """Kill until nothing is left but what refuses to be killed; return that.

        Raises:
            ChildProcessError: nothing is left.
        """
        while True:  # Bound: a child ends in every turn
            self.is_spent = True
            self.group.kill()
            children = _children(self.me.pid)
            refused = [pid for pid in children if not _kill(pid)]
            if children and len(refused) == len(children):
                return refused
            os.waitpid(-1, 0)

    def _judge_memory(self, end: End, before: tuple[int, int], limit_bytes: int) -> None:
        """Tell the kernel's OOM killer from anybody else's SIGKILL, and a culprit from a victim."""
        if end.cause == "exit" and end.code == 0:
            return
        kills, hits = (now - then for now, then in zip(self.group.ooms(), before, strict=True))
        if kills <= 0:
            return
        end.is_oom = True
        end.blame = "limit" if hits > 0 else "host"
        limit = f"the limit of {limit_bytes} bytes" if limit_bytes else "no limit of its own"
        limit += " was hit" if hits > 0 else "; memory ran out around it"
        end.text = f"the kernel's OOM killer ended {kills} of its processes: {limit}"
        if _SIGKILL in {end.signal, end.code - 128}:  # a shell reports it so
            end.cause, end.signal = "oom", _SIGKILL

    def _keep(self, order: Order, record: Record | None, end: End) -> None:
        """Keep the exit record, then report it; where it cannot be kept, our claim must die.

        Durable: the record, before the daemon hears of it.
        """
        line = end.line(order.task, order.attempt)
        try:
            if record is not None:
                record.write_exit(line, self.attempts)
        except OSError:
            self.is_sound = False
        self.is_sound = self.is_sound and record is not None
        self._tell(b"E" + line)


# --- ends ---------------------------------------------------------------------------------------


def _not_run(cause: str, text: str, code: int = 0) -> End:
    end = End(cause, code=code, text=text)
    end.ended_ns = time.time_ns()
    return end


def _failed(error: OSError, doing: str) -> End:
    errno = error.errno or _EINVAL
    return _not_run("spawn_error", f"cannot {doing}: {os.strerror(errno)}", errno)


def _end_of(status: int, complaint: bytes) -> End:
    """Return how the main process ended; a complaint is one that never became the task."""
    if complaint:
        errno, _, text = complaint.decode(errors="replace").partition(" ")
        return End("spawn_error", code=int(errno), text=text)
    if os.WIFSIGNALED(status):
        end = End("signal", signal=os.WTERMSIG(status))
        end.has_core = os.WCOREDUMP(status)
        return end
    return End("exit", code=os.WEXITSTATUS(status))


def _judge_disk(end: End, order: Order) -> None:
    """Say that the disk is full, now that it can be seen: it may be why the task failed."""
    is_plain = end.cause == "exit" and end.code and not end.blame
    if is_plain and output.is_full(order.output, order.uid):
        end.blame, end.text = "disk", end.text or output.FULL


def _said(end: End) -> str:
    return output.ending(
        end.cause, end.code, end.signal, end.text, blame=end.blame, is_oom=end.is_oom
    )


def _wait_for(main: int) -> tuple[int, float, int]:
    """Return (status, cpu seconds, peak bytes) of the main process; reap orphans meanwhile."""
    while True:  # Bound: the main process ends
        pid, status, usage = os.wait4(-1, 0)
        if pid == main:
            return status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1_024


def _kill(pid: int) -> bool:
    """SIGKILL a child of ours; False where it is a program that we may not kill."""
    try:
        os.kill(pid, _SIGKILL)
    except PermissionError:
        return False
    return True


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return [int(word) for word in file.read().split()]
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        found = ((other, identity.look(other)) for other in identity.every_pid())
        return [other for other, stat in found if stat and stat.parent == pid]


# --- the warm parent ------------------------------------------------------------------------------


def main() -> None:
    """Fork a supervisor for every descriptor that the daemon sends; exit when it hangs up."""
    fd, state_dir, boot_id, unified, memory, freezer = sys.argv[1:]
    control = _socket.socket(fileno=int(fd))
    os.set_inheritable(int(fd), False)
    roots = Roots(unified, memory, freezer)
    _be_quiet()
    linux.name_process(b"ckptd-parent")
    gc.collect()
    gc.freeze()
    gc.disable()
    while True:  # Bound: the daemon hangs up
        data, rights, _, _ = control.recvmsg(
            16, _socket.CMSG_SPACE(DESCRIPTOR_BYTES), _socket.MSG_CMSG_CLOEXEC
        )
        if not data:
            os._exit(0)
        link = int.from_bytes(rights[0][2][:DESCRIPTOR_BYTES], sys.byteorder)
        if _is_child():
            control.close()
            _supervise(link, f"{state_dir}/attempts", boot_id, roots)
        os.close(link)


def _is_child() -> bool:
    """Fork. Where no process is left, the link's end tells the daemon so: the parent lives on."""
    try:
        return os.fork() == 0
    except OSError:
        return False


def _supervise(link: int, attempts_dir: str, boot_id: str, roots: Roots) -> None:
    code = 1
    try:
        os.setsid()
        linux.adopt_orphans()
        linux.name_process(b"ckptd-shim")
        linux.leave_children_to_kernel(is_so=False)
        Supervisor(_socket.socket(fileno=link), attempts_dir, boot_id, roots).serve()
        code = 0
    finally:
        os._exit(code)


def _be_quiet() -> None:
    """Give tasks a clean start, once for all: default signals, few descriptors.

    What a terminal or an administrator sends to end programs is blocked here and in supervisors
    (SIGKILL remains); a child unblocks everything before it becomes the task.
    """
    linux.hush_signals()
    linux.leave_children_to_kernel(is_so=True)  # supervisors
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = NOFILE_SOFT if hard == resource.RLIM_INFINITY else min(NOFILE_SOFT, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _oom_score() -> bytes:
    fd = os.open("/proc/self/oom_score_adj", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 16).strip()
    finally:
        os.close(fd)


if __name__ == "__main__":
    main()
