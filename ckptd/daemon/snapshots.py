"""When a snapshot is due, and writing it in slices between the turns of the loop.

Invariant: at most one is under way; a failed one changes nothing, the next is tried later. What
earlier daemons appended behind the last one counts, too: else many short reigns make a log that
grows for ever.
"""

from collections.abc import Iterator

from ckptd.daemon.engine import Engine
from ckptd.host.journal import INFO, WARNING, Journal, Kind
from ckptd.storage.snapshot import SnapshotDone, SnapshotFailed, SnapshotWriter
from ckptd.storage.store import Store

CHUNKS_PER_TURN = 1  # about 0.2 ms of the loop
RETRY_S = 60.0


class Snapshots:
    """The daemon's snapshots."""

    def __init__(
        self, engine: Engine, store: Store, journal: Journal, last_lsn: int, tail_bytes: int
    ) -> None:
        self._engine, self._store, self._journal = engine, store, journal
        self.last_lsn = last_lsn
        self._writer: SnapshotWriter | None = None
        self._chunks: Iterator[bytes] | None = None
        self._begun_bytes = engine.appended_bytes - tail_bytes
        self._due_bytes = self._begun_bytes  # what to count from again if this one fails
        self._begun_ns = 0
        self._not_before_ns = 0

    @property
    def has_chunks(self) -> bool:
        """Tell whether the loop should come back at once to encode the next slice."""
        return self._chunks is not None

    @property
    def is_writing(self) -> bool:
        """Tell whether the writer's thread is still at it."""
        return self._writer is not None

    def step(self, every_bytes: int, mono_ns: int) -> None:
        """Begin, go on with or finish a snapshot."""
        if self._chunks is not None:
            self._encode()
        elif self._writer is not None:
            self._finish(self._writer, mono_ns)
        elif self._is_due(every_bytes, mono_ns):
            self._due_bytes, self._begun_bytes = self._begun_bytes, self._engine.appended_bytes
            self._begun_ns = mono_ns
            self._writer = self._store.begin_snapshot(self._engine.state.lsn)
            self._chunks = self._engine.image()

    def _is_due(self, every_bytes: int, mono_ns: int) -> bool:
        grown = self._engine.appended_bytes - self._begun_bytes
        return grown >= every_bytes and mono_ns >= self._not_before_ns

    def _encode(self) -> None:
        assert self._writer is not None, "chunks without a writer"
        assert self._chunks is not None, "nothing to encode"
        for _ in range(CHUNKS_PER_TURN):
            chunk = next(self._chunks, None)
            if chunk is None:
                self._chunks = None
                self._writer.finish()
                return
            self._writer.add(chunk)

    def _finish(self, writer: SnapshotWriter, mono_ns: int) -> None:
        result = writer.poll()
        if result is None:
            return
        self._writer = None
        took_ms = (mono_ns - self._begun_ns) // 1_000_000
        match result:
            case SnapshotDone():
                self.last_lsn = writer.lsn
                self._journal.event(
                    Kind.SNAPSHOT_WRITTEN,
                    f"snapshot at {writer.lsn} written and verified in {took_ms} ms",
                    INFO,
                    lsn=writer.lsn,
                )
            case SnapshotFailed():
                self._not_before_ns = mono_ns + int(RETRY_S * 1e9)
                self._begun_bytes = self._due_bytes
                self._journal.event(
                    Kind.SNAPSHOT_FAILED,
                    f"snapshot at {writer.lsn} failed, the log is kept: {result.why}",
                    WARNING,
                )
