"""Language models by reference, loaded with transformers, and how their bf16 matrices multiply."""

from kvzip.models.models import LoadedModel, check_is_decoder, load_model

__all__ = ["LoadedModel", "check_is_decoder", "load_model"]
