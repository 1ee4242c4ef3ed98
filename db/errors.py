"""What the database layer refuses, each as a class of its own."""


class NotFound(LookupError):
    """No such row for this organisation."""

    def __init__(self, kind: str, subject_id: str) -> None:
        self.kind, self.subject_id = kind, subject_id
        super().__init__(f"No such {kind}: {subject_id}")


class Conflict(ValueError):
    """The request is well-formed but the state does not allow it; `code` tells clients which."""

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        self.code, self.param = code, param
        super().__init__(message)


class Corrupt(RuntimeError):
    """Stored bytes are not those that were stored: the disk, or somebody on it, changed them."""


class LeaseLost(RuntimeError):
    """Another owner holds the work by now: stop everything that was started for it."""


class IllegalTransition(RuntimeError):
    """A state change that the tables in `states` do not know, or that somebody else made first."""
