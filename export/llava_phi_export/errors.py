"""The one error that the exporter shows to its user as a sentence."""


class ExportError(Exception):
    """What is wrong with the input, in one lower-case sentence that names the thing, the value and the way out."""
