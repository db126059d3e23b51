import pytest

from ckptd.sdk.surroundings import NotATask, Surroundings


def test_a_task_number_of_sixty_bits_is_read_to_its_last_digit() -> None:
    around = Surroundings({"CKPTD_DIR": "/d", "CKPTD_TASK_ID": "310000606633435384"})
    assert around.task == 310000606633435384


@pytest.mark.parametrize("text", ["", "seven", "inf", "nan"])
def test_a_task_number_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(NotATask):
        Surroundings({"CKPTD_DIR": "/d", "CKPTD_TASK_ID": text})


def test_a_deadline_may_have_a_fraction() -> None:
    around = Surroundings({"CKPTD_DIR": "/d", "CKPTD_TASK_ID": "7", "CKPTD_DEADLINE": "12.75"})
    assert around.deadline_s == 12
