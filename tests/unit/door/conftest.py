from tests.unit.daemon.desk import desk

__all__ = ["desk"]
