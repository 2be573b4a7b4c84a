"""Every error that a user can cause, with the exit code that the command line returns for it (design: faults)."""

from __future__ import annotations


class MergeError(Exception):
    """What, expected, found, where, what to do. `exit_code` is what the command line exits with.

    Names come from strangers' files: what could steer a terminal is shown by its escape sequence."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message))


class RecipeError(MergeError):
    """The recipe (YAML or Python arguments) cannot be understood; lists every problem at once."""

    exit_code = 2


class InputError(MergeError):
    """An input model cannot be used."""

    exit_code = 3


class CorruptFile(InputError):
    """A file is damaged: header, offsets, length."""


class UnsafeFile(InputError):
    """A file that could run code when loaded."""


class UnsafePath(InputError):
    """A file reference that leaves its model folder."""


class InconsistentIndex(InputError):
    """The index and the shards do not say the same."""


class AmbiguousModel(InputError):
    """A folder holds more than one model."""


class UnsupportedDtype(InputError):
    """A dtype that pymerge does not read or does not average."""


class ShapeMismatch(InputError):
    """The same parameter has different shapes in two models."""


class VocabMismatch(ShapeMismatch):
    """Vocabulary matrices with different numbers of rows."""


class MissingTensor(InputError):
    """A parameter of the base is absent from a fine-tuned model."""


class ExtraTensor(InputError):
    """A fine-tuned model has a parameter that the base has not."""


class ChangedInput(InputError):
    """An input file changed while it was being read."""


class NumericError(MergeError):
    """The numbers themselves are the problem."""

    exit_code = 4


class NonFinite(NumericError, ValueError):
    """NaN or Inf in an input or in a result."""


class Overflow(NumericError):
    """A result does not fit the output dtype."""


class OutputError(MergeError):
    """The output cannot be written: disk, permissions, lock, journal, an existing model."""

    exit_code = 5


class EvaluationError(MergeError):
    """The evaluation of a search failed, or did not give a finite number."""

    exit_code = 6


class DeviceMemoryError(MergeError):
    """A device ran out of memory in the middle; the work done so far is kept and can be resumed."""


class ClusterError(MergeError):
    """The machines that a merge runs on cannot be reached, or were lost; the work done so far is kept."""

    exit_code = 7


class Interrupted(MergeError):
    """Stopped by a signal; the work done so far is kept and can be resumed. exit_code is 128 + signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
