"""Lines that ended `ckpt pipe` with a traceback, or left what is no JSON in the journal."""

from pathlib import Path

import pytest

from ckptd.sdk.pipe import Pipe
from ckptd.sdk.surroundings import Surroundings
from tests.task_world import TaskWorld

HUGE = b"1" + b"0" * 400


@pytest.mark.parametrize(
    "line",
    [
        b'{"op":"checkpoint","progress":[142]}',
        b'{"op":"checkpoint","progress":"x"}',
        b'{"op":"checkpoint","progress":[1,2,3]}',
        b'{"op":"checkpoint","progress":["nan",1]}',
        b'{"op":"checkpoint","progress":[1,"inf"]}',
        b'{"op":"checkpoint","progress":[-1,2]}',
        b'{"op":"progress","done":%s}' % HUGE,
        b'{"op":"step_done","name":"a","version":1e999}',
        b'{"op":"set","key":"k","value":1e999}',
        b'{"op":"set","key":"k","value":[-1e999]}',
    ],
)
def test_a_line_out_of_range_is_refused_and_the_next_one_is_answered(
    tmp_path: Path, line: bytes
) -> None:
    world = TaskWorld(tmp_path)
    pipe = Pipe(Surroundings(world.environ()))
    pipe.take(line)
    pipe.take(b'{"op":"step_done","name":"next"}')
    pipe.commit()
    pipe.journal.close()
    refused, done = pipe.answers
    assert refused["error"]["code"] == "bad_request"
    assert done == {"ok": True, "seq": 2}
    assert list(world.facts().steps) == ["next"]
    assert not world.facts().values
