"""All targets by name, and the corpus that is kept of each."""

from pathlib import Path

from tests.fuzz import files, handed, ledger, log, requests, wire, words
from tests.fuzz.target import Target

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).resolve().parent / "corpus"
TARGETS: dict[str, Target] = {
    target.name: target
    for group in (
        log.TARGETS,
        requests.TARGETS,
        files.TARGETS,
        handed.TARGETS,
        ledger.TARGETS,
        words.TARGETS,
        wire.TARGETS,
    )
    for target in group
}


def kept(target: Target) -> list[bytes]:
    """Return the inputs of the kept corpus, by name: damage found once, and what reaches far."""
    return [path.read_bytes() for path in sorted((CORPUS / target.name).glob("*"))]


def tidy() -> None:
    """Remove what the targets of this process have made."""
    files.forget()
    ledger.forget()
    wire.close()
