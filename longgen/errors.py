"""The errors that are meant for the person at the keyboard."""


class UsageError(ValueError):
    """Report something the user can put right.

    The message is a sentence: what was wrong, the value, and what to do. The command line prints it
    alone and exits with code 2; library users catch it as a `ValueError`.
    """


class ReportedElsewhere(UsageError):
    """Repeat what another process of the run reports: the command line stays silent here."""
