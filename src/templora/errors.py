"""The one tree of errors. Each message names the cause and the cure, in one line.

Deliberately knows nothing of torch: the command line imports it before any model is loaded.
"""

# What only a session on disk can do.
ON_DISK = ("undo", "redo", "rewind", "fork", "edit", "editing", "note", "reseed", "close", "versions")


class TemploraError(Exception):
    """Anything a user can mend. The command line prints it in one line and exits with 2."""


class InvalidRecipe(TemploraError):
    """A recipe that does not exist, does not parse, or holds a value that cannot work."""


class WindowTooLarge(TemploraError):
    """Sinks, window, chunk and context do not fit into the positions that the base was trained for."""


class UnsupportedModel(TemploraError):
    """A model that cannot carry an adapter: no causal LM, no key/value cache, no linear layers."""


class ModelNotFound(TemploraError):
    """No model of that name or at that place, or its files cannot be read."""


class InvalidText(TemploraError):
    """A text that cannot be used: empty, not text, or not readable."""

    @classmethod
    def check(cls, text: str, what: str = "the text") -> str:
        """The same text, if it is one: without halves of characters.

        Those come from a command line that is not UTF-8, and from JSON's escapes.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise cls(
                f"character {error.start + 1} of {what} is no character ({text[error.start]!a}); give UTF-8"
            ) from error
        return text

    @classmethod
    def check_note(cls, name: str) -> str:
        """The same name for a moment, if it is text and means no other moment."""
        if name.removeprefix("v").isdecimal():
            raise cls(f"{name!r} means a number of tokens or a version; choose another name")
        return cls.check(name, "the name")


class OutOfMemory(TemploraError):
    """The machine or the GPU ran out of memory at the chosen sizes."""


class OutputError(TemploraError):
    """What was written could not be saved where it was asked for."""


class SessionClosed(TemploraError):
    """The session was discarded or closed: its adapter is gone."""


class SessionInUse(TemploraError):
    """Another thread is at work in the session."""


class NotASession(TemploraError):
    """A folder that holds no session, or that holds one where none may be."""


class SessionLocked(TemploraError):
    """Another process, or another part of this one, has the session open."""


class SessionDamaged(TemploraError):
    """A file of the session is not what was written, and nothing good can take its place."""


class WrongBase(TemploraError):
    """The session was begun on another base, or the base has changed since."""


class NoSuchMoment(TemploraError):
    """A place in a session's past that does not exist: nothing to undo or redo, an unknown version."""


class NeedsFolder(TemploraError, AttributeError):
    """Something that only a session on disk can do was asked of one in memory."""

    @classmethod
    def of(cls, name: str) -> AttributeError:
        """What to raise where a session has no attribute of that name."""
        if name in ON_DISK:
            return cls(f"{name} needs a session on disk; make it with base.session(dir=…)")
        return AttributeError(f"a session has no attribute {name!r}")


class MissingExtra(TemploraError):
    """A package that an optional part needs is not installed."""


class InvalidTemplate(TemploraError):
    """A prompt template that does not exist or cannot be used with this base."""
