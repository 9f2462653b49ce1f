"""The converters of published state dicts under their documented path; `interop.formats` holds them."""

from omnivision.interop.formats import from_omnimae, from_ours, from_videomae

__all__ = ["from_omnimae", "from_ours", "from_videomae"]
