"""Every bound of the protocol, each with its reason. Not tunable: clients rely on it."""

from typing import Final

PROTOCOL_VERSION: Final = 1
REQUEST_BYTES_MAX: Final = 4 << 20  # one request fits one log frame
REPLY_BYTES_MAX: Final = 4 << 20  # a slow client costs at most SNDHWM times this
TASKS_PER_SUBMIT_MAX: Final = 10_000  # keeps one turn of the loop under about 50 ms
ROWS_PER_PAGE_MAX: Final = 1_000  # a page costs the loop a few milliseconds
SCAN_PER_PAGE_MAX: Final = 5_000  # tasks looked at for one page, so that no query stalls the loop
EVENTS_PER_PAGE_MAX: Final = 1_000
OUTPUT_CHUNK_BYTES_MAX: Final = 256 << 10  # one `logs` reply
HOLD_S_MAX: Final = 30.0  # a parked `wait` or `events` is answered "not yet" then
WAITERS_MAX: Final = 4_096  # parked requests over all clients
REQUESTS_REMEMBERED: Final = 16_384  # mutating requests whose answer can be repeated
ANSWERS_BYTES_MAX: Final = 16 << 20  # of those answers; a larger total forgets the oldest
ARGV_BYTES_MAX: Final = 128 << 10  # execve allows one string of 128 KiB
ENV_BYTES_MAX: Final = 1 << 20
NAME_CHARS_MAX: Final = 128
KEY_CHARS_MAX: Final = 256
LABELS_MAX: Final = 32
DEPENDENCIES_MAX: Final = 1_000
SELECTED_MAX: Final = 10_000  # tasks that one mutating request may touch
RETRIES_UNLIMITED: Final = 1_000_000  # for as long as there is progress; 3 in a row without stop it
START_PAST_S_MAX: Final = 86_400  # one that was long under way is not one of a wrong day
PRIORITY_MAX: Final = 1_000_000
PARALLEL_MAX: Final = 10_000
CPUS_MAX: Final = 10_000  # processors that one task may be limited to
MEMORY_BYTES_MIN: Final = 4 << 20  # below that who records a unit's end may be killed, too
CPUS_MIN: Final = 0.01  # a hundredth: less is no time at all to a scheduler
PROCESSES_MAX: Final = 1 << 22  # the kernel's own bound on process ids
STARVED_BYTES = 8 << 20  # left to a unit by a drill: recording its end takes half of it
