"""The converters of Hugging Face's VideoMAE under their documented path; `interop.formats` holds them."""

from omnivision.interop.formats import from_hf, preprocessor_config, to_hf

__all__ = ["from_hf", "preprocessor_config", "to_hf"]
