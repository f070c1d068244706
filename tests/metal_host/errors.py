"""The one error that the harness raises."""


class HostError(AssertionError):
    """A kernel does what Metal forbids, or leaves undefined, or does not compile."""
