"""What ends a job before its time: bad input that the user can mend, and a search that has seen enough."""


class UserError(Exception):
    """Bad input, told in one line that names the file, line or key and what to do. Exit status 2."""


class Pruned(Exception):  # noqa: N818 (not an error: the job is neither done nor failed)
    """A search has stopped this job, whose pruned.json says when and why."""
