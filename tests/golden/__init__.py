"""Bytes of every format ever released; they only grow in number, and what is here never changes.

format_1/ task_format_1/ records_1*.txt    files of the log, of a task, log records, one by one
whole_1.tar.xz                             what a whole machine has, after a power cut
"""
