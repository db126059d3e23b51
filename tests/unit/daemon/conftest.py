from tests.unit.daemon.day import day
from tests.unit.daemon.desk import desk

__all__ = ["day", "desk"]
